"""Passes over a row of logits on GPUs, by a block of threads.

Thread t works on the columns t, t + threads, …; partial results are in shared memory, and every
thread puts them together by itself.
"""

from __future__ import annotations

from typing import Any

from ..gpu.barriers import barrier
from ..gpu.items import GpuTile
from ..kernel import T
from ..math import KEY_NONE

BLOCK = GpuTile(threads=128)  # what every GPU has


def thread_columns(vocab: int, threads: int) -> Any:
    """The T.inline columns(step, tx): step(column) for the columns of thread `tx`, in order."""

    @T.inline
    def columns(step, tx):
        for i in T.serial(-(-vocab // threads)):
            if i * threads + tx < vocab:
                step(i * threads + tx)

    return columns


def block_largest_finder(vocab: int, threads: int) -> Any:
    """The T.inline find(look, tx, keys, columns, key, column): the largest key that `look` gives.

    look(column) updates the thread's own key and column, i32 [1]; in the end all threads have the
    largest key of all and its first column, which is -1 where there is none. keys and columns are
    shared i32 [threads].
    """
    every = thread_columns(vocab, threads)

    @T.inline
    def find(look, tx, keys, columns, key, column):
        key[0] = KEY_NONE
        column[0] = -1
        every(look, tx)
        keys[tx] = key[0]
        columns[tx] = column[0]
        barrier()
        for t in T.serial(threads):
            # Not by `if`: TVM takes no shared memory in a condition.
            column[0] = T.Select(
                keys[t] > key[0],
                columns[t],
                T.Select(keys[t] == key[0], T.min(columns[t], column[0]), column[0]),
            )
            key[0] = T.max(key[0], keys[t])
        barrier()

    return find
