"""Rotate queries and keys by their positions and store keys and values in the paged cache.

    qkv f32 [n, (Hq + 2·Hkv)·D]   cos_sin f32 [n, D]   positions, token_seq i32 [n]
    page_table i32 [b, p]   first_page i32 [b]   kv [2, Hkv, pages, row], updated in place
    -> q f32 [n, Hq·D], rotated

    half-split pairs: (x1, x2) = (x[i], x[i + D/2]) -> (x1·cos - x2·sin, x2·cos + x1·sin)

The cache's layout, and how each type keeps an element, are in `kv_cache`.

Roofline: reads and writes 4·(Hq + 2·Hkv)·D bytes a token. EPYC (Zen 4, 2 cores), 2026-11, at 20b
shapes: 1.1 µs a token of 512, 14 µs for one alone.
"""

from __future__ import annotations

from functools import cache, partial

import numpy as np
import tvm

from mxforge.kv_layout import KV_BYTES, PAGE_TOKENS

from . import bf16
from .kernel import Case, Kernel, T, Target, bind_items, scheduled
from .kv_cache import (
    key_at,
    kv_shape,
    packed,
    paged_layout,
    physical_page,
    quantized,
    random_cache,
    scale_at,
    scale_bits,
    scale_byte,
    slot_elements,
    stored,
    value_at,
)

