"""`sample_token` on GPUs: three launches, of which two have a block for each chunk of a row.

    survey   reads all logits: a chunk's largest one, and the sum of its weights beside that
    decide   a block a row: the token. It reads one chunk, and where tokens are left out, for top_k
             and top_p, once or a few times what may be kept
    weigh    writes the weights that were drawn from

Between launches the first columns of a chunk's weights hold what is known about the chunk. They are
floats that nobody computes with, and which are the same bits wherever they are moved.

A threshold is found by search over the keys of logits (math.order_key), WAYS parts a step. As soon
as what lies between the bounds fits into shared memory, it is kept there, and no step reads logits
again.
"""

# ruff: noqa: B023 (T.inline functions are expanded where they are called, not closures)

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import tvm

from ..gpu.barriers import barrier, metal_device_barrier
from ..gpu.lanes import LANES, BlockSums
from ..kernel import Schedule, T, Tensor, TileConfig, gpu, prim_func
from ..math import KEY_MINUS_INF, exp_f32, log_f32, order_key
from .chunks_gpu import RECORD, BlockLargest, Chunks, RunningSum, clean, key_value
from .threefry import threefry

BITS = 3  # of a key, found by a step of the search
WAYS = 1 << BITS  # parts, of which a step leaves one
STEPS = 11  # 3 · 11 > 32: as many leave one key
TEAM = 8  # threads that look at a chunk together: 128 bytes where each reads 16
MARGIN = 0.125  # for rounding, where what cannot matter to top_p is left out


@dataclass(frozen=True)
class SampleTile(TileConfig):
    threads: int  # of a chunk's block
    row_threads: int  # of a row's block
    kept: int  # logits that each of its threads has room for
    depth: int  # vectors that each loads before it uses the first


