"""Attention of many tokens by CUDA's matrix units, sm_80 and later, flash style.

A block takes some tokens that follow each other and eight heads of one KV head: each read of the
cache serves them all. A token and a head are a row of A, eight rows a token, and a warp has four
tokens in two tiles of 16 rows. Keys go by in turns of four pages, which are brought to shared
memory a turn ahead (chunk_pages_cuda.py). Scores stay in registers: those of two tiles of eight
keys are a fragment of A for the product with the values.

Tokens of several sequences in one block are taken one sequence after the other, and a token that
is the only one of its sequence is left to another launch (attend_alone_cuda.py).

Queries and weights are split in two parts of the cache's type where a result should be as good as
those of float32, and else rounded. The sum of a row's weights is a product with ones, of what the
values are multiplied with.

Counted for a warp and 32 keys of float16, where no mask is needed: 417 instructions, of which 136
are products of matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from mxforge.kv_layout import PAGE_TOKENS

from ..cuda.dense import load_words
from ..cuda.instructions import (
    LANES,
    mma_bf16,
    mma_f16,
    shared_words,
    store_shared_words,
    wait_for_launch_before,
)
from ..cuda.mxfp4 import load_word
from ..cuda.warps import ALL, lane_value, largest, smallest
from ..formats.kv import KV
from ..gpu.barriers import barrier
from ..kernel import T, TileConfig
from ..math import LOG2_E, LOWEST
from .attend import HEADS, Words, by_chunk, is_alone
from .chunk_pages_cuda import BLOCKS, HEAD, PART, PART_PAGES, TILES, Pages
from .pages import first_visible, is_hidden

ROW_TILES = 2  # of a warp
ROWS = 2 * ROW_TILES  # that a lane has a part of: tokens of a warp
STEPS = HEAD // 16  # of A's columns
FRAGMENTS = ROW_TILES * STEPS  # of q
PAGES, STAGES = 4, 2  # of a turn; turns
PARTS = PAGES // PART_PAGES
EXACT = 1e-4  # formats with less tolerance have queries and weights in two parts
ONES = {"float16": 0x3C003C00, "bfloat16": 0x3F803F80}  # pairs
NOT_SEEN = -(2.0**80)  # a score; exact in every unit
LEAST = 2.0**-60  # of a row's unit
FAR = 1 << 30  # behind all positions


@dataclass(frozen=True)
class ChunkTile(TileConfig):
    warps: int = 4  # of a block
    of_sm: int = 8  # warps of a multiprocessor, at least: so many registers a thread may have
    least: int = 64  # tokens beyond one each sequence, from which on it is taken

    @property
    def tokens(self) -> int:
        return self.warps * ROWS


class State(NamedTuple):
    """Of a block, in shared memory; then those that each thread has of its own."""

    # u32 [stages · words]: pages. Then u32 [row tiles, D/16, threads, 4]: second parts of `query`,
    # for which there are no registers.
    cache: Any
    raw: Any  # u32: pieces of int8 on their way
    scales: Any  # u32: of these
    query: Any  # u32 [row tiles, D/16, 4]: fragments of A
    weight: Any  # u32 [row tiles, parts, 4]: of A too
    at: Any  # i32 [8]: where the thread's words of pages are
    b: Any  # u32 [8]: fragments of B
    ones: Any  # u32 [2]: one of B
    x: Any  # f32 [16]: of a row of q
    low: Any  # u32 [16]: second parts
    read: Any  # u32 [4]
    score: Any  # f32 [row tiles, 4, 4]: fragments of D, of a part's keys; then weights
    acc: Any  # f32 [row tiles, 8, 4]: fragments of D, sums of values
    total: Any  # f32 [row tiles, 4]: of D, sums of weights
    top: Any  # f32 [rows]: largest score so far
    running: Any  # f32 [rows]
    factor: Any  # f32 [rows]
    unit: Any  # f32 [rows]: of scores, in units of log 2
    last: Any  # i32 [rows]: key that is seen; -1 of rows that are not of the run
    mine: Any  # i32 [2]: sequence and position of the tile's token number `lane`
    run: Any  # i32 [2]: tokens of the tile that are of one sequence
    seen: Any  # i32 [6]: keys that any token sees, that any of the warp sees, that all of it see
    page: Any  # u32: physical, that the thread brings
    turn: Any  # i32: its number
    stage: Any  # i32: of its pages


def chunks(
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    kv_dtype: str,
    window: int,
    tile: ChunkTile,
) -> Any:
    """by_chunk's launch of all tokens but those that are alone in their sequence."""
    words = Words(kv_dtype, head_dim)
    pages = Pages(kv_dtype, PAGES, tile.warps * LANES)
    half = pages.float16
    parts = 2 if KV[kv_dtype].attention_tolerance < EXACT else 1
    group = heads // kv_heads
    per_kv_head = -(-group // HEADS)
    warps, tokens = tile.warps, tile.tokens
    threads = warps * LANES
    rest = STAGES * pages.stage_words  # where second parts of q begin
    mma = mma_f16 if half else mma_bf16
    pair = T.ptx["cvt.rn.f16x2.f32" if half else "cvt.rn.bf16x2.f32"]
    # Weights up to 2¹⁴: float16 has its full precision from 2⁻¹⁴ on.
    bias = 14.0 if half else 0.0
    kept = 0xFFFFE000 if half else 0xFFFF0000  # bits of a float32 that the high part has
    scale = LOG2_E * head_dim**-0.5
    assert not KV[kv_dtype].scaled or parts == 1

    def allocated():
        def local(*shape, dtype="float32"):
            return T.sblock_alloc_buffer(shape, dtype, scope="local")

        return State(
            cache=T.sblock_alloc_buffer(
                (rest + (parts - 1) * FRAGMENTS * threads * 4,), "uint32", scope="shared"
            ),
            raw=local(pages.reads * 8, dtype="uint32"),
            scales=local(pages.reads * 4, dtype="uint32"),
            query=local(FRAGMENTS * 4, dtype="uint32"),
            weight=local(ROW_TILES * parts * 4, dtype="uint32"),
            at=local(8, dtype="int32"),
            b=local(8, dtype="uint32"),
            ones=local(2, dtype="uint32"),
            x=local(16),
            low=local(16, dtype="uint32"),
            read=local(4, dtype="uint32"),
            score=local(ROW_TILES * TILES * 4),
            acc=local(ROW_TILES * 2 * TILES * 4),
            total=local(ROW_TILES * 4),
            top=local(ROWS),
            running=local(ROWS),
            factor=local(ROWS),
            unit=local(ROWS),
            last=local(ROWS, dtype="int32"),
            mine=local(2, dtype="int32"),
            run=local(2, dtype="int32"),
            seen=local(6, dtype="int32"),
            page=local(1, dtype="uint32"),
            turn=local(1, dtype="int32"),
            stage=local(1, dtype="int32"),
        )

    def over_group(combine: Any, value: Any, distance: int) -> Any:
        """With the lane of the four of a row whose number differs by `distance`."""
        return combine(value, T.cuda.__shfl_xor_sync(T.uint32(ALL), value, distance, LANES))

    @T.inline
    def put_pair(to, at, rest, rest_at, x, first, second):
        """Numbers x[first] and x[second] to a pair to[at], what that leaves to rest[rest_at]."""
        if parts == 2:
            highs: T.let = T.reinterpret(
                "float32", T.bitwise_and(T.reinterpret("uint32", x[first]), T.uint32(kept))
            )
            high: T.let = T.reinterpret(
                "float32", T.bitwise_and(T.reinterpret("uint32", x[second]), T.uint32(kept))
            )
            pair(to[at], high, highs)
            pair(rest[rest_at], x[second] - high, x[first] - highs)
        else:
            pair(to[at], x[second], x[first])

    @T.inline
    def find_run(own, count, warp, lane):
        """The tokens run[0] … run[1] - 1 of the tile are those from run[0] on that are of its
        sequence, and see `seen`."""
        sequence: T.let = lane_value(own.mine[0], own.run[0])
        other: T.let = T.Or(own.mine[0] != sequence, lane >= count)
        own.run[1] = smallest(T.Select(T.And(lane > own.run[0], other), lane, count))
        inside: T.let = T.And(lane >= own.run[0], lane < own.run[1])
        first: T.let = first_visible(own.mine[1], window)
        own.seen[0] = smallest(T.Select(inside, first, FAR))
        own.seen[1] = largest(T.Select(inside, own.mine[1], -1))
        of_warp: T.let = T.And(inside, lane // ROWS == warp)
        own.seen[2] = smallest(T.Select(of_warp, first, FAR))
        own.seen[3] = largest(T.Select(of_warp, own.mine[1], -1))
        own.seen[4] = largest(T.Select(of_warp, first, -1))
        own.seen[5] = smallest(T.Select(of_warp, own.mine[1], FAR))
        for r in T.unroll(ROWS):
            number: T.let = warp * ROWS + r
            position: T.let = lane_value(own.mine[1], number)
            own.last[r] = T.Select(T.And(number >= own.run[0], number < own.run[1]), position, -1)

    @T.inline
    def put_query(own, q, token0, n, head0, heads_left, tx):
        """Fragments of q; float16's in units of the largest power of two in the row."""
        warp: T.let = tx // LANES
        lane: T.let = tx % LANES
        head: T.let = head0 + T.min(lane // 4, heads_left - 1)
        for m in T.unroll(ROW_TILES):
            for h in T.unroll(2):
                r: T.let = m * 2 + h
                t: T.let = T.min(token0 + warp * ROWS + r, n - 1)
                own.unit[r] = T.float32(LEAST)
                for s in T.unroll(STEPS):
                    load_words(own.read, 0, q[t, head * head_dim + s * 16 + lane % 4 * 4])
                    for i in T.unroll(4):
                        own.x[s * 4 + i] = T.reinterpret("float32", own.read[i])
                        own.unit[r] = T.max(own.unit[r], T.fabs(own.x[s * 4 + i]))
                if half:
                    for i in T.unroll(2):
                        own.unit[r] = over_group(T.max, own.unit[r], T.shift_left(1, i))
                    own.unit[r] = T.reinterpret(
                        "float32",
                        T.bitwise_and(T.reinterpret("uint32", own.unit[r]), T.uint32(0x7F800000)),
                    )
                    for i in T.unroll(16):  # times 1 / unit
                        own.x[i] = own.x[i] * T.reinterpret(
                            "float32",
                            T.uint32(0x7F000000) - T.reinterpret("uint32", own.unit[r]),
                        )
                    own.unit[r] = own.unit[r] * T.float32(scale)
                else:
                    own.unit[r] = T.float32(scale)
                for s in T.unroll(STEPS):
                    for i in T.unroll(2):
                        put_pair(
                            own.query, (m * STEPS + s) * 4 + i * 2 + h,
                            own.low, s * 4 + i * 2 + h, own.x, s * 4 + i * 2, s * 4 + i * 2 + 1,
                        )  # fmt: skip
            if parts == 2:
                for s in T.unroll(STEPS):
                    low: T.let = s * 4
                    store_shared_words(
                        [own.low[low], own.low[low + 1], own.low[low + 2], own.low[low + 3]],
                        own.cache[rest + ((m * STEPS + s) * threads + tx) * 4],
                    )

    @T.inline
    def find_page(own, table, first_page, sequence, turn, tx):
        """The physical page that the thread brings for a turn."""
        page: T.let = own.seen[0] // PAGE_TOKENS + turn * PAGES + tx // pages.of_page
        last: T.let = own.seen[1] // PAGE_TOKENS
        load_word(
            own.page, 0,
            T.address_of(table[sequence, T.min(page, last) - first_page[sequence]]),
        )  # fmt: skip

    @T.inline
    def score_keys(own, part, key0, tx):
        """score = q · k in units of the row, NOT_SEEN where a row does not see the key."""
        for i in T.unroll(ROW_TILES * TILES * 4):
            own.score[i] = T.float32(0)
        for s in T.unroll(STEPS):
            pages.keys(own.b, own, own.stage[0], part, s)
            for m in T.unroll(ROW_TILES):
                for i in T.unroll(TILES):
                    mma(
                        own.score, (m * TILES + i) * 4, own.query, (m * STEPS + s) * 4, own.b, i * 2
                    )
                if parts == 2:
                    shared_words(
                        [own.low[0], own.low[1], own.low[2], own.low[3]],
                        own.cache[rest + ((m * STEPS + s) * threads + tx) * 4],
                    )
                    for i in T.unroll(TILES):
                        mma(own.score, (m * TILES + i) * 4, own.low, 0, own.b, i * 2)
        if T.Or(key0 < own.seen[4], key0 + PART - 1 > own.seen[5]):
            for m in T.unroll(ROW_TILES):
                for i in T.unroll(TILES):
                    for h in T.unroll(2):
                        for j in T.unroll(2):
                            key: T.let = key0 + i * 8 + tx % 4 * 2 + j
                            own.score[(m * TILES + i) * 4 + h * 2 + j] = T.Select(
                                is_hidden(key, own.last[m * 2 + h], window),
                                T.float32(NOT_SEEN),
                                own.score[(m * TILES + i) * 4 + h * 2 + j],
                            )

    @T.inline
    def weigh(own):
        """score = 2^(score - top + bias), and the sums corrected where a top has grown."""
        for m in T.unroll(ROW_TILES):
            for h in T.unroll(2):
                own.running[m * 2 + h] = own.top[m * 2 + h]
                for i in T.unroll(TILES):
                    for j in T.unroll(2):
                        own.running[m * 2 + h] = T.max(
                            own.running[m * 2 + h], own.score[(m * TILES + i) * 4 + h * 2 + j]
                        )
        for i in T.unroll(2):
            for r in T.unroll(ROWS):
                own.running[r] = over_group(T.max, own.running[r], T.shift_left(1, i))
        grown: T.let = T.Or(
            T.Or(own.running[0] > own.top[0], own.running[1] > own.top[1]),
            T.Or(own.running[2] > own.top[2], own.running[3] > own.top[3]),
        )
        if grown:
            for m in T.unroll(ROW_TILES):
                for h in T.unroll(2):
                    r: T.let = m * 2 + h
                    own.factor[r] = T.exp2((own.top[r] - own.running[r]) * own.unit[r])
                    own.top[r] = own.running[r]
                    for j in T.unroll(2):
                        own.total[m * 4 + h * 2 + j] = own.total[m * 4 + h * 2 + j] * own.factor[r]
                        for i in T.unroll(2 * TILES):
                            at: T.let = (m * 2 * TILES + i) * 4 + h * 2 + j
                            own.acc[at] = own.acc[at] * own.factor[r]
        for m in T.unroll(ROW_TILES):
            for h in T.unroll(2):
                below: T.let = T.float32(bias) - own.top[m * 2 + h] * own.unit[m * 2 + h]
                for i in T.unroll(TILES):
                    for j in T.unroll(2):
                        at: T.let = (m * TILES + i) * 4 + h * 2 + j
                        T.ptx["ex2.approx.ftz.f32"](
                            own.score[at], own.score[at] * own.unit[m * 2 + h] + below
                        )

    @T.inline
    def add_values(own, part):
        """acc += weights · values, total += weights · 1."""
        for block in T.unroll(BLOCKS):
            for m in T.unroll(ROW_TILES):
                for i in T.unroll(2):
                    for h in T.unroll(2):
                        at: T.let = (m * TILES + block * 2 + i) * 4 + h * 2
                        to: T.let = m * parts * 4 + i * 2 + h
                        put_pair(own.weight, to, own.weight, to + 4, own.score, at, at + 1)
                for of in T.unroll(parts):
                    mma(own.total, m * 4, own.weight, (m * parts + of) * 4, own.ones, 0)
            for c in T.unroll(2):
                pages.values(own.b, own, own.stage[0], part, block, c)
                for m in T.unroll(ROW_TILES):
                    for i in T.unroll(TILES):
                        for of in T.unroll(parts):
                            mma(
                                own.acc, ((m * 2 + c) * TILES + i) * 4,
                                own.weight, (m * parts + of) * 4, own.b, i * 2,
                            )  # fmt: skip

    @T.inline
    def take_keys(
        own, cache, kv_head, table, first_page, sequence, q, token0, n, head0, heads_left, tx
    ):  # fmt: skip
        """acc, total and top of a run."""
        key0: T.let = own.seen[0] // PAGE_TOKENS * PAGE_TOKENS
        find_page(own, table, first_page, sequence, 0, tx)
        pages.start(own, cache, kv_head, T.Cast("int64", own.page[0]), own.stage[0], tx)
        find_page(own, table, first_page, sequence, 1, tx)
        put_query(own, q, token0, n, head0, heads_left, tx)
        for i in T.unroll(ROW_TILES * 2 * TILES * 4):
            own.acc[i] = T.float32(0)
        for i in T.unroll(ROW_TILES * 4):
            own.total[i] = T.float32(0)
        for r in T.unroll(ROWS):
            own.top[r] = T.float32(NOT_SEEN)
        own.turn[0] = 0
        while key0 + own.turn[0] * (PARTS * PART) <= own.seen[1]:
            first: T.let = key0 + own.turn[0] * (PARTS * PART)
            pages.finish(
                own, own.stage[0], first + tx // pages.of_page * PAGE_TOKENS, own.seen[0],
                own.seen[1], tx,
            )  # fmt: skip
            # Nobody reads the other stage any more. It stays so where another run begins.
            barrier()
            if first + PARTS * PART <= own.seen[1]:
                page: T.let = T.Cast("int64", own.page[0])
                pages.start(own, cache, kv_head, page, 1 - own.stage[0], tx)
                find_page(own, table, first_page, sequence, own.turn[0] + 2, tx)
            for part in T.serial(PARTS):
                key: T.let = first + part * PART
                if T.And(key <= own.seen[3], key + PART - 1 >= own.seen[2]):
                    score_keys(own, part, key, tx)
                    weigh(own)
                    add_values(own, part)
            own.turn[0] = own.turn[0] + 1
            own.stage[0] = 1 - own.stage[0]

    @T.inline
    def put_result(own, sinks, out, token0, head0, heads_left, warp, lane):
        for m in T.unroll(ROW_TILES):
            for h in T.unroll(2):
                r: T.let = m * 2 + h
                number: T.let = warp * ROWS + r
                inside: T.let = T.And(number >= own.run[0], number < own.run[1])
                if T.And(inside, lane // 4 < heads_left):
                    head: T.let = head0 + lane // 4
                    t: T.let = token0 + number
                    sink: T.let = T.max(sinks[head] * T.float32(LOG2_E), T.float32(LOWEST))
                    top: T.let = own.top[r] * own.unit[r]
                    own.running[r] = T.max(top, sink)
                    own.factor[r] = T.exp2(top - own.running[r] - T.float32(bias))
                    own.factor[r] = own.factor[r] / (
                        own.total[m * 4 + h * 2] * own.factor[r] + T.exp2(sink - own.running[r])
                    )
                    for i in T.unroll(2 * TILES):
                        for j in T.unroll(2):
                            sum_: T.let = own.acc[(m * 2 * TILES + i) * 4 + h * 2 + j]
                            own.x[j] = own.factor[r] * sum_
                        at: T.let = head * head_dim + i * 8 + lane % 4 * 2
                        out[t, T.ramp(at, 1, 2)] = own.x[T.ramp(0, 1, 2)]

    @T.inline
    def work(tx, token0, hb, n, cache, q, positions, token_seq, table, first_page, sinks, out):
        own = allocated()
        T.attr(0, "tirx.launch_bounds_min_blocks_per_sm", tile.of_sm // warps)
        T.attr(0, "pragma_unroll_explicit", False)  # nvcc unrolls: the text stays short
        warp: T.let = tx // LANES
        lane: T.let = tx % LANES
        kv_head: T.let = hb // per_kv_head
        head0: T.let = kv_head * group + hb % per_kv_head * HEADS
        heads_left: T.let = T.min(group - hb % per_kv_head * HEADS, HEADS)
        count: T.let = T.min(n - token0, tokens)
        # Positions, sequences and tables no launch writes.
        own.mine[0] = token_seq[token0 + T.min(lane, count - 1)]
        own.mine[1] = positions[token0 + T.min(lane, count - 1)]
        for i in T.unroll(2):
            own.ones[i] = T.uint32(ONES["float16" if half else "bfloat16"])
        pages.find(own, lane)
        own.stage[0] = 0
        own.run[0] = 0
        wait_for_launch_before()
        while own.run[0] < count:
            find_run(own, count, warp, lane)
            token: T.let = token0 + own.run[0]
            if T.Or(own.run[1] - own.run[0] > 1, T.Not(is_alone(token, n, token_seq))):
                take_keys(
                    own, cache, kv_head, table, first_page, token_seq[token], q, token0, n, head0,
                    heads_left, tx,
                )  # fmt: skip
                put_result(own, sinks, out, token0, head0, heads_left, warp, lane)
            own.run[0] = own.run[1]

    return by_chunk(work, words, tokens=tokens, threads=threads, heads=heads, kv_heads=kv_heads)