NAME = "f32_rope_kv_append"
LANES = 16
# Of int8: a rounding that falls the other way now and then.
TOLERANCE = {"float32": 1e-6, "float16": 5e-4, "bfloat16": 4e-3, "int8": 2e-3}


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
    assert kv.dtype == kv_dtype
    n = len(qkv)
    x = qkv.astype(np.float64).reshape(n, heads + 2 * kv_heads, head_dim)
    q, k, v = np.split(x, [heads, heads + kv_heads], axis=1)
    q, k = rotate_ref(q, cos_sin), rotate_ref(k, cos_sin)
    # The tokens alone as a cache of theirs, a page each: what is written are its bits.
    slot = positions % PAGE_TOKENS
    keys, values = np.zeros((2, kv_heads, n, head_dim, PAGE_TOKENS))
    values = values.swapaxes(2, 3)
    keys[:, np.arange(n), :, slot] = k
    values[:, np.arange(n), slot] = v.swapaxes(0, 1)
    fresh = packed(keys, values, kv_dtype)
    page = page_table[token_seq, positions // PAGE_TOKENS - first_page[token_seq]]
    new = kv.astype(np.float64)
    for t in range(n):
        for part, where in enumerate(slot_elements(head_dim, kv_dtype, int(slot[t]))):
            new[part, :, page[t]][:, where] = fresh[part, :, t][:, where]
    return q.reshape(n, heads * head_dim), new


def rope_kv_append_items(
    *, heads: int, kv_heads: int, head_dim: int, kv_dtype: str
) -> tvm.tirx.PrimFunc:
    """One item a (token, head of q, k or v, rotated pair), unscheduled."""
    half = head_dim // 2
    all_heads = heads + 2 * kv_heads
    key, value = partial(key_at, kv_dtype), partial(value_at, kv_dtype, head_dim)

    @T.inline
    def rotated(pair, qkv, cos_sin, t, h, i):
        """pair = elements i and i + D/2 of a head, keys and queries rotated."""
        x1: T.let = qkv[t, h * head_dim + i]
        x2: T.let = qkv[t, h * head_dim + half + i]
        if h < heads + kv_heads:
            pair[0] = x1 * cos_sin[t, i] - x2 * cos_sin[t, half + i]
            pair[1] = x2 * cos_sin[t, i] + x1 * cos_sin[t, half + i]
        else:
            pair[0] = x1
            pair[1] = x2

    @T.inline
    def store(kv, pair, page, part, h, at, i, slot):
        if kv_dtype == "int8":
            # pair[2] is the head's largest magnitude, which every item finds for itself.
            bits: T.let = scale_bits(pair[2])
            scale: T.let = bf16.widened(bits)
            kv[part, h, page, at(i, slot)] = quantized(pair[0], scale)
            kv[part, h, page, at(half + i, slot)] = quantized(pair[1], scale)
            if i == 0:
                for byte in T.unroll(2):
                    kv[part, h, page, scale_at(head_dim, slot) + byte] = scale_byte(bits, byte)
        else:
            kv[part, h, page, at(i, slot)] = stored(pair[0], kv_dtype)
            kv[part, h, page, at(half + i, slot)] = stored(pair[1], kv_dtype)

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
        kv = T.match_buffer(kv_p, kv_shape(pages, kv_heads, head_dim, kv_dtype), kv_dtype)
        q = T.match_buffer(q_p, (n, heads * head_dim), "float32")
        for t, h, i in T.grid(n, all_heads, half):
            with T.sblock("item"):
                vt, vh, vi = T.axis.remap("SSS", [t, h, i])
                pair = T.sblock_alloc_buffer((3,), "float32", scope="local")
                slot: T.let = positions[vt] % PAGE_TOKENS
                page: T.let = physical_page(
                    page_table, first_page, token_seq[vt], positions[vt] // PAGE_TOKENS
                )
                if kv_dtype == "int8":
                    pair[2] = T.float32(0)
                    for j in T.serial(half):
                        rotated(pair, qkv, cos_sin, vt, vh, j)
                        pair[2] = T.max(pair[2], T.max(T.fabs(pair[0]), T.fabs(pair[1])))
                rotated(pair, qkv, cos_sin, vt, vh, vi)
                if vh < heads:
                    q[vt, vh * head_dim + vi] = pair[0]
                    q[vt, vh * head_dim + half + vi] = pair[1]
                elif vh < heads + kv_heads:
                    store(kv, pair, page, 0, vh - heads, key, vi, slot)
                else:
                    store(kv, pair, page, 1, vh - heads - kv_heads, value, vi, slot)

    return main


def _cpu(heads: int, kv_heads: int, head_dim: int, kv_dtype: str) -> tvm.tirx.PrimFunc:
    half = head_dim // 2
    vectors, tail = divmod(half, LANES)
    all_heads = heads + 2 * kv_heads

    key, value = partial(key_at, kv_dtype), partial(value_at, kv_dtype, head_dim)

    @T.inline
    def rotate(out, qkv, cos_sin, t, h, i):
        """out[i], out[D/2 + i]: head h rotated."""
        out[i] = (
            qkv[t, h * head_dim + i] * cos_sin[t, i]
            - qkv[t, h * head_dim + half + i] * cos_sin[t, half + i]
        )
        out[half + i] = (
            qkv[t, h * head_dim + half + i] * cos_sin[t, i]
            + qkv[t, h * head_dim + i] * cos_sin[t, half + i]
        )

    @T.inline
    def rotate_head(out, qkv, cos_sin, t, h):
        for v in T.serial(vectors):
            for lane in T.vectorized(LANES):
                rotate(out, qkv, cos_sin, t, h, v * LANES + lane)
        for i in T.serial(tail):
            rotate(out, qkv, cos_sin, t, h, vectors * LANES + i)

    @T.inline
    def store(kv, head, page, part, h, at, slot):
        if kv_dtype == "int8":
            head[head_dim] = T.float32(0)
            for i in T.serial(head_dim):
                head[head_dim] = T.max(head[head_dim], T.fabs(head[i]))
            bits: T.let = scale_bits(head[head_dim])
            scale: T.let = bf16.widened(bits)
            for byte in T.unroll(2):
                kv[part, h, page, scale_at(head_dim, slot) + byte] = scale_byte(bits, byte)
            for i in T.serial(head_dim):
                kv[part, h, page, at(i, slot)] = quantized(head[i], scale)
        else:
            for i in T.serial(head_dim):
                kv[part, h, page, at(i, slot)] = stored(head[i], kv_dtype)

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
        kv = T.match_buffer(kv_p, kv_shape(pages, kv_heads, head_dim, kv_dtype), kv_dtype)
        q = T.match_buffer(q_p, (n, heads * head_dim), "float32")
        for token in T.parallel(n):
            with T.sblock("item"):
                t = T.axis.spatial(n, token)
                head = T.sblock_alloc_buffer((head_dim + 1,), "float32")
                slot: T.let = positions[t] % PAGE_TOKENS
                page: T.let = physical_page(
                    page_table, first_page, token_seq[t], positions[t] // PAGE_TOKENS
                )
                for h in T.serial(heads):
                    rotate_head(head, qkv, cos_sin, t, h)
                    for i in T.serial(head_dim):
                        q[t, h * head_dim + i] = head[i]
                for h in T.serial(kv_heads):
                    rotate_head(head, qkv, cos_sin, t, heads + h)
                    store(kv, head, page, 0, h, key, slot)
                    for i in T.serial(head_dim):
                        head[i] = qkv[t, (heads + kv_heads + h) * head_dim + i]
                    store(kv, head, page, 1, h, value, slot)

    return scheduled(main, NAME, "tokens in parallel, pairs in vectors")


@cache
def rope_kv_append(
    target: Target, *, heads: int, kv_heads: int, head_dim: int, kv_dtype: str
) -> tvm.tirx.PrimFunc:
    """(qkv, cos_sin, positions, token_seq, page_table, first_page, kv, q) -> None.

    kv is read by nobody and written in place; kv_dtype is one of kv_cache.KV_DTYPES.
    """
    if target.is_gpu:
        items = rope_kv_append_items(
            heads=heads, kv_heads=kv_heads, head_dim=head_dim, kv_dtype=kv_dtype
        )
        return bind_items(items, NAME)
    return _cpu(heads, kv_heads, head_dim, kv_dtype)


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
            "kv": random_cache(rng, pages, kv_heads, head_dim, kv_dtype),
        }

    return Case(
        name,
        {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "kv_dtype": kv_dtype},
        inputs,
        tolerance=TOLERANCE[kv_dtype],
        flops=3 * n * (heads + kv_heads) * head_dim,
        bytes=n * head_dim * (4 * (2 * heads + 2 * kv_heads) + 2 * kv_heads * KV_BYTES[kv_dtype]),
    )


CASES = (
    _case("one token, first of a page", [(16, 17)], 8, 2, 16),
    _case("one token, last of a page", [(31, 32)], 8, 2, 16),
    _case("chunk over page edges", [(15, 50)], 4, 4, 8),
    _case("head of 40, ragged batch", [(0, 3), (40, 41), (17, 33)], 6, 2, 40),
    _case("position 131,071 of a sliding layer", [(131_071, 131_072)], 4, 1, 16, first=130_944),
    _case("float16", [(5, 25), (0, 1)], 8, 1, 64, "float16"),
    _case("bfloat16", [(5, 25), (0, 1)], 8, 1, 64, "bfloat16"),
    _case("bfloat16, head of 6", [(5, 25)], 3, 3, 6, "bfloat16"),
    _case("int8", [(5, 25), (0, 1)], 8, 1, 64, "int8"),
    _case("int8, head of 6", [(5, 25)], 3, 3, 6, "int8"),
    _case("int8 beyond float16", [(5, 8)], 2, 1, 32, "int8", spike=1e6),
    _case("int8 of zeros", [(5, 8)], 2, 1, 32, "int8", spike=1e-35),
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
