"""`bf16xbf16` on CPUs: products of pairs of bfloat16.

Layout: groups of 64 rows, pairs of neighbouring inputs side by side, zero-padded at the ends.
weight [groups, ⌈k/2⌉, 64, 2]: inputs 2i and 2i + 1 of row r of group g stand at (g, i, r).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import tvm

from ..cpu.bf16 import PAIR_ISAS, PairIsa, PairTile, dot_pairs, imported, word_at
from ..cpu.vectors import LANES, in_tiles, sizes
from ..kernel import Layout, Schedule, T, Tensor, prim_func
from ..round_bf16 import width
from .linear import plus_options

GROUP = 64


def _packed_shape(shape: tuple[Any, ...]) -> tuple[Any, ...]:
    rows, k = shape
    return (-(-rows // GROUP), width(k) // 2, GROUP, 2)


def _pack(weight: np.ndarray) -> np.ndarray:
    rows, k = weight.shape
    groups, pairs, _, _ = shape = _packed_shape(weight.shape)
    whole = np.pad(weight, ((0, groups * GROUP - rows), (0, 2 * pairs - k)))
    words = whole.view(np.uint32).reshape(groups, GROUP, pairs)
    return np.ascontiguousarray(words.transpose(0, 2, 1)).view(weight.dtype).reshape(shape)


PAIRS = Layout(shape=_packed_shape, pack=_pack, rows=GROUP)


def _build(
    isa: PairIsa,
    arguments: tuple[Tensor, ...],
    *,
    rows: int,
    k: int,
    tile: PairTile,
    **_options: bool,
) -> tvm.tirx.PrimFunc:
    groups, pairs, _, _ = _packed_shape((rows, k))

    @T.inline
    def some_rows(at_once, first, acc, tokens, start, x, words, group, b, r, y):
        for t in T.unroll(tokens):
            acc[T.ramp(t * at_once, 1, at_once)] = T.broadcast(T.float32(0), at_once)
        for i in T.serial(pairs):
            for v in T.unroll(at_once // LANES):
                for t in T.unroll(tokens):
                    acc[T.ramp(t * at_once + v * LANES, 1, LANES)] = dot_pairs(
                        isa,
                        acc[T.ramp(t * at_once + v * LANES, 1, LANES)],
                        words[group, i, T.ramp(first + v * LANES, 1, LANES)],
                        word_at(x, start + t, i * 2),
                    )
        for t in T.unroll(tokens):
            for i in T.serial(T.max(T.min(rows - group * GROUP - first, at_once), 0)):
                y[start + t, group * GROUP + first + i] = plus_options(
                    acc[t * at_once + i], b, r, start + t, group * GROUP + first + i
                )

    @T.inline
    def tokens_tile(start, tokens, acc, x, words, group, b, r, y):
        for h in T.serial(GROUP // tile.rows_beside(tokens, GROUP)):
            some_rows(
                tile.rows_beside(tokens, GROUP), h * tile.rows_beside(tokens, GROUP),
                acc, tokens, start, x, words, group, b, r, y,
            )  # fmt: skip

    tiles = in_tiles(sizes(tile.tokens), tokens_tile)

    @T.inline
    def body(n, x, weight, y, bias=None, residual=None):
        with imported(isa):
            for g in T.parallel(groups):
                with T.sblock("item"):
                    group = T.axis.spatial(groups, g)
                    # Stated, as detection gives up on vector loads; nothing schedules further.
                    T.reads(x[0:n, 0 : width(k)])
                    T.writes(y[0:n, 0:rows])
                    words = T.decl_buffer((groups, pairs, GROUP), "int32", data=weight.data)
                    acc = T.sblock_alloc_buffer((tile.tokens * tile.rows,), "float32")
                    tiles(0, n, (acc, x, words, group, bias, residual, y))

    return prim_func(arguments, body)


SCHEDULES = tuple(
    Schedule(
        f"rows interleaved, {isa.name}",
        isa.needs,
        partial(_build, isa),
        isa.tile,
        layouts={"weight": PAIRS},
    )
    for isa in PAIR_ISAS
)
