"""Runs CUDA and Metal kernels on the CPU, and checks how they use memory and barriers.

TVM compiles a PrimFunc as for a GPU. The text that it writes for the device is translated to C++,
compiled, and started by the host code that TVM made beside it. docs/simt.md tells what is checked.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tvm
import tvm_ffi

from .tensors import DeviceArray
from .toolchain import RUNTIME, CompileError, build_kernel, statement_at
from .translate import DeviceFunction, stub, translate

Order = Literal["forward", "reverse", "random"]  # of threads; of blocks too, random ones forward
ORDERS: tuple[Order, ...] = ("forward", "reverse", "random")
TARGETS: dict[str, dict[str, Any]] = {
    "cuda": {"kind": "cuda", "arch": "sm_90a"},
    "metal": {"kind": "metal"},
}
SEED = 7  # of the random order


class Fault(Exception):
    """A kernel did what no GPU promises to do well: the text says what, where, and which thread."""


@dataclass(frozen=True)
class Program:
    """A compiled PrimFunc: the device's text, and what launches it."""

    kind: str
    text: str
    arguments: tuple[str, ...]  # names
    main: Callable[..., None]


@dataclass(frozen=True)
class Cost:
    """Accesses of one kind, summed over a run.

    `requests` of warps; `passes`: 32-byte sectors of global memory, or passes over the banks of
    shared memory; `ideal`: the fewest passes for the same bytes; `bytes`.
    """

    requests: int
    passes: int
    ideal: int
    bytes: int


MEMORIES = ("global", "shared")
ACCESSES = ("read", "write")


