"""`qkv_insert` on CUDA: a dense layer (cuda/dense.py) of a token's norm that rotates at its end.

A tile has eight rotated pairs of a head. One thread gets both sums of a pair: it rotates them and
stores them, as the query or in the cache. Every block computes the norm for itself: its warps read
all of x anyhow, and the factor 1/rms comes last.

A cache with scales wants to know all of a head before it stores any. There a block has heads of 64
whole. With up to 127 tokens a warp's threads have one of them: 32 pairs. Products of more leave
sums in the warps that made them, and these tell each other the largest.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import tvm

from mxforge.kv_layout import PAGE_TOKENS

from ..cuda.dense import MOST_TILES, STEP, Arithmetic, DenseTile, Tiling, dense
from ..cuda.dense_many import scratch, variants
from ..cuda.instructions import LANES
from ..formats.kv import KV
from ..kernel import Layout, Schedule, T, Tensor, gpu, prim_func
from ..linear import bf16_cuda, i8_f32_cuda
from .kv_insert_gpu import insertion, rotation
from .pages import physical_page

HEAD_DIMS = (16, 32, 64)  # the order of W's rows depends on it


def _schedules(
    arithmetic: Arithmetic, tile: DenseTile, layouts: Callable[[Tiling], dict[str, Layout]]
) -> tuple[Schedule, ...]:
    return tuple(
        Schedule(
            f"rows of heads of {head_dim} as a matrix, tokens as its columns{variant.ending}",
            gpu("cuda", variant.arch),
            partial(_build, arithmetic, variant.hopper),
            tile,
            layouts(Tiling(head_dim)),
            fits=partial(_fits, head_dim),
            scratch=partial(_scratch, variant.hopper),
        )
        for head_dim in HEAD_DIMS
        for variant in variants(arithmetic.rows(STEP))
    )


def _fits(
    of: int, *, hidden: int, heads: int, kv_heads: int, head_dim: int, kv_dtype: str, **_eps: float
) -> bool:
    tiles = Tiling(of).tiles((heads + 2 * kv_heads) * head_dim)
    of_a_warp = head_dim == 2 * LANES or not KV[kv_dtype].scaled
    return head_dim == of and hidden % STEP == 0 and tiles <= MOST_TILES and of_a_warp


def _scratch(hopper: bool, *, hidden: int, **_shape: Any) -> tuple[Tensor, ...]:
    return scratch(hidden, hopper=hopper)


def _build(
    arithmetic: Arithmetic,
    hopper: bool,
    arguments: tuple[Tensor, ...],
    *,
    tile: DenseTile,
    hidden: int,
    eps: float,
    heads: int,
    kv_heads: int,
    head_dim: int,
    kv_dtype: str,
) -> tvm.tirx.PrimFunc:
    half = head_dim // 2
    rows = (heads + 2 * kv_heads) * head_dim
    scaled, tiling = KV[kv_dtype].scaled, Tiling(head_dim)
    rotate, insert = rotation(head_dim), insertion(kv_dtype, head_dim)

    @T.inline
    def complete(given, token, tile, p, pair):
        row: T.let = tiling.row(tile, p, 0)
        pair[0] = pair[0] + given[0][row]
        pair[1] = pair[1] + given[0][row + half]
        if row // head_dim < heads + kv_heads:
            rotate(pair, given[1], token, row % head_dim)

    @T.inline
    def store(tables, kv, token, part, head, i, pair):
        positions, token_seq, page_table, first_page = tables
        page: T.let = physical_page(
            page_table, first_page, token_seq[token], positions[token] // PAGE_TOKENS
        )
        insert(pair, kv, page, positions[token] % PAGE_TOKENS, part, head, i)

    @T.inline
    def finish(given, token, tile, p, pair):
        row: T.let = tiling.row(tile, p, 0)
        head: T.let = row // head_dim
        i: T.let = row % head_dim
        if not scaled:
            complete(given, token, tile, p, pair)
        if head < heads:
            given[4][token, row] = pair[0]
            given[4][token, row + half] = pair[1]
        elif head < heads + kv_heads:
            store(given[2], given[3], token, 0, head - heads, i, pair)
        else:
            store(given[2], given[3], token, 1, head - heads - kv_heads, i, pair)

    launch = dense(
        arithmetic, tile, tiling, rows=rows, k=hidden, eps=eps,
        complete=complete if scaled else None, hopper=hopper,
    )  # fmt: skip

    @T.inline
    def body(
        n, x, norm_weight, weight, bias, cos_sin, positions, token_seq, page_table, first_page, kv,
        q, parts, weight_scale=None,
    ):  # fmt: skip
        launch(
            n, x, norm_weight, (weight, weight_scale), finish,
            (bias, cos_sin, (positions, token_seq, page_table, first_page), kv, q), parts,
        )  # fmt: skip

    return prim_func(arguments, body)


BF16 = _schedules(bf16_cuda.BF16, bf16_cuda.TILE, bf16_cuda.layouts)
I8 = _schedules(i8_f32_cuda.I8, i8_f32_cuda.TILE, i8_f32_cuda.layouts)
