"""Causal attention over the paged cache, with sinks and an optional sliding window.

    q f32 [n, Hq·D], rotated   kv [pages, 2, Hkv, 16·D]   positions, token_seq i32 [n]
    page_table i32 [b, p]   first_page i32 [b]   sinks f32 [Hq]   ->   out f32 [n, Hq·D]

    A token at position i of sequence s sees the keys j ≤ i of s; with a window w, i - w < j ≤ i.
    score_j = q·k_j / √D     m = max(sink, max_j score_j)
    out = Σ_j exp(score_j - m)·v_j / (exp(sink - m) + Σ_j exp(score_j - m))

The cache's layout is in `kv_append`. Page slots without a visible key may hold anything, NaN
included: their scores are replaced, their values never read.

The softmax is computed online, some keys at a time, in constant memory: on the CPU nine pages, on
GPUs 128 keys, one for each thread of a block. A sliding layer begins at the first key in the
window, on the CPU at its page. A GPU's block works on a token and up to eight query heads of one KV
head, which share each read of the cache; threads beside each other read elements beside each
other: 16 keys of a page at one d, then the D columns of a value.

Roofline of decoding: 4·Hkv·D·keys bytes of float16 cache a token, where memory can follow: a page
and KV head are 64·D bytes and 2·D·G multiply-adds of 16 lanes, so at G = 8 a core that does one
a cycle reads 4 bytes a cycle. Prefill is bound by the arithmetic.

GPUs are far from it: one token of gpt-oss is eight blocks, on a device that runs hundreds; every
token of a chunk reads the cache for itself; and there are no matrix units. For that, the keys of a
sequence have to be spread over blocks, and the tokens of a chunk to share one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import tvm

from .kernel import Case, Kernel, T, Target, TileConfig, scheduled
from .kv_append import PAGE_TOKENS, kv_shape, paged_layout, physical_page
from .math import exp_f32

NAME = "f32_paged_attention"
LANES = 16
LOWEST = -3e38  # stands for -inf where a difference is taken


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
    assert kv.dtype == kv_dtype
    keys = kv[:, 0].reshape(-1, kv_heads, head_dim, PAGE_TOKENS)
    values = kv[:, 1].reshape(-1, kv_heads, PAGE_TOKENS, head_dim)
    out = np.empty((len(q), kv_heads, heads // kv_heads, head_dim))
    queries = q.astype(np.float64).reshape(out.shape) / np.sqrt(head_dim)
    sink = sinks.astype(np.float64).reshape(kv_heads, -1, 1)
    for t, (position, sequence) in enumerate(zip(positions, token_seq, strict=True)):
        j = np.arange(max(0, position - window + 1) if window else 0, position + 1)
        page = page_table[sequence, j // PAGE_TOKENS - first_page[sequence]]
        k = keys[page, :, :, j % PAGE_TOKENS].astype(np.float64)  # [keys, Hkv, D]
        v = values[page, :, j % PAGE_TOKENS].astype(np.float64)
        score = np.einsum("hgd,jhd->hgj", queries[t], k)
        top = np.maximum(score.max(axis=-1, keepdims=True), sink)
        weight = np.exp(score - top)
        total = weight.sum(axis=-1, keepdims=True) + np.exp(sink - top)
        out[t] = np.einsum("hgj,jhd->hgd", weight / total, v)
    return (out.reshape(q.shape),)


@dataclass(frozen=True)
class AttentionTile(TileConfig):
    heads: int  # query heads of one KV head that share one read of it: at most this many
    pages: int  # pages between two corrections of the running maximum


# EPYC (Zen 4, 2 cores), 2026-11, 20b heads in float16: 12.9 GB/s of cache decoding at 32,768 keys,
# 20 GB/s (157 GFLOP/s) where the cache is in L2. 9 pages: a window of 128 keys touches 9. Eight
# heads fill the registers of AVX-512; on AVX2, four would be 25% faster than eight.
CPU_TILE = AttentionTile(heads=8, pages=9)


def _heads_of_item(group: int) -> int:
    """The largest divisor of the group within the tile."""
    return max(h for h in range(1, CPU_TILE.heads + 1) if group % h == 0)


def _first_key(position, window: int):
    """The first key position a query at `position` sees."""
    return T.max(position - T.int32(window - 1), T.int32(0)) if window else T.int32(0)


def _cpu(heads: int, kv_heads: int, head_dim: int, window: int, kv_dtype: str) -> tvm.tirx.PrimFunc:
    group = heads // kv_heads
    g = _heads_of_item(group)
    per_kv_head = group // g
    block_keys = CPU_TILE.pages * PAGE_TOKENS
    vectors, tail = divmod(head_dim, LANES)
    scale = head_dim**-0.5

    @T.inline
    def prefetch(kv, page, part, kv_head, element):
        T.evaluate(
            T.call_llvm_intrin(
                "void",
                "llvm.prefetch",
                T.address_of(kv[page, part, kv_head, element]),
                T.int32(0),
                T.int32(3),
                T.int32(1),
            )
        )

    @T.inline
    def score_page(kv, query, score, partial, page_of, kv_head, j, first, low, position):
        """Scores of the block's page j, -inf outside low ≤ key ≤ position; its values, fetched."""
        for i in T.unroll(g):
            for lane in T.vectorized(LANES):
                partial[i * LANES + lane] = T.float32(0)
        for d in T.serial(head_dim):
            prefetch(kv, page_of[j], 1, kv_head, d * PAGE_TOKENS)
            for i in T.unroll(g):
                for lane in T.vectorized(LANES):
                    partial[i * LANES + lane] = partial[i * LANES + lane] + query[
                        i * head_dim + d
                    ] * T.Cast("float32", kv[page_of[j], 0, kv_head, d * PAGE_TOKENS + lane])
        for i in T.unroll(g):
            for lane in T.vectorized(LANES):
                score[i * block_keys + j * PAGE_TOKENS + lane] = T.Select(
                    T.And(
                        (first + j) * PAGE_TOKENS + lane >= low,
                        (first + j) * PAGE_TOKENS + lane <= position,
                    ),
                    partial[i * LANES + lane],
                    T.float32(0) - T.infinity("float32"),
                )

    @T.inline
    def horizontal(vector, combine):
        """vector[0] = its 16 elements combined."""
        for lane in T.vectorized(8):
            vector[lane] = combine(vector[lane], vector[8 + lane])
        for lane in T.vectorized(4):
            vector[lane] = combine(vector[lane], vector[4 + lane])
        for lane in T.vectorized(2):
            vector[lane] = combine(vector[lane], vector[2 + lane])
        vector[0] = combine(vector[0], vector[1])

    @T.inline
    def softmax_block(score, top, total, correction, vector, i, count):
        """Turn one head's scores of `count` pages into weights; say how to correct older sums."""
        for lane in T.vectorized(LANES):
            vector[lane] = score[i * block_keys + lane]
        for j in T.serial(count - 1):
            for lane in T.vectorized(LANES):
                vector[lane] = T.max(
                    vector[lane], score[i * block_keys + (j + 1) * PAGE_TOKENS + lane]
                )
        horizontal(vector, T.max)
        correction[i] = exp_f32(T.min(top[i] - vector[0], T.float32(0)))
        top[i] = T.max(top[i], vector[0])
        for lane in T.vectorized(LANES):
            vector[lane] = T.float32(0)
        for j in T.serial(count):
            for lane in T.vectorized(LANES):
                score[i * block_keys + j * PAGE_TOKENS + lane] = exp_f32(
                    score[i * block_keys + j * PAGE_TOKENS + lane] - top[i]
                )
            for lane in T.vectorized(LANES):
                vector[lane] = vector[lane] + score[i * block_keys + j * PAGE_TOKENS + lane]
        horizontal(vector, _add)
        total[i] = total[i] * correction[i] + vector[0]

    @T.inline
    def add_values(kv, score, acc, partial, correction, page_of, kv_head, keys, d0, width):
        """acc[:, d0 : d0 + width] = corrected acc + weights · values of the visible keys.

        `keys`: the block's first page, its number of pages, the first and the last visible key.
        Meanwhile the next block's keys come from memory.
        """
        first, count, low, position = keys
        for i in T.unroll(g):
            for lane in T.vectorized(width):
                partial[i * LANES + lane] = T.float32(0)
        for j in T.serial(count):
            key0: T.let = (first + j) * PAGE_TOKENS
            slot0: T.let = T.max(low - key0, 0)
            for s in T.serial(T.min(position + 1 - key0, PAGE_TOKENS) - slot0):
                prefetch(kv, page_of[CPU_TILE.pages + j], 0, kv_head, (d0 + s) * PAGE_TOKENS)
                for i in T.unroll(g):
                    for lane in T.vectorized(width):
                        partial[i * LANES + lane] = partial[i * LANES + lane] + score[
                            i * block_keys + j * PAGE_TOKENS + slot0 + s
                        ] * T.Cast(
                            "float32",
                            kv[page_of[j], 1, kv_head, (slot0 + s) * head_dim + d0 + lane],
                        )
        for i in T.unroll(g):
            for lane in T.vectorized(width):
                acc[i * head_dim + d0 + lane] = (
                    acc[i * head_dim + d0 + lane] * correction[i] + partial[i * LANES + lane]
                )

    @T.prim_func(s_tir=True, private=True)
    def main(
        q_p: T.handle,
        kv_p: T.handle,
        positions_p: T.handle,
        token_seq_p: T.handle,
        page_table_p: T.handle,
        first_page_p: T.handle,
        sinks_p: T.handle,
        out_p: T.handle,
    ):
        n, b, p, pages = T.int64(), T.int64(), T.int64(), T.int64()
        q = T.match_buffer(q_p, (n, heads * head_dim), "float32")
        kv = T.match_buffer(kv_p, kv_shape(pages, kv_heads, head_dim), kv_dtype)
        positions = T.match_buffer(positions_p, (n,), "int32")
        token_seq = T.match_buffer(token_seq_p, (n,), "int32")
        page_table = T.match_buffer(page_table_p, (b, p), "int32")
        first_page = T.match_buffer(first_page_p, (b,), "int32")
        sinks = T.match_buffer(sinks_p, (heads,), "float32")
        out = T.match_buffer(out_p, (n, heads * head_dim), "float32")
        # Heads are the outer part: threads then get equal shares of long and short sequences,
        # and neighbouring tokens of a chunk find their keys in the core's cache.
        for item in T.parallel(n * (heads // g)):
            with T.sblock("item"):
                t = T.axis.spatial(n, item % n)
                head_block = T.axis.spatial(heads // g, T.Cast("int32", item // n))
                # Said here, since the bounds below depend on names bound inside the block.
                T.reads(
                    q[t, 0 : heads * head_dim],
                    kv[0:pages, 0:2, 0:kv_heads, 0 : PAGE_TOKENS * head_dim],
                    positions[t],
                    token_seq[t],
                    page_table[0:b, 0:p],
                    first_page[0:b],
                    sinks[0:heads],
                )
                T.writes(out[t, 0 : heads * head_dim])
                # Default scope: on CPUs, small buffers of scope "local" would not become registers.
                query = T.sblock_alloc_buffer((g * head_dim,), "float32")
                acc = T.sblock_alloc_buffer((g * head_dim,), "float32")
                score = T.sblock_alloc_buffer((g * block_keys,), "float32")
                partial = T.sblock_alloc_buffer((g * LANES,), "float32")
                vector = T.sblock_alloc_buffer((LANES,), "float32")
                top = T.sblock_alloc_buffer((g,), "float32")
                total = T.sblock_alloc_buffer((g,), "float32")
                correction = T.sblock_alloc_buffer((g,), "float32")
                page_of = T.sblock_alloc_buffer((2 * CPU_TILE.pages,), "int64")
                h0: T.let = head_block * g
                kv_head: T.let = head_block // per_kv_head
                position: T.let = positions[t]
                low: T.let = _first_key(position, window)
                page0: T.let = low // PAGE_TOKENS
                page_count: T.let = position // PAGE_TOKENS + 1 - page0
                for i in T.serial(g):
                    top[i] = T.max(sinks[h0 + i], T.float32(LOWEST))
                    total[i] = exp_f32(sinks[h0 + i] - top[i])
                for i in T.serial(g * head_dim):
                    query[i] = q[t, h0 * head_dim + i] * T.float32(scale)
                    acc[i] = T.float32(0)
                for block in T.serial(T.ceildiv(page_count, CPU_TILE.pages)):
                    first: T.let = page0 + block * CPU_TILE.pages
                    count: T.let = T.min(page_count - block * CPU_TILE.pages, CPU_TILE.pages)
                    # This block's pages and the next one's.
                    for j in T.serial(2 * CPU_TILE.pages):
                        page_of[j] = physical_page(
                            page_table, first_page, token_seq[t],
                            T.min(first + j, page0 + page_count - 1),
                        )  # fmt: skip
                    for j in T.serial(count):
                        score_page(
                            kv, query, score, partial, page_of, kv_head, j, first, low, position
                        )
                    for i in T.serial(g):
                        softmax_block(score, top, total, correction, vector, i, count)
                    for c in T.serial(vectors):
                        add_values(
                            kv, score, acc, partial, correction, page_of, kv_head,
                            (first, count, low, position), c * LANES, LANES,
                        )  # fmt: skip
                    if tail > 0:
                        add_values(
                            kv, score, acc, partial, correction, page_of, kv_head,
                            (first, count, low, position), vectors * LANES, tail,
                        )  # fmt: skip
                for i in T.serial(g):
                    for d in T.serial(head_dim):
                        out[t, (h0 + i) * head_dim + d] = acc[i * head_dim + d] / total[i]

    return scheduled(main, NAME, "heads of tokens in parallel, online softmax", CPU_TILE)


def _add(a, b):
    return a + b


@dataclass(frozen=True)
class BlockTile(TileConfig):
    threads: int  # of a block; as many keys between two corrections of the running maximum
    heads: int  # query heads of one KV head that share one read of it: at most this many
    parts: int  # threads that turn one head's scores into weights
    unroll: int  # reads of the cache in flight
    shared_bytes: int  # of a block: where head_dim is large, fewer heads share it


# By what every device has, and not measured: 128 threads, 16 KiB of shared memory (8 heads of 64
# take 7, so that two blocks fit). 128 keys are the window of gpt-oss, and so few are summed apart
# before they join the running sum, which bounds the rounding error. 8 heads of 16 parts keep all
# threads busy, and need 8 + 8 + 8 registers for sums, weights and one step's sums.
GPU_TILE = BlockTile(threads=128, heads=8, parts=16, unroll=8, shared_bytes=16 << 10)


def _heads_of_block(group: int, head_dim: int) -> int:
    """The largest divisor of the group that the tile and the shared memory have room for."""
    page_of = 4 * GPU_TILE.threads
    head = 4 * (head_dim + GPU_TILE.threads + GPU_TILE.parts + 1)  # query, score, largest, factor
    room = min(GPU_TILE.heads, (GPU_TILE.shared_bytes - page_of) // head)
    return max(h for h in range(1, room + 1) if group % h == 0)


def _gpu(
    heads: int, kv_heads: int, head_dim: int, window: int, kv_dtype: str, bound: bool
) -> tvm.tirx.PrimFunc:
    """A block of threads for a token and some query heads of one KV head.

    Every loop over the threads is a phase, and TVM puts barriers between phases that share memory.
    For each 128 keys, a thread first scores one key for all heads; then it is one of the `parts`
    of a head, which find the largest score and make weights of the scores; then it adds up one
    column of the values, over the keys of its row of threads. The rows are put together in the end.

    Not `bound` to a GPU's blocks and threads, all loops are serial: the same on the CPU.
    """
    group = heads // kv_heads
    g = _heads_of_block(group, head_dim)
    per_kv_head = group // g
    threads, parts, unroll = GPU_TILE.threads, GPU_TILE.parts, GPU_TILE.unroll
    lanes = min(head_dim, threads)  # threads of a row, beside each other in a value
    rows = threads // lanes
    columns = -(-head_dim // lanes)  # of a value, for each thread
    scale = head_dim**-0.5

    def over(extent, thread):
        return T.thread_binding(extent, thread=thread) if bound else T.serial(extent)

    def all_threads():
        return over(threads, "threadIdx.x")

    @T.inline
    def score_key(kv, query, score, sums, page, slot, kv_head, tx):
        """score[tx] = queries · the key at `slot` of `page`."""

        @T.inline
        def add(d):
            key: T.let = T.Cast("float32", kv[page, 0, kv_head, d * PAGE_TOKENS + slot])
            for i in T.unroll(g):
                sums[i] = sums[i] + query[d * g + i] * key

        for i in T.unroll(g):
            sums[i] = T.float32(0)
        for d in T.serial(head_dim // unroll):
            for u in T.unroll(unroll):
                add(d * unroll + u)
        for u in T.unroll(head_dim % unroll):
            add(head_dim // unroll * unroll + u)
        for i in T.unroll(g):
            score[tx * g + i] = sums[i]

    # The part of head i with number k is thread k·g + i.

    @T.inline
    def take_part(score, part, largest, running, tx):
        """part[tx] = this thread's part of a head's scores; the largest of them."""
        running[0] = T.float32(LOWEST)
        for k in T.unroll(threads // parts):
            part[tx, k] = score[k * (parts * g) + tx]
            running[0] = T.max(running[0], part[tx, k])
        largest[tx] = running[0]

    @T.inline
    def weigh(score, part, largest, factor, top, total, running, tx):
        """Turn this thread's part of the scores into weights; factor[i] corrects older sums."""
        running[0] = top[tx]
        for k in T.unroll(parts):
            running[0] = T.max(running[0], largest[k * g + tx % g])
        total[tx] = total[tx] * exp_f32(top[tx] - running[0])
        if tx < g:
            factor[tx] = exp_f32(top[tx] - running[0])
        top[tx] = running[0]
        running[0] = T.float32(0)
        for k in T.unroll(threads // parts):
            part[tx, k] = exp_f32(part[tx, k] - top[tx])
            score[k * (parts * g) + tx] = part[tx, k]
            running[0] = running[0] + part[tx, k]
        total[tx] = total[tx] + running[0]

    @T.inline
    def add_values(kv, score, factor, page_of, acc, sums, kv_head, begin, count, tx, c):
        """Column c of this thread: acc[tx] = corrected acc + weights · values of its row's keys.

        `count` keys from position `begin`.
        """

        @T.inline
        def add(j):
            value: T.let = T.Cast(
                "float32",
                kv[
                    T.Cast("int64", page_of[j]), 1, kv_head,
                    (begin + j) % PAGE_TOKENS * head_dim + c * lanes + tx % lanes,
                ],
            )  # fmt: skip
            for i in T.unroll(g):
                sums[i] = sums[i] + score[j * g + i] * value

        chunks: T.let = count // (rows * unroll)
        for i in T.unroll(g):
            sums[i] = T.float32(0)
        for chunk in T.serial(chunks):
            for u in T.unroll(unroll):
                add((chunk * unroll + u) * rows + tx // lanes)
        for rest in T.serial(T.ceildiv(count - chunks * (rows * unroll), rows)):
            j: T.let = (chunks * unroll + rest) * rows + tx // lanes
            if j < count:
                add(j)
        for i in T.unroll(g):
            acc[tx, c * g + i] = acc[tx, c * g + i] * factor[i] + sums[i]

    @T.prim_func(s_tir=True, private=True)
    def main(
        q_p: T.handle,
        kv_p: T.handle,
        positions_p: T.handle,
        token_seq_p: T.handle,
        page_table_p: T.handle,
        first_page_p: T.handle,
        sinks_p: T.handle,
        out_p: T.handle,
    ):
        n, b, p, pages = T.int64(), T.int64(), T.int64(), T.int64()
        q = T.match_buffer(q_p, (n, heads * head_dim), "float32")
        kv = T.match_buffer(kv_p, kv_shape(pages, kv_heads, head_dim), kv_dtype)
        positions = T.match_buffer(positions_p, (n,), "int32")
        token_seq = T.match_buffer(token_seq_p, (n,), "int32")
        page_table = T.match_buffer(page_table_p, (b, p), "int32")
        first_page = T.match_buffer(first_page_p, (b,), "int32")
        sinks = T.match_buffer(sinks_p, (heads,), "float32")
        out = T.match_buffer(out_p, (n, heads * head_dim), "float32")
        # Two dimensions, since some devices end each of them at 65,535 blocks.
        for token in over(n, "blockIdx.x"):
            for head_block in over(heads // g, "blockIdx.y"):
                with T.sblock("block"):
                    t, hb = T.axis.remap("SS", [token, head_block])
                    # Said here, since the bounds below depend on names bound inside the block.
                    T.reads(
                        q[t, 0 : heads * head_dim],
                        kv[0:pages, 0:2, 0:kv_heads, 0 : PAGE_TOKENS * head_dim],
                        positions[t],
                        token_seq[t],
                        page_table[0:b, 0:p],
                        first_page[0:b],
                        sinks[0:heads],
                    )
                    T.writes(out[t, 0 : heads * head_dim])
                    # The heads of a block are the inner dimension: a thread reads all of them.
                    query = T.sblock_alloc_buffer((head_dim * g,), "float32", scope="shared")
                    score = T.sblock_alloc_buffer((threads * g,), "float32", scope="shared")
                    largest = T.sblock_alloc_buffer((parts * g,), "float32", scope="shared")
                    factor = T.sblock_alloc_buffer((g,), "float32", scope="shared")
                    page_of = T.sblock_alloc_buffer((threads,), "int32", scope="shared")
                    # What each thread keeps from phase to phase.
                    acc = T.sblock_alloc_buffer((threads, columns * g), "float32", scope="local")
                    part = T.sblock_alloc_buffer(
                        (threads, threads // parts), "float32", scope="local"
                    )
                    top = T.sblock_alloc_buffer((threads,), "float32", scope="local")
                    total = T.sblock_alloc_buffer((threads,), "float32", scope="local")
                    # What it needs within one.
                    sums = T.sblock_alloc_buffer((g,), "float32", scope="local")
                    running = T.sblock_alloc_buffer((1,), "float32", scope="local")
                    h0: T.let = hb * g
                    kv_head: T.let = hb // per_kv_head
                    low: T.let = _first_key(positions[t], window)
                    for tx in all_threads():
                        for i in T.unroll(columns * g):
                            acc[tx, i] = T.float32(0)
                        for i in T.serial(-(-g * head_dim // threads)):
                            e: T.let = i * threads + tx
                            if e < g * head_dim:
                                query[e % head_dim * g + e // head_dim] = q[
                                    t, h0 * head_dim + e
                                ] * T.float32(scale)
                        if tx < parts * g:
                            top[tx] = T.max(sinks[h0 + tx % g], T.float32(LOWEST))
                            total[tx] = T.Select(
                                tx < g, exp_f32(sinks[h0 + tx % g] - top[tx]), T.float32(0)
                            )
                    for step in T.serial(T.ceildiv(positions[t] + 1 - low, threads)):
                        begin: T.let = low + step * threads
                        count: T.let = T.min(positions[t] + 1 - begin, threads)
                        for tx in all_threads():
                            if tx < count:
                                page: T.let = physical_page(
                                    page_table, first_page, token_seq[t],
                                    (begin + tx) // PAGE_TOKENS,
                                )  # fmt: skip
                                page_of[tx] = T.Cast("int32", page)
                                score_key(
                                    kv, query, score, sums, page, (begin + tx) % PAGE_TOKENS,
                                    kv_head, tx,
                                )  # fmt: skip
                            else:
                                for i in T.unroll(g):
                                    score[tx * g + i] = T.float32(LOWEST)
                        for tx in all_threads():
                            if tx < parts * g:
                                take_part(score, part, largest, running, tx)
                        for tx in all_threads():
                            if tx < parts * g:
                                weigh(score, part, largest, factor, top, total, running, tx)
                        for tx in all_threads():
                            for c in T.unroll(columns):
                                if tx < rows * lanes and c * lanes + tx % lanes < head_dim:
                                    add_values(
                                        kv, score, factor, page_of, acc, sums, kv_head,
                                        begin, count, tx, c,
                                    )  # fmt: skip
                    for tx in all_threads():
                        if tx < parts * g:
                            largest[tx] = total[tx]
                    for tx in all_threads():
                        if tx < g:
                            running[0] = T.float32(0)
                            for k in T.unroll(parts):
                                running[0] = running[0] + largest[k * g + tx]
                            factor[tx] = running[0]
                    for c in T.unroll(columns):
                        for tx in all_threads():
                            for i in T.unroll(g):
                                score[tx * g + i] = acc[tx, c * g + i]
                        for tx in all_threads():
                            if tx < lanes and c * lanes + tx < head_dim:
                                for i in T.unroll(g):
                                    running[0] = T.float32(0)
                                    for row in T.unroll(rows):
                                        running[0] = running[0] + score[(row * lanes + tx) * g + i]
                                    out[t, (h0 + i) * head_dim + c * lanes + tx] = (
                                        running[0] / factor[i]
                                    )

    return main


@cache
def paged_attention_items(
    *, heads: int, kv_heads: int, head_dim: int, window: int, kv_dtype: str
) -> tvm.tirx.PrimFunc:
    """The GPU schedule, a block's threads one after the other."""
    return _gpu(heads, kv_heads, head_dim, window, kv_dtype, bound=False)


@cache
def paged_attention(
    target: Target, *, heads: int, kv_heads: int, head_dim: int, window: int, kv_dtype: str
) -> tvm.tirx.PrimFunc:
    """(q, kv, positions, token_seq, page_table, first_page, sinks, out) -> None.

    heads is a multiple of kv_heads; window 0 means all keys; kv_dtype is "float32" or "float16".
    """
    if target.is_gpu:
        func = _gpu(heads, kv_heads, head_dim, window, kv_dtype, bound=True)
        return scheduled(func, NAME, "one block a token and group of heads", GPU_TILE)
    return _cpu(heads, kv_heads, head_dim, window, kv_dtype)


def _case(
    name: str,
    spans: list[tuple[int, int]],
    *,
    heads: int = 8,
    kv_heads: int = 2,
    head_dim: int = 16,
    window: int = 0,
    kv_dtype: str = "float32",
    tolerance: float = 1e-5,
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
        keys = np.full((pages, kv_heads, head_dim, PAGE_TOKENS), np.nan, kv_dtype)
        values = np.full((pages, kv_heads, PAGE_TOKENS, head_dim), np.nan, kv_dtype)
        if physical_pages:
            keys[:] = rng.standard_normal(keys.shape)
            values[:] = rng.standard_normal(values.shape)
        else:
            for s, (begin, end) in enumerate(seen):
                j = np.arange(begin, end)
                page, slot = table[s, j // PAGE_TOKENS - first_page[s]], j % PAGE_TOKENS
                keys[page, :, :, slot] = rng.standard_normal((len(j), kv_heads, head_dim))
                values[page, :, slot] = rng.standard_normal((len(j), kv_heads, head_dim))
        values[..., head_dim // 2] *= spike
        q = rng.standard_normal((n, heads * head_dim), dtype=np.float32)
        return {
            "q": q * np.float32(scores),
            "kv": np.stack(
                [part.reshape(pages, kv_heads, PAGE_TOKENS * head_dim) for part in (keys, values)],
                axis=1,
            ),
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
        tolerance=tolerance,
        flops=4 * pairs * heads * head_dim,
        bytes=2 * keys_read * kv_heads * head_dim * np.dtype(kv_dtype).itemsize
        + 8 * n * heads * head_dim,
    )


CASES = (
    _case("first token", [(0, 1)]),
    _case("15 keys, a page less one", [(14, 15)]),
    _case("16 keys, a full page", [(15, 16)]),
    _case("17 keys, a page and one", [(16, 17)]),
    _case("block edge of the online softmax", [(126, 130)]),
    _case("window edge", [(0, 40)], window=20),
    _case("window a multiple of a page", [(30, 34), (63, 66)], window=32),
    _case("window smaller than a page", [(0, 35)], window=5),
    _case("window of one key", [(17, 19)], window=1),
    _case("ragged batch", [(0, 7), (40, 41), (16, 33), (99, 100)], heads=6, kv_heads=3),
    _case("chunk in the middle of a sequence", [(37, 70)], window=24),
    _case("ungrouped heads", [(20, 23)], heads=3, kv_heads=3, head_dim=24),
    _case("head of 40", [(45, 48)], heads=10, kv_heads=2, head_dim=40),
    _case("head of 6, group of 12", [(45, 48)], heads=12, kv_heads=1, head_dim=6),
    _case("head of 160, more than a GPU's block has threads", [(140, 142)], head_dim=160),
    _case("group of 11", [(18, 20)], heads=11, kv_heads=1, head_dim=32),
    _case("large scores", [(30, 36)], scores=1e4),
    _case("sink above all scores", [(30, 36)], sink=60.0),
    _case("no sink", [(30, 36)], sink=float("-inf")),
    _case("one channel 1000 times the others", [(30, 36)], spike=1000.0),
    _case("float16", [(5, 25), (300, 301)], head_dim=64, kv_dtype="float16"),
    _case("float16, sliding, head of 40", [(5, 25)], head_dim=40, window=9, kv_dtype="float16"),
    _case("position 131,071 of a sliding layer", [(131_071, 131_072)], window=128),
    _case(
        "position 131,071 of a full layer",
        [(131_071, 131_072)],
        kv_heads=1,
        physical_pages=7,
    ),
    _case(
        "20b full layer, one token",
        [(4000, 4001)],
        heads=64,
        kv_heads=8,
        head_dim=64,
        kv_dtype="float16",
    ),
    _case(
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
    build=paged_attention,
    items=paged_attention_items,
    reference=paged_attention_ref,
    outputs=lambda inputs, **_: [(inputs["q"].shape, "float32")],
    cases=CASES,
)
