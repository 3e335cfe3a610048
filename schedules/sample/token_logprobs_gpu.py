"""`token_logprobs` on GPUs: a block of threads works on one row. Correct, not tuned."""

# ruff: noqa: B023 (T.inline functions are expanded where they are called, not closures)

from __future__ import annotations

import tvm

from ..gpu.barriers import barrier
from ..gpu.items import GpuTile
from ..kernel import Schedule, T, Tensor, gpu, prim_func
from ..math import KEY_MINUS_INF, KEY_PLUS_INF, exp_f32, log_f32, order_key
from .rows import TOP, usable
from .rows_gpu import BLOCK, block_largest_finder, thread_columns


def _build(arguments: tuple[Tensor, ...], *, vocab: int, tile: GpuTile) -> tvm.tirx.PrimFunc:
    """What is written as if by all threads is the same for all of them."""
    threads = tile.threads
    every = thread_columns(vocab, threads)
    find_largest = block_largest_finder(vocab, threads)

    @T.inline
    def body(m, logits, ids, chosen, top_ids, top_values):
        for r in T.thread_binding(m, thread="blockIdx.x"):
            with T.sblock("row"):
                row = T.axis.spatial(m, r)
                T.reads(logits[row, 0:vocab], ids[row])
                T.writes(chosen[row], top_ids[row, 0:TOP], top_values[row, 0:TOP])
                keys = T.sblock_alloc_buffer((threads,), "int32", scope="shared")
                columns = T.sblock_alloc_buffer((threads,), "int32", scope="shared")
                parts = T.sblock_alloc_buffer((threads,), "float32", scope="shared")
                for tx in T.thread_binding(threads, thread="threadIdx.x"):
                    with T.sblock("thread"):
                        T.reads(logits[row, 0:vocab], ids[row])
                        T.writes(chosen[row], top_ids[row, 0:TOP], top_values[row, 0:TOP])
                        key = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        column = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        smallest = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        last_key = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        last_column = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        largest = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        total = T.sblock_alloc_buffer((1,), "float32", scope="local")

                        @T.inline
                        def look(c):  # for the largest key
                            if order_key(logits[row, c]) > key[0]:
                                key[0] = order_key(logits[row, c])
                                column[0] = c
                            smallest[0] = T.min(smallest[0], order_key(logits[row, c]))

                        @T.inline
                        def look_on(c):  # for the largest key after the last, in order
                            if order_key(logits[row, c]) > key[0] and (
                                order_key(logits[row, c]) < last_key[0]
                                or (order_key(logits[row, c]) == last_key[0] and c > last_column[0])
                            ):
                                key[0] = order_key(logits[row, c])
                                column[0] = c

                        @T.inline
                        def add(c):
                            total[0] = total[0] + T.Select(
                                order_key(logits[row, c]) > KEY_MINUS_INF,
                                exp_f32(logits[row, c] - largest[0]),
                                T.float32(0),
                            )

                        smallest[0] = KEY_PLUS_INF
                        find_largest(look, tx, keys, columns, key, column)
                        keys[tx] = smallest[0]
                        barrier()
                        for t in T.serial(threads):
                            smallest[0] = T.min(smallest[0], keys[t])
                        if tx == 0:
                            chosen[row] = T.float32("-inf")
                            for j in T.serial(TOP):
                                top_ids[row, j] = -1
                                top_values[row, j] = T.float32("-inf")
                        if usable(key[0], smallest[0]):
                            largest[0] = logits[row, column[0]]
                            total[0] = T.float32(0)
                            every(add, tx)
                            parts[tx] = total[0]
                            total[0] = T.float32(0)
                            barrier()
                            for t in T.serial(threads):
                                total[0] = total[0] + parts[t]
                            total[0] = log_f32(total[0])
                            # Not in one `and`, which would read past the row.
                            if tx == 0 and ids[row] >= 0 and ids[row] < vocab:  # noqa: SIM102
                                if order_key(logits[row, ids[row]]) > KEY_MINUS_INF:
                                    chosen[row] = logits[row, ids[row]] - largest[0] - total[0]
                            last_key[0] = key[0]
                            last_column[0] = column[0]
                            for j in T.serial(TOP):
                                if tx == 0 and last_key[0] > KEY_MINUS_INF:
                                    top_ids[row, j] = last_column[0]
                                    top_values[row, j] = (
                                        logits[row, last_column[0]] - largest[0] - total[0]
                                    )
                                find_largest(look_on, tx, keys, columns, key, column)
                                last_key[0] = key[0]
                                last_column[0] = column[0]

    return prim_func(arguments, body)


SCHEDULES = (Schedule("one block a row", gpu(), _build, BLOCK),)
