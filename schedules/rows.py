"""What the kernels over rows of logits share: passes over a row, case data.

On the CPU a row is read in vectors of `lanes` columns. On GPUs a block of THREADS threads works on
a row: thread t on the columns t, t + THREADS, …, with partial results in shared memory that every
thread then puts together by itself. Logits are compared by their keys (math.order_key).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .kernel import T, Target
from .math import KEY_MINUS_INF, KEY_NONE, KEY_PLUS_INF, order_key

LANES = 16
THREADS = 128  # of a block: what every GPU has
CHUNK = 64  # vectors summed before their sum joins the row's: short sums lose less


def row_lanes(target: Target) -> int:
    return 1 if target.is_gpu else LANES


class Columns:
    """The columns of a row in chunks of CHUNK vectors; the last chunk has the left-over columns.

    Inside TVMScript, `run(step, c)` calls step(first, width) over chunk c: over whole vectors,
    then over single columns. The chunk lies in [begin(c), end(c)). Partial results have `lanes`
    places; single columns use the first. So the order of additions is fixed.
    """

    def __init__(self, vocab: int, lanes: int):
        vectors, rest = divmod(vocab, lanes)
        chunks = max(1, -(-vectors // CHUNK))

        @T.inline
        def columns(step, c):
            for v in T.serial(T.min(CHUNK, vectors - c * CHUNK)):
                step((c * CHUNK + v) * lanes, lanes)
            for i in T.serial(T.Select(c == chunks - 1, rest, 0)):
                step(vectors * lanes + i, 1)

        self.chunks = chunks
        self.run = columns
        self.begin = lambda c: c * (CHUNK * lanes)
        self.end = lambda c: T.Select(c == chunks - 1, vocab, (c + 1) * (CHUNK * lanes))


def largest_finder(vocab: int, lanes: int) -> Any:
    """The T.inline find(x, row, key, column, smallest): searches row `row` of x.

    It finds the largest key and its first column, and the smallest key, to see NaN. All three are
    i32 [lanes], and the results are in their first places.
    """
    every = Columns(vocab, lanes)

    @T.inline
    def find(x, row, key, column, smallest):
        @T.inline
        def look(first, width):
            for lane in T.vectorized(width):
                column[lane] = T.Select(
                    order_key(x[row, first + lane]) > key[lane], first + lane, column[lane]
                )
                key[lane] = T.max(key[lane], order_key(x[row, first + lane]))
                smallest[lane] = T.min(smallest[lane], order_key(x[row, first + lane]))

        for lane in T.vectorized(lanes):
            key[lane] = KEY_NONE
            column[lane] = -1
            smallest[lane] = KEY_PLUS_INF
        for c in T.serial(every.chunks):
            every.run(look, c)
        for lane in T.serial(1, lanes):
            smallest[0] = T.min(smallest[0], smallest[lane])
            if key[lane] > key[0] or (key[lane] == key[0] and column[lane] < column[0]):
                key[0] = key[lane]
                column[0] = column[lane]

    return find


@T.inline
def barrier():
    """All threads of the block have come here, and see what the others wrote to shared memory."""
    T.evaluate(T.tvm_storage_sync("shared"))


@T.inline
def _metal_barrier():
    # mem_flags::mem_device | mem_flags::mem_threadgroup
    T.evaluate(
        T.call_extern("int32", "threadgroup_barrier", T.call_extern("int32", "mem_flags", 3))
    )


def device_barrier(target: Target) -> Any:
    """The T.inline barrier() that is also one for what the others wrote to device memory.

    On CUDA and Vulkan every barrier is; Metal orders the memories that the barrier names.
    """
    return _metal_barrier if target.kind == "metal" else barrier


def thread_columns(vocab: int) -> Any:
    """The T.inline columns(step, tx): step(column) for the columns of thread `tx`, in order."""

    @T.inline
    def columns(step, tx):
        for i in T.serial(-(-vocab // THREADS)):
            if i * THREADS + tx < vocab:
                step(i * THREADS + tx)

    return columns


def block_largest_finder(vocab: int) -> Any:
    """The T.inline find(look, tx, keys, columns, key, column): the largest key that `look` gives.

    look(column) updates the thread's own key and column, i32 [1]; in the end all threads have the
    largest key of all and its first column, which is -1 where there is none. keys and columns are
    shared i32 [THREADS].
    """
    every = thread_columns(vocab)

    @T.inline
    def find(look, tx, keys, columns, key, column):
        key[0] = KEY_NONE
        column[0] = -1
        every(look, tx)
        keys[tx] = key[0]
        columns[tx] = column[0]
        barrier()
        for t in T.serial(THREADS):
            # Not by `if`: TVM takes no shared memory in a condition.
            column[0] = T.Select(
                keys[t] > key[0],
                columns[t],
                T.Select(keys[t] == key[0], T.min(columns[t], column[0]), column[0]),
            )
            key[0] = T.max(key[0], keys[t])
        barrier()

    return find


def usable(largest: Any, smallest: Any) -> Any:
    """Whether a row has neither NaN nor +inf and something above -inf, by its extreme keys."""
    return T.And(T.And(largest < KEY_PLUS_INF, largest > KEY_MINUS_INF), smallest >= KEY_MINUS_INF)


def random_logits(rng: np.random.Generator, m: int, vocab: int, spike: float = 4.0) -> np.ndarray:
    return rng.standard_normal((m, vocab), dtype=np.float32) * np.float32(spike)


def tie_logits(logits: np.ndarray) -> None:
    """Make many logits equal, with zeros of both signs."""
    np.rint(logits, out=logits)
    logits[logits == 0] = -0.0
    logits[:, ::2] += 0.0  # half of the zeros become +0


def spoil_logits(logits: np.ndarray) -> None:
    """Rows of every kind that has no distribution, and some with much at -inf."""
    logits[0, 3] = np.nan
    logits[1, 3] = -np.nan
    logits[2, 3] = np.inf
    logits[3] = -np.inf
    logits[4:7, 1:] = -np.inf
    logits[7, ::2] = -np.inf
    logits[8] = np.nan