class Simt:
    """The runtime of one process. `folder` has it built (`toolchain.build_runtime`), and keeps the
    compiled kernels, which several processes may share."""

    def __init__(self, folder: Path) -> None:
        self._objects = folder / "objects"
        self._runtime = ctypes.CDLL(str(folder / RUNTIME), ctypes.RTLD_GLOBAL)
        self._runtime.simt_begin.argtypes = [
            ctypes.c_int, ctypes.c_uint64, ctypes.c_int, ctypes.c_int,
        ]  # fmt: skip
        self._runtime.simt_argument.argtypes = [
            ctypes.c_char_p, ctypes.c_uint64, ctypes.c_int, ctypes.c_int,
        ]  # fmt: skip
        self._runtime.simt_argument.restype = ctypes.c_void_p
        self._runtime.simt_end.restype = ctypes.c_char_p
        self._runtime.simt_place.restype = ctypes.c_void_p
        self._runtime.simt_cost.restype = ctypes.c_uint64
        self._sources: dict[str, tuple[str, str]] = {}  # key -> name of a function, its source
        self._libraries: list[ctypes.CDLL] = []
        self._refused: CompileError | None = None
        self._find = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)(self._found)
        self._runtime.simt_operations.argtypes = [ctypes.c_char_p]
        self._runtime.simt_operations.restype = ctypes.c_uint64
        # TVM's host code selects the device that its tensors name.
        tvm_ffi.register_global_func("__tvm_set_device", lambda *_: None, override=True)

    def compile(
        self, func: tvm.tirx.PrimFunc, kind: str, edit: Callable[[str], str] | None = None
    ) -> Program:
        """`func`, scheduled for cuda or metal; `edit` may change the device's text.

        A function of several is compiled when it is launched: most cases launch few.
        CompileError, then or here, where the text uses what the headers in include/ lack.
        """
        texts: list[str] = []

        def build(original: Callable[..., Any], module: tvm.IRModule, target: Any) -> Any:
            text = original(module, target).inspect_source()
            texts.append(edit(text) if edit else text)
            functions = [_device_function(function) for function in module.functions.values()]
            sources = {one.name: translate(kind, texts[-1], one) for one in functions}
            keys = {name: sha256(source.encode()).hexdigest() for name, source in sources.items()}
            self._sources |= {keys[name]: (name, source) for name, source in sources.items()}
            (source, *others) = sources.values()
            try:
                built = build_kernel(stub(keys) if others else source, self._objects)
                return tvm.runtime.load_module(str(built))
            except CompileError as error:
                refused.append(error)
                raise

        refused: list[CompileError] = []
        module = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
        with _replaced(f"target.build.{kind}", build):
            try:
                compiled = tvm.compile(module, TARGETS[kind])
            except RuntimeError as error:  # what TVM makes of any error
                raise (refused[0] if refused else error) from None
        names = tuple(str(parameter.name) for parameter in func.params)
        return Program(kind, "\n".join(texts), names, compiled["main"])

    def run(
        self,
        program: Program,
        arrays: Sequence[np.ndarray],
        writable: Collection[int],
        order: Order = "random",
        *,
        counting: bool = False,
        without: int | None = None,
    ) -> list[np.ndarray]:
        """What `arrays` hold after the call; those not in `writable`, by index, are inputs.

        An edited text may say `if (simt::stays(7)) statement;` and run `without` number 7. Fault
        where the kernel breaks a rule.
        """
        left_out = -1 if without is None else without
        self._runtime.simt_find_functions(self._find)  # another Simt may have set its own
        self._runtime.simt_begin(ORDERS.index(order), SEED, counting, left_out)
        placed = [
            self._place(name, array, index in writable)
            for index, (name, array) in enumerate(zip(program.arguments, arrays, strict=True))
        ]
        tensors = [DeviceArray(array, program.kind) for array in placed]
        program.main(*(each.tensor for each in tensors))
        if refused := self._refused:
            self._refused = None
            raise refused
        if error := self._runtime.simt_end():
            place = self._runtime.simt_place()
            statement = statement_at(place) if place else ""
            raise Fault("\n    ".join(filter(None, [error.decode(), statement])))
        return [array.copy() for array in placed]

    def _found(self, key: bytes) -> int | None:
        """Where the function of a key is; None where it was refused."""
        name, source = self._sources[key.decode()]
        try:
            self._libraries.append(ctypes.CDLL(str(build_kernel(source, self._objects))))
        except CompileError as error:
            self._refused = error
            return None
        return ctypes.cast(self._libraries[-1][f"__tvm_ffi_{name}"], ctypes.c_void_p).value

    def costs(self) -> dict[str, Cost]:
        """By "global read" and the like: what the last run cost, which was `counting`."""
        return {
            f"{memory} {access}": Cost(
                *(self._runtime.simt_cost(shared, write, what) for what in range(4))
            )
            for shared, memory in enumerate(MEMORIES)
            for write, access in enumerate(ACCESSES)
        }

    def operations(self, name: str) -> int:
        """How often warps did what has this name, as simd_sum has, in a run that was `counting`."""
        return self._runtime.simt_operations(name.encode())

    def _place(self, name: str, array: np.ndarray, writable: bool) -> np.ndarray:
        address = self._runtime.simt_argument(name.encode(), array.nbytes, array.itemsize, writable)
        if not address:
            raise MemoryError(f"no address space for argument {name} of {array.nbytes} bytes")
        raw = (ctypes.c_uint8 * array.nbytes).from_address(address)
        placed = np.frombuffer(raw, np.uint8).view(array.dtype).reshape(array.shape)
        placed[...] = array
        return placed


def _device_function(func: tvm.tirx.PrimFunc) -> DeviceFunction:
    def dtype(parameter: Any) -> str:
        return str(getattr(parameter.ty, "dtype", "handle"))

    return DeviceFunction(
        str(func.attrs["global_symbol"]),
        tuple(map(dtype, func.params)),
        tuple(map(str, func.attrs["tirx.kernel_launch_params"])),
    )


@contextmanager
def _replaced(name: str, function: Callable[..., Any]) -> Iterator[None]:
    """The global function of this name is `function`, which gets the original first."""
    original = tvm.get_global_func(name)
    tvm_ffi.register_global_func(name, lambda *args: function(original, *args), override=True)
    try:
        yield
    finally:
        tvm_ffi.register_global_func(name, original, override=True)
