"""Attention on GPUs of every family: a block of threads takes one token and eight heads of one
KV head over a range of keys, and reads each of these keys and values once.

The cache is read as 32-bit words, four at a time (Words). The keys go by in chunks of two for
each thread. Of a chunk,

1. four threads a page and half of head_dim score its 16 keys, 32 sums each;
2. a thread for each head and 1/16 of the chunk turns scores into weights;
3. head_dim / 4 threads read a value, 32 sums each, and as many rows of threads as there is room
   for share the chunk's values.

In 1 and 3 every number from the cache meets eight heads, and every one from shared memory four or
eight numbers from the cache: of each ten instructions eight are multiply-adds. All arithmetic is
float32, whatever the cache holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import tvm

from mxforge.kv_layout import PAGE_TOKENS

from ..formats.kv import KV
from ..gpu.barriers import barrier
from ..gpu.matrices import MATRICES
from ..kernel import Schedule, T, Tensor, TileConfig, gpu
from ..math import LOWEST, exp_f32
from .attend import HEADS, WORDS, Words, over_blocks, upper
from .attend_chunk_gpu import CHUNK, chunks, chunks_fit
from .pages import physical_page

PLANE = 4  # heads whose scores lie side by side: 16 bytes


@dataclass(frozen=True)
class AttendTile(TileConfig):
    threads: int  # of a block
    loads: int  # of 16 bytes that a thread has in flight

    @property
    def keys(self) -> int:
        """Of a chunk."""
        return 2 * self.threads

    @property
    def pages(self) -> int:
        return self.keys // PAGE_TOKENS

    @property
    def plane(self) -> int:
        """Numbers from one plane of scores to the next: half of the banks further."""
        return PLANE * self.keys + 16


# 128 threads, 16 KiB of shared memory: what every device has. Not measured.
TILE = AttendTile(threads=128, loads=8)


def fits(*, head_dim: int, **_static: Any) -> bool:
    """Whether rows of values begin at a multiple of 16 bytes, and a block has room for one."""
    return head_dim % 8 == 0 and head_dim <= 4 * TILE.threads


class Arrays(NamedTuple):
    """Of a block, in shared memory; then those that each thread has of its own."""

    query: Any  # f32 [D, 8 heads]
    score: Any  # f32 [2 planes, keys, 4 heads]: scores, then weights, of a chunk's keys by place
    value_scale: Any  # f32 [keys], by place
    largest: Any  # f32 [threads]
    factor: Any  # f32 [8 heads]
    page_of: Any  # i32 [pages of a chunk]: physical ones
    acc: Any  # f32 [heads taken, wide]: sums of values of all chunks
    top: Any  # f32: largest score of a head so far
    total: Any  # f32: sum of weights, of this thread's part of the keys
    page: Any  # i64: the physical page whose keys it scores
    read: Any  # u32: words of the cache
    sums: Any  # f32: scores [wide, heads taken], then sums of values [heads taken, wide]
    part: Any  # f32: scores of a head
    four: Any  # f32: of four heads
    running: Any  # f32
    last: Any  # i32: key that is seen


class Seen(NamedTuple):
    """Of a chunk."""

    key0: Any  # its first key: a page's first
    pages: Any
    low: Any  # of all chunks, the first key that is visible
    high: Any  # and the last


def build(
    features: tuple[str, ...],
    split: bool,
    arguments: tuple[Tensor, ...],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    kv_dtype: str,
    window: int = 0,
    tile: AttendTile,
) -> tvm.tirx.PrimFunc:
    """The code of PAGED_ATTENTION or, of split keys, of SPLIT_ATTENTION.

    features: a key of MATRICES, or none
    """
    words = Words(kv_dtype, head_dim)
    scaled = KV[kv_dtype].scaled
    group = heads // kv_heads
    per_kv_head = -(-group // HEADS)
    threads, keys, plane = tile.threads, tile.keys, tile.plane
    word, wide, taken = words.word, words.wide, words.heads
    slot_groups, planes = words.slot_groups, words.heads // PLANE
    # Scores: a thread is a slot group and some heads of a page, and half of the units.
    units = words.key_units // 2
    # Weights: a thread is a head and a part of the keys.
    parts = threads // HEADS
    # Values: `across` threads are the elements and heads of a value, and `rows` times so many.
    across, columns = head_dim // PLANE, head_dim // wide
    rows = threads // across
    page_units = PAGE_TOKENS // word
    key_loads = min(tile.loads, units)
    value_loads = tile.loads // 2  # 32 registers are taken by the sums of older chunks
    rounds = (rows - 1).bit_length()

    def place(page, slot):
        """Of a key among the scores: lanes beside each other have places beside each other."""
        return slot % wide * (keys // wide) + page * slot_groups + slot // wide

    def slot_of(unit):
        """The first slot of value unit 0 … page_units - 1 of a page, by the same rule."""
        return unit % slot_groups * wide + unit // slot_groups * word

    def score_of(tx, k):
        """A head's score of key place k·parts + …, where heads are lanes."""
        return tx % HEADS // PLANE * plane + (k * parts + tx // HEADS) * PLANE + tx % PLANE

    def first_plane_of_score(tx):
        return tx % 4 // slot_groups * planes

    def first_plane_of_value(tx):
        return tx % across // columns * planes

    def allocated():
        """Arrays of a block, in shared memory, and of each thread."""

        def shared(*shape, dtype="float32"):
            return T.sblock_alloc_buffer(shape, dtype, scope="shared")

        def local(*shape, dtype="float32"):
            return T.sblock_alloc_buffer(shape, dtype, scope="local")

        return Arrays(
            query=shared(head_dim * HEADS),
            score=shared(HEADS // PLANE * plane),
            value_scale=shared(keys if scaled else 1),
            largest=shared(threads),
            factor=shared(HEADS),
            page_of=shared(tile.pages, dtype="int32"),
            acc=local(32),
            top=local(1),
            total=local(1),
            page=local(1, dtype="int64"),
            read=local(tile.loads * WORDS, dtype="uint32"),
            sums=local(32),
            part=local(keys // parts),
            four=local(PLANE),
            running=local(1),
            last=local(1, dtype="int32"),
        )

    @T.inline
    def rotate(own, turn):
        """four by one place, or by two."""
        for j in T.unroll(4):
            own.sums[j] = own.four[(j + 1 + turn) % 4]
        own.four[T.ramp(0, 1, 4)] = own.sums[T.ramp(0, 1, 4)]

    @T.inline
    def take_query(own, q, t, head, exists, tx):
        """query[d, head] = q / √D, and 0 for heads that do not exist."""
        for i in T.serial(T.ceildiv(head_dim * HEADS // 4 - tx, threads)):
            d: T.let = (i * threads + tx) // HEADS * 4
            own.four[T.ramp(0, 1, 4)] = T.broadcast(T.float32(0), 4)
            if exists:
                own.four[T.ramp(0, 1, 4)] = q[t, T.ramp(head * head_dim + d, 1, 4)]
            # Four lanes with the same head turn their numbers by 0 … 3 places: of each store they
            # meet different banks.
            for turn in T.unroll(2):
                turned: T.let = T.bitwise_and(tx // HEADS, T.shift_left(1, turn)) > 0
                if turned:
                    rotate(own, turn)
            for j in T.unroll(4):
                at: T.let = d + (j + tx // HEADS) % 4
                own.query[at * HEADS + tx % HEADS] = own.four[j] * T.float32(head_dim**-0.5)

    @T.inline
    def add_keys(own, cache, kv_head, tx, first, count):
        """sums += query · keys, over `count` units from number `first` of this thread's half on."""
        unit0: T.let = tx // (threads // 2) * units + first
        for u in T.unroll(count):
            at: T.let = words.key_at(unit0 + u, tx % 4 % slot_groups)
            own.read[T.ramp(u * WORDS, 1, WORDS)] = cache[
                0, kv_head, own.page[0], T.ramp(at, 1, WORDS)
            ]
        for u in T.unroll(count):
            for j in T.unroll(word):
                for h4 in T.unroll(planes):
                    d: T.let = (unit0 + u) * word + j
                    own.four[T.ramp(0, 1, PLANE)] = own.query[
                        T.ramp(d * HEADS + (first_plane_of_score(tx) + h4) * PLANE, 1, PLANE)
                    ]
                    for i in T.unroll(wide):
                        number: T.let = words.number(own.read, u * WORDS, i, j)
                        for h in T.unroll(PLANE):
                            sum_at: T.let = i * taken + h4 * PLANE + h
                            own.sums[sum_at] = own.sums[sum_at] + own.four[h] * number

    @T.inline
    def put_scores(own, tx, i0, s0):
        """Sums of half of this thread's slots, from i0 on, into places of slots from s0 on."""
        for i in T.unroll(wide // 2):
            for h4 in T.unroll(planes):
                at: T.let = place(tx // 4 % tile.pages, tx % 4 % slot_groups * wide + s0 + i)
                own.score[
                    T.ramp((first_plane_of_score(tx) + h4) * plane + at * PLANE, 1, PLANE)
                ] = own.sums[T.ramp((i0 + i) * taken + h4 * PLANE, 1, PLANE)]

    @T.inline
    def add_scores(own, tx, i0, s0):
        """Sums of half of this thread's slots, from i0 on, += places of slots from s0 on."""
        for i in T.unroll(wide // 2):
            for h4 in T.unroll(planes):
                at: T.let = place(tx // 4 % tile.pages, tx % 4 % slot_groups * wide + s0 + i)
                own.four[T.ramp(0, 1, PLANE)] = own.score[
                    T.ramp((first_plane_of_score(tx) + h4) * plane + at * PLANE, 1, PLANE)
                ]
                for h in T.unroll(PLANE):
                    sum_at: T.let = (i0 + i) * taken + h4 * PLANE + h
                    own.sums[sum_at] = own.sums[sum_at] + own.four[h]

    @T.inline
    def end_scores(own, cache, kv_head, tx, i0, seen):
        """Scores of half of this thread's slots, from i0 on: scaled where keys have scales, LOWEST
        where the key is not seen; and the scales of values, for later."""
        for i in T.unroll(wide // 2):
            slot: T.let = tx % 4 % slot_groups * wide + i0 + i
            key: T.let = seen.key0 + tx // 4 % tile.pages * PAGE_TOKENS + slot
            if key < seen.low or key > seen.high:
                for h in T.unroll(taken):
                    own.sums[(i0 + i) * taken + h] = T.float32(LOWEST)
            elif scaled:
                at: T.let = words.scales + slot // 2
                shift: T.let = T.Cast("uint32", i % 2 * 16)
                of_key: T.let = upper(cache[0, kv_head, own.page[0], at], shift)
                for h in T.unroll(taken):
                    own.sums[(i0 + i) * taken + h] = own.sums[(i0 + i) * taken + h] * of_key
                own.value_scale[place(tx // 4 % tile.pages, slot)] = upper(
                    cache[1, kv_head, own.page[0], at], shift
                )
        put_scores(own, tx, i0, i0)

    @T.inline
    def score_keys(own, cache, kv_head, page_table, first_page, sequence, tx, seen):
        """score = q·k / √D of the chunk's keys. Two threads have the sums of the same slots, over
        half of head_dim each: each of them ends half of the slots."""
        for i in T.unroll(32):
            own.sums[i] = T.float32(0)
        barrier()  # nobody reads scores of the chunk before
        if tx // 4 % tile.pages < seen.pages:
            own.page[0] = physical_page(
                page_table, first_page, sequence,
                seen.key0 // PAGE_TOKENS + tx // 4 % tile.pages,
            )  # fmt: skip
            if tx < threads // 2 and tx % 4 == 0:
                own.page_of[tx // 4] = T.Cast("int32", own.page[0])
            for step in T.serial(units // key_loads):
                add_keys(own, cache, kv_head, tx, step * key_loads, key_loads)
            if units % key_loads > 0:
                add_keys(own, cache, kv_head, tx, units - units % key_loads, units % key_loads)
        if tx < threads // 2:
            put_scores(own, tx, wide // 2, 0)
        else:
            put_scores(own, tx, 0, wide // 2)
        barrier()
        if tx < threads // 2:
            add_scores(own, tx, 0, wide // 2)
        else:
            add_scores(own, tx, wide // 2, 0)
        barrier()
        if tx < threads // 2:
            end_scores(own, cache, kv_head, tx, 0, seen)
        else:
            end_scores(own, cache, kv_head, tx, wide // 2, seen)

    @T.inline
    def weigh(own, tx):
        """score = exp(score - top), times the value's scale where there is one; factor corrects
        older sums. Heads are lanes here, and a thread takes each `parts`-th key."""
        own.running[0] = T.float32(LOWEST)
        for k in T.unroll(keys // parts):
            own.part[k] = own.score[score_of(tx, k)]
            own.running[0] = T.max(own.running[0], own.part[k])
        own.largest[tx] = own.running[0]
        barrier()
        own.running[0] = own.top[0]
        for k in T.unroll(parts):
            own.running[0] = T.max(own.running[0], own.largest[k * HEADS + tx % HEADS])
        own.total[0] = own.total[0] * exp_f32(own.top[0] - own.running[0])
        if tx < HEADS:
            own.factor[tx] = exp_f32(own.top[0] - own.running[0])
        own.top[0] = own.running[0]
        own.running[0] = T.float32(0)
        for k in T.unroll(keys // parts):
            own.part[k] = T.Select(
                own.part[k] > T.float32(LOWEST), exp_f32(own.part[k] - own.top[0]), T.float32(0)
            )
            own.running[0] = own.running[0] + own.part[k]
            if scaled and own.part[k] > T.float32(0):
                own.part[k] = own.part[k] * own.value_scale[k * parts + tx // HEADS]
            own.score[score_of(tx, k)] = own.part[k]
        own.total[0] = own.total[0] + own.running[0]

    @T.inline
    def add_values(own, cache, kv_head, tx, seen, first, count):
        """sums += weights · values, over `count` of this thread's units from number `first` on."""
        for u in T.unroll(count):
            unit: T.let = (first + u) * rows + tx // across
            slot: T.let = slot_of(unit % page_units)
            key: T.let = seen.key0 + unit // page_units * PAGE_TOKENS + slot
            own.read[T.ramp(u * WORDS, 1, WORDS)] = T.broadcast(T.uint32(0), WORDS)
            if key + word > seen.low and key <= seen.high:
                page: T.let = T.Cast("int64", own.page_of[unit // page_units])
                at: T.let = words.value_at(slot // word, tx % across % columns)
                own.read[T.ramp(u * WORDS, 1, WORDS)] = cache[
                    1, kv_head, page, T.ramp(at, 1, WORDS)
                ]
            if word == 2:  # numbers of two slots in a word, of which one may be NaN
                keep: T.let = T.bitwise_or(
                    T.Select(key < seen.low, T.uint32(0), T.uint32(0xFFFF)),
                    T.Select(key + 1 > seen.high, T.uint32(0), T.uint32(0xFFFF0000)),
                )
                for w in T.unroll(WORDS):
                    own.read[u * WORDS + w] = T.bitwise_and(own.read[u * WORDS + w], keep)
        for u in T.unroll(count):
            unit: T.let = (first + u) * rows + tx // across
            for j in T.unroll(word):
                at: T.let = place(unit // page_units, slot_of(unit % page_units) + j)
                for h4 in T.unroll(planes):
                    own.four[T.ramp(0, 1, PLANE)] = own.score[
                        T.ramp((first_plane_of_value(tx) + h4) * plane + at * PLANE, 1, PLANE)
                    ]
                    for i in T.unroll(wide):
                        number: T.let = words.number(own.read, u * WORDS, i, j)
                        for h in T.unroll(PLANE):
                            sum_at: T.let = (h4 * PLANE + h) * wide + i
                            own.sums[sum_at] = own.sums[sum_at] + own.four[h] * number

    @T.inline
    def sum_values(own, cache, kv_head, tx, seen):
        """acc = corrected acc + weights · values, of the chunk's keys that fall to this thread.

        These are summed apart, which bounds the rounding error of long contexts.
        """
        for i in T.unroll(32):
            own.sums[i] = T.float32(0)
        if tx < rows * across:
            steps: T.let = seen.pages * page_units // (rows * value_loads)
            for step in T.serial(steps):
                add_values(own, cache, kv_head, tx, seen, step * value_loads, value_loads)
            done: T.let = steps * value_loads
            for step in T.serial(T.ceildiv(seen.pages * page_units, rows) - done):
                if (done + step) * rows + tx // across < seen.pages * page_units:
                    add_values(own, cache, kv_head, tx, seen, done + step, 1)
        for h in T.unroll(taken):
            own.running[0] = own.factor[first_plane_of_value(tx) * PLANE + h]
            for i in T.unroll(wide):
                sum_at: T.let = h * wide + i
                own.acc[sum_at] = own.acc[sum_at] * own.running[0] + own.sums[sum_at]

    @T.inline
    def add_rows(own, tx, count, half):
        """acc of the first half of `count` rows += that of the others."""
        if tx // across >= half and tx // across < count:
            for i in T.unroll(32 // PLANE):
                at: T.let = i * (threads // 2) + tx - half * across
                own.score[T.ramp(at * PLANE, 1, PLANE)] = own.acc[T.ramp(i * PLANE, 1, PLANE)]
        barrier()
        if tx // across < count - half:
            for i in T.unroll(32 // PLANE):
                own.four[T.ramp(0, 1, PLANE)] = own.score[
                    T.ramp((i * (threads // 2) + tx) * PLANE, 1, PLANE)
                ]
                for h in T.unroll(PLANE):
                    own.acc[i * PLANE + h] = own.acc[i * PLANE + h] + own.four[h]

    @T.inline
    def put_result(own, out, t, row, head0, heads_left, tx):
        """Head by head, four columns at once."""
        for h in T.unroll(taken):
            head: T.let = first_plane_of_value(tx) * PLANE + h
            if head < heads_left:
                for i4 in T.unroll(wide // 4):
                    at: T.let = (head0 + head) * head_dim + tx % columns * wide + i4 * 4
                    if split:
                        out[t, row, T.ramp(at, 1, 4)] = own.acc[T.ramp(h * wide + i4 * 4, 1, 4)]
                    else:
                        out[t, T.ramp(at, 1, 4)] = own.acc[
                            T.ramp(h * wide + i4 * 4, 1, 4)
                        ] / T.broadcast(own.factor[head], 4)

    def attending(keys_exist: bool) -> Any:
        """The T.inline attend for by_token."""

        @T.inline
        def attend(cache, q, table, first_page, sequence, sinks, out, stats, t, row, hb, low, high):
            """Head block hb of token t over the keys low … high, into `row` of out and stats."""
            own = allocated()
            kv_head: T.let = hb // per_kv_head
            head0: T.let = kv_head * group + hb % per_kv_head * HEADS
            heads_left: T.let = group - hb % per_kv_head * HEADS
            page0: T.let = low // PAGE_TOKENS
            for tx in T.thread_binding(threads, thread="threadIdx.x"):
                head: T.let = head0 + tx % HEADS
                exists: T.let = tx % HEADS < heads_left
                if split and low > high and tx < HEADS and exists:
                    stats[t, row, head, 1] = T.float32(0)
                own.last[0] = high
                if keys_exist or low <= own.last[0]:
                    page_end: T.let = own.last[0] // PAGE_TOKENS + 1
                    take_query(own, q, t, head, exists, tx)
                    own.top[0] = T.float32(LOWEST)
                    own.total[0] = T.float32(0)
                    if not split and exists:
                        own.top[0] = T.max(sinks[head], T.float32(LOWEST))
                        if tx < HEADS:
                            own.total[0] = exp_f32(sinks[head] - own.top[0])
                    for i in T.unroll(32):
                        own.acc[i] = T.float32(0)
                    for chunk in T.serial(T.ceildiv(page_end - page0, tile.pages)):
                        first: T.let = page0 + chunk * tile.pages
                        seen = Seen(
                            first * PAGE_TOKENS, T.min(page_end - first, tile.pages), low,
                            own.last[0],
                        )  # fmt: skip
                        score_keys(own, cache, kv_head, table, first_page, sequence, tx, seen)
                        barrier()
                        weigh(own, tx)
                        barrier()
                        sum_values(own, cache, kv_head, tx, seen)
                    own.largest[tx] = own.total[0]
                    barrier()
                    if tx < HEADS:
                        own.running[0] = T.float32(0)
                        for k in T.unroll(parts):
                            own.running[0] = own.running[0] + own.largest[k * HEADS + tx]
                        own.factor[tx] = own.running[0]
                        if split and exists:
                            stats[t, row, head, 0] = own.top[0]
                            stats[t, row, head, 1] = own.running[0]
                    if rounds == 0:
                        barrier()
                    for r in T.unroll(rounds):
                        add_rows(
                            own, tx, T.ceildiv(rows, T.shift_left(1, r)),
                            T.ceildiv(rows, T.shift_left(2, r)),
                        )  # fmt: skip
                        if r < rounds - 1:
                            barrier()
                    if tx < across:
                        put_result(own, out, t, row, head0, heads_left, tx)

        return attend

    sizes: dict[str, Any] = {"heads": heads, "kv_heads": kv_heads, "window": window}
    matrices = None if split else MATRICES.get(features)
    if matrices is None or not chunks_fit(matrices, head_dim=head_dim, kv_dtype=kv_dtype):
        return over_blocks(attending(not split), split, arguments, words, **sizes)
    of_chunks = chunks(matrices, CHUNK, head_dim=head_dim, kv_dtype=kv_dtype, **sizes)
    return over_blocks(
        attending(False), split, arguments, words, **sizes, least=CHUNK.least, chunks=of_chunks,
        units=matrices,
    )  # fmt: skip


def schedules(*, split: bool) -> tuple[Schedule, ...]:
    """Of PAGED_ATTENTION or, of split keys, of SPLIT_ATTENTION."""
    name = "keys over threads"
    of_families = () if split else [of for of, units in MATRICES.items() if units.store_rows]
    return (
        *(
            Schedule(
                f"{name}; chunks on matrix units, {' '.join(features)}",
                gpu(*features),
                partial(build, features, split),
                TILE,
                fits=fits,
            )
            for features in of_families
        ),
        Schedule(name, gpu(), partial(build, (), split), TILE, fits=fits),
    )
