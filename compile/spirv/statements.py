"""TIR statements to blocks, by dispatch on the node's type.

AssertStmt writes nothing: a kernel has nobody to tell. Attributes that only inform are passed by.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.ir import prim
from tvm.tirx import stmt as tir

from . import arithmetic, matrices
from .alignment import power_of_two_in
from .dtypes import Value
from .encoding import StorageClass
from .errors import Refusal
from .expressions import Expressions, known_dtype, only_index
from .memory import Array, Buffer, Element, Pointer

_STORAGE = {"shared": StorageClass.WORKGROUP, "local": StorageClass.FUNCTION}
# Attributes that change what the code below them means, and that lowering should have removed.
_REFUSED_ATTRIBUTES = (
    "virtual_thread", "coproc_scope", "async_scope", "async_commit_queue_scope",
    "async_wait_queue_scope", "extern_scope",
)  # fmt: skip


class Statements:
    """Writes statements into the builder's blocks.

    thread(tag, extent, dtype) gives the value of a thread or block index; the kernel knows it.
    """

    def __init__(self, expressions: Expressions, thread: Callable[[str, Any, Any], Value]) -> None:
        self._x = expressions
        self._b = expressions.b
        self._scope = expressions.scope
        self._thread = thread

    def write(self, stmt: Any) -> None:
        """Write one statement; nothing where the code before it never gets there."""
        if not self._b.reachable:
            return
        write = _WRITERS.get(type(stmt))
        if write is None:
            raise Refusal(
                f"the statement {type(stmt).__name__}",
                "a statement of TVM's standard lowering",
                "Lower it before code generation, or build through tvm.compile.",
            )
        write(self, stmt)

    def _sequence(self, stmt: Any) -> None:
        for part in stmt.seq:
            self.write(part)

    def _evaluate(self, stmt: Any) -> None:
        if type(stmt.value) is not prim.IntImm:
            self._x.run(stmt.value)

    def _bind(self, stmt: Any) -> None:
        self._x.bind(stmt.var, stmt.value)

    def _store(self, stmt: Any) -> None:
        buffer = self._scope.buffer(stmt.buffer)
        index = self._x.index(only_index(stmt))
        self._scope.memory.store(buffer, self._x.value(stmt.value), index)

    def _allocate(self, stmt: Any) -> None:
        variable = stmt.buffer
        if not self._scope.is_live(variable):
            return
        scope = str(variable.ty.storage_scope)
        if scope not in (*_STORAGE, *matrices.USES):
            raise Refusal(
                f"the buffer {variable.name} in the scope {scope!r}",
                f"the scopes shared, local, {', '.join(matrices.USES)}",
                "Allocate it with scope='shared'."
                if scope == "shared.dyn"
                else "Allocate it in one of these, or pass global memory as a parameter.",
            )
        dtype = known_dtype(variable.ty.dtype, f"the buffer {variable.name}")
        length = static_elements(variable)
        if length is None:
            raise Refusal(
                f"the {scope} buffer {variable.name} of a size known only at launch",
                "a constant size",
                "Allocate the largest size that can occur.",
            )
        if scope in matrices.USES:
            fragments = matrices.allocate(scope, variable.name, dtype, length)
            self._scope.fragments[hash(variable)] = fragments
            return
        array = self._scope.memory.allocate(_STORAGE[scope], dtype, length, variable.name)
        self._scope.buffers[hash(variable)] = Buffer(dtype, array)

    def _declare(self, stmt: Any) -> None:
        variable = stmt.buffer
        if not self._scope.is_live(variable):
            return
        dtype = known_dtype(variable.ty.dtype, f"the buffer {variable.name}")
        pointer = self._x.pointer(stmt.data)
        root: Pointer | Array
        if isinstance(pointer, Element):
            root = self._view(variable.name, pointer, dtype.scalar)
            self._scope.buffers[hash(variable)] = Buffer(dtype, root)
            return
        promised = power_of_two_in(int(variable.ty.data_alignment))
        root = Pointer(pointer.address, min(pointer.alignment, promised), pointer.parameters)
        length = static_elements(variable)
        size = None if length is None else length * dtype.lanes * dtype.bytes
        self._scope.buffers[hash(variable)] = Buffer(dtype, root, size)

    def _view(self, name: str, pointer: Element, dtype: Any) -> Array:
        """Another name for a shared or local array."""
        array, index = pointer.array, pointer.index
        if array.element != dtype or self._b.known(index) != 0:
            raise Refusal(
                f"the buffer {name} as a view of {array.element} elements as {dtype}, "
                "or of a part, in shared or local memory",
                "the whole array with elements of its own dtype",
                "Allocate a buffer of its own, or use T.reinterpret on the loaded values.",
            )
        return array

    def _for(self, stmt: Any) -> None:
        kind = tir.ForKind(int(stmt.kind))
        if kind == tir.ForKind.THREAD_BINDING:
            raise Refusal(
                f"the loop over {stmt.loop_var.name}, still bound to a thread",
                "thread_extent attributes in its place",
                "Build through tvm.compile, which runs TVM's standard lowering.",
            )
        b = self._b
        variable, divisors = stmt.loop_var, self._scope.divisors
        start, extent = self._x.value(stmt.min), self._x.value(stmt.extent)
        step = b.constant(start.dtype, 1) if stmt.step is None else self._x.value(stmt.step)
        if b.known(extent) is not None and int(b.known(extent) or 0) <= 0:
            return
        step_divisor = 1 if stmt.step is None else divisors.of(stmt.step)
        divisors.bind(variable, min(divisors.of(stmt.min), step_divisor))
        is_once = b.known(extent) == 1 and not _jumps(stmt.body)
        if is_once:
            divisors.bind(variable, divisors.of(stmt.min))
            self._scope.bind(variable, start)
            self.write(stmt.body)
            return
        end = extent if b.known(start) == 0 else arithmetic.add(b, start, extent)

        def body(index: Value) -> None:
            self._scope.bind(variable, index)
            self.write(stmt.body)

        b.for_loop(
            start,
            step,
            lambda index: arithmetic.less(b, index, end),
            body,
            unroll=kind == tir.ForKind.UNROLLED,
        )

    def _while(self, stmt: Any) -> None:
        self._b.while_loop(lambda: self._x.value(stmt.condition), lambda: self.write(stmt.body))

    def _if(self, stmt: Any) -> None:
        otherwise = stmt.else_case
        self._b.if_then_else(
            self._x.value(stmt.condition),
            lambda: self.write(stmt.then_case),
            None if otherwise is None else lambda: self.write(otherwise),
        )

    def _break(self, _stmt: Any) -> None:
        self._b.branch(self._b.innermost("break").merge)

    def _continue(self, _stmt: Any) -> None:
        self._b.branch(self._b.innermost("continue").advance)

    def _return(self, _stmt: Any) -> None:
        self._b.leave()

    def _assert(self, _stmt: Any) -> None:
        pass

    def _attribute(self, stmt: Any) -> None:
        key = str(stmt.attr_key)
        if key == "thread_extent":
            tag, variable = str(stmt.node.thread_tag), stmt.node.var
            dtype = known_dtype(variable.ty, f"the index {tag}")
            index = self._thread(tag, stmt.value, dtype)
            self._scope.bind(variable, index)
        elif key in _REFUSED_ATTRIBUTES:
            raise Refusal(
                f"the attribute {key}",
                "thread_extent, or attributes that only inform",
                "Lower it before code generation, or build through tvm.compile.",
            )
        self.write(stmt.body)


def static_elements(buffer: Any) -> int | None:
    """The number of elements of a buffer of constant shape; None for others.

    Other extents are never evaluated: they may name variables that nothing binds.
    """
    count = 1
    for extent in buffer.ty.shape:
        if type(extent) is not prim.IntImm:
            return None
        count *= int(extent.value)
    return count


def _jumps(stmt: Any) -> bool:
    """Whether a loop body may leave or continue a loop; then it has to remain one."""
    kind = type(stmt)
    if kind in (tir.Break, tir.Continue):
        return True
    if kind is tir.Evaluate:
        return getattr(getattr(stmt.value, "op", None), "name", "") in (
            "tirx.break_loop",
            "tirx.continue_loop",
        )
    if kind is tir.SeqStmt:
        return any(_jumps(part) for part in stmt.seq)
    if kind is tir.IfThenElse:
        return _jumps(stmt.then_case) or (stmt.else_case is not None and _jumps(stmt.else_case))
    return kind is tir.AttrStmt and _jumps(stmt.body)


_WRITERS: dict[type, Callable[[Statements, Any], None]] = {
    tir.SeqStmt: Statements._sequence,
    tir.Evaluate: Statements._evaluate,
    tir.Bind: Statements._bind,
    tir.BufferStore: Statements._store,
    tir.AllocBuffer: Statements._allocate,
    tir.DeclBuffer: Statements._declare,
    tir.For: Statements._for,
    tir.While: Statements._while,
    tir.IfThenElse: Statements._if,
    tir.Break: Statements._break,
    tir.Continue: Statements._continue,
    tir.Return: Statements._return,
    tir.AssertStmt: Statements._assert,
    tir.AttrStmt: Statements._attribute,
}
