"""Attention by CUDA's matrix units: warps of a block take the keys of one token and eight heads of
one KV head by turns, straight from the cache's words into fragments, and put their sums together.

A warp takes eight groups of slots at once, 32 keys or, of a float16 cache, 64. Lane 4·g + t reads
four words at a time (Words): of group g's keys, elements 16s + 4t … 16s + 4t + 3 for each s, and of
the values of groups 2t and 2t+1, a number of columns that g says. Four elements that are summed
over, those of a key or four slots of a value, are what a fragment of B has in a lane: the words as
they are (bfloat16), two by two (float16) or widened (int8).

The eight heads are the first eight rows of A. What is multiplied with the cache, queries and
weights, is split in two parts of its type, high and low, and the low one is in the other eight
rows: that the product is as good as of 16 to 22 bits costs nothing.

Counted for 32 keys of 64 elements in bfloat16: 16 reads, 32 products of matrices, 8 exponentials.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import tvm

from mxforge.kv_layout import PAGE_TOKENS

from ..cuda.dense import load_words
from ..cuda.instructions import (
    LANES,
    copies_done,
    copy_async,
    mma_bf16,
    mma_f16,
    permuted,
    shared_words,
    wait_for_launch_before,
)
from ..formats.kv import BF16, F16, INT8, KV
from ..gpu.barriers import barrier
from ..kernel import Schedule, T, Tensor, TileConfig, gpu
from ..math import LOG2_E, LOWEST
from .attend import HEADS, WORDS, Words, over_blocks, upper
from .attend_alone_cuda import alone
from .attend_chunk_cuda import ChunkTile, chunks
from .pages import most_pages

LN_2 = 0.6931472
GROUPS = 8  # of slots, that a warp takes at once: the columns of B
PAIR = 0x7632  # selects the upper halves of two words


@dataclass(frozen=True)
class WarpsTile(TileConfig):
    warps: int  # of a block
    most_warps: int  # of one whose keys are those of a window
    of_sm: int  # of a multiprocessor, at least: the most registers of a thread depend on it


# Four: what a split of 128 keys gives 32 each. Not measured.
TILE = WarpsTile(warps=4, most_warps=8, of_sm=16)
# nvcc's code for these wants more than the 128 registers of 16 warps, where float16 is read.
LATE_F16 = WarpsTile(warps=4, most_warps=8, of_sm=12)
CHUNK = ChunkTile()


class State(NamedTuple):
    """Of a block, in shared memory; then those that each thread has of its own."""

    tops: Any  # f32 [warps, 8 heads]
    totals: Any  # f32 [warps, 8 heads]
    sums: Any  # f32 [warps, 8 heads, pitch]
    query: Any  # u32 [D/16, lanes, 4]: fragments of A; before that, or behind them, q itself
    a: Any  # u32 [4]: one of them
    weight: Any  # u32 [2, wide/4, 4]: fragments of A
    b: Any  # u32 [2]: a fragment of B
    d: Any  # f32 [4]: a fragment of D
    score: Any  # f32 [wide, 4]: fragments of D; the group's slots
    acc: Any  # f32 [D/8, 2]: of a fragment of D, high and low parts together
    keys: Any  # u32 [D/16, 4/p, 4]: words
    values: Any  # u32 [2, wide/4, D/8/wide, 4/p, 4]: words
    key_scales: Any  # u32 [4]: of 8 slots
    value_scales: Any  # u32 [4]
    first: Any  # i32: of the pages of the warp's turn
    key_page: Any  # u32: physical, of the keys that a lane reads
    value_page: Any  # u32
    unit: Any  # f32: that the query is in
    x: Any  # f32 [4]
    rest: Any  # f32 [4]
    top: Any  # f32
    total: Any  # f32
    running: Any  # f32


def bits(x: Any) -> Any:
    return T.reinterpret("uint32", x)


@T.inline
def load_word(to, at, start):
    """32 bits from `start` on, an element of a buffer, to a register; it stays on its side of
    wait_for_launch_before() as load_words does."""
    T.ptx["ld.global.b32"](to[at], T.address_of(start))


def over_group(combine: Any, value: Any) -> Any:
    """Over the four lanes with the same g."""
    for distance in (1, 2):
        other = T.cuda.__shfl_xor_sync(T.uint32(0xFFFFFFFF), value, distance, LANES)
        value = combine(value, other)
    return value


def _byte(word: Any, i: int) -> Any:
    """float32 of byte i of a word of int8 that is flipped by 0x80808080: the last bits of 2²³."""
    wide = permuted(word, T.uint32(0x4B000000), T.uint32(0x7540 + i))
    return T.reinterpret("float32", wide) - T.float32(8388736)


def fits(*, head_dim: int, kv_dtype: str, **_static: Any) -> bool:
    """With more columns, words and sums want more registers than there are."""
    return kv_dtype in (F16.name, BF16.name, INT8.name) and head_dim == 64


def build(
    split: bool,
    arguments: tuple[Tensor, ...],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    kv_dtype: str,
    window: int = 0,
    tile: WarpsTile,
) -> tvm.tirx.PrimFunc:
    """The code of PAGED_ATTENTION or, of split keys, of SPLIT_ATTENTION."""
    words = Words(kv_dtype, head_dim)
    half, scaled = kv_dtype == F16.name, KV[kv_dtype].scaled
    group = heads // kv_heads
    per_kv_head = -(-group // HEADS)
    word, wide, slot_groups = words.word, words.wide, words.slot_groups
    pages_at_once = GROUPS // slot_groups
    keys_at_once = pages_at_once * PAGE_TOKENS
    warps = tile.warps
    if window:  # all of it in one turn
        warps = max(warps, min(-(-most_pages(window) // pages_at_once), tile.most_warps))
    threads = warps * LANES
    reads = 4 // word  # that four elements are in
    steps = head_dim // 16  # of A's columns
    raw_at = steps * LANES * 4 if half else 0  # q in `query`: float16's as long as others need it
    quads, blocks = wide // 4, head_dim // (8 * wide)  # of a group's slots; of a value's columns
    # Weights up to 2¹⁴: float16 has its full precision from 2⁻¹⁴ on.
    bias = 14 if half else 0
    kept = 0xFFFFE000 if half else 0xFFFF0000  # bits of a float32 that the high part has
    # From row to row, so that a quarter of a warp that stores 16 bytes each meets every bank once.
    pitch = head_dim + (8 if half else 4)
    mma = mma_f16 if half else mma_bf16

    def place(column: Any) -> Any:
        """Of a column in a row of `sums`, where those of float16's lanes are 16 apart."""
        return column + column // 32 * 4 if half else column

    def allocated():
        def shared(*shape):
            return T.sblock_alloc_buffer(shape, "float32", scope="shared")

        def local(*shape, dtype="float32"):
            return T.sblock_alloc_buffer(shape, dtype, scope="local")

        return State(
            tops=shared(warps * HEADS),
            totals=shared(warps * HEADS),
            sums=shared(warps * HEADS * pitch),
            query=T.sblock_alloc_buffer((raw_at + steps * LANES * 4,), "uint32", scope="shared"),
            a=local(4, dtype="uint32"),
            weight=local(2 * quads * 4, dtype="uint32"),
            b=local(2, dtype="uint32"),
            d=local(4),
            score=local(wide * 4),
            acc=local(head_dim // 8 * 2),
            keys=local(steps * reads * WORDS, dtype="uint32"),
            values=local(2 * quads * blocks * reads * WORDS, dtype="uint32"),
            key_scales=local(WORDS, dtype="uint32"),
            value_scales=local(WORDS, dtype="uint32"),
            first=local(1, dtype="int32"),
            key_page=local(1, dtype="uint32"),
            value_page=local(1, dtype="uint32"),
            unit=local(1),
            x=local(4),
            rest=local(4),
            top=local(1),
            total=local(1),
            running=local(1),
        )

    @T.inline
    def find_pages(own, table, first_page, sequence, first, end, lane):
        """Of the warp's pages from `first` on, those whose keys and values the lane reads."""
        load_word(
            own.key_page, 0,
            table[
                sequence, T.min(first + lane // 4 // slot_groups, end - 1) - first_page[sequence]
            ],
        )  # fmt: skip
        load_word(
            own.value_page, 0,
            table[
                sequence, T.min(first + lane % 4 * 2 // slot_groups, end - 1) - first_page[sequence]
            ],
        )  # fmt: skip

    def packed(x, i):
        """The type's pair of x[i] and x[i + 1], which it holds in full but for rounding."""
        if not half:
            return permuted(bits(x[i]), bits(x[i + 1]), T.uint32(PAIR))
        low, high = (
            T.Cast("uint32", T.reinterpret("uint16", T.Cast("float16", x[i + j]))) for j in (0, 1)
        )
        return T.bitwise_or(low, T.shift_left(high, T.uint32(16)))

    @T.inline
    def put_parts(own, a, at):
        """The fragment a[at …] of A of four numbers x: high parts, and below them low ones."""
        for i in T.unroll(4):
            high: T.let = T.bitwise_and(bits(own.x[i]), T.uint32(kept))
            own.rest[i] = own.x[i] - T.reinterpret("float32", high)
            own.x[i] = T.reinterpret("float32", high)
        a[at] = packed(own.x, 0)
        a[at + 1] = packed(own.rest, 0)
        a[at + 2] = packed(own.x, 2)
        a[at + 3] = packed(own.rest, 2)

    @T.inline
    def take_fragment(own, read, at, i):
        """b = number i of four elements each, in `reads` times four words from `at` on."""
        if half:
            selector: T.let = T.Cast("uint32", 0x5410 + i % 2 * (PAIR - 0x5410))
            for j in T.unroll(2):
                own.b[j] = permuted(
                    read[at + j * 2 * WORDS + i // 2],
                    read[at + (j * 2 + 1) * WORDS + i // 2],
                    selector,
                )
        elif scaled:
            flipped: T.let = T.bitwise_xor(read[at + i], T.uint32(0x80808080))
            own.b[0] = permuted(bits(_byte(flipped, 0)), bits(_byte(flipped, 1)), T.uint32(PAIR))
            own.b[1] = permuted(bits(_byte(flipped, 2)), bits(_byte(flipped, 3)), T.uint32(PAIR))
        else:
            for j in T.unroll(2):
                own.b[j] = read[at + j * WORDS + i]

    @T.inline
    def copy_query(own, q, t, head, exists, warp, lane):
        """q to shared memory; a warp brings some steps."""
        for s in T.unroll(steps):
            if warp == s % warps:
                to: T.let = raw_at + (s * LANES + lane) * 4
                if exists:
                    copy_async(
                        T.address_of(own.query[to]),
                        T.address_of(q[t, head * head_dim + s * 16 + lane % 4 * 4]),
                    )
                else:
                    own.query[T.ramp(to, 1, 4)] = T.broadcast(T.uint32(0), 4)

    @T.inline
    def take_four(own, s, lane):
        """x = the lane's numbers of q / √D in units of log 2."""
        T.evaluate(
            shared_words(
                (own.a[0], own.a[1], own.a[2], own.a[3]),
                own.query[raw_at + (s * LANES + lane) * 4],
            )
        )
        for i in T.unroll(4):
            own.x[i] = T.reinterpret("float32", own.a[i]) * T.float32(LOG2_E * head_dim**-0.5)

    @T.inline
    def put_query(own, warp, lane):
        """Fragments of q / √D for all warps; float16's in units of the largest power of two in the
        row."""
        copies_done()
        if half:
            barrier()
            own.unit[0] = T.float32(0)
            for s in T.unroll(steps):
                take_four(own, s, lane)
                for i in T.unroll(4):
                    own.unit[0] = T.max(own.unit[0], T.fabs(own.x[i]))
            own.unit[0] = over_group(T.max, own.unit[0])
            own.unit[0] = T.reinterpret(
                "float32", T.bitwise_and(bits(own.unit[0]), T.uint32(0x7F800000))
            )
        for s in T.unroll(steps):
            if warp == s % warps:
                take_four(own, s, lane)
                if half:  # times 1 / unit
                    for i in T.unroll(4):
                        own.x[i] = own.x[i] * T.reinterpret(
                            "float32", T.uint32(0x7F000000) - bits(own.unit[0])
                        )
                put_parts(own, own.a, 0)
                own.query[T.ramp((s * LANES + lane) * 4, 1, 4)] = own.a[T.ramp(0, 1, 4)]
        barrier()

    @T.inline
    def read_keys(own, cache, kv_head, lane):
        page: T.let = T.Cast("int64", own.key_page[0])
        for s in T.unroll(steps):
            for u in T.unroll(reads):
                at: T.let = words.key_at(
                    s * (16 // word) + lane % 4 * reads + u, lane // 4 % slot_groups
                )
                load_words(own.keys, (s * reads + u) * WORDS, cache[0, kv_head, page, at])

    @T.inline
    def read_value(own, cache, kv_head, lane, r, c, u):
        slot: T.let = lane % 4 * 2 % slot_groups * wide + r * 4 + u * word
        at: T.let = words.value_at(slot // word, c * 8 + lane // 4)
        load_words(
            own.values, ((r * blocks + c) * reads + u) * WORDS,
            cache[1, kv_head, T.Cast("int64", own.value_page[0]), at],
        )  # fmt: skip

    @T.inline
    def read_values(own, cache, kv_head, lane, key0, low, high, whole):
        """Of the lane's 2·wide slots. What is not seen may be NaN: unless the warp's keys are seen
        as a whole, slots of float16 become 0 here."""
        if whole or word > 1:
            for r in T.unroll(2 * quads):
                for c in T.unroll(blocks):
                    for u in T.unroll(reads):
                        read_value(own, cache, kv_head, lane, r, c, u)
        else:
            for r in T.unroll(2 * quads):
                for u in T.unroll(reads):
                    key: T.let = key0 + lane % 4 * 2 % slot_groups * wide + r * 4 + u
                    for c in T.unroll(blocks):
                        own.values[T.ramp(((r * blocks + c) * reads + u) * WORDS, 1, WORDS)] = (
                            T.broadcast(T.uint32(0), WORDS)
                        )
                        if low <= key and key <= high:
                            read_value(own, cache, kv_head, lane, r, c, u)

    @T.inline
    def read_scales(own, cache, kv_head, lane):
        at: T.let = words.scales + lane % 4 * 2 % slot_groups * 2
        page: T.let = T.Cast("int64", own.value_page[0])
        load_words(own.key_scales, 0, cache[0, kv_head, page, at])
        load_words(own.value_scales, 0, cache[1, kv_head, page, at])

    @T.inline
    def mask_values(own, key0, lane, low, high):
        """Of two slots in a word, those that are not seen become 0."""
        for r in T.unroll(2 * quads):
            for u in T.unroll(reads):
                key: T.let = key0 + lane % 4 * 2 % slot_groups * wide + r * 4 + u * word
                keep: T.let = T.bitwise_or(
                    T.Select(key < low or key > high, T.uint32(0), T.uint32(0xFFFF)),
                    T.Select(key + 1 < low or key + 1 > high, T.uint32(0), T.uint32(0xFFFF0000)),
                )
                for c in T.unroll(blocks):
                    for w in T.unroll(WORDS):
                        at: T.let = ((r * blocks + c) * reads + u) * WORDS + w
                        own.values[at] = T.bitwise_and(own.values[at], keep)

    @T.inline
    def score_keys(own, lane, key0, low, high, whole):
        """score [slot, group 2t or 2t+1] = q·k of head g, in units of log 2; LOWEST where the key
        is not seen. key0: the first of this lane's 2·wide keys."""
        for i in T.unroll(wide * 4):
            own.score[i] = T.float32(0)
        for s in T.unroll(steps):
            own.a[T.ramp(0, 1, 4)] = own.query[T.ramp((s * LANES + lane) * 4, 1, 4)]
            for i in T.unroll(wide):
                take_fragment(own, own.keys, s * reads * WORDS, i)
                mma(own.score, i * 4, own.a, 0, own.b, 0)
        for j in T.unroll(2):
            for i in T.unroll(wide):
                own.score[i * 4 + j] = own.score[i * 4 + j] + own.score[i * 4 + j + 2]
                if half:
                    own.score[i * 4 + j] = own.score[i * 4 + j] * own.unit[0]
                if scaled:
                    own.score[i * 4 + j] = own.score[i * 4 + j] * upper(
                        own.key_scales[j * 2 + i // 2], T.Cast("uint32", i % 2 * 16)
                    )
        if not whole:
            for j in T.unroll(2):
                for i in T.unroll(wide):
                    key: T.let = key0 + j * wide + i
                    own.score[i * 4 + j] = T.Select(
                        key < low or key > high, T.float32(LOWEST), own.score[i * 4 + j]
                    )

    @T.inline
    def weigh(own):
        """score = 2^(score - top), and the sums corrected where top has grown."""
        own.running[0] = own.score[0]
        for j in T.unroll(2):
            for i in T.unroll(wide):
                own.running[0] = T.max(own.running[0], own.score[i * 4 + j])
        own.running[0] = over_group(T.max, own.running[0])
        if own.running[0] > own.top[0]:
            factor: T.let = T.exp2(own.top[0] - own.running[0])
            own.total[0] = own.total[0] * factor
            for i in T.unroll(head_dim // 8 * 2):
                own.acc[i] = own.acc[i] * factor
            own.top[0] = own.running[0]
        for j in T.unroll(2):
            for i in T.unroll(wide):
                own.score[i * 4 + j] = T.exp2(own.score[i * 4 + j] - own.top[0] + T.float32(bias))
                own.total[0] = own.total[0] + own.score[i * 4 + j]

    @T.inline
    def put_weights(own):
        for j in T.unroll(2):
            for r in T.unroll(quads):
                for e in T.unroll(4):
                    own.x[e] = own.score[(r * 4 + e) * 4 + j]
                    if scaled and own.x[e] > T.float32(0):
                        own.x[e] = own.x[e] * upper(
                            own.value_scales[j * 2 + e // 2], T.Cast("uint32", e % 2 * 16)
                        )
                put_parts(own, own.weight, (j * quads + r) * 4)

    @T.inline
    def add_values(own):
        """acc += weights · values: groups 2t and 2t+1, four slots of each at once."""
        for c in T.unroll(blocks):
            for i in T.unroll(wide):
                own.d[T.ramp(0, 1, 4)] = T.broadcast(T.float32(0), 4)
                for jr in T.unroll(2 * quads):
                    take_fragment(own, own.values, (jr * blocks + c) * reads * WORDS, i)
                    mma(own.d, 0, own.weight, jr * 4, own.b, 0)
                for j in T.unroll(2):
                    own.acc[(c * wide + i) * 2 + j] = own.acc[(c * wide + i) * 2 + j] + (
                        own.d[j] + own.d[j + 2]
                    )

    @T.inline
    def put_sums(own, warp, lane, factor):
        """Columns of groups 2t and 2t+1 of head g: `wide` each, which follow each other."""
        for c in T.unroll(blocks):
            for j in T.unroll(2):
                for i4 in T.unroll(quads):
                    for e in T.unroll(4):
                        own.x[e] = own.acc[(c * wide + i4 * 4 + e) * 2 + j] * factor
                    column: T.let = c * 8 * wide + (lane % 4 * 2 + j) * wide + i4 * 4
                    own.sums[T.ramp((warp * HEADS + lane // 4) * pitch + place(column), 1, 4)] = (
                        own.x[T.ramp(0, 1, 4)]
                    )

    @T.inline
    def put_result(own, sinks, out, stats, t, row, head0, heads_left, tx):
        """Four columns of a head: sums of all warps."""
        head: T.let = tx // (head_dim // 4)
        column: T.let = tx % (head_dim // 4) * 4
        if head < heads_left:
            own.top[0] = T.float32(LOWEST)
            for w in T.unroll(warps):
                own.top[0] = T.max(own.top[0], own.tops[w * HEADS + head])
            own.total[0] = T.float32(0)
            if not split:
                sink: T.let = T.max(sinks[head0 + head] * T.float32(LOG2_E), T.float32(LOWEST))
                own.top[0] = T.max(own.top[0], sink)
                own.total[0] = T.exp2(sink - own.top[0])
            own.x[T.ramp(0, 1, 4)] = T.broadcast(T.float32(0), 4)
            for w in T.unroll(warps):
                own.total[0] = own.total[0] + own.totals[w * HEADS + head] * T.exp2(
                    own.tops[w * HEADS + head] - own.top[0] - T.float32(bias)
                )
                own.x[T.ramp(0, 1, 4)] = (
                    own.x[T.ramp(0, 1, 4)]
                    + own.sums[T.ramp((w * HEADS + head) * pitch + place(column), 1, 4)]
                )
            if split:
                out[t, row, T.ramp((head0 + head) * head_dim + column, 1, 4)] = own.x[
                    T.ramp(0, 1, 4)
                ]
                if column == 0:
                    stats[t, row, head0 + head, 0] = own.top[0] * T.float32(LN_2)
                    stats[t, row, head0 + head, 1] = own.total[0]
            else:
                out[t, T.ramp((head0 + head) * head_dim + column, 1, 4)] = own.x[
                    T.ramp(0, 1, 4)
                ] / T.broadcast(own.total[0], 4)

    @T.inline
    def work(tx, cache, q, table, first_page, sequence, sinks, out, stats, t, row, hb, low, high):
        """What a thread does of it."""
        own = allocated()
        kv_head: T.let = hb // per_kv_head
        head0: T.let = kv_head * group + hb % per_kv_head * HEADS
        heads_left: T.let = group - hb % per_kv_head * HEADS
        page0: T.let = low // PAGE_TOKENS
        page_end: T.let = high // PAGE_TOKENS + 1
        warp: T.let = tx // LANES
        lane: T.let = tx % LANES
        own.first[0] = page0 + warp * pages_at_once
        # Where the keys are no launch writes.
        find_pages(own, table, first_page, sequence, own.first[0], page_end, lane)
        wait_for_launch_before()
        if split and low > high:
            if tx < HEADS and tx < heads_left:
                stats[t, row, head0 + tx, 1] = T.float32(0)
            T.thread_return()
        copy_query(own, q, t, head0 + lane // 4, lane // 4 < heads_left, warp, lane)
        read_keys(own, cache, kv_head, lane)
        put_query(own, warp, lane)
        own.top[0] = T.float32(LOWEST)
        own.total[0] = T.float32(0)
        for i in T.unroll(head_dim // 8 * 2):
            own.acc[i] = T.float32(0)
        while own.first[0] < page_end:
            key0: T.let = (own.first[0] + lane % 4 * 2 // slot_groups) * PAGE_TOKENS
            whole: T.let = (
                own.first[0] * PAGE_TOKENS >= low
                and own.first[0] * PAGE_TOKENS + keys_at_once <= high + 1
            )
            if scaled:
                read_scales(own, cache, kv_head, lane)
            if not half:  # as many registers as there are: float16 reads 64 keys
                read_values(own, cache, kv_head, lane, key0, low, high, whole)
            score_keys(own, lane, key0 + lane % 4 * 2 % slot_groups * wide, low, high, whole)
            weigh(own)
            put_weights(own)
            if half:
                read_values(own, cache, kv_head, lane, key0, low, high, whole)
            if word == 2 and not whole:
                mask_values(own, key0, lane, low, high)
            if half:
                add_values(own)
            own.first[0] = own.first[0] + warps * pages_at_once
            if own.first[0] < page_end:
                find_pages(own, table, first_page, sequence, own.first[0], page_end, lane)
                read_keys(own, cache, kv_head, lane)
            else:  # or nvcc keeps the old ones, and the registers that they have
                for i in T.unroll(steps * reads * WORDS):
                    own.keys[i] = T.uint32(0)
            if not half:
                add_values(own)
        own.total[0] = over_group(lambda a, b: a + b, own.total[0])
        if not half:  # TVM puts tops where the query was, unless that is much larger
            barrier()
        if lane % 4 == 0:
            own.tops[warp * HEADS + lane // 4] = own.top[0]
            own.totals[warp * HEADS + lane // 4] = own.total[0]
        barrier()
        own.running[0] = T.float32(LOWEST)
        for w in T.unroll(warps):
            own.running[0] = T.max(own.running[0], own.tops[w * HEADS + lane // 4])
        if not split and lane // 4 < heads_left:
            own.running[0] = T.max(own.running[0], sinks[head0 + lane // 4] * T.float32(LOG2_E))
        put_sums(own, warp, lane, T.exp2(own.top[0] - own.running[0] - T.float32(bias)))
        barrier()
        if tx < HEADS * head_dim // 4:
            put_result(own, sinks, out, stats, t, row, head0, heads_left, tx)

    @T.inline
    def attend(cache, q, table, first_page, sequence, sinks, out, stats, t, row, hb, low, high):
        """Head block hb of token t over the keys low … high, into `row` of out and stats."""
        for tx in T.thread_binding(threads, thread="threadIdx.x"):
            T.attr(0, "tirx.launch_bounds_min_blocks_per_sm", tile.of_sm // warps)
            work(
                tx, cache, q, table, first_page, sequence, sinks, out, stats, t, row, hb, low, high
            )

    if split:
        return over_blocks(
            attend, split, arguments, words, heads=heads, kv_heads=kv_heads, window=window
        )
    of_chunks = chunks(
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, kv_dtype=kv_dtype, window=window,
        tile=CHUNK,
    )  # fmt: skip
    of_others = alone(
        work, threads=threads, blocks_of_sm=tile.of_sm // warps, heads=heads, kv_heads=kv_heads,
        head_dim=head_dim, kv_dtype=kv_dtype, window=window,
    )  # fmt: skip

    return over_blocks(
        attend, split, arguments, words, heads=heads, kv_heads=kv_heads, window=window,
        least=CHUNK.least, chunks=of_chunks, others=of_others,
    )  # fmt: skip


def schedules(*, split: bool) -> tuple[Schedule, ...]:
    """Of PAGED_ATTENTION or, of split keys, of SPLIT_ATTENTION."""
    return (
        Schedule(
            "keys over warps, mma, 12 warps a multiprocessor",
            gpu("cuda", "sm_100"),
            partial(build, split),
            LATE_F16,
            fits=lambda **static: fits(**static) and static["kv_dtype"] == F16.name,
        ),
        Schedule(
            "keys over warps, mma", gpu("cuda", "sm_80"), partial(build, split), TILE, fits=fits
        ),
    )
