"""The argument block: where each parameter lies in it, and how the kernel reads it.

Up to 128 bytes, which every device has, the block is the push constants. A longer one lies in
memory, and the push constants hold its address.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm.ir import PointerType

from .builder import Builder
from .convert import cast, reinterpret
from .dtypes import BOOL, I32, U32, U64, DType, Value
from .encoding import Decoration, Op, StorageClass
from .errors import Refusal
from .expressions import known_dtype
from .memory import Pointer

PUSH_CONSTANT_BYTES = 128
BLOCK_ALIGNMENT = 16  # of a block in memory
POINTER_ALIGNMENT = 64  # TVM's allocators align so, and its host code checks


@dataclass(frozen=True)
class Argument:
    """A parameter's place in the block; `dtype` None is a pointer to global memory."""

    name: str
    dtype: DType | None
    offset: int

    @property
    def bytes(self) -> int:
        return _size(self.dtype)


def _size(dtype: DType | None) -> int:
    if dtype is None:
        return 8
    return 4 if dtype.kind == "bool" else dtype.bytes


def lay_out(parameters: Sequence[Any]) -> list[Argument]:
    """Places in the order of the parameters, naturally aligned; Refusal where one has none."""
    arguments, offset = [], 0
    for parameter in parameters:
        dtype = _scalar_dtype(parameter)
        size = _size(dtype)
        offset += -offset % size
        arguments.append(Argument(parameter.name, dtype, offset))
        offset += size
    return arguments


def _scalar_dtype(parameter: Any) -> DType | None:
    """The dtype of a scalar parameter; None for a pointer to global memory."""
    ty = parameter.ty
    if isinstance(ty, PointerType):
        if str(ty.storage_scope) not in ("global", ""):
            raise Refusal(
                f"the parameter {parameter.name}, a pointer to {ty.storage_scope} memory",
                "pointers to global memory and scalars",
                "Allocate it inside the kernel: in a scheduled function, with "
                "T.sblock_alloc_buffer instead of T.alloc_buffer.",
            )
        return None
    dtype = known_dtype(ty, f"the parameter {parameter.name}")
    if dtype.lanes > 1 or dtype.kind == "bfloat":
        raise Refusal(
            f"the parameter {parameter.name} of type {dtype}",
            "pointers to global memory and scalars of integer, float or bool type",
            "Pass it in a buffer.",
        )
    return dtype


class ArgumentBlock:
    """Declares the block and loads parameters from it."""

    def __init__(self, builder: Builder, arguments: Sequence[Argument]) -> None:
        self._b = builder
        end = max((argument.offset + argument.bytes for argument in arguments), default=0)
        self.bytes = end + -end % 8
        self.in_memory = self.bytes > PUSH_CONSTANT_BYTES
        self._members: dict[int, int] = {}  # offset of a word -> member
        self._pointer: int | None = None
        self._storage = StorageClass.PUSH_CONSTANT
        self._arguments = arguments

    def load(self, position: int) -> Value | Pointer:
        """Parameter number `position`."""
        b = self._b
        argument = self._arguments[position]
        if argument.dtype is None:
            address = self._word(argument.offset, U64)
            return Pointer(address.id, POINTER_ALIGNMENT, frozenset({position}))
        dtype = argument.dtype
        if dtype.bits == 64:
            return reinterpret(b, self._word(argument.offset, U64), dtype)
        word = self._word(argument.offset & ~3, U32)
        if dtype.kind == "bool":
            return cast(b, word, BOOL)
        if dtype.bits == 32:
            return reinterpret(b, word, dtype)
        shift = (argument.offset & 3) * 8
        if shift:
            word = b.op(Op.SHIFT_RIGHT_LOGICAL, U32, word, b.constant(U32, shift))
        bits = cast(b, word, DType("uint", dtype.bits))
        return reinterpret(b, bits, dtype)

    def _word(self, offset: int, dtype: DType) -> Value:
        b = self._b
        if self._pointer is None:
            self._pointer = self._declare()
        type_id = b.type_id(dtype)
        member = b.constant(I32, self._members[offset]).id
        pointer = b.assembler.value(
            Op.ACCESS_CHAIN, b.pointer_type(self._storage, type_id), self._pointer, member
        )
        alignment = 0
        if self.in_memory:
            alignment = min(BLOCK_ALIGNMENT, offset & -offset or BLOCK_ALIGNMENT)
        return Value(dtype, (b.load(type_id, pointer, alignment),))

    def _declare(self) -> int:
        """The id of a pointer to the block."""
        b = self._b
        words = {}
        for argument in self._arguments:
            words[argument.offset & ~3] = U64 if argument.bytes == 8 else U32
        self._members = {offset: member for member, offset in enumerate(words)}
        block = self._struct(words, "arguments")
        if not self.in_memory:
            return self._push_constants(block)
        address_block = self._struct({0: U64}, "argument_buffer")
        variable = self._push_constants(address_block)
        word = b.type_id(U64)
        member = b.assembler.value(
            Op.ACCESS_CHAIN,
            b.pointer_type(StorageClass.PUSH_CONSTANT, word),
            variable,
            b.constant(I32, 0).id,
        )
        self._storage = StorageClass.PHYSICAL_STORAGE_BUFFER
        for position in range(len(words)):
            b.assembler.decorate_member(block, position, Decoration.NON_WRITABLE)
        return b.block_pointer(b.load(word, member), block)

    def _struct(self, words: dict[int, DType], name: str) -> int:
        b = self._b
        members = [b.type_id(dtype) for dtype in words.values()]
        struct = b.assembler.type(Op.TYPE_STRUCT, *members, distinct=True)
        b.assembler.name(struct, name)
        b.assembler.decorate(struct, Decoration.BLOCK)
        for member, offset in enumerate(words):
            b.assembler.decorate_member(struct, member, Decoration.OFFSET, offset)
        return struct

    def _push_constants(self, struct: int) -> int:
        b = self._b
        pointer_type = b.pointer_type(StorageClass.PUSH_CONSTANT, struct)
        return b.assembler.global_variable(pointer_type, StorageClass.PUSH_CONSTANT)
