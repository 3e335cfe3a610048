"""MXFP4 weights on GPUs: how they are packed, and how a thread multiplies its part of some rows.

A block of threads takes R rows and strides over the inputs. Two threads beside each other, a pair,
share two blocks of 32 inputs: of each, thread q has the inputs 8j + 4q … 8j + 4q + 3, j = 0 … 3. So
16 bytes hold a thread's weights of a row, its neighbour's lie beside them, and what threads read of
the inputs at the same time fills sectors of 32 bytes, without a copy in shared memory.

    blocks u32 [experts, rows/R, R, 2·pairs, 4]   word 2i + j/2 of a thread: eight weights of
                                                  block i, those of j even, then of j odd
    scales u32 [experts, rows/R, pairs, 2·R/4]    byte i·R + r of a pair: block i's of row r

An odd last block has a partner of zeros.

A word has input n's magnitude in the low three bits of nibble n, and its sign in the high bit of
nibble n ^ 1. Magnitudes are e2m1's with the low bit flipped from 1 on:

    0    0.5  1    1.5  2    3    4    6
    000  001  011  010  101  100  111  110

Moved into a float16, e2m1's exponent and mantissa give 0.5 as a subnormal number, which some GPUs
flush to zero, as nearly all do in float32. So all eight weights of a word at a time become four
bits, h·eet. These are a float16's lowest three bits of exponent and highest one of mantissa: 2^-10
times the weight, normal, and zero where the weight is. It takes 5 operations for all eight
weights, 7 to give them their signs and a byte each, and 8 to make pairs of float16; then a GPU
converts, many in the multiplication itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..formats.blocks import BLOCK
from ..formats.mxfp4 import scale_value
from ..kernel import Layout, T, TileConfig
from .lanes import WARP
from .product import STEP, ProductRows

PAIR = 2  # threads, and the blocks of 32 that they share
WORDS = 4  # of a thread, for a row
EIGHT = 8  # weights of a word
SCALES = 4  # scale bytes of a word
PART = BLOCK // PAIR  # inputs of a block that one thread has
QUAD = 4  # inputs beside each other among them

HIGH = 0x88888888  # bits of all nibbles
LOW_THREE = 0x77777777

UNIT = 1024  # a weight divided by its float16


@dataclass(frozen=True)
class ExpertsTile(TileConfig):
    threads: int  # that share the inputs, at most: a multiple of 32
    rows: int  # of a block, which share the inputs: a multiple of 4
    teams: int = 1  # of so many threads in a block, each of which takes other experts
    ahead: int = 1  # experts of a team whose weights are loaded before the first is used
    # Of several tokens (chosen.py), two numbers of an expert's tokens that share its unpacked
    # weights, the smaller first: what fewer do not need is multiplied all the same.
    together: tuple[int, int] = (2, 4)


def pairs_of(k: int) -> int:
    """Pairs of blocks in a row of k inputs."""
    return -(-k // (PAIR * BLOCK))


# -- packing ---------------------------------------------------------------------------------------


def layouts(rows: int) -> dict[str, Layout]:
    """Of the arguments `blocks` and `scales`, for blocks of so many rows."""
    return {
        "blocks": Layout(partial(_blocks_shape, rows), partial(_pack_blocks, rows), dtype="uint32"),
        "scales": Layout(partial(_scales_shape, rows), partial(_pack_scales, rows), dtype="uint32"),
    }


def _blocks_shape(rows: int, shape: tuple[Any, ...]) -> tuple[Any, ...]:
    experts, n, nblocks, _ = shape
    return (experts, n // rows, rows, PAIR * pairs_of(nblocks * BLOCK), WORDS)


def _scales_shape(rows: int, shape: tuple[Any, ...]) -> tuple[Any, ...]:
    experts, n, nblocks = shape
    return (experts, n // rows, pairs_of(nblocks * BLOCK), PAIR * rows // SCALES)


def _even(array: np.ndarray) -> np.ndarray:
    """[experts, rows, blocks, …] with another block of zeros where they are odd."""
    odd = array.shape[2] % PAIR
    return np.pad(array, ((0, 0), (0, 0), (0, odd), *((0, 0),) * (array.ndim - 3)))


def _pack_blocks(rows: int, blocks: np.ndarray) -> np.ndarray:
    shape = _blocks_shape(rows, blocks.shape)
    # Four nibbles as stored are one u16: [experts, rows, pairs, block, j / 2, j % 2, thread].
    fours = _even(np.ascontiguousarray(blocks)).view("<u2")
    fours = fours.reshape(*blocks.shape[:2], -1, PAIR, 2, 2, PAIR)
    words = np.ascontiguousarray(fours.transpose(0, 1, 2, 6, 3, 4, 5)).view("<u4").reshape(shape)
    signs = words & HIGH
    magnitudes = words & LOW_THREE
    from_one = ((magnitudes + 0x66666666) & HIGH) >> 3
    swapped = (signs >> 4 & 0x0F0F0F0F) | (signs & 0x0F0F0F0F) << 4
    return (magnitudes ^ from_one | swapped).astype(np.uint32)


def _pack_scales(rows: int, scales: np.ndarray) -> np.ndarray:
    shape = _scales_shape(rows, scales.shape)
    grouped = _even(scales).reshape(*shape[:2], rows, shape[2], PAIR)
    return np.ascontiguousarray(grouped.transpose(0, 1, 3, 4, 2)).view("<u4").reshape(shape)


# -- unpacking -------------------------------------------------------------------------------------


def _u32(value: int) -> Any:
    return T.uint32(value)


def _with_signs(h: Any, signs: Any) -> Any:
    """Four weights, a byte each: the sign, two bits of no meaning, h·eet, another one."""
    return T.bitwise_or(
        T.bitwise_and(h, _u32(0x1E1E1E1E)), T.bitwise_and(signs, _u32(0xFFFFFFFF ^ 0x1E1E1E1E))
    )


@T.inline
def unpack(word, four):
    """`word` to four u32 [2]: its weights at even places, then those at odd ones."""
    # Nibbles: magnitude + 7 carries into the high bit unless it is zero. Then the low bit is the
    # mantissa's, but flipped.
    four[1] = word & T.uint32(LOW_THREE)
    four[0] = (four[1] + T.uint32(LOW_THREE)) & T.uint32(HIGH)
    four[1] = (four[1] ^ (four[0] >> T.uint32(3))) + four[0]
    four[0] = _with_signs(four[1] << T.uint32(1), word)
    four[1] = _with_signs(four[1] >> T.uint32(3), word << T.uint32(4))


def half_weight(four: Any, n: int) -> Any:
    """f32 2^-10 times the weight of byte n."""
    # A float16 has the sign, two bits of exponent that are zero, h·eet, the rest of the mantissa.
    two = four if n % 2 else T.shift_left(four, _u32(8))
    half = T.bitwise_and(two, _u32(0x9E009E00))
    if n // 2:
        half = T.shift_right(half, _u32(16))
    return T.Cast("float32", T.reinterpret("float16", T.Cast("uint16", half)))


@T.inline
def scaled(weight, four, factor):
    """weight f32 [8] = an unpacked word times a factor."""
    weight[0] = half_weight(four[0], 0) * factor
    weight[1] = half_weight(four[1], 0) * factor
    weight[2] = half_weight(four[0], 1) * factor
    weight[3] = half_weight(four[1], 1) * factor
    weight[4] = half_weight(four[0], 2) * factor
    weight[5] = half_weight(four[1], 2) * factor
    weight[6] = half_weight(four[0], 3) * factor
    weight[7] = half_weight(four[1], 3) * factor


def _plus_products(total: Any, four: Any, x: Any, at: Any) -> Any:
    """`total` plus unpacked weights times x[at : at + 8]."""
    for n in range(EIGHT):
        total = total + half_weight(four[n % 2], n // 2) * x[at + n]
    return total


def product_rows(rows: int, group: int) -> ProductRows:
    """Weights (blocks, scales) as packed for blocks of so many rows, in products of many tokens:
    UNIT times their sums. So no scale takes a weight beyond float32."""

    def scale_of(scale: Any, slot: Any, s: Any, row: Any) -> Any:
        """Of the s-th block of a pair."""
        byte = T.shift_right(scale[slot * PAIR + s], T.Cast("uint32", row % SCALES * 8))
        return scale_value(T.bitwise_and(byte, _u32(255)))

    @T.inline
    def load(weights, expert, row, c, words, scale, slot):
        words[T.ramp(slot * WORDS, 1, WORDS)] = weights[0][
            expert, row // rows, row % rows, c, T.ramp(0, 1, WORDS)
        ]
        for i in T.unroll(PAIR):
            scale[slot * PAIR + i] = weights[1][
                expert, row // rows, c // PAIR, i * (rows // SCALES) + row % rows // SCALES
            ]

    @T.inline
    def put(words, scale, slot, s, row, c, keep):
        four = T.sblock_alloc_buffer((2,), "uint32", scope="local")
        eight = T.sblock_alloc_buffer((EIGHT,), "float32", scope="local")
        factor: T.let = scale_of(scale, slot, s, row)
        for v in T.unroll(WORDS // PAIR):
            unpack(words[slot * WORDS + s * (WORDS // PAIR) + v], four)
            scaled(eight, four, factor)
            for j in T.unroll(EIGHT // QUAD):
                keep((v * (EIGHT // QUAD) + j) * PAIR * QUAD + c % PAIR * QUAD, eight, j * QUAD)

    return ProductRows(
        inputs=BLOCK,
        steps=PAIR * BLOCK // STEP,
        scales=PAIR,
        group=group,
        load=load,
        put=put,
        bound=lambda scale, slot, s, row: T.float32(6 / UNIT) * scale_of(scale, slot, s, row),
    )


# -- a block of threads ----------------------------------------------------------------------------


@dataclass(frozen=True)
class ExpertRows:
    """Some rows of a few experts, each times a vector of k inputs: a thread's part of the sums.

    products(acc, x, row, factor, blocks, scales, bias, expert, group, tx)
        acc f32 [rows] = Σ_j factor(j) · the thread's part of rows group·rows … of
        W[expert(j)] · x[row(j), :] + bias[expert(j)], of `experts` j; blocks and scales are as
        packed, tx < threads
    """

    k: int
    tile: ExpertsTile
    experts: int = 1

    @property
    def threads(self) -> int:
        """That share the inputs: no more than have something to do, in whole warps."""
        return min(self.tile.threads, -(-self.lanes // WARP) * WARP)

    @property
    def lanes(self) -> int:
        """Parts that the inputs have: a thread's of two blocks."""
        return PAIR * pairs_of(self.k)

    @property
    def steps(self) -> int:
        """Of a thread, each one part: with fewer than all of them in the last."""
        return -(-self.lanes // self.threads)

    def first_input(self, lane: Any, i: Any) -> Any:
        """Of a part's i-th block. The partner of an odd last block, whose weights are zeros, has
        that one's again."""
        block = lane // PAIR * PAIR + i
        if self.k // BLOCK % PAIR:
            block = T.min(block, self.k // BLOCK - 1)
        return block * BLOCK + lane % PAIR * QUAD

    @property
    def products(self) -> Any:
        rows, threads, experts = self.tile.rows, self.threads, self.experts
        lanes, steps, first_input = self.lanes, self.steps, self.first_input
        per_block = rows // SCALES  # words of scales
        per_pair = PAIR * per_block
        ahead = min(self.tile.ahead, experts)

        @T.inline
        def load(word, scale, begin, inputs, j, x, row, blocks, scales, bias, expert, group, lane):
            """What the thread needs of expert j, into place j % ahead."""
            for i in T.unroll(PAIR):
                for v in T.unroll(PART // QUAD):
                    inputs[T.ramp(j % ahead * BLOCK + i * PART + v * QUAD, 1, QUAD)] = x[
                        row(j), T.ramp(first_input(lane, i) + v * PAIR * QUAD, 1, QUAD)
                    ]
            for r in T.unroll(rows):
                word[T.ramp((j % ahead * rows + r) * WORDS, 1, WORDS)] = blocks[
                    expert(j), group, r, lane, T.ramp(0, 1, WORDS)
                ]
            scale[T.ramp(j % ahead * per_pair, 1, per_pair)] = scales[
                expert(j), group, lane // PAIR, T.ramp(0, 1, per_pair)
            ]
            for v in T.unroll(rows // QUAD):
                begin[T.ramp(j % ahead * rows + v * QUAD, 1, QUAD)] = bias[
                    expert(j), T.ramp(group * rows + v * QUAD, 1, QUAD)
                ]

        @T.inline
        def multiply(one, inputs, word, scale, j, four, part):
            for r in T.unroll(rows):
                one[r] = T.float32(0)
            for i in T.unroll(PAIR):
                for r in T.unroll(rows):
                    part[0] = T.float32(0)
                    for v in T.unroll(WORDS // PAIR):
                        unpack(word[(j % ahead * rows + r) * WORDS + i * (WORDS // PAIR) + v], four)
                        part[0] = _plus_products(
                            part[0], four, inputs, j % ahead * BLOCK + i * PART + v * EIGHT
                        )
                    one[r] = one[r] + T.float32(UNIT) * part[0] * scale_value(
                        (
                            scale[j % ahead * per_pair + i * per_block + r // SCALES]
                            >> T.uint32(r % SCALES * 8)
                        )
                        & T.uint32(255)
                    )

        @T.inline
        def products(acc, x, row, factor, blocks, scales, bias, expert, group, tx):
            word = T.sblock_alloc_buffer((ahead * rows * WORDS,), "uint32", scope="local")
            scale = T.sblock_alloc_buffer((ahead * per_pair,), "uint32", scope="local")
            inputs = T.sblock_alloc_buffer((ahead * BLOCK,), "float32", scope="local")
            four = T.sblock_alloc_buffer((2,), "uint32", scope="local")
            part = T.sblock_alloc_buffer((1,), "float32", scope="local")
            one = T.sblock_alloc_buffer((rows,), "float32", scope="local")
            begin = T.sblock_alloc_buffer((ahead * rows,), "float32", scope="local")
            for r in T.unroll(rows):
                acc[r] = T.float32(0)
            for s in T.serial(steps):
                if s * threads + tx < lanes:
                    lane: T.let = s * threads + tx
                    for j in T.unroll(ahead):
                        load(
                            word, scale, begin, inputs, j,
                            x, row, blocks, scales, bias, expert, group, lane,
                        )  # fmt: skip
                    for j in T.unroll(experts):
                        multiply(one, inputs, word, scale, j, four, part)
                        for r in T.unroll(rows):
                            # One thread has the bias, which has arrived by now.
                            acc[r] = acc[r] + factor(j) * (
                                one[r]
                                + T.Select(lane == 0, begin[j % ahead * rows + r], T.float32(0))
                            )
                        if j + ahead < experts:
                            load(
                                word, scale, begin, inputs, j + ahead,
                                x, row, blocks, scales, bias, expert, group, lane,
                            )  # fmt: skip

        return products
