"""What several CPU schedules are written with: tiles of tokens, and sums over a vector's lanes."""

from __future__ import annotations

from typing import Any

from ..kernel import T

LANES = 16


def sizes(most: int, *others: int) -> tuple[int, ...]:
    """`most`, those of the others that are below it, 1."""
    return (*dict.fromkeys((most, *(size for size in others if size < most), 1)),)


def in_tiles(descending: tuple[int, ...], tile: Any) -> Any:
    """The T.inline `all_(first, count, operands)`: tile(start, tokens, *operands) over `count`
    tokens from `first`, as many at a time as the first size says, then the next; the last is 1.

    `tokens` is known when the code is made, so that their sums are registers; every size is code.
    """
    most, *others = descending
    rest = in_tiles(tuple(others), tile) if others else None

    @T.inline
    def all_(first, count, operands):
        for t in T.serial(count // most):
            tile(first + t * most, most, *operands)
        if len(others) > 0:
            rest(first + count // most * most, count % most, operands)

    return all_


@T.inline
def horizontal(vector, combine):
    """vector[0] = its first 16 elements combined; the others are spoiled."""
    for lane in T.vectorized(8):
        vector[lane] = combine(vector[lane], vector[8 + lane])
    for lane in T.vectorized(4):
        vector[lane] = combine(vector[lane], vector[4 + lane])
    for lane in T.vectorized(2):
        vector[lane] = combine(vector[lane], vector[2 + lane])
    vector[0] = combine(vector[0], vector[1])


def add(a: Any, b: Any) -> Any:
    return a + b
