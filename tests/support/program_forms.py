"""The two forms in which a random program is written out; random_programs.py says what they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from support.spirv_programs import bound
from tvm import tirx
from tvm.tirx import stmt as tir

if TYPE_CHECKING:
    from support.random_programs import Program


@dataclass(frozen=True)
class Argument:
    name: str
    dtype: str
    size: int
    symbolic: bool = False  # its size is known only when the function is called


@dataclass(frozen=True)
class Own:
    """A thread's own memory: one value, or a local array."""

    name: str
    dtype: str
    size: int = 1


@dataclass(frozen=True)
class Shared:
    name: str
    dtype: str


class Form:
    """Where a program's names lead to. `variables` holds indices, counters and scalar arguments."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.buffers: dict[str, Any] = {}
        self.variables: dict[str, Any] = {}
        self.parameters: list[Any] = []
        for argument in (*program.inputs, *program.outputs):
            extent: Any = argument.size
            if argument.symbolic:
                extent = self.variables[f"n{argument.name}"] = tirx.Var(argument.name, "int64")
            buffer = tirx.decl_buffer((extent,), argument.dtype, argument.name)
            self.buffers[argument.name] = buffer
            self.parameters.append(buffer)
        for name, dtype, _ in program.scalars:
            variable = self.variables[name] = tirx.Var(name, dtype)
            self.parameters.append(variable)
        for name, _ in program.indices:
            self.variables[name] = tirx.Var(name, "int32")

    def load(self, name: str, index: Any) -> Any:
        return tirx.BufferLoad(self.buffers[name], [index])

    def store(self, name: str, index: Any, value: Any) -> Any:
        return tir.BufferStore(self.buffers[name], value, [index])

    def own(self, memory: Own, index: Any) -> Any:
        """The index of an element of a thread's own memory."""
        raise NotImplementedError

    def phase(self, lines: Sequence[Stmt]) -> list[Any]:
        """What all threads do before they meet."""
        raise NotImplementedError

    def function(self) -> tirx.PrimFunc:
        raise NotImplementedError

    def _allocated(self, sizes: dict[str, tuple[int, str]], scope: str) -> list[Any]:
        made = []
        for name, (size, dtype) in sizes.items():
            self.buffers[name] = tirx.decl_buffer((size,), dtype, name, scope=scope)
            made.append(tir.AllocBuffer(self.buffers[name]))
        return made

    def _finished(self, body: Any) -> tirx.PrimFunc:
        function = tirx.PrimFunc(self.parameters, body)
        return function.with_attrs(
            {"s_tir": True, "global_symbol": self.program.name, "tirx.noalias": True}
        )


class Threaded(Form):
    """Blocks and threads are bound; phases end with barriers."""

    def own(self, memory: Own, index: Any) -> Any:
        return index

    def phase(self, lines: Sequence[Stmt]) -> list[Any]:
        body = write_all(self, lines)
        return [*body, tir.Evaluate(tirx.call_intrin("void", "tirx.tvm_storage_sync", "shared"))]

    def function(self) -> tirx.PrimFunc:
        program = self.program
        shared = {s.name: (program.threads, s.dtype) for s in program.shared}
        owned = {o.name: (o.size, o.dtype) for o in program.owned}
        lines = [*self._allocated(shared, "shared"), *self._allocated(owned, "local")]
        body = tir.stmt_seq(*lines, *program.body(self))
        tags = {"tx": "threadIdx.x", "ty": "threadIdx.y", "bx": "blockIdx.x", "by": "blockIdx.y"}
        for name, extent in program.indices:
            body = bound(self.variables[name], tags[name], program.extent(self, extent), body)
        return self._finished(body)


class Serial(Form):
    """Loops over blocks, and in them, for each phase, over threads."""

    def own(self, memory: Own, index: Any) -> Any:
        return index + self.program.thread(self) * memory.size

    def phase(self, lines: Sequence[Stmt]) -> list[Any]:
        return [self._loops(("tx", "ty"), lambda: write_all(self, lines))]

    def function(self) -> tirx.PrimFunc:
        program = self.program
        sizes = {s.name: (program.threads, s.dtype) for s in program.shared}
        sizes |= {o.name: (program.threads * o.size, o.dtype) for o in program.owned}
        return self._finished(
            self._loops(
                ("bx", "by"), lambda: [*self._allocated(sizes, "local"), *program.body(self)]
            )
        )

    def _loops(self, names: Sequence[str], body: Callable[[], list[Any]]) -> Any:
        """Loops over some indices; each has a variable of its own."""
        extents = [(name, extent) for name, extent in self.program.indices if name in names]
        for name, _ in extents:
            self.variables[name] = tirx.Var(name, "int32")
        inner = tir.stmt_seq(*body())
        variables = [self.variables[name] for name, _ in extents]
        for variable, (_, extent) in zip(variables, extents, strict=True):
            times = self.program.extent(self, extent)
            inner = tir.For(variable, 0, times, tir.ForKind.SERIAL, inner)
        return inner


Stmt = Callable[[Form], Any]


def write_all(form: Form, lines: Sequence[Stmt]) -> list[Any]:
    return [line(form) for line in lines]
