"""MXFP4 weights on GPUs: how they are packed, and how a thread multiplies its part of some rows.

A block of threads takes `rows` rows and strides over the inputs. Two threads beside each other, a
pair, share two blocks of 32 inputs: of each, thread q has the inputs 8j + 4q … 8j + 4q + 3,
j = 0 … 3. So 16 bytes hold a thread's weights of a row, its neighbour's lie beside them, and what
threads read of the inputs at the same time fills sectors of 32 bytes.

    blocks u32 [experts, rows/R, R, 2·pairs, 4]   word (2i + j/2) of a thread: eight weights of
                                                  block i, those of j even, then of j odd
    scales u32 [experts, rows/R, pairs, 2·R/4]    byte i·R + r of a pair: block i's of row r

A word has input n's magnitude in the low three bits of nibble n, and its sign in the high bit of
nibble n ^ 2. Magnitudes are e2m1's with the low bit flipped from 1.0 on:

    0   0.5   1   1.5   2   3   4   6
    000 001  011  010  101 100 111 110

An odd last block has a partner of zeros.

e2m1 has one number that is subnormal, 0.5, and GPUs flush subnormal numbers in float32, some in
float16 too. So eight weights at a time, held in one word, become four bits each, h·eet: h is 0 for
zero alone, and a float32 with them in its lowest three bits of exponent and highest bit of
mantissa is 2^-122 times the weight, and normal. Its inputs are 2^64 times what they are, so that
products are normal too. That is about three integer operations a weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..formats.blocks import BLOCK
from ..formats.mxfp4 import scale_value
from ..kernel import Layout, T, TileConfig
from .lanes import WARP, BlockSums

PAIR = 2  # threads, and the blocks of 32 that they share
WORDS = 4  # of a thread, for a row
EIGHT = 8  # weights of a word
SCALES = 4  # scale bytes of a word
PART = BLOCK // PAIR  # inputs of a block that one thread has
QUAD = 4  # inputs beside each other among them

HIGH = 0x88888888  # bits of all nibbles
LOW_THREE = 0x77777777

# As float32: what inputs are multiplied by, and what then is missing in products.
INPUT_BITS = (127 + 64) << 23
OUTPUT_BITS = (127 + 122 - 64) << 23


@dataclass(frozen=True)
class ExpertsTile(TileConfig):
    threads: int  # of a block, at most: a multiple of 32
    rows: int  # of a block, which share the inputs: a multiple of 4


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
    swapped = (signs >> 8 & 0x00FF00FF) | (signs & 0x00FF00FF) << 8
    return (magnitudes ^ from_one | swapped).astype(np.uint32)


def _pack_scales(rows: int, scales: np.ndarray) -> np.ndarray:
    shape = _scales_shape(rows, scales.shape)
    grouped = _even(scales).reshape(*shape[:2], rows, shape[2], PAIR)
    return np.ascontiguousarray(grouped.transpose(0, 1, 3, 4, 2)).view("<u4").reshape(shape)


# -- unpacking -------------------------------------------------------------------------------------


def _u32(value: int) -> Any:
    return T.uint32(value)


# Bits of a word that hold four weights h·eet, each with its sign six bits above.
_FOUR = 0x03FC03FC
# How far to the left its weights stand from a float32's place; the n-th is input n or, in the
# second word, n + 2.
_TO_FLOAT = (20, 16, 4, 0)
_FLOAT = 0x83C00000


def _four(h: Any, signs: Any) -> Any:
    """The rest of `signs` is not looked at."""
    return T.bitwise_or(
        T.bitwise_and(h, _u32(_FOUR)), T.bitwise_and(signs, _u32(0xFFFFFFFF ^ _FOUR))
    )


def _weight(four: Any, n: int) -> Any:
    """f32 2^-122 times a weight."""
    bits = T.shift_left(four, _u32(_TO_FLOAT[n])) if _TO_FLOAT[n] else four
    return T.reinterpret("float32", T.bitwise_and(bits, _u32(_FLOAT)))


@T.inline
def unpack(word, four):
    """The eight weights of `word` as four[0] and four[1], u32 [2]."""
    # Nibbles: magnitude + 7 carries into the high bit unless it is zero. Then the low bit is the
    # mantissa's, but flipped.
    four[1] = word & T.uint32(LOW_THREE)
    four[0] = (four[1] + T.uint32(LOW_THREE)) & T.uint32(HIGH)
    four[1] = (four[1] ^ (four[0] >> T.uint32(3))) + four[0]
    four[0] = _four(four[1] << T.uint32(2), word)
    four[1] = _four(four[1] >> T.uint32(6), word << T.uint32(8))


# Of the inputs of a word in order: which half of the unpacked weights, and which place there.
_PLACES = ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3), (1, 2), (1, 3))


def _plus_products(total: Any, four: Any, x: Any, at: Any) -> Any:
    """`total` plus unpacked weights times x[at : at + 8]."""
    for n, (half, place) in enumerate(_PLACES):
        total = total + _weight(four[half], place) * x[at + n]
    return total


# -- a block of threads ----------------------------------------------------------------------------


@dataclass(frozen=True)
class ExpertRows:
    """Some rows of one expert times one vector of k inputs: a thread's part of it.

    products(acc, x, row, blocks, scales, expert, group, tx)
        acc f32 [rows] += the thread's part of rows group·rows … of W[expert] times x[row, :];
        blocks and scales are as packed
    """

    family: str
    k: int
    tile: ExpertsTile

    @property
    def threads(self) -> int:
        """Of a block: no more than have something to do, in whole warps."""
        return min(self.tile.threads, -(-PAIR * pairs_of(self.k) // WARP) * WARP)

    @property
    def sums(self) -> BlockSums:
        return BlockSums(self.family, self.threads, self.tile.rows)

    @property
    def products(self) -> Any:
        k, rows, threads = self.k, self.tile.rows, self.threads
        lanes = PAIR * pairs_of(k)
        steps = -(-lanes // threads)
        per_block = rows // SCALES  # words of scales

        def first_input(lane: Any, i: Any) -> Any:
            """Of the thread's part of its i-th block. The partner of an odd last block, whose
            weights are zeros, reads that one again."""
            block = lane // PAIR * PAIR + i
            if k // BLOCK % PAIR:
                block = T.min(block, k // BLOCK - 1)
            return block * BLOCK + lane % PAIR * QUAD

        @T.inline
        def step(acc, x, row, blocks, scales, expert, group, lane):
            word = T.sblock_alloc_buffer((rows * WORDS,), "uint32", scope="local")
            scale = T.sblock_alloc_buffer((PAIR * per_block,), "uint32", scope="local")
            input = T.sblock_alloc_buffer((PAIR * PART,), "float32", scope="local")
            four = T.sblock_alloc_buffer((2,), "uint32", scope="local")
            part = T.sblock_alloc_buffer((1,), "float32", scope="local")
            power = T.sblock_alloc_buffer((2,), "uint32", scope="local")
            # No constants: Metal's would be printed with seven digits.
            power[0] = T.uint32(INPUT_BITS)
            power[1] = T.uint32(OUTPUT_BITS)
            for i in T.unroll(PAIR):
                for j in T.unroll(PART // QUAD):
                    input[T.ramp(i * PART + j * QUAD, 1, QUAD)] = x[
                        row, T.ramp(first_input(lane, i) + j * PAIR * QUAD, 1, QUAD)
                    ]
            for r in T.unroll(rows):
                word[T.ramp(r * WORDS, 1, WORDS)] = blocks[
                    expert, group, r, lane, T.ramp(0, 1, WORDS)
                ]
            scale[T.ramp(0, 1, PAIR * per_block)] = scales[
                expert, group, lane // PAIR, T.ramp(0, 1, PAIR * per_block)
            ]
            for i in T.unroll(PAIR * PART):
                input[i] = input[i] * T.reinterpret("float32", power[0])
            for r in T.unroll(rows):
                for i in T.unroll(PAIR):
                    part[0] = T.float32(0)
                    for v in T.unroll(WORDS // PAIR):
                        unpack(word[r * WORDS + i * (WORDS // PAIR) + v], four)
                        part[0] = _plus_products(part[0], four, input, i * PART + v * EIGHT)
                    acc[r] = acc[r] + part[0] * T.reinterpret("float32", power[1]) * scale_value(
                        (scale[i * per_block + r // SCALES] >> T.uint32(r % SCALES * 8))
                        & T.uint32(255)
                    )

        @T.inline
        def products(acc, x, row, blocks, scales, expert, group, tx):
            for s in T.serial(steps):
                if s * threads + tx < lanes:
                    step(acc, x, row, blocks, scales, expert, group, s * threads + tx)

        return products
