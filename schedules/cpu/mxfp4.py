"""MXFP4 weights on CPUs: how they are packed, and the dot product of a tile.

The layouts, all in groups of 32 rows whose order the caller chooses (`row_order`):

  f32 activations   [experts, groups, k/2, 32]: byte (i, r) holds inputs 2i (low), 2i+1 (high)
  bf16 activations  [experts, groups, k/8, 128]: word (i, 16v+r) holds inputs 8i to 8i+7 of row
                    16v+r, those at even places in its low half, at odd ones in its high half
  i8 activations    [experts, groups, k/8, 128]: byte (i, 64v+4r+j) holds inputs 8i+j (low) and
                    8i+4+j (high) of row 16v+r: the operand order of a 4-byte dot product
  scales, all       [experts, groups, k/32, 32]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import ml_dtypes
import numpy as np
from tvm.script import tirx as T

from ..formats.blocks import BLOCK
from ..formats.mxfp4 import VALUES, scale_value
from ..kernel import Layout
from .bf16 import PairIsa, PairTile, dot_pairs, word_at
from .int8 import GROUP, Int8Weights
from .isa import Isa
from .vectors import LANES

# Which of eight neighbouring inputs stand in a word's nibbles, from its lowest on.
Places = tuple[int, ...]
PAIRS: Places = (0, 2, 4, 6, 1, 3, 5, 7)
QUADS: Places = (0, 4, 1, 5, 2, 6, 3, 7)


RowOrder = Callable[[int], np.ndarray]  # of so many rows


def in_order(rows: int) -> np.ndarray:
    return np.arange(rows)


def layouts(places: Places | None, row_order: RowOrder = in_order) -> dict[str, Layout]:
    """Of the arguments `blocks` and `scales`: in words of eight inputs, or else in bytes of two."""
    return {
        "blocks": Layout(
            shape=partial(_blocks_shape, places), pack=partial(_pack_blocks, places, row_order)
        ),
        "scales": Layout(shape=_scales_shape, pack=partial(_pack_scales, row_order)),
    }


def _blocks_shape(places: Places | None, shape: tuple[Any, ...]) -> tuple[Any, ...]:
    experts, rows, nblocks, _ = shape
    if places is None:
        return (experts, rows // GROUP, nblocks * 16, GROUP)
    return (experts, rows // GROUP, nblocks * 4, 4 * GROUP)


def _scales_shape(shape: tuple[Any, ...]) -> tuple[Any, ...]:
    experts, rows, nblocks = shape
    return (experts, rows // GROUP, nblocks, GROUP)


def _pack_blocks(places: Places | None, row_order: RowOrder, blocks: np.ndarray) -> np.ndarray:
    experts, rows, nblocks, _ = blocks.shape
    half = nblocks * 16
    if row_order is not in_order:
        blocks = blocks[:, row_order(rows)]
    grouped = blocks.reshape(experts, rows // GROUP, GROUP, half)
    if places is None:
        return np.ascontiguousarray(grouped.transpose(0, 1, 3, 2))
    # Of eight inputs, the first four are one u16 as stored, the others the next.
    stored = grouped.view("<u2").reshape(experts, rows // GROUP, GROUP, half // 4, 2)
    first, second = _spread(places)
    words = first[stored[..., 0]] | second[stored[..., 1]]
    packed = np.ascontiguousarray(words.transpose(0, 1, 3, 2)).view(np.uint8)
    return packed.reshape(experts, rows // GROUP, half // 4, 4 * GROUP)


@cache
def _spread(places: Places) -> tuple[np.ndarray, np.ndarray]:
    """Two tables u32 [65536]: where the first four nibbles of eight go, and where the others."""
    codes = np.arange(1 << 16, dtype="<u4")
    tables = []
    for inputs in (range(4), range(4, 8)):
        found = [places.index(i) for i in inputs]
        nibbles = [((codes >> 4 * i) & 15) << 4 * place for i, place in enumerate(found)]
        tables.append(np.bitwise_or.reduce(nibbles))
    return tables[0], tables[1]


def _pack_scales(row_order: RowOrder, scales: np.ndarray) -> np.ndarray:
    experts, rows, nblocks = scales.shape
    if row_order is not in_order:
        scales = scales[:, row_order(rows)]
    grouped = scales.reshape(experts, rows // GROUP, GROUP, nblocks)
    return np.ascontiguousarray(grouped.transpose(0, 1, 3, 2))


def _half_bits(low: bool, byte: Any) -> Any:
    """The nibble moved into an f16's exponent and mantissa: its value times 2^-14."""
    wide = T.Cast("uint16", byte)
    if low:
        magnitude = T.shift_left(T.bitwise_and(wide, T.uint16(0x07)), T.uint16(9))
        sign = T.shift_left(T.bitwise_and(wide, T.uint16(0x08)), T.uint16(12))
    else:
        magnitude = T.shift_left(T.bitwise_and(wide, T.uint16(0x70)), T.uint16(5))
        sign = T.shift_left(T.bitwise_and(wide, T.uint16(0x80)), T.uint16(8))
    half = T.reinterpret("float16", T.bitwise_or(magnitude, sign))
    return T.Cast("float32", half)


