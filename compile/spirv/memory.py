"""Buffers: global memory by 64-bit address, shared and local memory as arrays; loads and stores.

Global memory is reached through addresses alone. Neighbouring lanes become one vector access
where the address is proven to be a multiple of the vector's size, single accesses otherwise.
Shared and local arrays have scalar elements and are accessed one by one: the device's compiler
keeps local ones in registers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .alignment import power_of_two_in
from .builder import Builder
from .convert import cast
from .dtypes import U8, U32, U64, DType, Value, widths
from .encoding import Op, StorageClass


@dataclass(frozen=True)
class Pointer:
    """A 64-bit address in global memory.

    parameters: positions of the kernel's parameters that it derives from; alignment: a power of
    two that divides it.
    """

    address: int
    alignment: int
    parameters: frozenset[int]


@dataclass(frozen=True)
class Array:
    """A shared or local variable: `length` elements of `element`, a scalar dtype."""

    variable: int
    storage: StorageClass
    element: DType
    length: int


@dataclass(frozen=True)
class Element:
    """One element of a shared or local array, as address_of gives it."""

    array: Array
    index: Value


@dataclass(frozen=True)
class Buffer:
    """What a TIR buffer stands for; indices count elements of dtype.lanes lanes each.

    bytes: its size where the shape is constant.
    """

    dtype: DType
    root: Pointer | Array
    bytes: int | None = None


@dataclass(frozen=True)
class Index:
    """Where an access goes: one scalar index for each element, or a run of neighbours.

    A run is `count` elements from places[0] on, an index that `divisor`, a power of two, divides.
    """

    places: tuple[Value, ...]
    count: int = 0
    divisor: int = 1

    @property
    def is_run(self) -> bool:
        return self.count > 0


@dataclass(frozen=True)
class _Access:
    """`width` neighbouring scalars at a byte address with a proven alignment."""

    address: int
    width: int
    alignment: int


class Memory:
    """Reads and writes buffers, and records which parameters are read and written.

    alignments: what must divide a parameter's address, for the accesses that go through it.
    coherent: parameters whose memory is accessed past caches that threads do not share, since
    threads exchange values there. SPIR-V's memory model asks for it beside the barrier.
    """

    def __init__(self, builder: Builder, coherent: frozenset[int]) -> None:
        self._b = builder
        self._coherent = coherent
        self.read: set[int] = set()
        self.written: set[int] = set()
        self.has_barrier = False
        self.alignments: dict[int, int] = {}
        self.shared_bytes = 0

    @property
    def exchanged(self) -> frozenset[int]:
        """Parameters in whose memory one thread may read what another wrote."""
        return frozenset(self.read & self.written if self.has_barrier else ())

    def allocate(self, storage: StorageClass, dtype: DType, length: int, name: str) -> Array:
        """A shared or local variable for `length` elements of `dtype`."""
        element, count = dtype.scalar, length * dtype.lanes
        b = self._b
        array_type = b.assembler.type(Op.TYPE_ARRAY, b.type_id(element), b.word(max(count, 1)))
        pointer_type = b.pointer_type(storage, array_type)
        if storage is StorageClass.WORKGROUP:
            # Devices keep a bool in a register's width.
            self.shared_bytes += count * (4 if element.kind == "bool" else element.bytes)
            variable = b.assembler.global_variable(pointer_type, storage)
        else:
            variable = b.assembler.local_variable(pointer_type, storage)
        b.assembler.name(variable, name)
        return Array(variable, storage, element, count)

    def load(self, buffer: Buffer, dtype: DType, index: Index) -> Value:
        """A value of `dtype`, whose lanes are those of all elements of `index`."""
        b, root = self._b, buffer.root
        if isinstance(root, Array):
            type_id = b.type_id(dtype)
            pointers = self._elements(buffer, root, index)
            shared = root.storage is StorageClass.WORKGROUP
            lanes = [b.load(type_id, pointer, exchanged=shared) for pointer in pointers]
            return b.from_lanes(dtype, lanes)
        self.read |= root.parameters
        stored = _stored(dtype)
        b.requirements.storage(stored)
        parts: list[int] = []
        singles: list[int] = []  # lanes of a part that no single access covers
        pending = iter(widths(dtype.lanes))
        width = next(pending)
        for access in self._accesses(buffer, root, index):
            type_id = b.type_id(stored, access.width)
            pointer = self._device_pointer(root, access.address, type_id)
            loaded = b.load(type_id, pointer, access.alignment, self.is_exchanged(root))
            if access.width > 1:
                parts.append(loaded)
            else:
                singles.append(loaded)
                if len(singles) < width:
                    continue
                parts.append(b.from_lanes(stored.with_lanes(width), singles).id)
                singles = []
            width = next(pending, 0)
        return cast(b, Value(stored, tuple(parts)), dtype)

    def store(self, buffer: Buffer, value: Value, index: Index) -> None:
        """Write all lanes of `value` to the elements of `index`, the first lane first."""
        b, root = self._b, buffer.root
        if isinstance(root, Array):
            pointers = self._elements(buffer, root, index)
            for pointer, lane in zip(pointers, b.lanes(value), strict=True):
                b.store(pointer, lane, exchanged=root.storage is StorageClass.WORKGROUP)
            return
        self.written |= root.parameters
        stored = _stored(value.dtype)
        b.requirements.storage(stored)
        value = cast(b, value, stored)
        position, lanes = 0, None
        parts = dict(zip(_starts(value.dtype.lanes), value.parts, strict=True))
        for access in self._accesses(buffer, root, index):
            type_id = b.type_id(stored, access.width)
            pointer = self._device_pointer(root, access.address, type_id)
            if access.width > 1 or value.dtype.lanes == 1:
                content = parts[position]
            else:
                lanes = lanes or b.lanes(value)
                content = lanes[position]
            b.store(pointer, content, access.alignment, self.is_exchanged(root))
            position += access.width

    def element_pointer(
        self, pointer: Pointer | Element, dtype: DType, *, array: bool = False
    ) -> int:
        """SPIR-V's pointer to one scalar, for atomic operations; for matrices, to the first one of
        an array."""
        b = self._b
        if isinstance(pointer, Pointer):
            stored = _stored(dtype)
            b.requirements.storage(stored)
            self._require(pointer, stored.bytes)
            stride = stored.bytes if array else 0
            return self._device_pointer(pointer, pointer.address, b.type_id(stored), stride)
        return self._chain(pointer.array, self._narrow(pointer.index).id)

    def offset(self, pointer: Pointer, index: Value, size: int, divisor: int = 1) -> Pointer:
        """The pointer `index` items of `size` bytes further on."""
        address = self._b.address_plus(pointer.address, self._bytes(index, size, None))
        alignment = min(pointer.alignment, divisor * power_of_two_in(size))
        return Pointer(address, alignment, pointer.parameters)

    # Global memory

    def _device_pointer(self, root: Pointer, address: int, type_id: int, stride: int = 0) -> int:
        coherent = self.is_exchanged(root)
        return self._b.device_pointer(address, type_id, root.parameters, coherent, stride)

    def is_exchanged(self, root: Pointer) -> bool:
        """Whether threads exchange values in this memory (`coherent`)."""
        return bool(root.parameters & self._coherent)

    def _require(self, pointer: Pointer, alignment: int) -> None:
        """An access through `pointer`: what was added to the parameter is aligned no less."""
        for position in pointer.parameters:
            self.alignments[position] = max(self.alignments.get(position, 1), alignment)

    def _accesses(self, buffer: Buffer, root: Pointer, index: Index) -> Iterator[_Access]:
        """The accesses that cover `index`, as few as the proven alignment allows."""
        b = self._b
        size, lanes = buffer.dtype.bytes, buffer.dtype.lanes
        scalars = (index.count if index.is_run else 1) * lanes
        # A vector is one part of the value, and only a single run is cut into parts as a value is.
        proven = 1
        if len(index.places) == 1:
            proven = min(root.alignment, index.divisor * power_of_two_in(size * lanes))
        for place in index.places:
            offset = self._bytes(place, size * lanes, buffer.bytes)
            start = b.address_plus(root.address, offset)
            position = 0
            for width in widths(scalars):
                # A part begins at a multiple of four scalars.
                whole = width in (2, 4) and proven >= width * size
                for piece in (width,) if whole else (1,) * width:
                    address = start
                    if position:
                        address = b.address_plus(start, b.constant(U64, position * size).id)
                    self._require(root, piece * size)
                    yield _Access(address, piece, piece * size)
                    position += piece

    def _bytes(self, index: Value, size: int, total: int | None) -> int:
        """index·size as a uint64 id.

        In 32 bits where the whole buffer is known to be below 2 GiB and the index has 32 bits;
        in 64 bits otherwise, where the product cannot wrap.
        """
        b = self._b
        known = b.known(index)
        if known is not None:
            return b.constant(U64, int(known) * size).id
        if index.dtype.bits <= 32 and total is not None and total < 2**31:
            word = cast(b, index, U32)
            product = b.op(Op.I_MUL, U32, word, b.constant(U32, size)) if size > 1 else word
            return cast(b, product, U64).id
        wide = cast(b, index, U64)
        if size == 1:
            return wide.id
        return b.op(Op.I_MUL, U64, wide, b.constant(U64, size)).id

    # Shared and local memory

    def _elements(self, buffer: Buffer, array: Array, index: Index) -> Iterator[int]:
        """A pointer to every scalar of `index`."""
        b = self._b
        lanes = buffer.dtype.lanes
        scalars = (index.count if index.is_run else 1) * lanes
        for place in index.places:
            first = self._narrow(place)
            if lanes > 1:
                first = b.op(Op.I_MUL, U32, first, b.constant(U32, lanes))
            for lane in range(scalars):
                yield self._chain(array, self._plus(first, lane).id)

    def _narrow(self, index: Value) -> Value:
        known = self._b.known(index)
        if known is not None:
            return self._b.constant(U32, int(known))
        return cast(self._b, index, U32)

    def _plus(self, index: Value, lane: int) -> Value:
        if not lane:
            return index
        known = self._b.known(index)
        if known is not None:
            return self._b.constant(U32, int(known) + lane)
        return self._b.op(Op.I_ADD, U32, index, self._b.constant(U32, lane))

    def _chain(self, array: Array, index: int) -> int:
        b = self._b
        pointer_type = b.pointer_type(array.storage, b.type_id(array.element))
        return b.assembler.value(Op.ACCESS_CHAIN, pointer_type, array.variable, index)


def _stored(dtype: DType) -> DType:
    """How a dtype lies in global memory: bools are bytes."""
    return U8.with_lanes(dtype.lanes) if dtype.kind == "bool" else dtype


def _starts(lanes: int) -> list[int]:
    """The first lane of each part."""
    starts, position = [], 0
    for width in widths(lanes):
        starts.append(position)
        position += width
    return starts
