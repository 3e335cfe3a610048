"""`bf16` on CUDA: an input is the sum of two bfloat16, each a column of mma.m16n8k16.

The first is the input rounded, the second the rest rounded: 16 bits together, so that y is within
2e-6 of exact sums. Up to four tokens the second column costs nothing: eight are computed anyhow.
"""

from __future__ import annotations

from typing import Any

from ..cuda.dense import STEP, Arithmetic, DenseTile, Tiling, load_words
from ..cuda.instructions import LANES, mma_bf16, shared_words
from ..cuda.product import ProductRows
from ..kernel import Layout, T
from .dense_cuda import linear_schedules

PARTS, MMAS = 2, 2
PART = 16  # words of a step's 32 inputs
TILE = DenseTile(loads_of_several=16)

PAIR = r"""#include <cuda_bf16.h>
// Two numbers rounded to bfloat16, the first in the low half.
__forceinline__ __device__ uint32_t mx_bf16_pair(float a, float b) {
  __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  return *(uint32_t*)&pair;
}
"""


def _pair(a: Any, b: Any) -> Any:
    return T.cuda.func_call("mx_bf16_pair", a, b, source_code=PAIR, return_type="uint32")


def _rest(value: Any, bits: Any) -> Any:
    """What a float32 has beside that of these bits."""
    return value - T.reinterpret("float32", bits)


def _at(item: Any, part: Any) -> Any:
    """Where a part of an item begins. The parts of every other item change places, so that what a
    warp stores of items beside each other goes to all banks."""
    return item * (PARTS * PART) + T.bitwise_xor(part, item % 2) * PART


@T.inline
def _load(weights, m, step, lane, w, scale):
    for i in T.unroll(MMAS):
        load_words(w, (m * MMAS + i) * 4, weights[0][step, (i * LANES + lane) * 4])


@T.inline
def _stage(shared, at, item, q, together, stored, x, i, parts):
    for j in T.unroll(2):
        parts[j] = _pair(x[i + 2 * j], x[i + 2 * j + 1])
    for j in T.unroll(2):
        parts[2 + j] = _pair(
            _rest(x[i + 2 * j], T.shift_left(parts[j], T.uint32(16))),
            _rest(x[i + 2 * j + 1], T.bitwise_and(parts[j], T.uint32(0xFFFF0000))),
        )
    if stored:
        for part in T.unroll(PARTS):
            shared[T.ramp(at + _at(item, part) + q * 2, 1, 2)] = parts[T.ramp(part * 2, 1, 2)]


@T.inline
def _fetch(shared, at, item, part, own, together, d, t, b):
    T.evaluate(shared_words((b[0], b[1], b[2], b[3]), shared[at + _at(item, part) + t * 4]))


@T.inline
def _multiply(b, t, w, scale, m, together, d, acc, acc_at):
    for i in T.unroll(MMAS):
        mma_bf16(acc, acc_at, w, (m * MMAS + i) * 4, b, i * 2)


def _total(acc: Any, at: Any, t: Any) -> Any:
    return acc[at] + acc[at + 1]


def _rows(k: int) -> ProductRows:
    @T.inline
    def load(weights, expert, number, at, lane, words, scale, slot):
        _load(weights, slot, number * (k // STEP) + at, lane, words, None)

    @T.inline
    def fragments(words, scale, slot, block, known, a, to):
        for i in T.unroll(4 * MMAS):
            a[to + i] = words[4 * MMAS * slot + i]

    return ProductRows(blocks=1, ahead=2, words=4 * MMAS, scales=0, load=load, fragments=fragments)


BF16 = Arithmetic(
    columns=PARTS, mmas=MMAS, words=PARTS * PART, sums=2,
    load=_load, stage=_stage, fetch=_fetch, multiply=_multiply, total=_total, rows=_rows,
)  # fmt: skip


def layouts(tiling: Tiling) -> dict[str, Layout]:
    return {"weight": tiling.fragments(MMAS)}


SCHEDULES = linear_schedules(BF16, TILE, layouts)
