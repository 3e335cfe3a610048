"""Sums and maxima over the lanes of a vector, on CPUs."""

from __future__ import annotations

from typing import Any

from .kernel import T

LANES = 16


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
