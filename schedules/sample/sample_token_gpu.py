"""`sample_token` on GPUs: a block of threads works on one row.

A step of a search tries WAYS - 1 thresholds at once. Correct, not tuned.
"""

# ruff: noqa: B023 (T.inline functions are expanded where they are called, not closures)

from __future__ import annotations

from functools import partial
from typing import Any

import tvm

from ..gpu.items import GpuTile
from ..kernel import Schedule, T, Tensor, gpu, prim_func
from ..math import KEY_MINUS_INF, KEY_PLUS_INF, ONE_BITS, exp_f32, order_key
from .rows import usable
from .rows_gpu import (
    BLOCK,
    barrier,
    block_largest_finder,
    metal_device_barrier,
    thread_columns,
)
from .threefry import threefry

BITS = 3  # of a key, found by a step of the search
WAYS = 1 << BITS  # parts, of which a step leaves one
STEPS = 11  # 3 · 11 > 32: as many leave one key


def _build(
    weights_barrier: Any, arguments: tuple[Tensor, ...], *, vocab: int, tile: GpuTile
) -> tvm.tirx.PrimFunc:
    """What is written as if by all threads is the same for all of them.

    After `weights_barrier` threads see each other's weights, which are in device memory.
    """
    threads = tile.threads
    every = thread_columns(vocab, threads)
    find_largest = block_largest_finder(vocab, threads)
    segment = -(-vocab // threads)  # columns in a row, for the draw

    @T.inline
    def body(m, logits, temperature, top_k, top_p, min_p, seed, step, ids, weights):
        for r in T.thread_binding(m, thread="blockIdx.x"):
            with T.sblock("row"):
                row = T.axis.spatial(m, r)
                T.reads(
                    logits[row, 0:vocab], temperature[row], top_k[row], top_p[row], min_p[row],
                    seed[row, 0:2], step[row],
                )  # fmt: skip
                T.writes(ids[row], weights[row, 0:vocab])
                keys = T.sblock_alloc_buffer((threads,), "int32", scope="shared")
                columns = T.sblock_alloc_buffer((threads,), "int32", scope="shared")
                parts = T.sblock_alloc_buffer((threads, WAYS - 1), "float32", scope="shared")
                totals = T.sblock_alloc_buffer((WAYS - 1,), "float32", scope="shared")
                before = T.sblock_alloc_buffer((threads,), "float32", scope="shared")
                for tx in T.thread_binding(threads, thread="threadIdx.x"):
                    with T.sblock("thread"):
                        T.reads(logits[row, 0:vocab], parts[0:threads, 0 : WAYS - 1])
                        T.writes(ids[row], weights[row, 0:vocab], parts[0:threads, 0 : WAYS - 1])
                        key = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        column = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        smallest = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        sums = T.sblock_alloc_buffer((WAYS - 1,), "float32", scope="local")
                        bounds = T.sblock_alloc_buffer((WAYS - 1,), "int32", scope="local")
                        low = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        high = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        left = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        enough = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        bound = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        running = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        total = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        chosen = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        drawn = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        word = T.sblock_alloc_buffer((2,), "uint32", scope="local")
                        cipher_key = T.sblock_alloc_buffer((3,), "uint32", scope="local")
                        turn = T.sblock_alloc_buffer((1,), "uint32", scope="local")

                        @T.inline
                        def look(c):
                            if order_key(logits[row, c]) > key[0]:
                                key[0] = order_key(logits[row, c])
                                column[0] = c
                            smallest[0] = T.min(smallest[0], order_key(logits[row, c]))

                        @T.inline
                        def count_keys(c):
                            for j in T.unroll(WAYS - 1):
                                sums[j] = sums[j] + T.Select(
                                    order_key(logits[row, c]) >= bounds[j],
                                    T.float32(1), T.float32(0),
                                )  # fmt: skip

                        @T.inline
                        def add_weights(c):
                            for j in T.unroll(WAYS - 1):
                                sums[j] = sums[j] + T.Select(
                                    T.reinterpret("int32", weights[row, c]) >= bounds[j],
                                    weights[row, c], T.float32(0),
                                )  # fmt: skip

                        @T.inline
                        def choose(c):
                            weights[row, c] = T.Select(c == drawn[0], T.float32(1), T.float32(0))

                        @T.inline
                        def weigh(c):  # what has a key of at least `low`
                            weights[row, c] = T.Select(
                                order_key(logits[row, c]) >= low[0],
                                exp_f32(
                                    (logits[row, c] - logits[row, column[0]]) / temperature[row]
                                ),
                                T.float32(0),
                            )

                        @T.inline
                        def cut(c):  # weights whose bits are less than those of `low`
                            weights[row, c] = T.Select(
                                T.reinterpret("int32", weights[row, c]) >= low[0],
                                weights[row, c], T.float32(0),
                            )  # fmt: skip

                        @T.inline
                        def sum_all(add):  # the block's sums above each of the bounds
                            for j in T.unroll(WAYS - 1):
                                sums[j] = T.float32(0)
                            every(add, tx)
                            for j in T.unroll(WAYS - 1):
                                parts[tx, j] = sums[j]
                            barrier()
                            # Thread j adds up the sums of bound j. All threads adding up all of
                            # them take seven times the reads and seven times the code.
                            if tx < WAYS - 1:
                                total[0] = T.float32(0)
                                for t in T.serial(threads):
                                    total[0] = total[0] + parts[t, tx]
                                totals[tx] = total[0]
                            barrier()
                            for j in T.unroll(WAYS - 1):
                                sums[j] = totals[j]

                        @T.inline
                        def search(add):  # the largest bound in [low, high] with sums enough
                            for _step in T.serial(STEPS):
                                for j in T.unroll(WAYS - 1):
                                    bounds[j] = low[0] + T.Cast(
                                        "int32",
                                        T.shift_right(
                                            (T.Cast("int64", high[0]) - T.Cast("int64", low[0]))
                                            * (j + 1) + (WAYS - 1),
                                            T.int64(BITS),
                                        ),
                                    )  # fmt: skip
                                sum_all(add)
                                left[0] = high[0]
                                high[0] = T.max(low[0], bounds[0] - 1)
                                for j in T.unroll(WAYS - 1):
                                    if sums[j] >= enough[0]:
                                        low[0] = bounds[j]
                                        if j == WAYS - 2:
                                            high[0] = left[0]
                                        else:
                                            high[0] = T.max(
                                                bounds[j], bounds[T.min(j + 1, WAYS - 2)] - 1
                                            )

                        smallest[0] = KEY_PLUS_INF
                        find_largest(look, tx, keys, columns, key, column)
                        keys[tx] = smallest[0]
                        barrier()
                        for t in T.serial(threads):
                            smallest[0] = T.min(smallest[0], keys[t])
                        drawn[0] = -1
                        if not usable(key[0], smallest[0]) or temperature[row] == T.float32(0):
                            if usable(key[0], smallest[0]):
                                drawn[0] = column[0]
                            every(choose, tx)
                        else:
                            # top_k: the largest key that at least k logits reach. Counts below
                            # 2^24 are exact in float32.
                            low[0] = KEY_MINUS_INF + 1
                            if top_k[row] > 0 and top_k[row] < vocab:
                                high[0] = key[0]
                                enough[0] = T.Cast("float32", top_k[row])
                                search(count_keys)
                            every(weigh, tx)
                            # top_p: the largest weight at which the sum down to it is enough.
                            # Weights are positive and at most 1, so their bits order them.
                            low[0] = 1
                            if top_p[row] < T.float32(1):
                                for j in T.unroll(WAYS - 1):
                                    bounds[j] = 1
                                sum_all(add_weights)
                                enough[0] = top_p[row] * sums[0]
                                high[0] = ONE_BITS
                                search(add_weights)
                            if min_p[row] > T.float32(0):
                                low[0] = T.max(
                                    low[0], T.min(T.reinterpret("int32", min_p[row]), ONE_BITS)
                                )
                            every(cut, tx)
                            weights_barrier()
                            # The draw: the last segment of columns, and in it the last token, that
                            # has weight and before which the running sum does not exceed u·total.
                            # Rounding cannot make it miss: there is always one.
                            total[0] = T.float32(0)
                            for i in T.serial(segment):
                                if tx * segment + i < vocab:
                                    total[0] = total[0] + weights[row, tx * segment + i]
                            parts[tx, 0] = total[0]
                            barrier()
                            total[0] = T.float32(0)
                            running[0] = T.float32(0)
                            for t in T.serial(threads):
                                running[0] = T.Select(t == tx, total[0], running[0])
                                total[0] = total[0] + parts[t, 0]
                            before[tx] = running[0]
                            cipher_key[0] = T.Cast("uint32", seed[row, 0])
                            cipher_key[1] = T.Cast("uint32", seed[row, 1])
                            word[0] = T.Cast("uint32", step[row])
                            word[1] = T.uint32(0)
                            threefry(word, cipher_key, turn)
                            bound[0] = (
                                T.Cast("float32", T.shift_right(word[0], T.uint32(8)))
                                * T.float32(2.0**-24)
                                * total[0]
                            )
                            # Each thread judges its own segment: where all judge all of them,
                            # an unrolled loop keeps 128 sums in registers, and spills.
                            keys[tx] = T.Select(
                                T.And(parts[tx, 0] > T.float32(0), running[0] <= bound[0]), tx, 0
                            )
                            barrier()
                            chosen[0] = 0
                            for t in T.serial(threads):
                                chosen[0] = T.max(chosen[0], keys[t])
                            running[0] = before[chosen[0]]
                            for i in T.serial(segment):
                                if chosen[0] * segment + i < vocab:
                                    if (
                                        weights[row, chosen[0] * segment + i] > T.float32(0)
                                        and running[0] <= bound[0]
                                    ):
                                        drawn[0] = chosen[0] * segment + i
                                    running[0] = running[0] + weights[row, chosen[0] * segment + i]
                        if tx == 0:
                            ids[row] = drawn[0]

    return prim_func(arguments, body)


SCHEDULES = (
    Schedule(
        "one block a row, Metal's barriers",
        gpu("metal"),
        partial(_build, metal_device_barrier),
        BLOCK,
    ),
    Schedule("one block a row", gpu("device_barrier"), partial(_build, barrier), BLOCK),
)
