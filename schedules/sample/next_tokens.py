"""The tokens of a step that is asked for before the one that draws some of them has ended.

    ids i32 [n], rows i32 [m], given i32 [m] -> tokens i32 [m]
    tokens[i] = given[i] where rows[i] < 0, else max(ids[rows[i]], 0)

`ids` is what the step before drew. Its -1, of a row with nothing to choose by, becomes token 0, for
there is no embedding of another: the host learns of the -1 later, and drops what came after it.
Row numbers of at least 0 are trusted: the host has checked that they lie in [0, n).

Roofline: 12 bytes a token, which is nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm

from ..cpu.items import items_in_parallel
from ..gpu.items import one_thread_an_item
from ..kernel import Case, Kernel, Signature, Size, T, Tensor, i32, prim_func

NAME = "i32_next_tokens"


def next_tokens_ref(
    ids: np.ndarray, rows: np.ndarray, given: np.ndarray, **_static: Any
) -> tuple[np.ndarray]:
    """The module's formula; shapes as in its text."""
    return (np.where(rows < 0, given, np.maximum(ids[rows], 0)).astype(np.int32),)


def signature() -> Signature:
    n, m = Size("n"), Size("m")
    return Signature((i32("ids", n), i32("rows", m), i32("given", m)), (i32("tokens", m),))


def _items(arguments: tuple[Tensor, ...]) -> tvm.tirx.PrimFunc:
    """One item is one token."""

    @T.inline
    def body(m, ids, rows, given, tokens):
        for t in T.serial(m):
            with T.sblock("item"):
                vt = T.axis.spatial(m, t)
                # No row below 0 is read, not even for a result that is not taken.
                tokens[vt] = T.Select(rows[vt] < 0, given[vt], T.max(ids[T.max(rows[vt], 0)], 0))

    return prim_func(arguments, body)


def _case(name: str, ids: list[int], rows: list[int], given: list[int]) -> Case:
    def inputs(_rng: np.random.Generator) -> dict[str, np.ndarray]:
        named = {"ids": ids, "rows": rows, "given": given}
        return {key: np.array(values, np.int32) for key, values in named.items()}

    return Case(name, {}, inputs, tolerance=0.0, bytes=4 * (len(ids) + 3 * len(rows)))


CASES = (
    _case("one drawn", [7], [0], [0]),
    _case("one given", [7], [-1], [9]),
    _case("drawn, out of order, among given", [5, 6, 201087], [2, -1, 0, -1, 1], [0, 3, 0, 4, 0]),
    _case("nothing was drawn", [-1, 4], [0, 1, -1], [8, 8, 8]),
    _case("more than a block", list(range(200)), [*range(199, -1, -1)], [0] * 200),
)

NEXT_TOKENS = Kernel(
    NAME,
    signature,
    next_tokens_ref,
    CASES,
    (items_in_parallel(_items), one_thread_an_item(_items)),
)
