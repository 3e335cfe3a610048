"""Rows of logits in chunks, and what a block of threads finds out about one, on GPUs.

A chunk is what a block looks at in one pass, each of its logits in a register. A row's chunks are
as many as a block has threads, at most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..gpu.lanes import LANES
from ..kernel import T
from ..math import KEY_MINUS_INF, KEY_NONE, KEY_PLUS_INF, order_key

RECORD = 4  # columns that every chunk has, the last one too: numbers are kept in them
GROUP = 16  # parts of a sum that are added up first


@dataclass(frozen=True)
class Chunks:
    """The columns of a row, for blocks of `threads`."""

    vocab: int
    threads: int

    @property
    def width(self) -> int:
        """Columns of a vector."""
        return 1 if self.vocab % 4 else 4

    @property
    def size(self) -> int:
        """Columns of a chunk but the last."""
        step = self.threads * self.width
        size = step * -(-self.vocab // (step * self.threads))
        while 0 < self.vocab % size < RECORD:
            size += step
        return size

    @property
    def count(self) -> int:
        return -(-self.vocab // self.size)

    @property
    def elements(self) -> int:
        """Columns of a thread."""
        return self.size // self.threads

    @property
    def vectors(self) -> int:
        """Of a chunk but the last."""
        return self.size // self.width

    @property
    def load(self) -> Any:
        """The T.inline load(x, row, vector, values, place): values[place …] become a vector of the
        row; -inf where it has none of that number."""
        vectors, width = self.vocab // self.width, self.width

        @T.inline
        def load(x, row, vector, values, place):
            # From where there is something in any case: no branch between loads.
            for i in T.vectorized(width):
                values[place + i] = x[row, T.min(vector, vectors - 1) * width + i]
            for i in T.unroll(width):
                values[place + i] = T.Select(vector < vectors, values[place + i], T.float32("-inf"))

        return load

    @property
    def store(self) -> Any:
        """The T.inline store(y, row, vector, values, place), the other way round."""
        vectors, width = self.vocab // self.width, self.width

        @T.inline
        def store(y, row, vector, values, place):
            if vector < vectors:
                for i in T.vectorized(width):
                    y[row, vector * width + i] = values[place + i]

        return store

    @property
    def each_vector(self) -> Any:
        """The T.inline each(step, chunk, tx): step(vector, first place among the thread's) for
        each vector of thread `tx` in a chunk."""
        threads, width, vectors = self.threads, self.width, self.vectors

        @T.inline
        def each(step, chunk, tx):
            for i in T.unroll(vectors // threads):
                step(chunk * vectors + i * threads + tx, i * width)

        return each


def key_value(key: Any) -> Any:
    """The float32 that an int32 key is of; see math.order_key."""
    minus = T.bitwise_or(0 - key, T.int32(-(2**31)))
    return T.reinterpret("float32", T.Select(key < 0, minus, key))


@dataclass(frozen=True)
class BlockLargest:
    """The largest key of a block's, its first column, and the smallest key.

    look(value, column, found)   a thread's next, in order; found i32 [4] holds key, column,
        smallest and scratch, and begins as clear(found) leaves it
    share(found, shared, tx)     every thread: its own become the block's, with one barrier;
        shared i32 [elements] is used by nothing else before the next barrier
    """

    family: str
    threads: int

    @property
    def elements(self) -> int:
        return 3 * LANES[self.family].most(self.threads)

    @property
    def clear(self) -> Any:
        @T.inline
        def clear(found):
            found[0] = KEY_NONE
            found[1] = -1
            found[2] = KEY_PLUS_INF

        return clear

    @property
    def look(self) -> Any:
        @T.inline
        def look(value, column, found):
            found[1] = T.Select(order_key(value) > found[0], column, found[1])
            found[0] = T.max(found[0], order_key(value))
            found[2] = T.min(found[2], order_key(value))

        return look

    @property
    def share(self) -> Any:
        lanes, most = LANES[self.family], LANES[self.family].most(self.threads)
        warps = lanes.count(self.threads)

        @T.inline
        def share(found, shared, tx):
            found[3] = lanes.largest_int(found[0])
            found[1] = 0 - lanes.largest_int(
                T.Select(found[0] == found[3], 0 - found[1], T.int32(KEY_NONE + 1))
            )
            found[2] = 0 - lanes.largest_int(0 - found[2])
            if lanes.first(tx):
                shared[lanes.number(tx)] = found[3]
                shared[most + lanes.number(tx)] = found[1]
                shared[most * 2 + lanes.number(tx)] = found[2]
            T.tvm_storage_sync("shared")
            found[0] = KEY_NONE
            for warp in T.serial(warps):
                # Not by `if`: TVM takes no shared memory in a condition.
                found[1] = T.Select(
                    shared[warp] > found[0],
                    shared[most + warp],
                    T.Select(
                        shared[warp] == found[0],
                        T.min(found[1], shared[most + warp]),
                        found[1],
                    ),
                )
                found[0] = T.max(found[0], shared[warp])
                found[2] = T.min(found[2], shared[most * 2 + warp])

        return share


def clean(found: Any) -> Any:
    """Whether there is neither NaN nor +inf among what was looked at."""
    return T.And(found[0] < KEY_PLUS_INF, found[2] >= KEY_MINUS_INF)


@dataclass(frozen=True)
class RunningSum:
    """`count` numbers in order, added up by groups: where their running sum passes a bound.

    Number i is at place(i) of f32 [elements] in shared memory, which every thread sees.

    share(parts, groups, sum, tx)       every thread, with one barrier: groups f32 [self.groups],
        shared, become the sums of groups; sum f32 [1] is scratch
    total(groups, sum)                  after it: sum f32 [1]
    find(parts, groups, bound, sums, found)   found[0] of i32 [2]: the last number that is more
        than 0 and before which the sum is not more than bound[0]; -1 where none is more than 0.
        sums[0] of f32 [3] is what was before all of them, and becomes what is before this one.
    """

    threads: int
    count: int

    @property
    def groups(self) -> int:
        return -(-self.count // GROUP)

    @property
    def elements(self) -> int:
        return self.groups * (GROUP + 1)

    @staticmethod
    def place(i: Any) -> Any:
        """A group lies one element apart, so that threads read neighbouring groups at once."""
        return i + i // GROUP

    @property
    def share(self) -> Any:
        count, threads, all_groups = self.count, self.threads, self.groups

        @T.inline
        def share(parts, groups, sum, tx):
            for i in T.serial(-(-all_groups // threads)):
                if i * threads + tx < all_groups:
                    sum[0] = T.float32(0)
                    for j in T.serial(T.min(GROUP, count - (i * threads + tx) * GROUP)):
                        sum[0] = sum[0] + parts[(i * threads + tx) * (GROUP + 1) + j]
                    groups[i * threads + tx] = sum[0]
            T.tvm_storage_sync("shared")

        return share

    @property
    def total(self) -> Any:
        all_groups = self.groups

        @T.inline
        def total(groups, sum):
            sum[0] = T.float32(0)
            for g in T.serial(all_groups):
                sum[0] = sum[0] + groups[g]

        return total

    @property
    def find(self) -> Any:
        count, all_groups = self.count, self.groups

        @T.inline
        def find(parts, groups, bound, sums, found):
            @T.inline
            def step(value, number, place):
                sums[2] = value
                if sums[2] > T.float32(0) and sums[1] <= bound[0]:
                    found[place] = number
                    sums[0] = sums[1]
                sums[1] = sums[1] + sums[2]

            sums[1] = sums[0]
            found[0] = -1
            found[1] = -1
            for g in T.serial(all_groups):
                step(groups[g], g, 1)
            if found[1] >= 0:
                sums[1] = sums[0]
                for j in T.serial(T.min(GROUP, count - found[1] * GROUP)):
                    step(parts[found[1] * (GROUP + 1) + j], found[1] * GROUP + j, 0)

        return find
