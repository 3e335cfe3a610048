"""Dense layer with bfloat16 weights and activations: y = x·Wᵀ (+ bias) (+ residual). CPU only.

    x f32 [n, k] rounded to bits u16 (round_bf16.py)   W bf16 [rows, k]
    bias f32 [rows]   residual f32 [n, rows]   y f32 [n, rows]

Layout: groups of 64 rows, pairs of neighbouring inputs side by side, zero-padded at the ends.
W [groups, ⌈k/2⌉, 64, 2]: inputs 2i and 2i + 1 of row r of group g stand at (g, i, r).

Roofline of decoding: 2·rows·k bytes of weights a step, whatever n is.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import ml_dtypes
import numpy as np
import tvm

from .bf16 import LANES, dot_pairs, imported, instructions, tile_of, word_at
from .kernel import Kernel, T, Target, parameter, scheduled
from .linear import linear_case, linear_items, linear_ref
from .round_bf16 import round_ref, width
from .vectors import in_tiles, sizes

NAME = "bf16w_bf16_linear"
GROUP = 64


def linear_bf16_ref(
    x: np.ndarray, weight: np.ndarray, *optional: np.ndarray, **arrays: Any
) -> tuple[np.ndarray]:
    """linear_ref of the rounded x, in float64."""
    return linear_ref(x.astype(ml_dtypes.bfloat16), weight, *optional, **arrays)


def packed_shape(rows: int, k: int) -> tuple[int, ...]:
    return (-(-rows // GROUP), width(k) // 2, GROUP, 2)


def pack_weight(weight: np.ndarray) -> np.ndarray:
    """Any number of rows of a bf16 weight [rows, k], in this layout."""
    rows, k = weight.shape
    groups, pairs, _, _ = shape = packed_shape(rows, k)
    whole = np.pad(weight, ((0, groups * GROUP - rows), (0, 2 * pairs - k)))
    words = whole.view(np.uint32).reshape(groups, GROUP, pairs)
    return np.ascontiguousarray(words.transpose(0, 2, 1)).view(weight.dtype).reshape(shape)


@cache
def linear_bf16(
    target: Target, *, rows: int, k: int, with_bias: bool = False, with_residual: bool = False
) -> tvm.tirx.PrimFunc:
    """(bits, weight, [bias], [residual], y) -> None, scheduled for a CPU."""
    tile = tile_of(target)
    groups, pairs, _, _ = weight_shape = packed_shape(rows, k)

    @T.inline
    def some_rows(at_once, first, acc, tokens, start, x, words, group, b, r, y):
        for t in T.unroll(tokens):
            acc[T.ramp(t * at_once, 1, at_once)] = T.broadcast(T.float32(0), at_once)
        for i in T.serial(pairs):
            for v in T.unroll(at_once // LANES):
                for t in T.unroll(tokens):
                    acc[T.ramp(t * at_once + v * LANES, 1, LANES)] = dot_pairs(
                        target,
                        acc[T.ramp(t * at_once + v * LANES, 1, LANES)],
                        words[group, i, T.ramp(first + v * LANES, 1, LANES)],
                        word_at(x, start + t, i * 2),
                    )
        for t in T.unroll(tokens):
            for i in T.serial(T.max(T.min(rows - group * GROUP - first, at_once), 0)):
                y[start + t, group * GROUP + first + i] = (
                    acc[t * at_once + i]
                    + (b[group * GROUP + first + i] if with_bias else T.float32(0))
                    + (r[start + t, group * GROUP + first + i] if with_residual else T.float32(0))
                )

    @T.inline
    def tokens_tile(start, tokens, acc, x, words, group, b, r, y):
        for h in T.serial(GROUP // tile.rows_beside(tokens, GROUP)):
            some_rows(
                tile.rows_beside(tokens, GROUP), h * tile.rows_beside(tokens, GROUP),
                acc, tokens, start, x, words, group, b, r, y,
            )  # fmt: skip

    tiles = in_tiles(sizes(tile.tokens), tokens_tile)

    @T.prim_func(s_tir=True, private=True)
    def main():
        n = T.int64()
        x = parameter("x", (n, width(k)), "uint16")
        w = parameter("w", weight_shape, "bfloat16")
        if with_bias:
            b = parameter("b", (rows,), "float32")
        if with_residual:
            r = parameter("r", (n, rows), "float32")
        y = parameter("y", (n, rows), "float32")
        with imported(target):
            for g in T.parallel(groups):
                with T.sblock("item"):
                    group = T.axis.spatial(groups, g)
                    # Said here: detection gives up on vector loads, and nothing schedules further.
                    T.reads(x[0:n, 0 : width(k)])
                    T.writes(y[0:n, 0:rows])
                    words = T.decl_buffer((groups, pairs, GROUP), "int32", data=w.data)
                    acc = T.sblock_alloc_buffer((tile.tokens * tile.rows,), "float32")
                    tiles(
                    0, n,
                        (
                            acc, x, words, group,
                            b if with_bias else None, r if with_residual else None, y,
                        ),
                    )  # fmt: skip

    return scheduled(main, NAME, f"rows interleaved, {instructions(target)}", tile)


def _pack(_target: Target, inputs: dict[str, np.ndarray], **_static: Any) -> list[np.ndarray]:
    x, weight, *rest = inputs.values()
    return [*round_ref(x), pack_weight(weight), *rest]


_case = partial(linear_case, input_bytes=2)
CASES = (
    _case("one token, partial rows", 1, 72, 96),
    _case("tokens not a multiple of the tile", 7, 128, 160, bias=True),
    _case("one row, an odd number of inputs", 3, 1, 33, residual=True),
    _case("one channel 1000 times the others", 5, 200, 96, bias=True, residual=True, spike=1000),
    _case("20b attention output, one token", 1, 2880, 4096, bias=True, residual=True),
)

LINEAR_BF16 = Kernel(
    NAME,
    build=linear_bf16,
    items=linear_items,
    reference=linear_bf16_ref,
    outputs=lambda inputs, rows, **_: [((len(inputs["x"]), rows), "float32")],
    cases=CASES,
    pack=_pack,
    targets=("cpu",),
)
