"""Attention on GPUs: a block of threads for a token and up to eight heads of one KV head.

They share each read of the cache, which is taken 128 keys at a time, one for each thread; threads
beside each other read elements beside each other: 16 keys of a page at one d, then the D columns
of a value. All arithmetic is float32, whatever the cache holds.

This is what is left for heads that attend_gpu.py does not take: each of a token's eight blocks is
all there is of it, and every load is of one element.
"""

from __future__ import annotations

from dataclasses import dataclass

import tvm

from mxforge.kv_layout import PAGE_TOKENS

from ..formats.kv import KV
from ..kernel import Schedule, T, Tensor, TileConfig, gpu, prim_func
from ..math import LOWEST, exp_f32
from . import attend_cuda, attend_gpu
from .pages import first_visible, physical_page


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
TILE = BlockTile(threads=128, heads=8, parts=16, unroll=8, shared_bytes=16 << 10)


def _heads_of_block(group: int, head_dim: int, tile: BlockTile) -> int:
    """The largest divisor of the group that the tile and the shared memory have room for."""
    page_of = 4 * tile.threads
    head = 4 * (head_dim + tile.threads + tile.parts + 1)  # query, score, largest, factor
    room = min(tile.heads, (tile.shared_bytes - page_of) // head)
    return max(h for h in range(1, room + 1) if group % h == 0)


def _build(
    arguments: tuple[Tensor, ...],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    window: int,
    kv_dtype: str,
    tile: BlockTile,
) -> tvm.tirx.PrimFunc:
    """A block of threads is a token and some heads of one KV head.

    Every loop over the threads is a phase, and TVM puts barriers between phases that share memory.
    For each 128 keys, a thread first scores one key for all heads; then it is one of the `parts`
    of a head, which find the largest score and make weights of the scores; then it adds up one
    column of the values, over the keys of its row of threads. The rows are put together in the end.
    """
    group = heads // kv_heads
    g = _heads_of_block(group, head_dim, tile)
    per_kv_head = group // g
    threads, parts, unroll = tile.threads, tile.parts, tile.unroll
    kv_format = KV[kv_dtype]
    lanes = min(head_dim, threads)  # threads of a row, beside each other in a value
    rows = threads // lanes
    columns = -(-head_dim // lanes)  # of a value, for each thread
    scale = head_dim**-0.5

    def all_threads():
        return T.thread_binding(threads, thread="threadIdx.x")

    @T.inline
    def score_key(kv, query, score, sums, page, slot, kv_head, tx):
        """score[tx] = queries · the key at `slot` of `page`."""

        @T.inline
        def add(d):
            key: T.let = kv_format.load(
                kv, head_dim, (0, kv_head, page), kv_format.key_at(d, slot), slot
            )
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
            slot: T.let = (begin + j) % PAGE_TOKENS
            value: T.let = kv_format.load(
                kv, head_dim, (1, kv_head, T.Cast("int64", page_of[j])),
                kv_format.value_at(head_dim, c * lanes + tx % lanes, slot), slot,
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

    @T.inline
    def body(n, b, p, pages, q, kv, positions, token_seq, page_table, first_page, sinks, out):
        # Two dimensions, since some devices end each of them at 65,535 blocks.
        for token in T.thread_binding(n, thread="blockIdx.x"):
            for head_block in T.thread_binding(heads // g, thread="blockIdx.y"):
                with T.sblock("block"):
                    t, hb = T.axis.remap("SS", [token, head_block])
                    # Stated here, since the bounds below depend on names bound inside the block.
                    T.reads(
                        q[t, 0 : heads * head_dim],
                        kv[0:2, 0:kv_heads, 0:pages, 0 : kv.shape[3]],
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
                    low: T.let = first_visible(positions[t], window)
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
                    if rows == 1:  # each thread has its columns to itself
                        for tx in all_threads():
                            for c in T.unroll(columns):
                                if tx < lanes and c * lanes + tx < head_dim:
                                    for i in T.unroll(g):
                                        out[t, (h0 + i) * head_dim + c * lanes + tx] = (
                                            acc[tx, c * g + i] / factor[i]
                                        )
                    else:  # a column each, which a thread of each row has a part of
                        for tx in all_threads():
                            for i in T.unroll(g):
                                score[tx * g + i] = acc[tx, i]
                        for tx in all_threads():
                            if tx < lanes:
                                for i in T.unroll(g):
                                    running[0] = T.float32(0)
                                    for row in T.unroll(rows):
                                        running[0] = running[0] + score[(row * lanes + tx) * g + i]
                                    out[t, (h0 + i) * head_dim + tx] = running[0] / factor[i]

    return prim_func(arguments, body)


SCHEDULES = (
    *attend_cuda.schedules(split=False),
    *attend_gpu.schedules(split=False),
    Schedule("one block a token and group of heads", gpu(), _build, TILE),
)
