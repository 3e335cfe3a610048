"""`qkv_insert` on CUDA: a dense layer (cuda/dense.py) of a token's norm that rotates at its end.

A tile has eight rotated pairs of a head. One thread gets both sums of a pair: it rotates them and
stores them, as the query or in the cache. Every block computes the norm for itself: its warps read
all of x anyhow, and the factor 1/rms comes last.

A cache with scales wants to know all of a head before it stores any. There a block has heads of 64
whole, and a warp's threads one of them: 32 pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import tvm

from mxforge.kv_layout import PAGE_TOKENS

from ..cuda.dense import MOST_TILES, STEP, Arithmetic, DenseTile, Tiling, dense
from ..cuda.dense_many import scratch, variants
from ..cuda.instructions import ALL_LANES, LANES, MMA_ROWS
from ..formats import bf16
from ..formats.kv import KV, scale_at, scale_bits, scale_byte
from ..kernel import Layout, Schedule, T, Tensor, gpu, prim_func
from ..linear import bf16_cuda, i8_f32_cuda
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
    kv_format, tiling = KV[kv_dtype], Tiling(head_dim)
    key, value = kv_format.key_at, partial(kv_format.value_at, head_dim)
    whole = head_dim // MMA_ROWS if kv_format.scaled else 1
    launch = dense(
        arithmetic, tile, tiling, rows=rows, k=hidden, eps=eps, whole=whole, hopper=hopper
    )

    @T.inline
    def rotate(pair, cos_sin, token, i):
        pair[2] = pair[0] * cos_sin[token, i] - pair[1] * cos_sin[token, half + i]
        pair[3] = pair[1] * cos_sin[token, i] + pair[0] * cos_sin[token, half + i]

    @T.inline
    def store(tables, kv, token, part, head, at, i, first, second):
        positions, token_seq, page_table, first_page = tables
        slot: T.let = positions[token] % PAGE_TOKENS
        page: T.let = physical_page(
            page_table, first_page, token_seq[token], positions[token] // PAGE_TOKENS
        )
        if kv_format.scaled:
            # Of numbers without a sign, the larger has the larger bits.
            peak: T.let = T.call_extern(
                "uint32", "__reduce_max_sync", T.uint32(ALL_LANES),
                T.max(
                    T.reinterpret("uint32", T.fabs(first)), T.reinterpret("uint32", T.fabs(second))
                ),
            )  # fmt: skip
            bits: T.let = scale_bits(T.reinterpret("float32", peak))
            scale: T.let = bf16.widened(bits)
            kv[part, head, page, at(i, slot)] = kv_format.store(first, scale)
            kv[part, head, page, at(half + i, slot)] = kv_format.store(second, scale)
            if i == 0:
                for byte in T.unroll(2):
                    kv[part, head, page, scale_at(head_dim, slot) + byte] = scale_byte(bits, byte)
        else:
            kv[part, head, page, at(i, slot)] = kv_format.store(first, None)
            kv[part, head, page, at(half + i, slot)] = kv_format.store(second, None)

    @T.inline
    def finish(given, token, tile, p, pair):
        row: T.let = tiling.row(tile, p, 0)
        head: T.let = row // head_dim
        i: T.let = row % head_dim
        pair[0] = pair[0] + given[0][row]
        pair[1] = pair[1] + given[0][row + half]
        if head < heads:
            rotate(pair, given[1], token, i)
            given[4][token, row] = pair[2]
            given[4][token, row + half] = pair[3]
        elif head < heads + kv_heads:
            rotate(pair, given[1], token, i)
            store(given[2], given[3], token, 0, head - heads, key, i, pair[2], pair[3])
        else:
            store(given[2], given[3], token, 1, head - heads - kv_heads, value, i, pair[0], pair[1])

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
