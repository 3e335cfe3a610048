"""Typed values over the assembler: types, constants, operations lane by lane, structured blocks.

Everything above works on `Value`s and never sees how a vector is cut into parts.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

from .assembler import Assembler
from .dtypes import BOOL, I32, U32, U64, DType, Value, widths
from .encoding import (
    ALIGNED,
    NON_PRIVATE_POINTER,
    UNROLL,
    BuiltIn,
    Decoration,
    Glsl,
    Op,
    StorageClass,
)
from .errors import Refusal
from .requirements import Requirements

Number = bool | int | float


@dataclass(frozen=True)
class Loop:
    """The loop around a statement: where `break` and `continue` go."""

    merge: int
    advance: int


class Builder:
    """Writes the body of one kernel.

    `reachable` is False between a terminator (return, break, continue) and the next block:
    whatever would be written there is dead and must not be.

    vulkan_memory: under Vulkan's own memory model, what threads exchange is told by each access
    and barrier, and no longer by decorations.
    """

    def __init__(self, vulkan_memory: bool = False) -> None:
        self.vulkan_memory = vulkan_memory
        self.assembler = Assembler()
        self.requirements = Requirements(self.assembler)
        self.reachable = True
        self.block = 0  # the current block's label; 0 is the entry's
        self.loops: list[Loop] = []
        self._numbers: dict[int, Number] = {}
        self._builtins: dict[BuiltIn, int] = {}
        # (type, parameters, whether coherent) -> struct with nothing else in it
        self._blocks: dict[tuple[int, frozenset[int], bool], int] = {}
        self._arrays: dict[int, int] = {}  # type -> array of unknown length

    # Types

    def type_id(self, dtype: DType, lanes: int = 1) -> int:
        """SPIR-V's type of a part: `lanes` (1 to 4) registers of the dtype's scalar type."""
        if lanes > 1:
            return self.assembler.type(Op.TYPE_VECTOR, self.type_id(dtype), lanes)
        if dtype.kind == "bool":
            return self.assembler.type(Op.TYPE_BOOL)
        self.requirements.arithmetic(dtype)
        if dtype.is_float:
            return self.assembler.type(Op.TYPE_FLOAT, dtype.bits)
        return self.assembler.type(Op.TYPE_INT, dtype.bits, 0)

    def pointer_type(self, storage: StorageClass, type_id: int) -> int:
        return self.assembler.type(Op.TYPE_POINTER, storage, type_id)

    # Constants

    def word(self, value: int) -> int:
        """The id of a uint32 constant, as barriers and indices take them."""
        return self.assembler.constant(Op.CONSTANT, self.type_id(U32), value)

    def constant(self, dtype: DType, value: Number) -> Value:
        """`value` in every lane; integers wrap around, floats round to nearest."""
        scalar = self._scalar_constant(dtype, value)
        if dtype.lanes == 1:
            return Value(dtype, (scalar,))
        parts = tuple(
            scalar
            if width == 1
            else self.assembler.constant(
                Op.CONSTANT_COMPOSITE, self.type_id(dtype, width), *[scalar] * width
            )
            for width in widths(dtype.lanes)
        )
        return Value(dtype, parts)

    def _scalar_constant(self, dtype: DType, value: Number) -> int:
        type_id = self.type_id(dtype)
        if dtype.kind == "bool":
            return self.assembler.constant(
                Op.CONSTANT_TRUE if value else Op.CONSTANT_FALSE, type_id
            )
        words = constant_words(dtype, value)
        result = self.assembler.constant(Op.CONSTANT, type_id, *words)
        self._numbers[result] = value
        return result

    def known(self, value: Value) -> Number | None:
        """The number that a scalar constant holds; None for all else."""
        return self._numbers.get(value.parts[0]) if value.dtype.lanes == 1 else None

    # Lanes

    def lanes(self, value: Value) -> list[int]:
        """One scalar id for each lane."""
        scalar = self.type_id(value.dtype)
        result = []
        for part, width in zip(value.parts, widths(value.dtype.lanes), strict=True):
            if width == 1:
                result.append(part)
                continue
            result.extend(
                self.assembler.value(Op.COMPOSITE_EXTRACT, scalar, part, lane)
                for lane in range(width)
            )
        return result

    def from_lanes(self, dtype: DType, lanes: Sequence[int]) -> Value:
        """A value of dtype.lanes lanes from one scalar id each."""
        parts, start = [], 0
        for width in widths(dtype.lanes):
            chunk = lanes[start : start + width]
            parts.append(
                chunk[0]
                if width == 1
                else self.assembler.value(
                    Op.COMPOSITE_CONSTRUCT, self.type_id(dtype, width), *chunk
                )
            )
            start += width
        return Value(dtype, tuple(parts))

    def broadcast(self, value: Value, lanes: int) -> Value:
        """A scalar in every lane."""
        if value.dtype.lanes == lanes:
            return value
        dtype = value.dtype.with_lanes(lanes)
        made: dict[int, int] = {1: value.id}
        for width in widths(lanes):
            if width not in made:
                made[width] = self.assembler.value(
                    Op.COMPOSITE_CONSTRUCT, self.type_id(dtype, width), *[value.id] * width
                )
        return Value(dtype, tuple(made[width] for width in widths(lanes)))

    # Operations

    def op(self, op: Op, dtype: DType, *operands: Value, exact: bool = False) -> Value:
        """`op` on each part. `exact` forbids the device to fuse it with its neighbours."""
        parts = []
        for index, width in enumerate(widths(dtype.lanes)):
            result = self.assembler.value(
                op, self.type_id(dtype, width), *[value.parts[index] for value in operands]
            )
            if exact:
                self.assembler.decorate(result, Decoration.NO_CONTRACTION)
            parts.append(result)
        return Value(dtype, tuple(parts))

    def glsl(self, function: Glsl, dtype: DType, *operands: Value) -> Value:
        """An instruction of GLSL.std.450 on each part."""
        library = self.assembler.glsl()
        return Value(
            dtype,
            tuple(
                self.assembler.value(
                    Op.EXT_INST,
                    self.type_id(dtype, width),
                    library,
                    function,
                    *[value.parts[index] for value in operands],
                )
                for index, width in enumerate(widths(dtype.lanes))
            ),
        )

    def select(self, condition: Value, yes: Value, no: Value) -> Value:
        """Lane by lane; a scalar condition decides for all lanes."""
        condition = self.broadcast(condition, yes.dtype.lanes)
        return self.op(Op.SELECT, yes.dtype, condition, yes, no)

    def retype(self, value: Value, dtype: DType) -> Value:
        """The same registers under the name of another dtype of the same SPIR-V type."""
        return Value(dtype, value.parts)

    def typed_parts(self, value: Value) -> list[tuple[int, int]]:
        """(id, type) of each part, for instructions that take the parts one by one."""
        return [
            (part, self.type_id(value.dtype, width))
            for part, width in zip(value.parts, widths(value.dtype.lanes), strict=True)
        ]

    # Memory

    def builtin(self, builtin: BuiltIn, type_id: int) -> int:
        """The variable of a built-in of this type."""
        if builtin not in self._builtins:
            pointer_type = self.pointer_type(StorageClass.INPUT, type_id)
            variable = self.assembler.global_variable(pointer_type, StorageClass.INPUT)
            self.assembler.decorate(variable, Decoration.BUILT_IN, builtin)
            self.assembler.name(variable, builtin.name.lower())
            self._builtins[builtin] = variable
        return self._builtins[builtin]

    def load(self, type_id: int, pointer: int, alignment: int = 0, exchanged: bool = False) -> int:
        """exchanged: other threads write there."""
        operands = self.access(alignment, exchanged)
        return self.assembler.value(Op.LOAD, type_id, pointer, *operands)

    def store(self, pointer: int, value: int, alignment: int = 0, exchanged: bool = False) -> None:
        """exchanged: other threads read there."""
        self.assembler.emit(Op.STORE, pointer, value, *self.access(alignment, exchanged))

    def access(self, alignment: int, exchanged: bool) -> tuple[int, ...]:
        """The memory operands of a load or store."""
        mask = NON_PRIVATE_POINTER if exchanged and self.vulkan_memory else 0
        if alignment:
            return mask | ALIGNED, alignment
        return (mask,) if mask else ()

    def device_pointer(
        self,
        address: int,
        type_id: int,
        parameters: frozenset[int],
        coherent: bool = False,
        stride: int = 0,
    ) -> int:
        """A pointer into the global memory of these parameters of the kernel, from a 64-bit
        address; coherent, threads may exchange values there. With a stride, in bytes, it is to the
        first element of an array.

        Through a struct of one member, as compilers of GLSL have it: only a member can be
        coherent, and the validation layers check no address that comes without an OpAccessChain.
        """
        member = self._array_of(type_id, stride) if stride else type_id
        block = self.block_pointer(address, self._block_of(member, parameters, coherent))
        pointer_type = self.pointer_type(StorageClass.PHYSICAL_STORAGE_BUFFER, type_id)
        first = self.constant(I32, 0).id
        path = (first, first) if stride else (first,)
        return self.assembler.value(Op.ACCESS_CHAIN, pointer_type, block, *path)

    def _array_of(self, type_id: int, stride: int) -> int:
        """An array of unknown length; a type has one stride."""
        if type_id not in self._arrays:
            array = self.assembler.type(Op.TYPE_RUNTIME_ARRAY, type_id, distinct=True)
            self.assembler.decorate(array, Decoration.ARRAY_STRIDE, stride)
            self._arrays[type_id] = array
        return self._arrays[type_id]

    def block_pointer(self, address: int, block: int) -> int:
        """A pointer to a struct, decorated as a block, from a 64-bit address."""
        pointer_type = self.pointer_type(StorageClass.PHYSICAL_STORAGE_BUFFER, block)
        return self.assembler.value(Op.CONVERT_U_TO_PTR, pointer_type, address)

    def promise_read_only(self, written: Set[int]) -> None:
        """Say of the memory of all parameters but these that nothing writes it while the kernel
        runs: devices may then move its loads ahead of stores, and share them among threads."""
        for (_, parameters, _), block in self._blocks.items():
            if written.isdisjoint(parameters):
                self.assembler.decorate_member(block, 0, Decoration.NON_WRITABLE)

    def _block_of(self, type_id: int, parameters: frozenset[int], coherent: bool) -> int:
        """A struct with this as its only member, for the memory of these parameters."""
        key = type_id, parameters, coherent
        if key not in self._blocks:
            block = self.assembler.type(Op.TYPE_STRUCT, type_id, distinct=True)
            self.assembler.decorate(block, Decoration.BLOCK)
            self.assembler.decorate_member(block, 0, Decoration.OFFSET, 0)
            if coherent and not self.vulkan_memory:
                self.assembler.decorate_member(block, 0, Decoration.COHERENT)
            self._blocks[key] = block
        return self._blocks[key]

    def address_plus(self, address: int, offset: int) -> int:
        """address + offset, uint64 ids both."""
        return self.assembler.value(Op.I_ADD, self.type_id(U64), address, offset)

    # Control flow

    def label(self, label: int) -> None:
        """Begin the block `label`."""
        self.assembler.emit(Op.LABEL, label)
        self.block = label
        self.reachable = True

    def branch(self, target: int) -> None:
        """End the block with a jump; nothing where the block has ended already."""
        if self.reachable:
            self.assembler.emit(Op.BRANCH, target)
            self.reachable = False

    def innermost(self, word: str) -> Loop:
        """The loop that a `break` or `continue` here is about."""
        if not self.loops:
            raise Refusal(f"a {word} outside of any loop", "a loop around it", "Remove it.")
        return self.loops[-1]

    def leave(self) -> None:
        """Return from the kernel."""
        if self.reachable:
            self.assembler.emit(Op.RETURN)
            self.reachable = False

    def if_then_else(
        self, condition: Value, then: Callable[[], None], otherwise: Callable[[], None] | None
    ) -> None:
        """Run one of two branches of statements."""
        yes, merge = self.assembler.fresh(), self.assembler.fresh()
        no = self.assembler.fresh() if otherwise else merge
        self.assembler.emit(Op.SELECTION_MERGE, merge, 0)
        self.assembler.emit(Op.BRANCH_CONDITIONAL, condition.id, yes, no)
        self.label(yes)
        then()
        reaches = self.reachable or otherwise is None
        self.branch(merge)
        if otherwise:
            self.label(no)
            otherwise()
            reaches = reaches or self.reachable
            self.branch(merge)
        self._merge(merge, reaches)

    def choose(
        self, condition: Value, then: Callable[[], Value], otherwise: Callable[[], Value]
    ) -> Value:
        """The value of one of two expressions; the other one is not evaluated."""
        yes, no, merge = (self.assembler.fresh() for _ in range(3))
        self.assembler.emit(Op.SELECTION_MERGE, merge, 0)
        self.assembler.emit(Op.BRANCH_CONDITIONAL, condition.id, yes, no)
        self.label(yes)
        first = then()
        first_block = self.block
        self.branch(merge)
        self.label(no)
        second = otherwise()
        second_block = self.block
        self.branch(merge)
        self.label(merge)
        return Value(
            first.dtype,
            tuple(
                self.assembler.value(
                    Op.PHI, self.type_id(first.dtype, width), a, first_block, b, second_block
                )
                for a, b, width in zip(
                    first.parts, second.parts, widths(first.dtype.lanes), strict=True
                )
            ),
        )

    def for_loop(
        self,
        start: Value,
        step: Value,
        goes_on: Callable[[Value], Value],
        body: Callable[[Value], None],
        unroll: bool = False,
    ) -> None:
        """body(i) for i = start, start + step, … while goes_on(i)."""
        header, test, inside, advance, merge = (self.assembler.fresh() for _ in range(5))
        before, following = self.block_label(), self.assembler.fresh()
        self.branch(header)
        self.label(header)
        type_id = self.type_id(start.dtype)
        counter = self.assembler.value(Op.PHI, type_id, start.id, before, following, advance)
        self.assembler.emit(Op.LOOP_MERGE, merge, advance, UNROLL if unroll else 0)
        self.branch(test)
        self.label(test)
        index = Value(start.dtype, (counter,))
        condition = goes_on(index)
        self.assembler.emit(Op.BRANCH_CONDITIONAL, condition.id, inside, merge)
        self.label(inside)
        self.loops.append(Loop(merge, advance))
        body(index)
        self.loops.pop()
        self.branch(advance)
        self.label(advance)
        words = (5 << 16 | Op.I_ADD, type_id, following, counter, step.id)
        self.assembler.body.extend(words)
        self.branch(header)
        self.label(merge)

    def while_loop(self, condition: Callable[[], Value], body: Callable[[], None]) -> None:
        """body() while condition()."""
        header, test, inside, advance, merge = (self.assembler.fresh() for _ in range(5))
        self.branch(header)
        self.label(header)
        self.assembler.emit(Op.LOOP_MERGE, merge, advance, 0)
        self.branch(test)
        self.label(test)
        self.assembler.emit(Op.BRANCH_CONDITIONAL, condition().id, inside, merge)
        self.label(inside)
        self.loops.append(Loop(merge, advance))
        body()
        self.loops.pop()
        self.branch(advance)
        self.label(advance)
        self.branch(header)
        self.label(merge)

    def block_label(self) -> int:
        """The label of the current block, for a phi; the entry block gets a successor first."""
        if not self.block:
            label = self.assembler.fresh()
            self.assembler.emit(Op.BRANCH, label)
            self.label(label)
        return self.block

    def _merge(self, merge: int, reaches: bool) -> None:
        self.label(merge)
        if not reaches:
            self.assembler.emit(Op.UNREACHABLE)
            self.reachable = False

    def truth(self, value: bool, lanes: int = 1) -> Value:
        return self.constant(BOOL.with_lanes(lanes), value)


def constant_words(dtype: DType, value: Number) -> tuple[int, ...]:
    """The literal words of a number, low word first."""
    if dtype.is_float:
        data = _float_bytes(dtype.bits, float(value))
    elif dtype.kind == "bfloat":
        bits = struct.unpack("<I", _float_bytes(32, float(value)))[0]
        rounded = bits if value != value else bits + 0x7FFF + (bits >> 16 & 1)
        data = struct.pack("<I", rounded >> 16)
    else:
        data = (int(value) % (1 << dtype.bits)).to_bytes(dtype.bytes, "little")
    data += b"\0" * (-len(data) % 4)
    return struct.unpack(f"<{len(data) // 4}I", data)


def _float_bytes(bits: int, value: float) -> bytes:
    """IEEE 754, rounded to nearest even; what overflows becomes infinite."""
    try:
        return struct.pack({16: "<e", 32: "<f", 64: "<d"}[bits], value)
    except OverflowError:
        return struct.pack({16: "<e", 32: "<f"}[bits], float("inf") if value > 0 else -float("inf"))