def _own(vectors: int, threads: int) -> int:
    """Vectors of a thread where as many as possible of `threads` share them."""
    return next(v for v in range(-(-vectors // threads), vectors + 1) if vectors % v == 0)


def _bound(low: Any, high: Any, part: Any) -> Any:
    """The least key of one of WAYS parts of [low, high], i32 expressions."""
    width = T.Cast("uint32", high) - T.Cast("uint32", low)  # which has 32 bits
    whole = T.shift_right(width, T.uint32(BITS)) * T.Cast("uint32", part)
    rest = T.bitwise_and(width, T.uint32(WAYS - 1)) * T.Cast("uint32", part) + T.uint32(WAYS - 1)
    return low + T.Cast("int32", whole + T.shift_right(rest, T.uint32(BITS)))


def _build(
    family: str, arguments: tuple[Tensor, ...], *, vocab: int, tile: SampleTile
) -> tvm.tirx.PrimFunc:
    """What is written as if by all threads is the same for all of them."""
    threads, row_threads, kept, depth = tile.threads, tile.row_threads, tile.kept, tile.depth
    chunks = Chunks(vocab, threads)
    width, size, count, elements = chunks.width, chunks.size, chunks.count, chunks.elements
    load, store, each_vector = chunks.load, chunks.store, chunks.each_vector
    of_chunk, of_row = BlockLargest(family, threads), BlockLargest(family, row_threads)
    lanes = LANES[family]
    weight_sum = BlockSums(family, threads, 1)
    sums_of = BlockSums(family, row_threads, WAYS + 1)
    own = _own(chunks.vectors, row_threads)  # vectors of a thread, in the draw
    chunk_sums, column_sums = (
        RunningSum(row_threads, count),
        RunningSum(row_threads, chunks.vectors // own),
    )
    teams = row_threads // TEAM
    device_barrier = metal_device_barrier if family == "metal" else barrier

    @T.inline
    def survey(m, logits, temperature, weights):
        for r in T.thread_binding(m, thread="blockIdx.y"):
            for c in T.thread_binding(count, thread="blockIdx.x"):
                with T.sblock("survey"):
                    row, chunk = T.axis.remap("SS", [r, c])
                    shared = T.sblock_alloc_buffer((of_chunk.elements,), "int32", scope="shared")
                    parts = T.sblock_alloc_buffer((weight_sum.elements,), "float32", scope="shared")
                    for tx in T.thread_binding(threads, thread="threadIdx.x"):
                        with T.sblock("survey_thread"):
                            T.reads(logits[row, 0:vocab], temperature[row])
                            T.writes(weights[row, 0:vocab])
                            value = T.sblock_alloc_buffer((elements,), "float32", scope="local")
                            found = T.sblock_alloc_buffer((4,), "int32", scope="local")
                            largest = T.sblock_alloc_buffer((1,), "float32", scope="local")
                            total = T.sblock_alloc_buffer((1,), "float32", scope="local")

                            @T.inline
                            def read(vector, place):
                                load(logits, row, vector, value, place)

                            @T.inline
                            def look(vector, place):
                                for i in T.unroll(width):
                                    of_chunk.look(value[place + i], vector * width + i, found)

                            @T.inline
                            def add(_vector, place):
                                for i in T.unroll(width):
                                    total[0] = total[0] + T.Select(
                                        order_key(value[place + i]) > KEY_MINUS_INF,
                                        exp_f32((value[place + i] - largest[0]) / temperature[row]),
                                        T.float32(0),
                                    )

                            each_vector(read, chunk, tx)
                            of_chunk.clear(found)
                            each_vector(look, chunk, tx)
                            of_chunk.share(found, shared, tx)
                            largest[0] = key_value(found[0])
                            total[0] = T.float32(0)
                            if temperature[row] != T.float32(0):
                                each_vector(add, chunk, tx)
                            weight_sum.share(total, parts, tx)
                            if tx == 0:
                                weight_sum.total(parts, 0, total)
                                weights[row, chunk * size] = largest[0]
                                weights[row, chunk * size + 1] = T.Cast("float32", found[1])
                                weights[row, chunk * size + 2] = T.Select(
                                    clean(found), T.float32(1), T.float32(0)
                                )
                                weights[row, chunk * size + 3] = total[0]

    @T.inline
    def decide(m, logits, temperature, top_k, top_p, min_p, seed, step, ids, weights):
        for r in T.thread_binding(m, thread="blockIdx.x"):
            with T.sblock("decide"):
                row = T.axis.spatial(m, r)
                shared = T.sblock_alloc_buffer((of_row.elements,), "int32", scope="shared")
                keys = T.sblock_alloc_buffer((count,), "int32", scope="shared")
                start = T.sblock_alloc_buffer((1,), "int32", scope="shared")
                parts = T.sblock_alloc_buffer((sums_of.elements,), "float32", scope="shared")
                totals = T.sblock_alloc_buffer((WAYS + 1,), "float32", scope="shared")
                lists = T.sblock_alloc_buffer((kept * row_threads,), "float32", scope="shared")
                by_chunk = T.sblock_alloc_buffer((chunk_sums.elements,), "float32", scope="shared")
                chunk_groups = T.sblock_alloc_buffer(
                    (chunk_sums.groups,), "float32", scope="shared"
                )
                by_thread = T.sblock_alloc_buffer(
                    (column_sums.elements,), "float32", scope="shared"
                )
                thread_groups = T.sblock_alloc_buffer(
                    (column_sums.groups,), "float32", scope="shared"
                )
                for tx in T.thread_binding(row_threads, thread="threadIdx.x"):
                    with T.sblock("decide_thread"):
                        T.reads(
                            logits[row, 0:vocab], temperature[row], top_k[row], top_p[row],
                            min_p[row], seed[row, 0:2], step[row], weights[row, 0:vocab],
                        )  # fmt: skip
                        T.writes(ids[row], weights[row, 0:vocab])
                        found = T.sblock_alloc_buffer((4,), "int32", scope="local")
                        place = T.sblock_alloc_buffer((2,), "int32", scope="local")
                        record = T.sblock_alloc_buffer((RECORD,), "float32", scope="local")
                        largest = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        least = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        value = T.sblock_alloc_buffer((depth * width,), "float32", scope="local")
                        mine = T.sblock_alloc_buffer((own * width,), "float32", scope="local")
                        here = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        item = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        sums = T.sblock_alloc_buffer((WAYS + 1,), "float32", scope="local")
                        added = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        bounds = T.sblock_alloc_buffer((WAYS,), "int32", scope="local")
                        low = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        high = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        before = T.sblock_alloc_buffer((2,), "int32", scope="local")
                        above = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        left_above = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        beside = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        enough = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        listed = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        in_lists = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        total = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        running = T.sblock_alloc_buffer((3,), "float32", scope="local")
                        bound = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        drawn = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        word = T.sblock_alloc_buffer((2,), "uint32", scope="local")
                        cipher_key = T.sblock_alloc_buffer((3,), "uint32", scope="local")
                        turn = T.sblock_alloc_buffer((1,), "uint32", scope="local")

                        @T.inline
                        def weight(x):  # beside the largest, for a logit above -inf
                            added[0] = exp_f32((x - largest[0]) / temperature[row])

                        @T.inline
                        def kept_weight(x):
                            weight(x)
                            added[0] = T.Select(
                                T.And(order_key(x) >= low[0], added[0] >= least[0]),
                                added[0],
                                T.float32(0),
                            )

                        @T.inline
                        def each_logit(step, chunk):  # of this thread's in a chunk
                            for v in T.serial(chunks.vectors // (TEAM * depth)):
                                for d in T.unroll(depth):
                                    load(
                                        logits,
                                        row,
                                        chunk * chunks.vectors + (v * depth + d) * TEAM + tx % TEAM,
                                        value,
                                        d * width,
                                    )
                                for i in T.unroll(depth * width):
                                    step(value[i])

                        @T.inline
                        def add(x, phase):  # to the sums above each bound: 1, or its weight
                            weight(x)
                            added[0] = T.Select(phase == 0, T.float32(1), added[0])
                            for j in T.unroll(WAYS):
                                sums[j] = sums[j] + T.Select(
                                    order_key(x) >= bounds[j], added[0], T.float32(0)
                                )

                        @T.inline
                        def sum_parts(phase):  # what there is at and above each bound
                            @T.inline
                            def add_and_list(x):
                                add(x, phase)
                                if order_key(x) >= low[0] and order_key(x) <= high[0]:
                                    if listed[0] < kept:
                                        lists[listed[0] * row_threads + tx] = x
                                    listed[0] = listed[0] + 1

                            for j in T.unroll(WAYS):
                                bounds[j] = _bound(low[0], high[0], j)
                            for j in T.unroll(WAYS + 1):
                                sums[j] = T.float32(0)
                            if in_lists[0] == 1:
                                for i in T.serial(listed[0]):
                                    item[0] = lists[i * row_threads + tx]
                                    add(item[0], phase)
                            else:
                                listed[0] = 0
                                for i in T.serial(-(-count // teams)):
                                    if i * teams + tx // TEAM < count:
                                        here[0] = keys[i * teams + tx // TEAM]
                                        if here[0] >= low[0]:
                                            each_logit(add_and_list, i * teams + tx // TEAM)
                                sums[WAYS] = T.Select(listed[0] > kept, T.float32(1), T.float32(0))
                            # In a loop that stays one: NVK's code for a subgroup's sum is long, and
                            # many of them at once need more predicates than there are.
                            for j in T.serial(WAYS + 1 - in_lists[0]):
                                item[0] = sums[WAYS]
                                for i in T.unroll(WAYS):
                                    item[0] = T.Select(j == i, sums[i], item[0])
                                item[0] = lanes.total(item[0])
                                if lanes.first(tx):
                                    parts[lanes.number(tx) * (WAYS + 1) + j] = item[0]
                            barrier()
                            if tx < WAYS + 1:
                                sums_of.total(parts, tx, added)
                                totals[tx] = added[0]
                            barrier()

                        @T.inline
                        def narrow():  # to the part with the largest bound that is low enough
                            before[0] = low[0]
                            before[1] = high[0]
                            added[0] = above[0]
                            high[0] = T.max(low[0], _bound(before[0], before[1], 1) - 1)
                            above[0] = totals[1] + beside[0]
                            for j in T.serial(1, WAYS):
                                item[0] = totals[j] + beside[0]
                                if item[0] >= enough[0]:
                                    low[0] = _bound(before[0], before[1], j)
                                    if j == WAYS - 1:
                                        high[0] = before[1]
                                        above[0] = added[0]
                                    else:
                                        high[0] = T.max(
                                            low[0], _bound(before[0], before[1], j + 1) - 1
                                        )
                                        above[0] = totals[j + 1] + beside[0]

                        @T.inline
                        def keep_lists():  # what is left is in them, but for what lies above
                            item[0] = totals[WAYS]
                            if in_lists[0] == 0 and item[0] == T.float32(0):
                                in_lists[0] = 1
                                beside[0] = left_above[0]

                        @T.inline
                        def begin_top_k():
                            # With k chunks or more, k logits reach the k-th of their largest.
                            enough[0] = T.Cast("float32", top_k[row])
                            if top_k[row] <= count:
                                if tx < count:
                                    place[0] = 0
                                    for c in T.serial(count):
                                        place[0] = place[0] + T.Select(
                                            T.Or(
                                                keys[c] > keys[tx],
                                                T.And(keys[c] == keys[tx], c < tx),
                                            ),
                                            1,
                                            0,
                                        )
                                    if place[0] == top_k[row] - 1:
                                        start[0] = keys[tx]
                                barrier()
                                low[0] = T.max(low[0], start[0])

                        @T.inline
                        def begin_top_p():
                            total[0] = T.float32(0)
                            if low[0] == KEY_MINUS_INF + 1:
                                # All logits count, but for those whose weights are so small that
                                # all of them together may be left out.
                                barrier()
                                chunk_sums.share(by_chunk, chunk_groups, total, tx)
                                chunk_sums.total(chunk_groups, total)
                                added[0] = (
                                    T.float32(MARGIN / vocab)
                                    * (T.float32(1) - top_p[row])
                                    * total[0]
                                )
                                added[0] = (
                                    largest[0]
                                    + T.min(log_f32(added[0]), T.float32(0)) * temperature[row]
                                )
                                low[0] = T.max(low[0], T.min(order_key(added[0]), found[0]))

                        @T.inline
                        def search(phase):  # the largest key at and above which there is enough
                            high[0] = found[0]
                            above[0] = T.float32(0)
                            beside[0] = T.float32(0)
                            in_lists[0] = 0
                            for i in T.serial(STEPS):
                                if low[0] < high[0]:
                                    sum_parts(phase)
                                    if phase == 1 and i == 0:
                                        item[0] = totals[0]
                                        enough[0] = top_p[row] * T.max(total[0], item[0])
                                    left_above[0] = above[0]
                                    narrow()
                                    keep_lists()

                        @T.inline
                        def sum_kept():  # of each chunk
                            @T.inline
                            def add_kept(x):
                                kept_weight(x)
                                total[0] = total[0] + added[0]

                            for i in T.serial(-(-count // teams)):
                                if i * teams + tx // TEAM < count:
                                    total[0] = T.float32(0)
                                    here[0] = keys[i * teams + tx // TEAM]
                                    if here[0] >= low[0]:
                                        each_logit(add_kept, i * teams + tx // TEAM)
                                    lists[tx % TEAM * count + i * teams + tx // TEAM] = total[0]
                            barrier()
                            if tx < count:
                                total[0] = T.float32(0)
                                for i in T.unroll(TEAM):
                                    total[0] = total[0] + lists[i * count + tx]
                                by_chunk[chunk_sums.place(tx)] = total[0]

                        @T.inline
                        def draw():
                            cipher_key[0] = T.Cast("uint32", seed[row, 0])
                            cipher_key[1] = T.Cast("uint32", seed[row, 1])
                            word[0] = T.Cast("uint32", step[row])
                            word[1] = T.uint32(0)
                            threefry(word, cipher_key, turn)
                            barrier()
                            chunk_sums.share(by_chunk, chunk_groups, total, tx)
                            chunk_sums.total(chunk_groups, total)
                            bound[0] = (
                                T.Cast("float32", T.shift_right(word[0], T.uint32(8)))
                                * T.float32(2.0**-24)
                                * total[0]
                            )
                            running[0] = T.float32(0)
                            chunk_sums.find(by_chunk, chunk_groups, bound, running, place)
                            if place[0] >= 0:
                                here[0] = place[0] * chunks.vectors
                                total[0] = T.float32(0)
                                for v in T.unroll(own):
                                    load(logits, row, here[0] + tx * own + v, mine, v * width)
                                for i in T.unroll(own * width):
                                    kept_weight(mine[i])
                                    mine[i] = added[0]
                                    total[0] = total[0] + mine[i]
                                if tx < chunks.vectors // own:
                                    by_thread[column_sums.place(tx)] = total[0]
                                barrier()
                                column_sums.share(by_thread, thread_groups, total, tx)
                                column_sums.find(by_thread, thread_groups, bound, running, place)
                                if tx == place[0]:
                                    for i in T.unroll(own * width):
                                        if mine[i] > T.float32(0) and running[0] <= bound[0]:
                                            drawn[0] = (here[0] + tx * own) * width + i
                                        running[0] = running[0] + mine[i]

                        of_row.clear(found)
                        if tx < count:
                            for i in T.unroll(RECORD):
                                record[i] = weights[row, tx * size + i]
                            found[0] = order_key(record[0])
                            keys[tx] = found[0]
                            found[1] = T.Cast("int32", record[1])
                            # As the smallest key; NaN among them.
                            if record[2] == T.float32(0):
                                found[2] = KEY_MINUS_INF - 1
                        of_row.share(found, shared, tx)
                        largest[0] = key_value(found[0])
                        drawn[0] = -1
                        low[0] = KEY_MINUS_INF + 1
                        place[0] = 0
                        if T.And(clean(found), found[0] > KEY_MINUS_INF):
                            if temperature[row] == T.float32(0):
                                drawn[0] = found[1]
                            else:
                                least[0] = T.float32(0)
                                if min_p[row] > T.float32(0):
                                    least[0] = T.min(min_p[row], T.float32(1))
                                if tx < count:
                                    weight(record[0])
                                    by_chunk[chunk_sums.place(tx)] = record[3] * added[0]
                                cuts_k: T.let = T.And(top_k[row] > 0, top_k[row] < vocab)
                                cuts_p: T.let = top_p[row] < T.float32(1)
                                for phase in T.serial(
                                    T.Select(cuts_k, 0, 1), T.Select(cuts_p, 2, 1)
                                ):
                                    if phase == 0:
                                        begin_top_k()
                                    else:
                                        begin_top_p()
                                    search(phase)
                                if T.Or(T.Or(cuts_k, cuts_p), least[0] > T.float32(0)):
                                    sum_kept()
                                draw()
                        # Whoever has drawn; nobody has where no number is more than 0.
                        if tx == T.max(place[0], 0):
                            ids[row] = drawn[0]
                        if tx < count:
                            weights[row, tx * size] = largest[0]
                            weights[row, tx * size + 1] = key_value(low[0])

    @T.inline
    def weigh(m, logits, temperature, min_p, ids, weights):
        for r in T.thread_binding(m, thread="blockIdx.y"):
            for c in T.thread_binding(count, thread="blockIdx.x"):
                with T.sblock("weigh"):
                    row, chunk = T.axis.remap("SS", [r, c])
                    for tx in T.thread_binding(threads, thread="threadIdx.x"):
                        with T.sblock("weigh_thread"):
                            T.reads(
                                logits[row, 0:vocab], temperature[row], min_p[row], ids[row],
                                weights[row, 0:vocab],
                            )  # fmt: skip
                            T.writes(weights[row, 0:vocab])
                            value = T.sblock_alloc_buffer((elements,), "float32", scope="local")
                            record = T.sblock_alloc_buffer((2,), "float32", scope="local")
                            least = T.sblock_alloc_buffer((1,), "float32", scope="local")

                            @T.inline
                            def choose(vector, place):
                                for i in T.unroll(width):
                                    value[place + i] = T.Select(
                                        vector * width + i == ids[row], T.float32(1), T.float32(0)
                                    )

                            @T.inline
                            def read(vector, place):
                                load(logits, row, vector, value, place)

                            @T.inline
                            def weight(_vector, place):
                                for i in T.unroll(width):
                                    least[0] = T.Select(
                                        order_key(value[place + i]) >= order_key(record[1]),
                                        exp_f32((value[place + i] - record[0]) / temperature[row]),
                                        T.float32(0),
                                    )
                                    value[place + i] = T.Select(
                                        T.And(
                                            min_p[row] > T.float32(0),
                                            least[0] < T.min(min_p[row], T.float32(1)),
                                        ),
                                        T.float32(0),
                                        least[0],
                                    )

                            @T.inline
                            def write(vector, place):
                                store(weights, row, vector, value, place)

                            for i in T.unroll(2):
                                record[i] = weights[row, chunk * size + i]
                            device_barrier()
                            if temperature[row] == T.float32(0) or ids[row] < 0:
                                each_vector(choose, chunk, tx)
                            else:
                                each_vector(read, chunk, tx)
                                each_vector(weight, chunk, tx)
                            each_vector(write, chunk, tx)

    @T.inline
    def body(m, logits, temperature, top_k, top_p, min_p, seed, step, ids, weights):
        survey(m, logits, temperature, weights)
        decide(m, logits, temperature, top_k, top_p, min_p, seed, step, ids, weights)
        weigh(m, logits, temperature, min_p, ids, weights)

    return prim_func(arguments, body)


# (family, what its devices have to offer, tile), best first.
_TABLE = (
    ("cuda", (), SampleTile(threads=256, row_threads=512, kept=16, depth=2)),
    ("metal", (), SampleTile(threads=256, row_threads=512, kept=12, depth=2)),
    ("vulkan", ("threads256",), SampleTile(threads=256, row_threads=256, kept=20, depth=2)),
    ("vulkan", (), SampleTile(threads=128, row_threads=128, kept=16, depth=2)),
)

SCHEDULES = tuple(
    Schedule(
        f"chunks by {tile.threads} threads, {family}",
        gpu(family, *features),
        partial(_build, family),
        tile,
        fits=lambda vocab: RECORD <= vocab < 1 << 24,  # exact as float32
    )
    for family, features, tile in _TABLE
)
