"""`moe_plan` on GPUs: one block, a thread for each expert, which counts and places its own slots.

All threads read the same ids, four at a time where their number allows it. Nothing is sorted in
rounds, and no thread has an array.
"""

# ruff: noqa: B023 (T.inline functions are expanded where they are called, not closures)

from __future__ import annotations

import tvm

from ..gpu.items import GpuTile
from ..kernel import Schedule, T, Tensor, gpu, prim_func
from .router_topk_gpu import strided

TILE = GpuTile(threads=128)  # what every GPU has, and 120b's experts


def _build(
    arguments: tuple[Tensor, ...], *, experts: int, top_k: int, tile: GpuTile
) -> tvm.tirx.PrimFunc:
    threads = tile.threads
    width = 1 if top_k % 4 else 4
    each_expert = strided(experts, threads)

    @T.inline
    def body(n, ids, offsets, order):
        for one in T.thread_binding(1, thread="blockIdx.x"):
            with T.sblock("plan"):
                _unused = T.axis.spatial(1, one)
                counts = T.sblock_alloc_buffer((experts,), "int32", scope="shared")
                for tx in T.thread_binding(threads, thread="threadIdx.x"):
                    with T.sblock("thread"):
                        T.reads(ids[0:n, 0:top_k])
                        T.writes(offsets[0 : experts + 1], order[0 : n * top_k])
                        four = T.sblock_alloc_buffer((width,), "int32", scope="local")
                        place = T.sblock_alloc_buffer((1,), "int32", scope="local")

                        @T.inline
                        def each_slot(step):
                            for t, c in T.grid(n, top_k // width):
                                for i in T.vectorized(width):
                                    four[i] = ids[t, c * width + i]
                                for i in T.unroll(width):
                                    step(four[i], t * top_k + c * width + i)

                        @T.inline
                        def count(e):
                            place[0] = 0

                            @T.inline
                            def add(expert, _slot):
                                place[0] = place[0] + T.Select(expert == e, 1, 0)

                            each_slot(add)
                            counts[e] = place[0]

                        @T.inline
                        def fill(e):
                            place[0] = 0
                            for other in T.serial(experts):
                                place[0] = place[0] + T.Select(other < e, counts[other], 0)
                            offsets[e] = place[0]

                            @T.inline
                            def put(expert, slot):
                                if expert == e:
                                    order[place[0]] = T.Cast("int32", slot)
                                    place[0] = place[0] + 1

                            each_slot(put)
                            if e == experts - 1:
                                offsets[experts] = place[0]

                        each_expert(count, tx)
                        T.tvm_storage_sync("shared")
                        each_expert(fill, tx)

    return prim_func(arguments, body)


SCHEDULES = (Schedule("a thread an expert", gpu(), _build, TILE),)
