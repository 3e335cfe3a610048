"""MXFP4 weights by inputs in MXFP8, which tensor cores of sm_120a multiply as they are.

Weights are laid out as mxfp4.py says, but for the bits of a word, a lane's inputs 8t … 8t+7 of a
row and block. They are four bits each, from bit 2 on, around the end: the inputs ORDER[0][i] are in
the middle of byte i, where `mma_scaled` takes them, and ORDER[1][i] are once the word is rotated by
4. The order is such that bfloat16 pairs are easily made of them too.

Inputs are bfloat16 between kernels. For many tokens a launch makes rows of MXFP8 of them:

    u32 [rows, (steps, 32), (steps, 4)], of steps of 128 inputs, the last filled up with zeros:
    word (half, t, block, i) of a step holds e4m3, of block 2·half + block the inputs 8t +
        ORDER[i]; then of each step the e8m0 of its four blocks in a word, four times, so that
        lanes that read them from shared memory find them in other banks
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ..kernel import T
from ..round_mxfp8 import e4m3_bits, e4m3_scale
from .mxfp4 import INPUTS, high_half, load_words, loader, low_half
from .product import COLUMN, SCALE_WORDS, SCALED_STEP, ProductRows
from .warps import shared_with

ORDER = ((0, 2, 1, 3), (4, 6, 5, 7))
OWN = 8  # inputs in 16 bytes of bfloat16, which a thread makes MXFP8 of
_BYTES = 0x3C3C3C3C


# -- weights --------------------------------------------------------------------------------------


def nibbles_in_bytes(blocks: np.ndarray) -> np.ndarray:
    """u8 [e, rows, k/32, 16] -> u32 [e, rows, k/32, 4 lanes]: words as said above."""
    lanes = blocks.reshape(*blocks.shape[:3], 4, 4).astype(np.uint32)
    words = np.zeros(lanes.shape[:4], np.uint32)
    for high, numbers in enumerate(ORDER):
        for byte, number in enumerate(numbers):
            nibble = lanes[..., number // 2] >> 4 * (number % 2) & 15
            words |= nibble << (8 * byte + 4 * high)
    return words << 2 | words >> 30


def _rotated(word: Any) -> Any:
    return T.bitwise_or(T.shift_right(word, T.uint32(4)), T.shift_left(word, T.uint32(28)))


def _pair(sign: Any, magnitude: Any) -> Any:
    """A pair of bfloat16, 2^-126 of the values, of a word with signs and one with the rest where
    they belong."""
    return T.bitwise_or(
        T.bitwise_and(sign, T.uint32(0x80008000)), T.bitwise_and(magnitude, T.uint32(0x01C001C0))
    )


@T.inline
def _unpack(words, at, a):
    """As mxfp4.unpack."""
    for row in T.unroll(2):
        word: T.let = words[at + row]
        turned: T.let = _rotated(word)
        a[row] = _pair(T.shift_left(word, T.uint32(10)), T.shift_left(word, T.uint32(4)))
        a[2 + row] = _pair(T.shift_left(word, T.uint32(2)), T.shift_right(word, T.uint32(4)))
        a[4 + row] = _pair(T.shift_left(word, T.uint32(6)), word)
        a[6 + row] = _pair(T.shift_left(turned, T.uint32(2)), T.shift_right(turned, T.uint32(4)))


# Said in PTX, and volatile, for nvcc would unpack anew for each group of columns.
_IN_BYTES = r"""
__forceinline__ __device__ uint32_t mx_in_bytes(uint32_t word, uint32_t mask) {
  uint32_t bytes;
  asm volatile("lop3.b32 %0, %1, %2, %2, 0xC0;" : "=r"(bytes) : "r"(word), "r"(mask));
  return bytes;
}
"""


def _in_bytes(word: Any) -> Any:
    return T.cuda.func_call(
        "mx_in_bytes", word, T.uint32(_BYTES), source_code=_IN_BYTES, return_type="uint32"
    )


@T.inline
def _fragments(words, _scale, slot, _block, _known, a, at):
    """Of two blocks."""
    for block in T.unroll(2):
        for row in T.unroll(2):
            word: T.let = words[4 * slot + 2 * block + row]
            a[at + 4 * block + row] = _in_bytes(word)
            a[at + 4 * block + 2 + row] = _in_bytes(_rotated(word))


def rows(k: int) -> ProductRows:
    """Of weights [experts, rows, k], for a product of many columns in MXFP8."""
    return ProductRows(
        blocks=1, ahead=2, words=4, scales=1, load=loader(k), fragments=_fragments,
        row_scales=lambda scale, slot, lane: T.shift_right(
            scale[slot], T.Cast("uint32", lane % 2 * 8)
        ),
    )  # fmt: skip


# By activation format: inputs that are rounded to MXFP8.
SCALED = {"mxfp8": replace(INPUTS["bf16"], unpack=_unpack, packed=nibbles_in_bytes, scaled=True)}


# -- inputs ---------------------------------------------------------------------------------------


def _steps(k: int) -> int:
    return -(-k // SCALED_STEP)


def words(k: int) -> int:
    """u32 of a row."""
    return _steps(k) * (COLUMN + SCALE_WORDS)


def pieces(k: int) -> int:
    """What threads make of a row, `make_piece` each."""
    return _steps(k) * (SCALED_STEP // OWN)


def _e4m3_word(pairs: Any, numbers: tuple[int, ...], scale: Any) -> Any:
    """u32 of the e4m3 of bfloat16 of these numbers in u32 `pairs`."""
    word = T.uint32(0)
    for i, number in enumerate(numbers):
        half = high_half if number % 2 else low_half
        byte = e4m3_bits(half(pairs[number // 2]), scale)
        word = T.bitwise_or(word, T.shift_left(byte, T.uint32(8 * i)))
    return word


@T.inline
def make_piece(k, piece, count, x, to):
    """A thread's piece of x bf16 [count, k] as bits -> rows `to`. Four lanes have a block, sixteen
    a step; all lanes of a warp come by."""
    pairs = T.sblock_alloc_buffer((4,), "uint32", scope="local")
    both = T.sblock_alloc_buffer((2,), "uint32", scope="local")
    peak = T.sblock_alloc_buffer((1,), "uint32", scope="local")
    scales = T.sblock_alloc_buffer((1,), "uint32", scope="local")
    row: T.let = piece // pieces(k)
    at: T.let = piece % pieces(k)
    step: T.let = at // (SCALED_STEP // OWN)
    block: T.let = at // 4 % 4
    for i in T.unroll(4):
        pairs[i] = T.uint32(0)
    if T.And(row < count, at < k // OWN):
        load_words(pairs, 0, T.address_of(x[row, at * OWN]))
    peak[0] = T.uint32(0)
    for i in T.unroll(4):
        low: T.let = T.bitwise_and(T.shift_left(pairs[i], T.uint32(16)), T.uint32(0x7FFF0000))
        peak[0] = T.max(peak[0], T.max(low, T.bitwise_and(pairs[i], T.uint32(0x7FFF0000))))
    for i in T.unroll(2):
        peak[0] = T.max(peak[0], shared_with(peak[0], 1 << i))
    scale: T.let = e4m3_scale(peak[0])
    both[0] = _e4m3_word(pairs, ORDER[0], scale)
    both[1] = _e4m3_word(pairs, ORDER[1], scale)
    scales[0] = T.shift_left(scale, T.Cast("uint32", 8 * block))
    for i in T.unroll(2):
        scales[0] = T.bitwise_or(scales[0], shared_with(scales[0], 4 << i))
    if row < count:
        place: T.let = step * COLUMN + block // 2 * 16 + at % 4 * 4 + block % 2 * 2
        to[row, T.ramp(place, 1, 2)] = both[T.ramp(0, 1, 2)]
        if block == 0:
            to[row, _steps(k) * COLUMN + step * SCALE_WORDS + at % 4] = scales[0]
