"""The CUDA or Metal text that TVM writes -> C++ for the host, with what TVM's host code calls.

The text stays as it is but for what no header can turn into C++: declarations of shared memory and
of arrays of a thread, inline PTX, and Metal's attributes.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Starts a kernel for TVM's host code, which passes pointers, then numbers, then extents of the
# grid. Only the kernel itself is to be instrumented: what is here reads the host's memory.
GLUE = """
#define HOST __attribute__((no_sanitize("thread")))
struct Any {
  int32_t type, padding;
  union { int64_t integer; double real; void* pointer; };
};
struct Pointer {
  void* pointer;
  template <class T> HOST operator T*() const { return (T*)pointer; }
};
"""
METAL_GLUE = """
struct Index {
  simt::Dim3 of;
  operator uint() const { return of.x; }
  operator metal::uint2() const { return {of.x, of.y}; }
  operator metal::uint3() const { return {of.x, of.y, of.z}; }
};
"""
LAUNCHER = """
extern "C" HOST int __tvm_ffi_{name}(void*, const Any* a, int, Any* result) {{
  result->type = 0;
  struct Body {{
    HOST static void run(void* arguments) {{
      auto a = (const Any*)arguments;
      {call}
    }}
  }};
  simt::launch({{{grid}, {block}, uint32_t({dynamic_shared}), Body::run, (void*)a}});
  return 0;
}}
"""


STUB = """
using Function = int (*)(void*, const void*, int, void*);
extern "C" void* simt_function(const char* key);
"""
# Without the function, nothing happens: the runtime remembers why.
STUB_FUNCTION = """
extern "C" __attribute__((no_sanitize("thread"))) int __tvm_ffi_{name}(
    void* self, const void* arguments, int count, void* result) {{
  static Function found;
  if (!found) found = (Function)simt_function("{key}");
  return found ? found(self, arguments, count, result) : 0;
}}
"""


@dataclass(frozen=True)
class DeviceFunction:
    """A kernel as TVM's host code calls it: dtypes of its parameters ("handle": a pointer), and
    what follows them, such as "blockIdx.x"."""

    name: str
    parameters: tuple[str, ...]
    launch: tuple[str, ...]


def translate(kind: str, text: str, function: DeviceFunction) -> str:
    """C++ of one function of a module's text; `kind` is cuda or metal."""
    head, begin, body, call, glue = _LANGUAGES[kind]
    shared, *kernels = begin.split(_CUDA_DECLARED.sub("", text))
    (own,) = [kernel for kernel in kernels if re.search(rf"\b{function.name}\(", kernel)]
    return "".join([head, body(shared + own), GLUE, glue, _launcher(function, call)])


def stub(keys: dict[str, str]) -> str:
    """C++ of a module whose functions are looked up when they are first called: name -> key."""
    return STUB + "".join(STUB_FUNCTION.format(name=name, key=key) for name, key in keys.items())


def _launcher(function: DeviceFunction, call: Callable[[DeviceFunction], str]) -> str:
    values = [tag for tag in function.launch if tag not in _FLAGS]
    extents = {tag: f"a[{len(function.parameters) + i}].integer" for i, tag in enumerate(values)}

    def size(axes: str) -> str:
        return "{" + ", ".join(f"uint32_t({extents.get(f'{axes}.{i}', 1)})" for i in "xyz") + "}"

    return LAUNCHER.format(
        name=function.name,
        call=call(function),
        grid=size("blockIdx"),
        block=size("threadIdx"),
        dynamic_shared=extents.get("tirx.use_dyn_shared_memory", 0),
    )


# Of a launch, without a value.
_FLAGS = ("tirx.use_programtic_dependent_launch", "tirx.use_cooperative_launch")


def _argument(index: int, dtype: str) -> str:
    if dtype == "handle":
        return f"Pointer{{a[{index}].pointer}}"
    field = "real" if dtype.startswith("float") else "integer"
    ctype = {"float32": "float", "float64": "double"}.get(dtype, f"{dtype}_t")
    return f"({ctype})a[{index}].{field}"


# ---- CUDA


def _cuda_call(function: DeviceFunction) -> str:
    given = [_argument(index, dtype) for index, dtype in enumerate(function.parameters)]
    return f"{function.name}({', '.join(given)});"


