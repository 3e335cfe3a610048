"""MXFP4 weights: what the bits mean, how the CPU packs them, the dot product of a tile.

A value is e2m1 (sign, two exponent bits, one mantissa bit) times 2^(scale − 127); 32 neighbours
along the input dimension share a scale byte (OCP Microscaling Formats 1.0). As stored, 16 bytes
hold a block, the low nibble first. The weights are never expanded in memory: registers only.

CPU layouts, all in groups of 32 rows whose order the caller chooses (`row_order`):

  f32 activations   [experts, groups, k/2, 32]: byte (i, r) holds inputs 2i (low), 2i+1 (high)
  bf16 activations  [experts, groups, k/8, 128]: word (i, 16v+r) holds inputs 8i to 8i+7 of row
                    16v+r, those at even places in its low half, at odd ones in its high half
  i8 activations    [experts, groups, k/8, 128]: byte (i, 64v+4r+j) holds inputs 8i+j (low) and
                    8i+4+j (high) of row 16v+r: the operand order of a 4-byte dot product
  scales, all       [experts, groups, k/32, 32]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import ml_dtypes
import numpy as np
from tvm.script import tirx as T

from .bf16 import PairTile, dot_pairs, word_at
from .int8 import BLOCK, GROUP, Int8Weights
from .isa import Isa
from .kernel import Target

LANES = 16

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = np.array([*E2M1, *(-value for value in E2M1)], np.float32)

Activations = Literal["f32", "bf16", "i8"]

# Which of eight neighbouring inputs stand in a word's nibbles, from its lowest on.
_PLACES = {"bf16": (0, 2, 4, 6, 1, 3, 5, 7), "i8": (0, 4, 1, 5, 2, 6, 3, 7)}


def dequantize(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """u8 [..., rows, k/32, 16] and u8 [..., rows, k/32] -> f32 [..., rows, k], exactly."""
    values = np.stack([VALUES[blocks & 15], VALUES[blocks >> 4]], axis=-1)
    values = values.reshape(*scales.shape, BLOCK)
    values = np.ldexp(values, scales.astype(np.int32)[..., None] - 127)
    return values.reshape(*scales.shape[:-1], scales.shape[-1] * BLOCK)


def gate_up_row_order(rows: int) -> np.ndarray:
    """Stored gate_up rows alternate gate, up; a group takes 16 gates, then their 16 ups."""
    return np.arange(rows).reshape(rows // GROUP, LANES, 2).transpose(0, 2, 1).reshape(rows)


def pack_blocks(
    blocks: np.ndarray, activations: Activations, row_order: np.ndarray | None = None
) -> np.ndarray:
    """Pack u8 [experts, rows, k/32, 16] for the CPU; result as in the module's text, u8."""
    experts, rows, nblocks, _ = blocks.shape
    half = nblocks * 16
    if row_order is not None:
        blocks = blocks[:, row_order]
    grouped = blocks.reshape(experts, rows // GROUP, GROUP, half)
    if activations == "f32":
        return np.ascontiguousarray(grouped.transpose(0, 1, 3, 2))
    # Of eight inputs, the first four are one u16 as stored, the others the next.
    stored = grouped.view("<u2").reshape(experts, rows // GROUP, GROUP, half // 4, 2)
    first, second = _spread(activations)
    words = first[stored[..., 0]] | second[stored[..., 1]]
    packed = np.ascontiguousarray(words.transpose(0, 1, 3, 2)).view(np.uint8)
    return packed.reshape(experts, rows // GROUP, half // 4, 4 * GROUP)


@cache
def _spread(activations: Activations) -> tuple[np.ndarray, np.ndarray]:
    """Two tables u32 [65536]: where the first four nibbles of eight go, and where the others."""
    codes = np.arange(1 << 16, dtype="<u4")
    tables = []
    for inputs in (range(4), range(4, 8)):
        places = [_PLACES[activations].index(i) for i in inputs]
        nibbles = [((codes >> 4 * i) & 15) << 4 * place for i, place in enumerate(places)]
        tables.append(np.bitwise_or.reduce(nibbles))
    return tables[0], tables[1]


def pack_scales(scales: np.ndarray, row_order: np.ndarray | None = None) -> np.ndarray:
    """Pack u8 [experts, rows, k/32] -> u8 [experts, groups, k/32, 32]."""
    experts, rows, nblocks = scales.shape
    if row_order is not None:
        scales = scales[:, row_order]
    grouped = scales.reshape(experts, rows // GROUP, GROUP, nblocks)
    return np.ascontiguousarray(grouped.transpose(0, 1, 3, 2))


def packed_shapes(
    experts: int, rows: int, k: int, activations: Activations
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of packed blocks and scales on the CPU."""
    groups = rows // GROUP
    blocks = (
        (experts, groups, k // 2, GROUP) if activations == "f32" else (experts, groups, k // 8, 128)
    )
    return blocks, (experts, groups, k // BLOCK, GROUP)


def stored_shapes(experts: int, rows: int, k: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of blocks and scales as stored in the checkpoint, which GPUs keep."""
    return (experts, rows, k // BLOCK, 16), (experts, rows, k // BLOCK)


def nibble_value(nibble: Any) -> Any:
    """f32 value of an e2m1 nibble held in a uint32 expression, by integer arithmetic alone."""
    magnitude = T.bitwise_and(nibble, T.uint32(7))
    normal = T.reinterpret("float32", T.shift_left(magnitude + T.uint32(252), T.uint32(22)))
    value = T.Select(
        magnitude >= T.uint32(2), normal, T.Cast("float32", magnitude) * T.float32(0.5)
    )
    return T.Select(nibble >= T.uint32(8), -value, value)


def scale_value(scale: Any) -> Any:
    """f32 2^(scale − 127) of a uint8 expression; scale 0 is the denormal 2^-127."""
    bits = T.shift_left(T.Cast("uint32", scale), T.uint32(23))
    return T.reinterpret("float32", T.Select(bits == T.uint32(0), T.uint32(0x00400000), bits))


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


def dot_bf16(target: Target, k: int, tile: PairTile) -> Any:
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
                        target, blocks, (*at, b * 4 + i // 4), first + v * LANES, i % 4
                    )
                    for t in T.unroll(tokens):
                        part[T.ramp(t * rows + v * LANES, 1, LANES)] = dot_pairs(
                            target,
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


def _pairs(target: Target, blocks: Any, at: Any, row: Any, part: Any) -> Any:
    """i32x16: inputs 2·part and 2·part + 1 of eight, of 16 rows, as words of bfloat16."""
    stored = T.reinterpret("int32x16", blocks[(*at, T.ramp(row * 4, 1, 4 * LANES))])
    # Of each half, the nibble is what counts; above it stand others.
    shifted = T.shift_right(stored, T.broadcast(part * 4, LANES))
    codes = T.reinterpret("uint16x32", shifted)
    return T.reinterpret("int32x16", _bf16_of(target, codes))


def _bf16_of(target: Target, codes: Any) -> Any:
    """The bfloat16 of nibbles in the low bits of u16x32, whatever is above them."""
    if target.has("avx512bw"):
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
