"""MXFP4 weights for mma.sync, unpacked in registers.

A tile is 16 rows, a step 64 inputs: two blocks. In a step, lane 4·g + t has the inputs 8t … 8t+7 of
both blocks of the rows g and g+8, 16 bytes: the word 2·block + row. A word has four pairs of
neighbouring inputs, the even one in its low half:

    bits of a half   15 8 7 6    12 5 4 3    9 2 1 0    14 13 11 10
    hold the pair    0           1           2          3              sign and magnitude

A shift and a mask make a pair of bfloat16 of it: sign, the two last bits of the exponent, the first
bit of the mantissa. That is 2^-126 of the value, subnormal where it is 0.5. Inputs come times
2^64 (`raised`), and sums go out times 2^62 (`LOWER`), so that neither leaves the range of f32.

    blocks u8 [e, rows, k/32, 16] -> u8 [e, (rows/16, steps, 32 lanes, 16)]
    scales u8 [e, rows, k/32]     -> u32 [e, (rows/16, steps, 8)]: byte 2·block + row of the word g

k need not fill the last step: what is left are zeros.

The products of a block are summed apart, and the sum is multiplied by the scale in f32. Of inputs
below 2^-62 digits are lost, and scale 0, the subnormal 2^-127, counts as zero: neither is seen
beside other terms of a sum. All other scales, and inputs up to 2^63, are exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..formats.blocks import BLOCK
from ..kernel import Layout, T
from .instructions import LANES, MMA_COLUMNS, MMA_ROWS, mma_bf16
from .product import ProductRows
from .warps import lanes_where, shared_with

STEP = 2 * BLOCK
STEP_BYTES, STEP_SCALES = LANES * 16, MMA_ROWS // 2  # of a tile
RAISE, LOWER = 2.0**64, 2.0**62
_RAISE_PAIR = 0x5F805F80  # RAISE, as two bfloat16

# Where the magnitude of a pair begins in a half, and where its sign is. The last pair has the high
# bit of its magnitude apart.
_PLACES = ((6, 15), (3, 12), (0, 9), (10, 14))
_MASK = 0x81C081C0


def _halves() -> np.ndarray:
    """u32 [4, 256]: what the byte of two nibbles adds to its word, by the pair's number."""
    nibble = np.arange(16, dtype=np.uint32)
    sign, magnitude = nibble >> 3, nibble & 7
    table = []
    for pair, (low, sign_at) in enumerate(_PLACES):
        bits = magnitude if pair < 3 else magnitude & 3 | (magnitude & 4) << 1
        half = bits << low | sign << sign_at
        table.append((half[None] | half[:, None] << 16).ravel())
    return np.stack(table)


def _stepped(array: np.ndarray) -> np.ndarray:
    """[e, rows, k/32, …] -> [e, rows, steps, 2, …], filled up with zeros."""
    fill = [(0, 0)] * array.ndim
    fill[2] = (0, array.shape[2] % 2)
    padded = np.pad(array, fill)
    return padded.reshape(*array.shape[:2], -1, 2, *array.shape[3:])


Rows = Callable[[np.ndarray], np.ndarray]  # [e, rows, …] -> [e, tiles, g, 2, …]


