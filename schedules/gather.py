"""Rows of a matrix: the hidden states whose logits are asked for.

    x f32 [n, hidden]   rows i32 [m]   y f32 [m, hidden], y[i] = x[rows[i]]

Row numbers are trusted: the host has checked that they lie in [0, n). A row may be asked for
more than once and in any order.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm

from .cpu.items import items_in_parallel
from .cpu.vectors import LANES
from .gpu.items import one_thread_an_item
from .kernel import Case, Kernel, Signature, Size, T, Tensor, f32, i32, prim_func

NAME = "f32_gather_rows"


def gather_rows_ref(x: np.ndarray, rows: np.ndarray, **_static: Any) -> tuple[np.ndarray]:
    """x[rows]; shapes as in the module's text."""
    return (x[rows].astype(np.float64),)


def signature(*, hidden: int) -> Signature:
    n, m = Size("n"), Size("m")
    return Signature((f32("x", n, hidden), i32("rows", m)), (f32("y", m, hidden),))


def _rows(arguments: tuple[Tensor, ...], *, hidden: int) -> tvm.tirx.PrimFunc:
    """One item is one row."""

    @T.inline
    def body(m, x, rows, y):
        for t in T.serial(m):
            with T.sblock("item"):
                vt = T.axis.spatial(m, t)
                for v in T.serial(hidden // LANES):
                    for lane in T.vectorized(LANES):
                        y[vt, v * LANES + lane] = x[rows[vt], v * LANES + lane]
                for i in T.serial(hidden % LANES):
                    y[vt, hidden // LANES * LANES + i] = x[rows[vt], hidden // LANES * LANES + i]

    return prim_func(arguments, body)


def _elements(arguments: tuple[Tensor, ...], *, hidden: int) -> tvm.tirx.PrimFunc:
    """One item is one element."""

    @T.inline
    def body(m, x, rows, y):
        for t, i in T.grid(m, hidden):
            with T.sblock("item"):
                vt, vi = T.axis.remap("SS", [t, i])
                y[vt, vi] = x[rows[vt], vi]

    return prim_func(arguments, body)


def _case(name: str, n: int, rows: list[int], hidden: int) -> Case:
    def inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {
            "x": rng.standard_normal((n, hidden), dtype=np.float32),
            "rows": np.array(rows, np.int32),
        }

    bytes_ = len(rows) * (4 + 8 * hidden)
    return Case(name, {"hidden": hidden}, inputs, tolerance=0.0, bytes=bytes_)


CASES = (
    _case("repeated, out of order, first and last", 6, [5, 0, 3, 3], 64),
    _case("one row of one", 1, [0], 32),
    _case("hidden not a multiple of the lanes", 3, [2, 1], 50),
    _case("20b hidden, the last row of a chunk", 512, [511], 2880),
)

GATHER_ROWS = Kernel(
    NAME,
    signature,
    gather_rows_ref,
    CASES,
    (items_in_parallel(_rows), one_thread_an_item(_elements)),
)
