"""Causal attention over the paged cache, with sinks and an optional sliding window.

    q f32 [n, Hq·D], rotated   kv [2, Hkv, pages, row]   positions, token_seq i32 [n]
    page_table i32 [b, p]   first_page i32 [b]   sinks f32 [Hq]   ->   out f32 [n, Hq·D]

    A token at position i of sequence s sees the keys j ≤ i of s; with a window w, i - w < j ≤ i.
    Tokens of a sequence follow each other.
    score_j = q·k_j / √D     m = max(sink, max_j score_j)
    out = Σ_j exp(score_j - m)·v_j / (exp(sink - m) + Σ_j exp(score_j - m))

The cache's layout is in formats/kv.py. Page slots without a visible key may hold anything, NaN
included: their scores are replaced, their values never read.

The softmax is computed online, some keys at a time, in constant memory: on the CPU nine pages, on
GPUs 128 keys. A sliding layer begins at the first key in the window, on the CPU at its page.

Roofline of decoding: 2·Hkv·keys rows of D elements of cache a token. Prefill is bound by the
arithmetic, 4·Hq·D operations for each pair of a token and a key that it sees.
"""

from __future__ import annotations

import numpy as np

from mxforge.kv_layout import PAGE_TOKENS

from ..formats.kv import KV
from ..kernel import Case, Kernel, Signature, Size, f32
from . import paged_attention_cpu, paged_attention_gpu
from .pages import paged_layout, table_arguments

NAME = "f32_paged_attention"


