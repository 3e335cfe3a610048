"""What the CUDA schedules of dense layers share: inputs as they are; bias and residual added."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import tvm

from ..cuda.dense import MOST_TILES, STEP, Arithmetic, DenseTile, Tiling, dense
from ..cuda.dense_many import scratch, variants
from ..kernel import Layout, Schedule, T, Tensor, gpu, prim_func
from .linear import plus_options

TILING = Tiling()


def linear_schedules(
    arithmetic: Arithmetic, tile: DenseTile, layouts: Callable[[Tiling], dict[str, Layout]]
) -> tuple[Schedule, ...]:
    return tuple(
        Schedule(
            f"rows as a matrix, tokens as its columns{variant.ending}",
            gpu("cuda", variant.arch),
            partial(_build, arithmetic, variant.hopper),
            tile,
            layouts(TILING),
            fits=_fits,
            scratch=partial(_scratch, variant.hopper),
        )
        for variant in variants(arithmetic.rows(STEP))
    )


def _scratch(hopper: bool, *, k: int, **_options: Any) -> tuple[Tensor, ...]:
    return scratch(k, hopper=hopper)


def _fits(*, rows: int, k: int, **_options: bool) -> bool:
    return k % STEP == 0 and TILING.tiles(rows) <= MOST_TILES


def _build(
    arithmetic: Arithmetic,
    hopper: bool,
    arguments: tuple[Tensor, ...],
    *,
    tile: DenseTile,
    rows: int,
    k: int,
    **_options: bool,
) -> tvm.tirx.PrimFunc:
    launch = dense(arithmetic, tile, TILING, rows=rows, k=k, hopper=hopper)

    @T.inline
    def finish(given, token, tile, p, pair):
        for second in T.unroll(2):
            row: T.let = TILING.row(tile, p, second)
            if row < rows:
                given[0][token, row] = plus_options(pair[second], given[1], given[2], token, row)

    @T.inline
    def body(n, x, weight, y, parts, weight_scale=None, bias=None, residual=None):
        launch(n, x, None, (weight, weight_scale), finish, (y, bias, residual), parts)

    return prim_func(arguments, body)
