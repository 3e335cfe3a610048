"""`i8_f32` on CUDA: an input is an integer of three digits, each a column of mma.m16n8k32.

Inputs are rounded to 23 bits (a sign and 22) for up to 128 neighbours, those that a warp reads at
once, by a scale that is a power of two, and so that y is as good as of float32:
x = scale·(65536·a + 256·b + c), digits from -128 to 127. Columns are a, b, nothing, c: a lane has
two sums beside each other, and adds 256·a + b or c.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..cuda.dense import (
    ITEMS,
    PAIRS,
    QUADS,
    STEP,
    Arithmetic,
    DenseTile,
    Tiling,
    load_words,
)
from ..cuda.instructions import ALL_LANES, LANES, mma_s8, shared_words
from ..cuda.product import ProductRows
from ..kernel import Layout, T
from .dense_cuda import linear_schedules

DIGITS, COLUMNS, MMAS = 3, 4, 1
DIGIT = 8  # words of a step's 32 inputs
BITS = 21  # the largest of the inputs is at least 2 to this, times the scale
SMALLEST = 27  # of the exponents that count, biased; 2^-100: what is below counts as zero
ROUND = 0x4B400000  # the bits of 1.5·2^23, whose last bit is 1
NAN = 0x7FC00000
TILE = DenseTile(many=8)


def _perm(a: Any, b: Any, selector: int) -> Any:
    return T.call_extern("uint32", "__byte_perm", a, b, T.uint32(selector))


@T.inline
def _load(weights, m, step, lane, w, scale):
    load_words(w, m * 4, weights[0][step, lane * 4])
    T.ptx["ld.global.b32"](scale[m], T.address_of(weights[1][step, lane // 4]))


@T.inline
def _stage(shared, at, item, q, together, stored, x, i, parts):
    parts[0] = T.uint32(0)
    for j in T.unroll(4):
        parts[0] = T.max(
            parts[0], T.bitwise_and(T.reinterpret("uint32", x[i + j]), T.uint32(0x7FFFFFFF))
        )
    if together * QUADS == LANES:
        parts[0] = T.call_extern("uint32", "__reduce_max_sync", T.uint32(ALL_LANES), parts[0])
    else:
        for distance in T.unroll((together * QUADS).bit_length() - 1):
            parts[0] = T.max(
                parts[0],
                T.cuda.__shfl_xor_sync(
                    T.uint32(ALL_LANES), parts[0], T.shift_left(1, distance), LANES
                ),
            )
    exponent: T.let = T.max(T.shift_right(parts[0], T.uint32(23)), T.uint32(SMALLEST))
    up: T.let = T.reinterpret(
        "float32", T.shift_left(T.uint32(2 * 127 + BITS) - exponent, T.uint32(23))
    )
    for j in T.unroll(4):
        # Digits plus 128 each, which makes all of them, and what is carried, positive.
        parts[j + 1] = T.reinterpret("uint32", x[i + j] * up + T.float32(1.5 * 2**23)) + T.uint32(
            (0x808080 - ROUND) % 2**32
        )
    if stored:
        # Bytes of four inputs, beside each other by digit.
        for j in T.unroll(2):
            parts[5 + j] = _perm(parts[1 + 2 * j], parts[2 + 2 * j], 0x5140)
            parts[1 + 2 * j] = _perm(parts[1 + 2 * j], parts[2 + 2 * j], 0x0062)
        place: T.let = at + item * (DIGITS * DIGIT) + q
        shared[place] = T.bitwise_xor(_perm(parts[1], parts[3], 0x5410), T.uint32(0x80808080))
        shared[place + DIGIT] = T.bitwise_xor(
            _perm(parts[5], parts[6], 0x7632), T.uint32(0x80808080)
        )
        shared[place + 2 * DIGIT] = T.bitwise_xor(
            _perm(parts[5], parts[6], 0x5410), T.uint32(0x80808080)
        )
        if (q == 0) and (item % together == 0):
            shared[at + ITEMS * (DIGITS * DIGIT) + item] = T.Select(
                exponent == T.uint32(255),  # an infinity or NaN among the inputs
                T.uint32(NAN),
                T.shift_left(exponent - T.uint32(BITS), T.uint32(23)),
            )


@T.inline
def _fetch(shared, at, item, column, own, together, d, t, b):
    digit: T.let = T.min(column, DIGITS - 1)  # the column of nothing has c too
    T.evaluate(
        shared_words((b[0], b[1]), shared[at + item * (DIGITS * DIGIT) + digit * DIGIT + t * 2])
    )
    if d % together == together - 1:
        first: T.let = own - (together - 1)
        T.evaluate(shared_words((b[2],), shared[at + ITEMS * (DIGITS * DIGIT) + first]))


def _half(word: Any, second: Any) -> Any:
    """float32 of one of the two float16 in a word."""
    bits = T.Cast("uint16", T.shift_right(word, T.Cast("uint32", 16 * second)))
    return T.Cast("float32", T.reinterpret("float16", bits))


@T.inline
def _multiply(b, t, w, scale, m, together, d, acc, acc_at):
    """acc f32 [row, 2]: sums, and those that want the scale of their inputs."""
    for i in T.unroll(4):
        b[4 + i] = T.uint32(0)
    mma_s8(b, 4, w, m * 4, b, 0)
    factor: T.let = T.Select(t % 2 == 0, T.uint32(256), T.uint32(0))
    for i in T.unroll(2):
        product: T.let = T.Cast("float32", T.Cast("int32", b[4 + 2 * i] * factor + b[5 + 2 * i]))
        unscaled: T.let = acc_at + 2 * i + 1
        if d % together == 0:
            acc[unscaled] = product * _half(scale[m], i)
        else:
            acc[unscaled] = acc[unscaled] + product * _half(scale[m], i)
        if d % together == together - 1:
            acc[acc_at + 2 * i] = acc[acc_at + 2 * i] + acc[unscaled] * T.reinterpret(
                "float32", b[2]
            )


def _total(acc: Any, at: Any, t: Any) -> Any:
    """Both lanes of a token have it."""
    own = acc[at] * T.Select(t % 2 == 0, T.float32(256), T.float32(1))
    return own + T.cuda.__shfl_xor_sync(T.uint32(ALL_LANES), own, 1, LANES)


BF16_PAIRS = r"""#include <cuda_bf16.h>
// Two bfloat16 of the int8 in two bytes: 128 + its low bits, less 128 or, where it is below zero,
// 256.
__forceinline__ __device__ uint32_t mx_int8_pair(uint32_t word, uint32_t selector) {
  uint32_t bytes = __byte_perm(word, 0, selector);
  uint32_t low = (bytes & 0x007F007F) | 0x43004300, less = (bytes & 0x00800080) | 0x43004300;
  __nv_bfloat162 pair = __hsub2(*(__nv_bfloat162*)&low, *(__nv_bfloat162*)&less);
  return *(uint32_t*)&pair;
}
"""


def _int8_pair(word: Any, second: Any) -> Any:
    """Bytes 0 and 1 of a word, or 2 and 3, as bfloat16."""
    selector = T.Select(second == 0, T.uint32(0x4140), T.uint32(0x4342))
    return T.cuda.func_call(
        "mx_int8_pair", word, selector, source_code=BF16_PAIRS, return_type="uint32"
    )


def _rows(k: int) -> ProductRows:
    """bfloat16 holds every int8; the scales of blocks come to their sums."""

    @T.inline
    def load(weights, expert, number, at, lane, words, scale, slot):
        _load(weights, slot, number * (k // STEP) + at, lane, words, scale)

    @T.inline
    def fragments(words, scale, slot, block, known, a, to):
        for half in T.unroll(2):
            for second in T.unroll(2):
                for row in T.unroll(2):
                    a[to + 4 * half + 2 * second + row] = _int8_pair(
                        words[4 * slot + 2 * half + row], second
                    )

    @T.inline
    def sums(scale, slot, block, part, acc, to):
        for r in T.unroll(2):
            for j in T.unroll(2):
                acc[to + 2 * r + j] = acc[to + 2 * r + j] + part[2 * r + j] * _half(scale[slot], r)

    return ProductRows(
        blocks=1, ahead=2, words=4, scales=1, load=load, fragments=fragments, sums=sums
    )


I8 = Arithmetic(
    columns=COLUMNS, mmas=MMAS, words=DIGITS * DIGIT + 1, sums=2,
    load=_load, stage=_stage, fetch=_fetch, multiply=_multiply, total=_total, rows=_rows,
)  # fmt: skip


def _scales(tiling: Tiling) -> Layout:
    """f16 [rows, k/32] -> u32 [tiles·k/32, 8]: those of both rows of a pair, the first in the low
    half."""

    def shape(stored: tuple[Any, ...]) -> tuple[Any, ...]:
        return (tiling.tiles(stored[0]) * stored[1], PAIRS)

    def pack(scales: np.ndarray) -> np.ndarray:
        pairs = tiling.by_tile(scales).transpose(0, 3, 2, 1)  # tile, step, p, second
        return np.ascontiguousarray(pairs).view(np.uint32).reshape(shape(scales.shape))

    return Layout(shape, pack, rows=tiling.group, dtype="uint32")


def layouts(tiling: Tiling) -> dict[str, Layout]:
    return {"weight": tiling.fragments(MMAS), "weight_scale": _scales(tiling)}


SCHEDULES = linear_schedules(I8, TILE, layouts)
