"""Rotate queries and keys by their positions and store keys and values in the paged cache.

    qkv f32 [n, (Hq + 2·Hkv)·D]   cos_sin f32 [n, D]   positions, token_seq i32 [n]
    page_table i32 [b, p]   first_page i32 [b]   kv [pages, 2, Hkv, 16·D], updated in place
    -> q f32 [n, Hq·D], rotated

    half-split pairs: (x1, x2) = (x[i], x[i + D/2]) -> (x1·cos - x2·sin, x2·cos + x1·sin)

The cache. A page holds 16 positions of one layer for every KV head: first the keys, transposed,
element (d, slot) at d·16 + slot, so that attention takes 16 keys as one vector; then the values,
element (slot, d) at slot·D + d. Position j of sequence s is slot j % 16 of page
page_table[s, j // 16 - first_page[s]]; first_page is the logical number of the first page that
the table's row still holds. In float16, values beyond ±65504 are stored as ±65504: an infinity
would poison every later query of the sequence.

Roofline: reads and writes 4·(Hq + 2·Hkv)·D bytes a token. EPYC (Zen 4, 2 cores), 2026-11, at 20b
shapes: 1.1 µs a token of 512, 14 µs for one alone.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import tvm

from .kernel import Case, Kernel, T, Target, bind_items, scheduled

NAME = "f32_rope_kv_append"
LANES = 16
PAGE_TOKENS = 16  # positions of one page; equal to the lanes, for the transposed keys
KV_DTYPES = ("float32", "float16")
F16_MAX = 65504.0


def kv_shape(pages: int, kv_heads: int, head_dim: int) -> tuple[int, int, int, int]:
    """Shape of one layer's cache of `pages` pages: keys at [:, 0], values at [:, 1]."""
    return (pages, 2, kv_heads, PAGE_TOKENS * head_dim)


def rotate_ref(x: np.ndarray, cos_sin: np.ndarray) -> np.ndarray:
    """x float64 [n, heads, D] rotated by cos_sin [n, D]."""
    cos, sin = np.split(cos_sin.astype(np.float64)[:, None], 2, axis=-1)
    x1, x2 = np.split(x, 2, axis=-1)
    return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