def neighbours(array: np.ndarray) -> np.ndarray:
    """A lane's rows are g and g + 8 of the tile's 16."""
    return array.reshape(len(array), -1, 2, MMA_ROWS // 2, *array.shape[2:]).swapaxes(2, 3)


def alternating(array: np.ndarray) -> np.ndarray:
    """A lane's rows are 2g and 2g + 1."""
    return array.reshape(len(array), -1, MMA_ROWS // 2, 2, *array.shape[2:])


def steps(k: int) -> int:
    return -(-k // STEP)


def pairs_apart(blocks: np.ndarray) -> np.ndarray:
    """u8 [e, rows, k/32, 16] -> u32 [e, rows, k/32, 4 lanes]: words as said above."""
    words = np.zeros((*blocks.shape[:3], 4), np.uint32)
    for pair, halves in enumerate(_halves()):
        words |= halves[blocks[..., pair::4]]
    return words


def layouts(
    rows: Rows, packed: Callable[[np.ndarray], np.ndarray] = pairs_apart
) -> dict[str, Layout]:
    """How the weights [e, rows, k] are packed; `rows` says which two of a tile are a lane's, and
    `packed` makes its words."""

    def packed_blocks(blocks: np.ndarray) -> np.ndarray:
        words = packed(blocks)
        # [e, tile, g, row, step, block, t] -> [e, tile, step, g, t, block, row]
        words = rows(_stepped(words)).transpose(0, 1, 4, 2, 6, 5, 3)
        return np.ascontiguousarray(words).view(np.uint8).reshape(len(words), -1)

    def packed_scales(scales: np.ndarray) -> np.ndarray:
        # [e, tile, g, row, step, block] -> [e, tile, step, g, block, row]
        ordered = rows(_stepped(scales)).transpose(0, 1, 4, 2, 5, 3)
        return np.ascontiguousarray(ordered).reshape(len(ordered), -1).view(np.uint32)

    def shape(step: int) -> Callable[[tuple[Any, ...]], tuple[Any, ...]]:
        return lambda of: (of[0], of[1] // MMA_ROWS * steps(of[2] * BLOCK) * step)

    return {
        "blocks": Layout(shape(STEP_BYTES), packed_blocks),
        "scales": Layout(shape(STEP_SCALES), packed_scales, dtype="uint32"),
    }


# -- device code ----------------------------------------------------------------------------------


@T.inline
def load_step(blocks, scales, expert, start, step, lane, words, scale, slot):
    """A lane's part of step number `step` after the step `start` of an expert, into place `slot`
    of words u32 [4·slots], scale u32 [slots]."""
    at: T.let = T.Cast("int64", expert)
    T.ptx["ld.global.nc.L1::no_allocate.v4.b32"](
        words[4 * slot], words[4 * slot + 1], words[4 * slot + 2], words[4 * slot + 3],
        T.address_of(blocks[at, start * STEP_BYTES + lane * 16 + step * STEP_BYTES]),
    )  # fmt: skip
    scale[slot] = scales[at, start * STEP_SCALES + lane // 4 + step * STEP_SCALES]


@T.inline
def unpack(words, at, a):
    """Two rows' words of a block -> the fragments a u32 [8] of two mma, 2^-126 of the values."""
    for row in T.unroll(2):
        word: T.let = words[at + row]
        a[row] = T.bitwise_and(word, T.uint32(_MASK))
        a[2 + row] = T.bitwise_and(T.shift_left(word, T.uint32(3)), T.uint32(_MASK))
        a[4 + row] = T.bitwise_and(T.shift_left(word, T.uint32(6)), T.uint32(_MASK))
        a[6 + row] = T.bitwise_or(
            T.bitwise_or(
                T.bitwise_and(T.shift_left(word, T.uint32(1)), T.uint32(0x80008000)),
                T.bitwise_and(T.shift_right(word, T.uint32(5)), T.uint32(0x01000100)),
            ),
            T.bitwise_and(T.shift_right(word, T.uint32(4)), T.uint32(0x00C000C0)),
        )


_FACTOR = """
__forceinline__ __device__ uint32_t mx_factor(uint32_t scales, uint32_t selector) {
  return __byte_perm(scales, 0, selector) * 128 + 0x3F003F00;
}
"""
_TIMES = """#include <cuda_bf16.h>
__forceinline__ __device__ uint32_t mx_times(uint32_t a, uint32_t b) {
  __nv_bfloat162 product = __hmul2(*(__nv_bfloat162*)&a, *(__nv_bfloat162*)&b);
  return *(uint32_t*)&product;
}
"""


def _times(a: Any, b: Any) -> Any:
    """u32 of the products of two pairs of bfloat16."""
    return T.cuda.func_call("mx_times", a, b, source_code=_TIMES, return_type="uint32")


def _factor(scales: Any, byte: Any) -> Any:
    """u32 of two bfloat16 2^(s - 1), of a scale s below 128 in a step's word."""
    selector = T.bitwise_or(T.Cast("uint32", byte * 0x0101), T.uint32(0x4040))
    return T.cuda.func_call(
        "mx_factor", scales, selector, source_code=_FACTOR, return_type="uint32"
    )


def _large_scales(scale: Any, first: Any, count: int) -> Any:
    """Whether any lane has a scale of 128 or more among so many words."""
    words = scale[first]
    for i in range(1, count):
        words = T.bitwise_or(words, scale[first + i])
    high = T.bitwise_and(words, T.uint32(0x80808080))
    return lanes_where(high > T.uint32(0)) > T.uint32(0)


@T.inline
def _unpack_scaled(words, scale, slot, block, large, a, at):
    """As `unpack`, of place `slot` into a[at …], times their scales: the values as they are.

    Where one is `large`, no factor undoes the 2^-126 too: two do.
    """
    raw = T.sblock_alloc_buffer((8,), "uint32", scope="local")
    unpack(words, 4 * slot + 2 * block, raw)
    if large:
        for row in T.unroll(2):
            byte: T.let = T.bitwise_and(
                T.shift_right(scale[slot], T.Cast("uint32", 8 * (2 * block + row))), T.uint32(255)
            )
            # 2^(s - 127); of s = 0 the subnormal
            half: T.let = T.max(T.shift_left(byte, T.uint32(7)), T.uint32(0x40))
            factor: T.let = T.bitwise_or(half, T.shift_left(half, T.uint32(16)))
            for i in T.unroll(4):
                a[at + 2 * i + row] = _times(_times(raw[2 * i + row], T.uint32(0x7E807E80)), factor)
    else:
        for row in T.unroll(2):
            factor: T.let = _factor(scale[slot], 2 * block + row)
            for i in T.unroll(4):
                a[at + 2 * i + row] = _times(raw[2 * i + row], factor)


def scale_of(scales: Any, block: Any, row: Any) -> Any:
    """f32 scale of one of a lane's two rows, out of a step's word."""
    byte = T.shift_right(scales, T.Cast("uint32", 8 * (2 * block + row)))
    bits = T.bitwise_and(T.shift_left(byte, T.uint32(23)), T.uint32(0x7F800000))
    return T.reinterpret("float32", bits)


_BF16_PAIR = """#include <cuda_bf16.h>
__forceinline__ __device__ uint32_t bf16_pair(float low, float high) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *(uint32_t*)&pair;
}
"""


def bf16_pair(low: Any, high: Any) -> Any:
    """u32 of two f32 rounded to bfloat16."""
    return T.cuda.func_call("bf16_pair", low, high, source_code=_BF16_PAIR, return_type="uint32")


def low_half(pair: Any) -> Any:
    """f32 of the first bfloat16 of two."""
    return T.reinterpret("float32", T.shift_left(pair, T.uint32(16)))


def high_half(pair: Any) -> Any:
    """f32 of the second bfloat16 of two."""
    return T.reinterpret("float32", T.bitwise_and(pair, T.uint32(0xFFFF0000)))


def column_word(columns: int, block: Any, column: Any) -> Any:
    """Where a column's 32 inputs of a block begin in shared memory: 16 words of bfloat16 pairs.

    Columns change places with their neighbours in odd blocks, so that neighbouring threads write to
    different banks, as they read from them.
    """
    return (block * columns + T.bitwise_xor(column, block % 2)) * (BLOCK // 2)


@T.inline
def read_columns(xs, columns, step, column, t, b):
    """b u32 [8] = a lane's inputs of a step, of a column in xs, which `column_word` places."""
    for block in T.unroll(2):
        at: T.let = column_word(columns, 2 * step, T.bitwise_xor(column, block))
        b[T.ramp(4 * block, 1, 4)] = xs[T.ramp(at + block * columns * (BLOCK // 2) + 4 * t, 1, 4)]


@T.inline
def multiply_step(inputs, words, scale, slot, groups, read, b, a, part, acc, to):
    """acc[to …] f32 [groups, 2 rows, inputs.own] += a lane's part of a step · the inputs b u32
    [8·groups].

    The weights are unpacked once for all groups of columns. read(slot, group, block) brings
    b[8·group + 4·block …] when they are needed, unless it is None. a u32 [8] and part f32 [4]
    are scratch.
    """
    own = T.meta_var(inputs.own)
    for block in T.unroll(2):
        inputs.unpack(words, 4 * slot + 2 * block, a)
        for group in T.unroll(groups):
            if read is not None:
                read(slot, group, block)
            for i in T.unroll(4):
                part[i] = T.float32(0)
            mma_bf16(part, 0, a, 0, b, 8 * group + 4 * block)
            mma_bf16(part, 0, a, 4, b, 8 * group + 4 * block + 2)
            for row, j in T.grid(2, own):
                sum = T.meta_var(to + (2 * group + row) * own + j)
                acc[sum] = acc[sum] + scale_of(scale[slot], block, row) * (
                    part[2 * row + j] if own == 2 else part[2 * row] + part[2 * row + 1]
                )


def loader(k: int) -> Callable[..., Any]:
    """`ProductRows.load` of weights [experts, rows, k]."""

    @T.inline
    def load(weights, expert, number, at, lane, words, scale, slot):
        load_step(weights[0], weights[1], expert, number * steps(k), at, lane, words, scale, slot)

    return load


def rows(k: int) -> ProductRows:
    """Of weights [experts, rows, k], for a product of many columns."""
    return ProductRows(
        blocks=2, ahead=2, words=4, scales=1, load=loader(k), look=_large_scales,
        fragments=_unpack_scaled,
    )  # fmt: skip


# -- inputs ---------------------------------------------------------------------------------------


# What the launch before wrote is read by these. Not by ld.global.nc: ptxas takes what that reads
# for constant, and may move it over the wait for that launch.


@T.inline
def load_words(to, at, start):
    """16 bytes from the address `start` in global memory into to u32 [4], from an index on."""
    T.ptx["ld.global.v4.b32"](to[at], to[at + 1], to[at + 2], to[at + 3], start)


@T.inline
def load_pair(to, at, start):
    """The same of 8 bytes into two of them."""
    T.ptx["ld.global.v2.b32"](to[at], to[at + 1], start)


@T.inline
def load_word(to, at, start):
    """The 32 bits at the address `start` in global memory into to[at], u32."""
    T.ptx["ld.global.b32"](to[at], start)


@T.inline
def split_floats(load, at, factor, pairs):
    """pairs u32 [4] = two pairs of bfloat16 of the f32 load[at …] times a factor, and two of what
    they leave."""
    for i in T.unroll(2):
        low: T.let = T.reinterpret("float32", load[at + 2 * i]) * T.float32(factor)
        high: T.let = T.reinterpret("float32", load[at + 2 * i + 1]) * T.float32(factor)
        pairs[i] = bf16_pair(low, high)
        pairs[2 + i] = bf16_pair(low - low_half(pairs[i]), high - high_half(pairs[i]))


@T.inline
def _f32_columns(load, at, pairs):
    split_floats(load, at, RAISE, pairs)


@T.inline
def _bf16_columns(load, at, pairs):
    for i in T.unroll(4):
        pairs[i] = _times(load[at + i], T.uint32(_RAISE_PAIR))


@T.inline
def _f32_fragments(raw, at, lane, pairs, b, to):
    # Columns 2c and 2c + 1 are token c. A lane has 8 inputs of one of the step's blocks, and makes
    # both columns of them; with the lane of the other column it changes one for one.
    odd: T.let = lane // 4 % 2 == 1
    for j in T.unroll(2):
        _f32_columns(raw, at + 4 * j, pairs)
        for i in T.unroll(2):
            got: T.let = shared_with(T.Select(odd, pairs[i], pairs[2 + i]), 4)
            b[to + 2 * j + i] = T.Select(odd, got, pairs[i])
            b[to + 4 + 2 * j + i] = T.Select(odd, pairs[2 + i], got)


@T.inline
def _bf16_fragments(raw, at, _lane, pairs, b, to):
    for j in T.unroll(2):
        _bf16_columns(raw, at + 4 * j, pairs)
        for i in T.unroll(4):
            b[to + 4 * j + i] = pairs[i]


@dataclass(frozen=True)
class Inputs:
    """How the inputs of a token become columns of bfloat16.

    parts: how many columns it takes, which its product is the sum of
    width: inputs in 16 bytes
    columns(load, at, pairs): pairs u32 [4], for each part the inputs raised, of the 16 bytes
        load[at …]
    fragments(raw, at, lane, pairs, b, to): b[to …] u32 [8] = a lane's inputs of a step and a group
        of columns, of what `load_inputs` brought to raw[at …]; all lanes of a warp; pairs u32 [4]
        is scratch
    unpack, packed: how the weights' words become bfloat16, and what made them, as `unpack` and
        `pairs_apart` do
    scaled: whether they are MXFP8, which many tokens are multiplied as (cuda/mxfp8.py)
    """

    parts: int
    width: int
    columns: Any
    fragments: Any
    unpack: Any = unpack
    packed: Callable[[np.ndarray], np.ndarray] = pairs_apart
    scaled: bool = False

    @property
    def own(self) -> int:
        """Tokens of a group whose sums a lane has, of two rows."""
        return 2 // self.parts

    @property
    def group(self) -> int:
        """Tokens in a group of columns."""
        return MMA_COLUMNS // self.parts

    def token(self, lane: Any) -> Any:
        """Whose inputs a lane loads, of a group's tokens; also that of its column."""
        return lane // 4 // self.parts

    def place(self, lane: Any, j: int) -> tuple[Any, Any]:
        """Of the lane's j-th 16 bytes of a step: the block, and the first input of it."""
        if self.parts == 2:
            return lane // 4 % 2, 8 * (lane % 4) + 4 * j
        return j, 8 * (lane % 4)


# By activation format. An f32 is split into what bfloat16 holds of it, and what it holds of the
# rest: 2^-17 of it is lost at most.
INPUTS = {
    "f32": Inputs(2, 4, _f32_columns, _f32_fragments),
    "bf16": Inputs(1, 8, _bf16_columns, _bf16_fragments),
}


@T.inline
def load_inputs(inputs, k, x, row, step, lane, raw, at):
    """raw[at …] u32 [8] = what `inputs.fragments` needs of a step of x [n, k]: 32 bytes of the row
    of token `inputs.token(lane)` of a group. Zeros behind k; of no step, any inputs."""
    for j in T.unroll(2):
        place = T.meta_var(inputs.place(lane, j))
        block: T.let = 2 * T.min(step, steps(k) - 1) + place[0]
        if (k % STEP == 0) or (block < k // BLOCK):
            load_words(raw, at + 4 * j, T.address_of(x[row, block * BLOCK + place[1]]))
        else:
            for i in T.unroll(4):
                raw[at + 4 * j + i] = T.uint32(0)


def _pieces(inputs: Inputs, k: int) -> int:
    """16 bytes each, of a row of inputs with what fills its last step."""
    return steps(k) * (STEP // inputs.width)


def staged_words(inputs: Inputs, k: int, rows: int, threads: int) -> int:
    """u32 of so many rows of inputs that each of so many threads loads at most."""
    return 4 * -(-rows * _pieces(inputs, k) // threads)


@T.inline
def stage_rows(
    inputs, k, columns, x, found, share, begin, count, most, thread, threads, xs, load, pairs
):
    """The rows found[i] // share of x [n, k] into the columns of number i in xs, zeros behind them.

    i from `begin` on, `count` times, at most `most`, by all threads of a block. load u32
    [staged_words] and pairs u32 [4] are a thread's own. All loads are on their way before the first
    is used.
    """
    for i in T.unroll(staged_words(inputs, k, most, threads) // 4):
        at: T.let = i * threads + thread
        piece: T.let = at % _pieces(inputs, k)
        if T.And(at < count * _pieces(inputs, k), piece < k // inputs.width):
            row: T.let = found[begin + at // _pieces(inputs, k)] // share
            load_words(load, 4 * i, T.address_of(x[row, piece * inputs.width]))
    for i in T.unroll(staged_words(inputs, k, most, threads) // 4):
        at: T.let = i * threads + thread
        piece: T.let = at % _pieces(inputs, k)
        number: T.let = begin + at // _pieces(inputs, k)
        if at < count * _pieces(inputs, k):
            inputs.columns(load, 4 * i, pairs)
            if k % STEP != 0 and piece >= k // inputs.width:
                for j in T.unroll(4):
                    pairs[j] = T.uint32(0)
            block: T.let = piece // (BLOCK // inputs.width)
            inside: T.let = piece % (BLOCK // inputs.width) * (inputs.width // 2)
            for part in T.unroll(inputs.parts):
                to: T.let = column_word(columns, block, inputs.parts * number + part) + inside
                xs[T.ramp(to, 1, inputs.width // 2)] = pairs[
                    T.ramp(inputs.width // 2 * part, 1, inputs.width // 2)
                ]
