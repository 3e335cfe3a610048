"""Attention of few tokens over long contexts: the keys of a token, spread over blocks of a GPU.

    q f32 [n, Hq·D], rotated   kv [2, Hkv, pages, row]   positions, token_seq i32 [n]
    page_table i32 [b, p]   first_page i32 [b]
    ->   partial f32 [n, SPLITS, Hq·D]   stats f32 [n, SPLITS, Hq, 2]: largest score and sum

    Split i of a token at position t has the keys j of [i·K, (i+1)·K) with j ≤ t, where K is
    ⌈(t+1) / SPLITS⌉, rounded up to whole pages, and FEWEST_KEYS at least.
    score_j = q·k_j / √D   largest = max_j score_j   sum = Σ_j exp(score_j - largest)
    partial = Σ_j exp(score_j - largest)·v_j

Of a split without keys, sum = 0 is written and nothing else. COMBINE_ATTENTION makes of them what
PAGED_ATTENTION gives without a window; the sinks enter there.

Roofline of decoding: 2·Hkv·keys rows of D elements of cache a token.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from mxforge.kv_layout import PAGE_TOKENS

from ..formats.kv import KV
from ..kernel import Case, Kernel, Signature, Size, f32
from . import split_attention_gpu
from .paged_attention import attention_case
from .pages import table_arguments
from .splits import FEWEST_KEYS, SPLITS

NAME = "f32_split_attention"


def split_attention_ref(
    q: np.ndarray,
    kv: np.ndarray,
    positions: np.ndarray,
    token_seq: np.ndarray,
    page_table: np.ndarray,
    first_page: np.ndarray,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    kv_dtype: str,
) -> tuple[np.ndarray, np.ndarray]:
    """(partial, stats) in float64; NaN where nothing is written."""
    keys, values = KV[kv_dtype].unpacked(kv, head_dim)
    n, group = len(q), heads // kv_heads
    partial = np.full((n, SPLITS, kv_heads, group, head_dim), np.nan)
    stats = np.full((n, SPLITS, kv_heads, group, 2), np.nan)
    stats[..., 1] = 0
    queries = q.astype(np.float64).reshape(n, kv_heads, group, head_dim) / np.sqrt(head_dim)
    for t, (position, sequence) in enumerate(zip(positions, token_seq, strict=True)):
        pages = -(-(position + 1) // (SPLITS * PAGE_TOKENS))
        size = max(FEWEST_KEYS, pages * PAGE_TOKENS)
        for split, begin in enumerate(range(0, position + 1, size)):
            j = np.arange(begin, min(begin + size, position + 1))
            page = page_table[sequence, j // PAGE_TOKENS - first_page[sequence]]
            k = keys[:, page, :, j % PAGE_TOKENS]  # [keys, Hkv, D]
            v = values[:, page, j % PAGE_TOKENS]  # [Hkv, keys, D]
            score = np.einsum("hgd,jhd->hgj", queries[t], k)
            weight = np.exp(score - score.max(axis=-1, keepdims=True))
            partial[t, split] = np.einsum("hgj,hjd->hgd", weight, v)
            stats[t, split] = np.stack([score.max(axis=-1), weight.sum(axis=-1)], axis=-1)
    return partial.reshape(n, SPLITS, -1), stats.reshape(n, SPLITS, heads, 2)


def signature(*, heads: int, kv_heads: int, head_dim: int, kv_dtype: str) -> Signature:
    """heads is a multiple of kv_heads, head_dim is even."""
    n = Size("n")
    return Signature(
        (
            f32("q", n, heads * head_dim),
            KV[kv_dtype].tensor("kv", kv_heads, head_dim),
            *table_arguments(n),
        ),
        (
            f32("partial", n, SPLITS, heads * head_dim),
            f32("stats", n, SPLITS, heads, 2),
        ),
    )


def _case(name: str, spans: list[tuple[int, int]], **options: Any) -> Case:
    """A case as PAGED_ATTENTION has it, of queries at positions [begin, end), a sequence each."""
    case = attention_case(name, spans, **options)

    def inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {name: array for name, array in case.inputs(rng).items() if name != "sinks"}

    static = {name: value for name, value in case.static.items() if name != "window"}
    return replace(case, static=static, inputs=inputs)


_LEAST = SPLITS * FEWEST_KEYS  # the most keys that are split into the fewest
_GROUPED = {"heads": 8, "kv_heads": 1}

CASES = (
    _case("first token", [(0, 1)], **_GROUPED),
    _case("fewer keys than splits", [(30, 31)], **_GROUPED),
    _case("edge of the first split", [(126, 130)], **_GROUPED),
    _case("17 tokens of 1 to 600 keys", [(i * 37, i * 37 + 1) for i in range(17)], **_GROUPED),
    _case("last key of the last split", [(_LEAST - 1, _LEAST)], physical_pages=9, **_GROUPED),
    _case("splits of a page more", [(_LEAST, _LEAST + 1)], physical_pages=9, **_GROUPED),
    _case("two KV heads, groups of 3", [(140, 142)], heads=6, kv_heads=2, head_dim=24),
    _case("group of 11", [(140, 141)], heads=11, kv_heads=1, head_dim=40),
    _case("ungrouped heads", [(129, 131)], heads=3, kv_heads=3, head_dim=8),
    _case("head of 160", [(140, 142)], heads=4, kv_heads=1, head_dim=160),
    _case("large scores", [(150, 151)], scores=1e4),
    _case("one channel 1000 times the others", [(150, 152)], spike=1000.0),
    _case("float16", [(5, 8), (300, 301)], head_dim=64, kv_dtype="float16"),
    _case("float16, head of 40", [(145, 147)], head_dim=40, kv_dtype="float16"),
    _case("bfloat16", [(5, 8), (300, 301)], head_dim=64, kv_dtype="bfloat16"),
    _case("bfloat16, head of 40", [(145, 147)], head_dim=40, kv_dtype="bfloat16"),
    _case("int8", [(5, 8), (300, 301)], head_dim=64, kv_dtype="int8"),
    _case("int8, head of 40", [(145, 147)], head_dim=40, kv_dtype="int8"),
    _case("int8, one channel 1000 times", [(150, 152)], spike=1000.0, kv_dtype="int8"),
    _case("position 131,071", [(131_071, 131_072)], physical_pages=7, **_GROUPED),
    *(
        _case(
            f"20b, one token, {kv_dtype}",
            [(4000, 4001)],
            heads=64,
            kv_heads=8,
            head_dim=64,
            kv_dtype=kv_dtype,
        )
        for kv_dtype in ("float16", "bfloat16", "int8")
    ),
)

SPLIT_ATTENTION = Kernel(NAME, signature, split_attention_ref, CASES, split_attention_gpu.SCHEDULES)
