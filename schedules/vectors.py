"""What several CPU schedules are written with: tiles of tokens, and sums over a vector's lanes."""

from __future__ import annotations

from typing import Any

from .kernel import T

LANES = 16


def in_tiles(most: int, tile: Any) -> Any:
    """The T.inline `all(first, count, operands)`: tile(start, tokens, *operands) for `count` tokens
    from `first`, `most` of them at a time, then for the rest.

    tokens is a number when the code is made, so that as many sums stay in registers.
    """
    rest = _rest(most - 1, tile)

    @T.inline
    def all_(first, count, operands):
        for t in T.serial(count // most):
            tile(first + t * most, most, *operands)
        rest(first + count // most * most, count % most, operands)

    return all_


def _rest(most: int, tile: Any) -> Any:
    """The T.inline `rest(start, count, operands)`: one tile of at most `most` tokens, or none."""
    fewer = _rest(most - 1, tile) if most else None

    @T.inline
    def rest(start, count, operands):
        if most > 0:
            if count == most:
                tile(start, most, *operands)
            else:
                fewer(start, count, operands)

    return rest


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
