"""One device function to one SPIR-V module, with what the runtime has to know beside it.

No execution modes of float controls are declared: a module that names one is invalid on a device
without it, and the device is not known here. The code does without: it reads NaN off the bits
where it matters, and forbids fusing (NoContraction) where a formula depends on each rounding.
"""

from __future__ import annotations

from typing import Any

from tvm.ir import prim

from .arguments import ArgumentBlock, lay_out
from .builder import Builder
from .calls import CALLS
from .container import KernelCode
from .convert import cast
from .dtypes import U32, DType, Value
from .encoding import BuiltIn, Capability, Decoration, Op
from .errors import Refusal
from .expressions import Expressions
from .liveness import live_variables
from .memory import Memory
from .scope import Scope
from .statements import Statements
from .subgroups import check_block

_AXES = ("x", "y", "z")


class Threads:
    """Thread and block indices, and the local size that their extents amount to.

    sizes: extents of threadIdx.x, y, z; 0 where it is only known at launch.
    """

    def __init__(self, builder: Builder) -> None:
        self._b = builder
        self._extents: dict[str, int] = {}

    @property
    def sizes(self) -> tuple[int, int, int]:
        x, y, z = (self._extents.get(f"threadIdx.{axis}", 1) for axis in _AXES)
        return x, y, z

    def index(self, tag: str, extent: Any, dtype: DType) -> Value:
        """The value of an index such as blockIdx.x, whose extent is an expression."""
        kind, _, axis = tag.partition(".")
        if kind not in ("blockIdx", "threadIdx") or axis not in _AXES:
            raise Refusal(
                f"the thread index {tag}",
                "blockIdx and threadIdx with .x, .y or .z",
                "Bind the loop to one of these.",
            )
        size = int(extent.value) if type(extent) is prim.IntImm else 0
        if self._extents.setdefault(tag, size) != size:
            raise Refusal(
                f"{tag} with the extents {self._extents[tag]} and {size}",
                "one extent for every thread index of a kernel",
                "Guard the smaller part with a condition.",
            )
        b = self._b
        if size == 1:
            return b.constant(dtype, 0)
        three = b.type_id(U32, 3)
        builtin = BuiltIn.WORKGROUP_ID if kind == "blockIdx" else BuiltIn.LOCAL_INVOCATION_ID
        vector = b.load(three, b.builtin(builtin, three))
        word = b.type_id(U32)
        lane = b.assembler.value(Op.COMPOSITE_EXTRACT, word, vector, _AXES.index(axis))
        b.assembler.name(lane, tag)
        return cast(b, Value(U32, (lane,)), dtype)

    def specialize(self) -> tuple[int, int, int] | None:
        """The local size for the assembler; None where specialization constants make it up."""
        if all(self.sizes):
            return self.sizes
        b = self._b
        word = b.type_id(U32)
        parts = []
        for number, size in enumerate(self.sizes):
            if size:
                parts.append(b.word(size))
                continue
            part = b.assembler.constant(Op.SPEC_CONSTANT, word, 1, distinct=True)
            b.assembler.decorate(part, Decoration.SPEC_ID, number)
            parts.append(part)
        size_id = b.assembler.constant(
            Op.SPEC_CONSTANT_COMPOSITE, b.type_id(U32, 3), *parts, distinct=True
        )
        b.assembler.decorate(size_id, Decoration.BUILT_IN, BuiltIn.WORKGROUP_SIZE)
        return None


def generate_kernel(name: str, function: Any) -> KernelCode:
    """The code of one device function.

    `function`: a PrimFunc after TVM's lowering, its parameters pointers to global memory and
    scalars, with the attribute "tirx.kernel_launch_params". VulkanCodegenError, naming the
    construct, where something in it cannot be said in SPIR-V for Vulkan.
    """
    try:
        return _generate(name, function)
    except Refusal as refusal:
        raise refusal.of(name) from None


def _generate(
    name: str,
    function: Any,
    exchanged: frozenset[int] = frozenset(),
    vulkan_memory: bool = False,
) -> KernelCode:
    """Parameters that threads exchange values in, and the memory model, are known at the end:
    then a second time."""
    b = Builder(vulkan_memory)
    b.requirements.capability(Capability.SHADER)
    b.requirements.capability(Capability.PHYSICAL_STORAGE_BUFFER_ADDRESSES)
    launch = _launch_parameters(function)
    arguments = lay_out(function.params)
    memory = Memory(b, exchanged)
    scope = Scope(b, memory, live_variables(function.body))
    block = ArgumentBlock(b, arguments)
    for position, parameter in enumerate(function.params):
        if scope.is_live(parameter):
            scope.bind(parameter, block.load(position))
    threads = Threads(b)
    expressions = Expressions(scope, CALLS)
    Statements(expressions, threads.index).write(function.body)
    b.leave()
    is_vulkan = Capability.VULKAN_MEMORY_MODEL in b.assembler.capabilities
    if (memory.exchanged, is_vulkan) != (exchanged, vulkan_memory):
        return _generate(name, function, memory.exchanged, is_vulkan)
    # As TVM's CUDA code with `__restrict__`: TVM has it that no two parameters share memory.
    if (function.attrs or {}).get("tirx.noalias", False):
        b.promise_read_only(memory.written)
    b.requirements.complete()
    check_block(b.requirements, threads.sizes[0])
    local_size = threads.specialize()
    reflection = {
        "arguments": [
            _pointer_entry(argument.name, argument.offset, position, memory)
            if argument.dtype is None
            else {
                "kind": "scalar",
                "name": argument.name,
                "dtype": str(argument.dtype),
                "offset": argument.offset,
            }
            for position, argument in enumerate(arguments)
        ],
        "argument_bytes": block.bytes,
        "argument_buffer": block.in_memory,
        "launch_params": launch,
        "local_size": list(threads.sizes),
        "shared_bytes": memory.shared_bytes,
        "requirements": b.requirements.to_json(),
    }
    return KernelCode(name, b.assembler.assemble(local_size), reflection)


def _pointer_entry(name: str, offset: int, position: int, memory: Memory) -> dict[str, Any]:
    return {
        "kind": "pointer",
        "name": name,
        "offset": offset,
        "read": position in memory.read,
        "write": position in memory.written,
        "alignment": memory.alignments.get(position, 1),
    }


def _launch_parameters(function: Any) -> list[str]:
    """The order of the extents that follow the arguments in a launch."""
    attributes = function.attrs or {}
    launch = [str(tag) for tag in attributes.get("tirx.kernel_launch_params", ())]
    for tag in launch:
        if tag.partition(".")[0] not in ("blockIdx", "threadIdx"):
            dynamic = "dyn_shared" in tag
            raise Refusal(
                f"the launch parameter {tag}",
                "extents of blockIdx and threadIdx",
                "Allocate shared memory with scope='shared' and a constant size."
                if dynamic
                else "Bind loops to blockIdx and threadIdx only.",
            )
    return launch
