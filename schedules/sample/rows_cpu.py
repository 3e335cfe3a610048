"""Passes over a row of logits on CPUs, in vectors of `lanes` columns."""

from __future__ import annotations

from typing import Any

from ..kernel import T
from ..math import KEY_NONE, KEY_PLUS_INF, order_key

CHUNK = 64  # vectors summed before their sum joins the row's: short sums lose less


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