_CUDA_BEGIN = re.compile(r'^(?=extern "C" __global__ )', re.M)
_CUDA_DECLARED = re.compile(r'^extern "C" __global__ [^;{]*;\n', re.M)
_CUDA_SHARED = re.compile(r"^(\s*)__shared__ alignas\((\d+)\) ([\w ]+?) (\w+)\[(\d+)\];", re.M)
_CUDA_DYNAMIC = re.compile(r"extern __shared__ [^;]*?(\w+) (\w+)\[\];")
_CUDA_LOCAL = re.compile(r"^(\s*)alignas\(\d+\) ([\w ]+?) (\w+)\[(\d+)\];", re.M)
_ASM = re.compile(
    r"(?:asm|__asm__)\s+(?:volatile|__volatile__)\s*\(\s*"
    r'"([^"]*)"\s*(?::([^:;]*))?(?::([^:;]*))?(?::[^;]*)?\);'
)
_OPERAND = re.compile(r'"[^"]*"\s*\(((?:[^()]|\([^()]*\))*)\)')  # "=r"(operand)


def _cuda_body(text: str) -> str:
    ids = itertools.count()
    text = _ASM.sub(_instruction, text)
    text = _CUDA_SHARED.sub(
        lambda m: m[1] + _shared(next(ids), m[3], m[4], int(m[5]), int(m[2])), text
    )
    text = _CUDA_DYNAMIC.sub(r"\1* const \2 = (\1*)simt::dynamic_shared();", text)
    return _CUDA_LOCAL.sub(r"\1simt::Local<\2, \4> \3;", text)


def _instruction(match: re.Match[str]) -> str:
    """asm volatile("name %0, [%1], 16;" : "=r"(a) : "r"(b)) -> simt_ptx::name(a, b, 16);

    Several in braces become several calls; the predicates that they declare are bool.
    """
    text = match[1].replace("\\n", "").strip("; ")
    bound = _OPERAND.findall(f"{match[2] or ''},{match[3] or ''}")
    if not text.startswith("{"):
        return _call(text, bound)
    return (
        f"{{ {' '.join(_call(one.strip(), bound) for one in text[1:-1].strip('; ').split(';'))} }}"
    )


def _call(text: str, bound: list[str]) -> str:
    name, _, operands = text.partition(" ")
    if name == ".reg":
        return f"bool {operands.removeprefix('.pred')};"
    given = [operand.strip(" {}[]") for operand in operands.split(",") if operand.strip()]
    # "_" stands for a result that nobody wants.
    given = [re.sub(r"%(\d+)", lambda m: bound[int(m[1])], one) for one in given if one != "_"]
    return f"simt_ptx::{re.sub('[.:]+', '_', name)}({', '.join(given)});"


def _shared(index: int, ctype: str, name: str, count: int, alignment: int) -> str:
    return (
        f'{ctype}* const {name} = ({ctype}*)simt::shared_array({index}, "{_shown(name)}", '
        f"sizeof({ctype}) * {count}, sizeof({ctype}), {alignment});"
    )


def _shown(name: str) -> str:
    return name.removesuffix("_ptr")


# ---- Metal


def _metal_call(function: DeviceFunction) -> str:
    pointers = [_argument(i, d) for i, d in enumerate(function.parameters) if d == "handle"]
    # In braces, as one of 32 bits is the first of an array of two.
    scalars = [f"{{{_argument(i, d)}}}" for i, d in enumerate(function.parameters) if d != "handle"]
    given = [*pointers, *(["scalars"] if scalars else [])]
    given += ["Index{simt::block_index()}", "Index{simt::thread_index()}"]
    declared = f"{function.name}_args_t scalars{{{', '.join(scalars)}}};" if scalars else ""
    return f"{declared} {function.name}({', '.join(given)});"


_METAL_BEGIN = re.compile(r"^(?=// Function: )", re.M)
_METAL_SHARED = re.compile(r"^(\s*)threadgroup (\w+) (\w+)\[(\d+)\];", re.M)
_METAL_LOCAL = re.compile(r"^(\s*)(?:thread (\w+)|(simdgroup_\w+)) (\w+)\[(\d+)\];", re.M)
_METAL_ALIGNMENT = 16  # of threadgroup memory: what vectors need, though Metal's text does not say


def _metal_body(text: str) -> str:
    ids = itertools.count()
    text = re.sub(r"\[\[[^\]]*\]\]", "", text)
    text = re.sub(r"union __TVMArgUnion \{[^}]*\};", "", text)  # before every kernel, and unused
    text = _METAL_SHARED.sub(
        lambda m: m[1] + _shared(next(ids), m[2], m[3], int(m[4]), _METAL_ALIGNMENT), text
    )
    return _METAL_LOCAL.sub(lambda m: f"{m[1]}simt::Local<{m[2] or m[3]}, {m[5]}> {m[4]};", text)


_LANGUAGES: dict[str, tuple[str, re.Pattern[str], Callable[[str], str], Any, str]] = {
    "cuda": (
        '#include "cuda.h"\n#include "math_constants.h"\n',
        _CUDA_BEGIN,
        _cuda_body,
        _cuda_call,
        "",
    ),
    "metal": ("", _METAL_BEGIN, _metal_body, _metal_call, METAL_GLUE),
}
