"""`router_topk` on GPUs: a block of threads works on one token, a thread on an expert.

An expert's place is the number of experts before it, so that nothing is done in rounds.
"""

# ruff: noqa: B023 (T.inline functions are expanded where they are called, not closures)

from __future__ import annotations

from typing import Any

import tvm

from ..gpu.items import GpuTile
from ..kernel import Schedule, T, Tensor, gpu, prim_func
from ..math import exp_f32, order_key

TILE = GpuTile(threads=128)  # what every GPU has, and 120b's experts


def strided(count: int, threads: int) -> Any:
    """The T.inline each(step, tx): step(i) for the i < count of thread `tx`."""

    @T.inline
    def each(step, tx):
        for i in T.serial(-(-count // threads)):
            if i * threads + tx < count:
                step(i * threads + tx)

    return each


def chooser(experts: int, top_k: int, threads: int) -> Any:
    """The T.inline choose(logits, keys, chosen, rank, total, largest, ids, weights, token, tx): a
    token's experts and their weights, by all threads.

    logits f32 [experts] and keys, their order_key, i32 [experts], in shared memory, where every
    thread sees them already; chosen f32 [top_k] in shared memory; rank i32 [1], total and largest
    f32 [1], a thread's own
    """
    each_expert, each_choice = strided(experts, threads), strided(top_k, threads)

    @T.inline
    def choose(logits, keys, chosen, rank, total, largest, ids, weights, token, tx):
        @T.inline
        def place(e):
            rank[0] = 0
            for other in T.serial(experts):
                rank[0] = rank[0] + T.Select(
                    T.Or(keys[other] > keys[e], T.And(keys[other] == keys[e], other < e)), 1, 0
                )
            if rank[0] < top_k:
                ids[token, rank[0]] = e
                chosen[rank[0]] = logits[e]

        @T.inline
        def weigh(j):
            # Kept apart, or TVM takes a number from itself, which is no 0 where it is NaN.
            largest[0] = chosen[0]
            total[0] = T.float32(0)
            for other in T.serial(top_k):
                total[0] = total[0] + exp_f32(chosen[other] - largest[0])
            weights[token, j] = exp_f32(chosen[j] - largest[0]) / total[0]

        each_expert(place, tx)
        T.tvm_storage_sync("shared")
        each_choice(weigh, tx)

    return choose


def _build(
    arguments: tuple[Tensor, ...], *, experts: int, top_k: int, tile: GpuTile
) -> tvm.tirx.PrimFunc:
    threads = tile.threads
    each_expert, choose = strided(experts, threads), chooser(experts, top_k, threads)

    @T.inline
    def body(n, logits, ids, weights):
        for t in T.thread_binding(n, thread="blockIdx.x"):
            with T.sblock("token"):
                vt = T.axis.spatial(n, t)
                row = T.sblock_alloc_buffer((experts,), "float32", scope="shared")
                keys = T.sblock_alloc_buffer((experts,), "int32", scope="shared")
                chosen = T.sblock_alloc_buffer((top_k,), "float32", scope="shared")
                for tx in T.thread_binding(threads, thread="threadIdx.x"):
                    with T.sblock("thread"):
                        T.reads(logits[vt, 0:experts])
                        T.writes(ids[vt, 0:top_k], weights[vt, 0:top_k])
                        rank = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        total = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        largest = T.sblock_alloc_buffer((1,), "float32", scope="local")

                        @T.inline
                        def load(e):
                            row[e] = logits[vt, e]
                            keys[e] = order_key(logits[vt, e])

                        each_expert(load, tx)
                        T.tvm_storage_sync("shared")
                        choose(row, keys, chosen, rank, total, largest, ids, weights, vt, tx)

    return prim_func(arguments, body)


SCHEDULES = (Schedule("a block a token", gpu(), _build, TILE),)