def paged_attention_ref(
    q: np.ndarray,
    kv: np.ndarray,
    positions: np.ndarray,
    token_seq: np.ndarray,
    page_table: np.ndarray,
    first_page: np.ndarray,
    sinks: np.ndarray,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    window: int,
    kv_dtype: str,
) -> tuple[np.ndarray]:
    """out float64 [n, heads·head_dim]; window 0 means all keys."""
    keys, values = KV[kv_dtype].unpacked(kv, head_dim)
    out = np.empty((len(q), kv_heads, heads // kv_heads, head_dim))
    queries = q.astype(np.float64).reshape(out.shape) / np.sqrt(head_dim)
    sink = sinks.astype(np.float64).reshape(kv_heads, -1, 1)
    for t, (position, sequence) in enumerate(zip(positions, token_seq, strict=True)):
        j = np.arange(max(0, position - window + 1) if window else 0, position + 1)
        page = page_table[sequence, j // PAGE_TOKENS - first_page[sequence]]
        k = keys[:, page, :, j % PAGE_TOKENS]  # [keys, Hkv, D]
        v = values[:, page, j % PAGE_TOKENS]  # [Hkv, keys, D]
        score = np.einsum("hgd,jhd->hgj", queries[t], k)
        top = np.maximum(score.max(axis=-1, keepdims=True), sink)
        weight = np.exp(score - top)
        total = weight.sum(axis=-1, keepdims=True) + np.exp(sink - top)
        out[t] = np.einsum("hgj,hjd->hgd", weight / total, v)
    return (out.reshape(q.shape),)


def signature(
    *, heads: int, kv_heads: int, head_dim: int, kv_dtype: str, **_window: int
) -> Signature:
    """heads is a multiple of kv_heads, head_dim is even; window 0 means all keys."""
    n = Size("n")
    return Signature(
        (
            f32("q", n, heads * head_dim),
            KV[kv_dtype].tensor("kv", kv_heads, head_dim),
            *table_arguments(n),
            f32("sinks", heads),
        ),
        (f32("out", n, heads * head_dim),),
    )


def attention_case(
    name: str,
    spans: list[tuple[int, int]],
    *,
    heads: int = 8,
    kv_heads: int = 2,
    head_dim: int = 16,
    window: int = 0,
    kv_dtype: str = "float32",
    spike: float = 1.0,
    scores: float = 1.0,
    sink: float = 0.0,
    physical_pages: int = 0,
) -> Case:
    """A case whose queries stand at positions [begin, end) of every span, a sequence each.

    The cache holds what the first of them sees up to the last; all other slots are NaN.
    `scores` scales the queries, `spike` one channel of the values; `sink` shifts the sinks.
    `physical_pages` maps many logical pages onto so few.
    """
    n = sum(end - begin for begin, end in spans)
    seen = [(max(0, begin - window + 1) if window else 0, end) for begin, end in spans]
    keys_read = sum(end - begin for begin, end in seen)
    pairs = sum(
        min(position + 1, window or position + 1)
        for begin, end in spans
        for position in range(begin, end)
    )

    def inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
        if physical_pages:
            (_, end), pages = spans[0], physical_pages
            logical = (end - 1) // PAGE_TOKENS + 1
            table = rng.integers(0, pages, (1, logical)).astype(np.int32)
            first_page = np.zeros(1, np.int32)
        else:
            table, first_page, pages = paged_layout(rng, seen)
        keys = np.full((kv_heads, pages, head_dim, PAGE_TOKENS), np.nan)
        values = np.full((kv_heads, pages, PAGE_TOKENS, head_dim), np.nan)
        if physical_pages:
            keys[:] = rng.standard_normal(keys.shape)
            values[:] = rng.standard_normal(values.shape)
        else:
            for s, (begin, end) in enumerate(seen):
                j = np.arange(begin, end)
                page, slot = table[s, j // PAGE_TOKENS - first_page[s]], j % PAGE_TOKENS
                keys[:, page, :, slot] = rng.standard_normal((len(j), kv_heads, head_dim))
                values[:, page, slot] = rng.standard_normal((kv_heads, len(j), head_dim))
        values[..., head_dim // 2] *= spike
        q = rng.standard_normal((n, heads * head_dim), dtype=np.float32)
        return {
            "q": q * np.float32(scores),
            "kv": KV[kv_dtype].packed(keys, values),
            "positions": np.concatenate([np.arange(*span, dtype=np.int32) for span in spans]),
            "token_seq": np.repeat(
                np.arange(len(spans), dtype=np.int32), [end - begin for begin, end in spans]
            ),
            "page_table": table,
            "first_page": first_page,
            "sinks": rng.standard_normal(heads, dtype=np.float32) + np.float32(sink),
        }

    return Case(
        name,
        {
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "window": window,
            "kv_dtype": kv_dtype,
        },
        inputs,
        tolerance=KV[kv_dtype].attention_tolerance,
        flops=4 * pairs * heads * head_dim,
        bytes=2 * keys_read * kv_heads * head_dim * KV[kv_dtype].element_bytes
        + 8 * n * heads * head_dim,
    )


CASES = (
    attention_case("first token", [(0, 1)]),
    attention_case("15 keys, a page less one", [(14, 15)]),
    attention_case("16 keys, a full page", [(15, 16)]),
    attention_case("17 keys, a page and one", [(16, 17)]),
    attention_case("block edge of the online softmax", [(126, 130)]),
    attention_case("window edge", [(0, 40)], window=20),
    attention_case("window a multiple of a page", [(30, 34), (63, 66)], window=32),
    attention_case("window smaller than a page", [(0, 35)], window=5),
    attention_case("window of one key", [(17, 19)], window=1),
    attention_case("ragged batch", [(0, 7), (40, 41), (16, 33), (99, 100)], heads=6, kv_heads=3),
    attention_case("chunk in the middle of a sequence", [(37, 70)], window=24),
    attention_case("ungrouped heads", [(20, 23)], heads=3, kv_heads=3, head_dim=24),
    attention_case("head of 40", [(45, 48)], heads=10, kv_heads=2, head_dim=40),
    attention_case("head of 6, group of 12", [(45, 48)], heads=12, kv_heads=1, head_dim=6),
    attention_case("head of 160, more than a GPU's block has threads", [(140, 142)], head_dim=160),
    attention_case("group of 11", [(18, 20)], heads=11, kv_heads=1, head_dim=32),
    attention_case("large scores", [(30, 36)], scores=1e4),
    attention_case("sink above all scores", [(30, 36)], sink=60.0),
    attention_case("no sink", [(30, 36)], sink=float("-inf")),
    attention_case("one channel 1000 times the others", [(30, 36)], spike=1000.0),
    attention_case("float16", [(5, 25), (300, 301)], head_dim=64, kv_dtype="float16"),
    attention_case(
        "float16, sliding, head of 40", [(5, 25)], head_dim=40, window=9, kv_dtype="float16"
    ),
    attention_case("bfloat16", [(5, 25), (300, 301)], head_dim=64, kv_dtype="bfloat16"),
    attention_case(
        "bfloat16, sliding, head of 40", [(5, 25)], head_dim=40, window=9, kv_dtype="bfloat16"
    ),
    attention_case(
        "bfloat16, head of 6", [(45, 48)], heads=12, kv_heads=1, head_dim=6, kv_dtype="bfloat16"
    ),
    attention_case("bfloat16, no sink", [(30, 36)], sink=float("-inf"), kv_dtype="bfloat16"),
    attention_case("int8", [(5, 25), (300, 301)], head_dim=64, kv_dtype="int8"),
    attention_case("int8, sliding, head of 40", [(5, 25)], head_dim=40, window=9, kv_dtype="int8"),
    attention_case(
        "int8, head of 6", [(45, 48)], heads=12, kv_heads=1, head_dim=6, kv_dtype="int8"
    ),
    attention_case("int8, one channel 1000 times", [(30, 36)], spike=1000.0, kv_dtype="int8"),
    attention_case("position 131,071 of a sliding layer", [(131_071, 131_072)], window=128),
    *(
        attention_case(
            f"window that begins in a page, {kv_dtype}",
            [(135, 136), (270, 271)],
            head_dim=64,
            window=128,
            kv_dtype=kv_dtype,
        )
        for kv_dtype in ("float16", "bfloat16", "int8")
    ),
    *(
        attention_case(
            f"chunks that begin in a page, and tokens of two more sequences, {kv_dtype}",
            [(5, 23), (300, 301), (37, 110), (40, 41)],
            head_dim=64,
            kv_dtype=kv_dtype,
        )
        for kv_dtype in ("float16", "bfloat16", "int8")
    ),
    *(
        attention_case(
            f"chunks that begin in a window, and a token before them, {kv_dtype}",
            [(135, 136), (100, 175), (7, 9)],
            head_dim=64,
            window=128,
            kv_dtype=kv_dtype,
        )
        for kv_dtype in ("float16", "bfloat16", "int8")
    ),
    attention_case(
        "chunk, float32, head of 32, group of 2",
        [(21, 90), (3, 4)],
        heads=4,
        head_dim=32,
        window=20,
    ),
    attention_case(
        "chunk, group of 11", [(70, 138)], heads=11, kv_heads=1, head_dim=64, kv_dtype="float16"
    ),
    attention_case(
        "position 131,071 of a full layer",
        [(131_071, 131_072)],
        kv_heads=1,
        physical_pages=7,
    ),
    attention_case(
        "20b full layer, one token",
        [(4000, 4001)],
        heads=64,
        kv_heads=8,
        head_dim=64,
        kv_dtype="float16",
    ),
    attention_case(
        "20b full layer, one token, bfloat16",
        [(4000, 4001)],
        heads=64,
        kv_heads=8,
        head_dim=64,
        kv_dtype="bfloat16",
    ),
    attention_case(
        "20b full layer, one token, int8",
        [(4000, 4001)],
        heads=64,
        kv_heads=8,
        head_dim=64,
        kv_dtype="int8",
    ),
    attention_case(
        "20b sliding layer, 32 tokens",
        [(4000, 4032)],
        heads=64,
        kv_heads=8,
        head_dim=64,
        window=128,
        kv_dtype="float16",
    ),
)

PAGED_ATTENTION = Kernel(
    NAME,
    signature,
    paged_attention_ref,
    CASES,
    (*paged_attention_cpu.SCHEDULES, *paged_attention_gpu.SCHEDULES),
)