def rope_kv_append_ref(
    qkv: np.ndarray,
    cos_sin: np.ndarray,
    positions: np.ndarray,
    token_seq: np.ndarray,
    page_table: np.ndarray,
    first_page: np.ndarray,
    kv: np.ndarray,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    kv_dtype: str,
) -> tuple[np.ndarray, np.ndarray]:
    """(rotated q [n, heads·head_dim], the new kv), in float64."""
    n = len(qkv)
    x = qkv.astype(np.float64).reshape(n, heads + 2 * kv_heads, head_dim)
    q, k, v = np.split(x, [heads, heads + kv_heads], axis=1)
    q, k = rotate_ref(q, cos_sin), rotate_ref(k, cos_sin)
    if kv_dtype == "float16":
        k, v = (np.clip(part, -F16_MAX, F16_MAX) for part in (k, v))
    new = kv.astype(np.float64)
    pages = len(kv)
    keys = new[:, 0].reshape(pages, kv_heads, head_dim, PAGE_TOKENS)
    values = new[:, 1].reshape(pages, kv_heads, PAGE_TOKENS, head_dim)
    slot = positions % PAGE_TOKENS
    page = page_table[token_seq, positions // PAGE_TOKENS - first_page[token_seq]]
    keys[page, :, :, slot] = k
    values[page, :, slot, :] = v
    new[:, 0], new[:, 1] = keys.reshape(new[:, 0].shape), values.reshape(new[:, 1].shape)
    return q.reshape(n, heads * head_dim), new


def stored(value: Any, kv_dtype: str) -> Any:
    """A float32 expression as the cache's type, saturated."""
    if kv_dtype == "float32":
        return value
    limit = T.float32(F16_MAX)
    return T.Cast(kv_dtype, T.max(T.min(value, limit), T.float32(0) - limit))


def physical_page(page_table: Any, first_page: Any, sequence: Any, page: Any) -> Any:
    """Index into kv of a sequence's logical page, in 64 bits: pools exceed 2³¹ elements."""
    return T.Cast("int64", page_table[sequence, page - first_page[sequence]])


def rope_kv_append_items(
    *, heads: int, kv_heads: int, head_dim: int, kv_dtype: str
) -> tvm.tirx.PrimFunc:
    """One item a (token, head of q, k or v, rotated pair), unscheduled."""
    half = head_dim // 2
    all_heads = heads + 2 * kv_heads

    @T.prim_func(s_tir=True, private=True)
    def main(
        qkv_p: T.handle,
        cos_sin_p: T.handle,
        positions_p: T.handle,
        token_seq_p: T.handle,
        page_table_p: T.handle,
        first_page_p: T.handle,
        kv_p: T.handle,
        q_p: T.handle,
    ):
        n, b, p, pages = T.int64(), T.int64(), T.int64(), T.int64()
        qkv = T.match_buffer(qkv_p, (n, all_heads * head_dim), "float32")
        cos_sin = T.match_buffer(cos_sin_p, (n, head_dim), "float32")
        positions = T.match_buffer(positions_p, (n,), "int32")
        token_seq = T.match_buffer(token_seq_p, (n,), "int32")
        page_table = T.match_buffer(page_table_p, (b, p), "int32")
        first_page = T.match_buffer(first_page_p, (b,), "int32")
        kv = T.match_buffer(kv_p, kv_shape(pages, kv_heads, head_dim), kv_dtype)
        q = T.match_buffer(q_p, (n, heads * head_dim), "float32")
        for t, h, i in T.grid(n, all_heads, half):
            with T.sblock("item"):
                vt, vh, vi = T.axis.remap("SSS", [t, h, i])
                x1: T.let = qkv[vt, vh * head_dim + vi]
                x2: T.let = qkv[vt, vh * head_dim + half + vi]
                cos: T.let = cos_sin[vt, vi]
                sin: T.let = cos_sin[vt, half + vi]
                slot: T.let = positions[vt] % PAGE_TOKENS
                page: T.let = physical_page(
                    page_table, first_page, token_seq[vt], positions[vt] // PAGE_TOKENS
                )
                if vh < heads:
                    q[vt, vh * head_dim + vi] = x1 * cos - x2 * sin
                    q[vt, vh * head_dim + half + vi] = x2 * cos + x1 * sin
                elif vh < heads + kv_heads:
                    kv[page, 0, vh - heads, vi * PAGE_TOKENS + slot] = stored(
                        x1 * cos - x2 * sin, kv_dtype
                    )
                    kv[page, 0, vh - heads, (half + vi) * PAGE_TOKENS + slot] = stored(
                        x2 * cos + x1 * sin, kv_dtype
                    )
                else:
                    kv[page, 1, vh - heads - kv_heads, slot * head_dim + vi] = stored(x1, kv_dtype)
                    kv[page, 1, vh - heads - kv_heads, slot * head_dim + half + vi] = stored(
                        x2, kv_dtype
                    )

    return main


def _cpu(heads: int, kv_heads: int, head_dim: int, kv_dtype: str) -> tvm.tirx.PrimFunc:
    half = head_dim // 2
    vectors, tail = divmod(half, LANES)
    all_heads = heads + 2 * kv_heads

    @T.inline
    def rotate_query(q, qkv, cos_sin, t, h, i):
        q[t, h * head_dim + i] = (
            qkv[t, h * head_dim + i] * cos_sin[t, i]
            - qkv[t, h * head_dim + half + i] * cos_sin[t, half + i]
        )
        q[t, h * head_dim + half + i] = (
            qkv[t, h * head_dim + half + i] * cos_sin[t, i]
            + qkv[t, h * head_dim + i] * cos_sin[t, half + i]
        )

    @T.inline
    def copy_value(kv, qkv, t, page, slot, h, i):
        kv[page, 1, h, slot * head_dim + i] = stored(
            qkv[t, (heads + kv_heads + h) * head_dim + i], kv_dtype
        )

    @T.prim_func(s_tir=True, private=True)
    def main(
        qkv_p: T.handle,
        cos_sin_p: T.handle,
        positions_p: T.handle,
        token_seq_p: T.handle,
        page_table_p: T.handle,
        first_page_p: T.handle,
        kv_p: T.handle,
        q_p: T.handle,
    ):
        n, b, p, pages = T.int64(), T.int64(), T.int64(), T.int64()
        qkv = T.match_buffer(qkv_p, (n, all_heads * head_dim), "float32")
        cos_sin = T.match_buffer(cos_sin_p, (n, head_dim), "float32")
        positions = T.match_buffer(positions_p, (n,), "int32")
        token_seq = T.match_buffer(token_seq_p, (n,), "int32")
        page_table = T.match_buffer(page_table_p, (b, p), "int32")
        first_page = T.match_buffer(first_page_p, (b,), "int32")
        kv = T.match_buffer(kv_p, kv_shape(pages, kv_heads, head_dim), kv_dtype)
        q = T.match_buffer(q_p, (n, heads * head_dim), "float32")
        for token in T.parallel(n):
            with T.sblock("item"):
                t = T.axis.spatial(n, token)
                slot: T.let = positions[t] % PAGE_TOKENS
                page: T.let = physical_page(
                    page_table, first_page, token_seq[t], positions[t] // PAGE_TOKENS
                )
                for h in T.serial(heads):
                    for v in T.serial(vectors):
                        for lane in T.vectorized(LANES):
                            rotate_query(q, qkv, cos_sin, t, h, v * LANES + lane)
                    for i in T.serial(tail):
                        rotate_query(q, qkv, cos_sin, t, h, vectors * LANES + i)
                for h in T.serial(kv_heads):
                    # Scalar: the transposed layout puts neighbouring elements 16 apart.
                    for i in T.serial(half):
                        x1: T.let = qkv[t, (heads + h) * head_dim + i]
                        x2: T.let = qkv[t, (heads + h) * head_dim + half + i]
                        kv[page, 0, h, i * PAGE_TOKENS + slot] = stored(
                            x1 * cos_sin[t, i] - x2 * cos_sin[t, half + i], kv_dtype
                        )
                        kv[page, 0, h, (half + i) * PAGE_TOKENS + slot] = stored(
                            x2 * cos_sin[t, i] + x1 * cos_sin[t, half + i], kv_dtype
                        )
                    for v in T.serial(head_dim // LANES):
                        for lane in T.vectorized(LANES):
                            copy_value(kv, qkv, t, page, slot, h, v * LANES + lane)
                    for i in T.serial(head_dim % LANES):
                        copy_value(kv, qkv, t, page, slot, h, head_dim // LANES * LANES + i)

    return scheduled(main, NAME, "tokens in parallel, pairs in vectors")


@cache
def rope_kv_append(
    target: Target, *, heads: int, kv_heads: int, head_dim: int, kv_dtype: str
) -> tvm.tirx.PrimFunc:
    """(qkv, cos_sin, positions, token_seq, page_table, first_page, kv, q) -> None.

    kv is read by nobody and written in place; kv_dtype is "float32" or "float16".
    """
    if target.is_gpu:
        items = rope_kv_append_items(
            heads=heads, kv_heads=kv_heads, head_dim=head_dim, kv_dtype=kv_dtype
        )
        return bind_items(items, NAME)
    return _cpu(heads, kv_heads, head_dim, kv_dtype)


def paged_layout(
    rng: np.random.Generator, ranges: list[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray, int]:
    """(page_table, first_page, pages) for sequences that hold positions [begin, end).

    Physical pages are shuffled, and one in the pool belongs to nobody; the table's unused
    entries point at it.
    """
    first = [begin // PAGE_TOKENS for begin, _ in ranges]
    counts = [(end - 1) // PAGE_TOKENS + 1 - f for f, (_, end) in zip(first, ranges, strict=True)]
    pages = sum(counts) + 1
    order = iter(rng.permutation(pages))
    spare = next(order)
    table = np.full((len(ranges), max(counts)), spare, np.int32)
    for row, count in enumerate(counts):
        table[row, :count] = [next(order) for _ in range(count)]
    return table, np.array(first, np.int32), pages


def _case(
    name: str,
    spans: list[tuple[int, int]],
    heads: int,
    kv_heads: int,
    head_dim: int,
    kv_dtype: str = "float32",
    first: int = 0,
    spike: float = 1.0,
) -> Case:
    """A case appending positions [begin, end) of every span, each to its own sequence.

    `first` drops that many tokens' pages from the front of each sequence, as sliding layers do.
    """
    n = sum(end - begin for begin, end in spans)

    def inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
        table, first_page, pages = paged_layout(rng, [(first, end) for _, end in spans])
        qkv = rng.standard_normal((n, (heads + 2 * kv_heads) * head_dim), dtype=np.float32)
        qkv[:, head_dim // 2 :: head_dim] *= spike
        angle = rng.uniform(0, 6, (n, head_dim // 2))
        cos_sin = np.concatenate([np.cos(angle), np.sin(angle)], axis=1) * 1.3465735
        return {
            "qkv": qkv,
            "cos_sin": cos_sin.astype(np.float32),
            "positions": np.concatenate([np.arange(*span, dtype=np.int32) for span in spans]),
            "token_seq": np.repeat(
                np.arange(len(spans), dtype=np.int32), [end - begin for begin, end in spans]
            ),
            "page_table": table,
            "first_page": first_page,
            "kv": rng.standard_normal(kv_shape(pages, kv_heads, head_dim)).astype(kv_dtype),
        }

    return Case(
        name,
        {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "kv_dtype": kv_dtype},
        inputs,
        tolerance=1e-6 if kv_dtype == "float32" else 5e-4,
        flops=3 * n * (heads + kv_heads) * head_dim,
        bytes=n
        * head_dim
        * (4 * (2 * heads + 2 * kv_heads) + 2 * kv_heads * np.dtype(kv_dtype).itemsize),
    )


CASES = (
    _case("one token, first of a page", [(16, 17)], 8, 2, 16),
    _case("one token, last of a page", [(31, 32)], 8, 2, 16),
    _case("chunk over page edges", [(15, 50)], 4, 4, 8),
    _case("head of 40, ragged batch", [(0, 3), (40, 41), (17, 33)], 6, 2, 40),
    _case("position 131,071 of a sliding layer", [(131_071, 131_072)], 4, 1, 16, first=130_944),
    _case("float16", [(5, 25), (0, 1)], 8, 1, 64, "float16"),
    _case("float16 beyond its range", [(5, 8)], 2, 1, 32, "float16", spike=1e6),
    _case("one channel 1000 times the others", [(0, 20)], 8, 2, 64, spike=1000),
    _case("20b, one token", [(1000, 1001)], 64, 8, 64, "float16"),
)

ROPE_KV_APPEND = Kernel(
    NAME,
    build=rope_kv_append,
    items=rope_kv_append_items,
    reference=rope_kv_append_ref,
    outputs=lambda inputs, heads, head_dim, **_: [
        ((len(inputs["qkv"]), heads * head_dim), "float32")
    ],
    cases=CASES,
    inplace=("kv",),
)