def dot_f32(k: int) -> Any:
    """As int8.dot_i8, for x = (x,) in f32, which it stays throughout; part, value: f32.

    Sums within a block first, then times the block's scale: that keeps the scale out of the
    inner loop, and any scale byte exact.
    """

    @T.inline
    def dot(acc, part, value, row, tokens, x, blocks, scales, at):
        for i in T.unroll(tokens * 2):
            for lane in T.vectorized(LANES):
                acc[i * LANES + lane] = T.float32(0)
        for b in T.serial(k // BLOCK):
            for i in T.unroll(tokens * 2):
                for lane in T.vectorized(LANES):
                    part[i * LANES + lane] = T.float32(0)
            for i in T.serial(BLOCK // 2):
                for v in T.unroll(2):
                    for lane in T.vectorized(LANES):
                        value[lane] = _half_bits(True, blocks[(*at, b * 16 + i, v * LANES + lane)])
                    for t in T.unroll(tokens):
                        for lane in T.vectorized(LANES):
                            part[(t * 2 + v) * LANES + lane] = (
                                part[(t * 2 + v) * LANES + lane]
                                + value[lane] * x[0][row[t], b * BLOCK + i * 2]
                            )
                    for lane in T.vectorized(LANES):
                        value[lane] = _half_bits(False, blocks[(*at, b * 16 + i, v * LANES + lane)])
                    for t in T.unroll(tokens):
                        for lane in T.vectorized(LANES):
                            part[(t * 2 + v) * LANES + lane] = (
                                part[(t * 2 + v) * LANES + lane]
                                + value[lane] * x[0][row[t], b * BLOCK + i * 2 + 1]
                            )
            for t in T.unroll(tokens):
                for v in T.unroll(2):
                    for lane in T.vectorized(LANES):
                        acc[(t * 2 + v) * LANES + lane] = acc[(t * 2 + v) * LANES + lane] + (
                            part[(t * 2 + v) * LANES + lane] * T.float32(16384)
                        ) * scale_value(scales[(*at, b, v * LANES + lane)])

    return dot


def dot_bf16(isa: PairIsa, k: int, tile: PairTile) -> Any:
    """As int8.dot_i8, for x = (x,) of bfloat16 as u16; part: f32, as many as acc; value: i32.

    As in dot_f32, sums within a block come first.
    """

    @T.inline
    def some_rows(rows, first, acc, part, value, row, tokens, x, blocks, scales, at):
        for t in T.unroll(tokens):
            acc[T.ramp(t * GROUP + first, 1, rows)] = T.broadcast(T.float32(0), rows)
        for b in T.serial(k // BLOCK):
            part[T.ramp(0, 1, tokens * rows)] = T.broadcast(T.float32(0), tokens * rows)
            for i in T.unroll(BLOCK // 2):
                for v in T.unroll(rows // LANES):
                    value[T.ramp(0, 1, LANES)] = _pairs(
                        isa, blocks, (*at, b * 4 + i // 4), first + v * LANES, i % 4
                    )
                    for t in T.unroll(tokens):
                        part[T.ramp(t * rows + v * LANES, 1, LANES)] = dot_pairs(
                            isa,
                            part[T.ramp(t * rows + v * LANES, 1, LANES)],
                            value[T.ramp(0, 1, LANES)],
                            word_at(x[0], row[t], b * BLOCK + i * 2),
                        )
            for t in T.unroll(tokens):
                for v in T.unroll(rows // LANES):
                    for lane in T.vectorized(LANES):
                        acc[t * GROUP + first + v * LANES + lane] = acc[
                            t * GROUP + first + v * LANES + lane
                        ] + part[t * rows + v * LANES + lane] * scale_value(
                            scales[(*at, b, first + v * LANES + lane)]
                        )

    @T.inline
    def dot(acc, part, value, row, tokens, x, blocks, scales, at):
        for h in T.unroll(GROUP // tile.rows_beside(tokens, GROUP)):
            some_rows(
                tile.rows_beside(tokens, GROUP), h * tile.rows_beside(tokens, GROUP),
                acc, part, value, row, tokens, x, blocks, scales, at,
            )  # fmt: skip

    return dot


def _pairs(isa: PairIsa, blocks: Any, at: Any, row: Any, part: Any) -> Any:
    """i32x16: inputs 2·part and 2·part + 1 of eight, of 16 rows, as words of bfloat16."""
    stored = T.reinterpret("int32x16", blocks[(*at, T.ramp(row * 4, 1, 4 * LANES))])
    # Of each half, the nibble is what counts; above it stand others.
    shifted = T.shift_right(stored, T.broadcast(part * 4, LANES))
    codes = T.reinterpret("uint16x32", shifted)
    return T.reinterpret("int32x16", _bf16_of(isa, codes))


def _bf16_of(isa: PairIsa, codes: Any) -> Any:
    """The bfloat16 of nibbles in the low bits of u16x32, whatever is above them."""
    if isa.permutes:
        # It takes five bits of a code: the values stand in the table twice.
        return T.call_llvm_pure_intrin(
            "uint16x32", "llvm.x86.avx512.permvar.hi.512", _bf16_table(), codes
        )

    def every(value: int) -> Any:
        return T.broadcast(T.uint16(value), 2 * LANES)

    magnitude = T.bitwise_and(codes, every(7))
    sign = T.shift_left(T.bitwise_and(codes, every(8)), every(12))
    normal = T.shift_left(magnitude, every(6)) + every(0x3F00)
    small = magnitude * every(0x3F00)  # 0 or 0.5
    return T.bitwise_or(T.Select(magnitude < every(2), small, normal), sign)


def _bf16_table() -> Any:
    """u16x32: the bfloat16 of the 16 values, twice."""
    entries = VALUES.astype(ml_dtypes.bfloat16).view(np.uint64)
    lanes = [T.int64(int(entry)) for entry in entries.view(np.int64)]
    return T.reinterpret("uint16x32", T.Shuffle(lanes * 2, list(range(8))))


def _nibbles(isa: Isa) -> Callable[..., Any]:
    """Operands of stored bytes: the low nibbles, then the high ones."""
    size = 4 * isa.lanes

    def operand(w, at, b, i, vector, part):
        stored = w[(*at, b * 4 + i, T.ramp(vector * size, 1, size))]
        shift = T.broadcast(T.Cast("uint8", part * 4), size)
        low = T.bitwise_and(T.shift_right(stored, shift), T.broadcast(T.uint8(15), size))
        return isa.value_of(low)

    return operand


def int8_weights(isa: Isa) -> Int8Weights:
    """MXFP4 weights as operands of 8-bit products: doubled, so that they are integers."""
    return Int8Weights(
        parts=2,
        operand=_nibbles(isa),
        scale=lambda s, at, b, row: scale_value(s[(*at, b, row)]),
        dot=isa.dot_values,
        bias=isa.value_bias,
        factor=0.5,
    )
