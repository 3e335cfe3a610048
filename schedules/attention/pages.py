"""Page tables: where the positions of a sequence lie.

Position j of sequence s is slot j % 16 of page page_table[s, j // 16 - first_page[s]]; first_page
is the logical number of the first page that the table's row still holds.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mxforge.kv_layout import PAGE_TOKENS

from ..kernel import Size, T, Tensor, i32


def table_arguments(n: Size) -> tuple[Tensor, ...]:
    """Of n tokens: their positions and sequences, and the sequences' page tables."""
    b = Size("b")
    return (
        i32("positions", n),
        i32("token_seq", n),
        i32("page_table", b, Size("p")),
        i32("first_page", b),
    )


def physical_page(page_table: Any, first_page: Any, sequence: Any, page: Any) -> Any:
    """Index into kv of a sequence's logical page, in 64 bits: pools exceed 2³¹ elements."""
    return T.Cast("int64", page_table[sequence, page - first_page[sequence]])


def first_visible(position: Any, window: int) -> Any:
    """The first position that a query at `position` sees; window 0 means all."""
    return T.max(position - T.int32(window - 1), T.int32(0)) if window else T.int32(0)


def is_hidden(key: Any, last: Any, window: int) -> Any:
    """Whether a query that sees keys up to `last` does not see this one; window 0 means all."""
    return T.Or(key > last, key <= last - window) if window else key > last


def most_pages(window: int) -> int:
    """In which a query's keys may lie: they begin anywhere in a page."""
    return -(-(window - 1) // PAGE_TOKENS) + 1


def paged_layout(
    rng: np.random.Generator, ranges: list[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray, int]:
    """(page_table, first_page, pages) for sequences that hold positions [begin, end).

    Physical pages are shuffled, and one in the pool belongs to nobody; the table's unused
    entries point at it.
    """
    first = [begin // PAGE_TOKENS for begin, _ in ranges]
    counts = [(end - 1) // PAGE_TOKENS + 1 - f for f, (_, end) in zip(first, ranges, strict=True)]
    pages = sum(counts) + 1
    order = iter(rng.permutation(pages))
    spare = next(order)
    table = np.full((len(ranges), max(counts)), spare, np.int32)
    for row, count in enumerate(counts):
        table[row, :count] = [next(order) for _ in range(count)]
    return table, np.array(first, np.int32), pages
