"""Rotate queries and keys by their positions and store keys and values in the paged cache.

    qkv f32 [n, (Hq + 2·Hkv)·D]   cos_sin f32 [n, D]   positions, token_seq i32 [n]
    page_table i32 [b, p]   first_page i32 [b]   kv [2, Hkv, pages, row], updated in place
    -> q f32 [n, Hq·D], rotated

    half-split pairs: (x1, x2) = (x[i], x[i + D/2]) -> (x1·cos - x2·sin, x2·cos + x1·sin)

The cache's layout, and how each type keeps an element, are in formats/kv.py.

Roofline: reads and writes 4·(Hq + 2·Hkv)·D bytes a token. EPYC (Zen 4, 2 cores), 2026-11, at 20b
shapes: 1.1 µs a token of 512, 14 µs for one alone.
"""

from __future__ import annotations

import numpy as np

from mxforge.kv_layout import PAGE_TOKENS

from ..formats.kv import KV
from ..gpu.items import one_thread_an_item
from ..kernel import Case, Kernel, Signature, Size, f32
from .kv_insert_cpu import SCHEDULES
from .kv_insert_gpu import pairs
from .pages import paged_layout, table_arguments

NAME = "f32_rope_kv_insert"


def rotate_ref(x: np.ndarray, cos_sin: np.ndarray) -> np.ndarray:
    """x float64 [n, heads, D] rotated by cos_sin [n, D]."""
    cos, sin = np.split(cos_sin.astype(np.float64)[:, None], 2, axis=-1)
    x1, x2 = np.split(x, 2, axis=-1)
    return np.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)


def rope_kv_insert_ref(
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
    kv_format = KV[kv_dtype]
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
    fresh = kv_format.packed(keys, values)
    page = page_table[token_seq, positions // PAGE_TOKENS - first_page[token_seq]]
    new = kv.astype(np.float64)
    for t in range(n):
        for part, where in enumerate(kv_format.slot_elements(head_dim, int(slot[t]))):
            new[part, :, page[t]][:, where] = fresh[part, :, t][:, where]
    return q.reshape(n, heads * head_dim), new


def signature(*, heads: int, kv_heads: int, head_dim: int, kv_dtype: str) -> Signature:
    n = Size("n")
    return Signature(
        (
            f32("qkv", n, (heads + 2 * kv_heads) * head_dim),
            f32("cos_sin", n, head_dim),
            *table_arguments(n),
            KV[kv_dtype].tensor("kv", kv_heads, head_dim),
        ),
        (f32("q", n, heads * head_dim),),
        updated=("kv",),
    )


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
    """A case inserting positions [begin, end) of every span, each to its own sequence.

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
            "kv": KV[kv_dtype].random_cache(rng, pages, kv_heads, head_dim),
        }

    return Case(
        name,
        {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "kv_dtype": kv_dtype},
        inputs,
        tolerance=KV[kv_dtype].insert_tolerance,
        flops=3 * n * (heads + kv_heads) * head_dim,
        bytes=n
        * head_dim
        * (4 * (2 * heads + 2 * kv_heads) + 2 * kv_heads * KV[kv_dtype].element_bytes),
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

ROPE_KV_INSERT = Kernel(
    NAME, signature, rope_kv_insert_ref, CASES, (*SCHEDULES, one_thread_an_item(pairs))
)
