"""Rows of a matrix: the hidden states whose logits are asked for.

    x f32 [n, hidden]   rows i32 [m]   y f32 [m, hidden], y[i] = x[rows[i]]

Row numbers are trusted: the host has checked that they lie in [0, n). A row may be asked for
more than once and in any order.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import tvm

from .kernel import Case, Kernel, T, Target, bind_items, parallel_items

NAME = "f32_gather_rows"
LANES = 16


def gather_rows_ref(x: np.ndarray, rows: np.ndarray, **_static: Any) -> tuple[np.ndarray]:
    """x[rows]; shapes as in the module's text."""
    return (x[rows].astype(np.float64),)


@cache
def gather_rows(target: Target, *, hidden: int) -> tvm.tirx.PrimFunc:
    """(x, rows, y) -> None, scheduled for `target`."""
    if target.is_gpu:
        return bind_items(gather_rows_items(hidden=hidden), NAME)
    return parallel_items(_cpu_items(hidden), NAME)


def _cpu_items(hidden: int) -> tvm.tirx.PrimFunc:
    """One item is one row."""

    @T.prim_func(s_tir=True, private=True)
    def main(xp: T.handle, rp: T.handle, yp: T.handle):
        n, m = T.int64(), T.int64()
        x = T.match_buffer(xp, (n, hidden), "float32")
        rows = T.match_buffer(rp, (m,), "int32")
        y = T.match_buffer(yp, (m, hidden), "float32")
        for t in T.serial(m):
            with T.sblock("item"):
                vt = T.axis.spatial(m, t)
                for v in T.serial(hidden // LANES):
                    for lane in T.vectorized(LANES):
                        y[vt, v * LANES + lane] = x[rows[vt], v * LANES + lane]
                for i in T.serial(hidden % LANES):
                    y[vt, hidden // LANES * LANES + i] = x[rows[vt], hidden // LANES * LANES + i]

    return main


@cache
def gather_rows_items(*, hidden: int) -> tvm.tirx.PrimFunc:
    """One item is one element."""

    @T.prim_func(s_tir=True, private=True)
    def main(xp: T.handle, rp: T.handle, yp: T.handle):
        n, m = T.int64(), T.int64()
        x = T.match_buffer(xp, (n, hidden), "float32")
        rows = T.match_buffer(rp, (m,), "int32")
        y = T.match_buffer(yp, (m, hidden), "float32")
        for t, i in T.grid(m, hidden):
            with T.sblock("item"):
                vt, vi = T.axis.remap("SS", [t, i])
                y[vt, vi] = x[rows[vt], vi]

    return main


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
    build=gather_rows,
    items=gather_rows_items,
    reference=gather_rows_ref,
    outputs=lambda inputs, hidden, **_: [((len(inputs["rows"]), hidden), "float32")],
    cases=CASES,
)
