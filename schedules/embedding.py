"""Embedding: the rows of a bfloat16 table that belong to the tokens, widened to float32.

    tokens i32 [n]   table bf16 [vocabulary, hidden]   x f32 [n, hidden]

The table is stored by rows on every target. Token ids are trusted: the host has checked that
they lie in the vocabulary, and an id outside of it reads foreign memory.

Roofline: 2·hidden bytes read and 4·hidden written a token.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import tvm

from .kernel import Case, Kernel, T, Target, bind_items, parallel_items

NAME = "bf16w_embed"
LANES = 16


def embed_ref(tokens: np.ndarray, table: np.ndarray, **_static: Any) -> tuple[np.ndarray]:
    """table[tokens]; shapes as in the module's text."""
    return (table[tokens].astype(np.float64),)


@cache
def embed(target: Target, *, hidden: int) -> tvm.tirx.PrimFunc:
    """(tokens, table, x) -> None, scheduled for `target`."""
    if target.is_gpu:
        return bind_items(embed_items(hidden=hidden), NAME)
    return parallel_items(_cpu_items(hidden), NAME)


def _cpu_items(hidden: int) -> tvm.tirx.PrimFunc:
    """One item is one row."""

    @T.prim_func(s_tir=True, private=True)
    def main(tp: T.handle, wp: T.handle, xp: T.handle):
        n, vocab = T.int64(), T.int64()
        tokens = T.match_buffer(tp, (n,), "int32")
        table = T.match_buffer(wp, (vocab, hidden), "bfloat16")
        x = T.match_buffer(xp, (n, hidden), "float32")
        for t in T.serial(n):
            with T.sblock("item"):
                vt = T.axis.spatial(n, t)
                for v in T.serial(hidden // LANES):
                    for lane in T.vectorized(LANES):
                        x[vt, v * LANES + lane] = T.Cast(
                            "float32", table[tokens[vt], v * LANES + lane]
                        )
                for i in T.serial(hidden % LANES):
                    x[vt, hidden // LANES * LANES + i] = T.Cast(
                        "float32", table[tokens[vt], hidden // LANES * LANES + i]
                    )

    return main


@cache
def embed_items(*, hidden: int) -> tvm.tirx.PrimFunc:
    """One item is one element."""

    @T.prim_func(s_tir=True, private=True)
    def main(tp: T.handle, wp: T.handle, xp: T.handle):
        n, vocab = T.int64(), T.int64()
        tokens = T.match_buffer(tp, (n,), "int32")
        table = T.match_buffer(wp, (vocab, hidden), "bfloat16")
        x = T.match_buffer(xp, (n, hidden), "float32")
        for t, i in T.grid(n, hidden):
            with T.sblock("item"):
                vt, vi = T.axis.remap("SS", [t, i])
                x[vt, vi] = T.Cast("float32", table[tokens[vt], vi])

    return main


def _case(name: str, n: int, vocab: int, hidden: int) -> Case:
    def inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
        tokens = rng.integers(0, vocab, n, dtype=np.int32)
        tokens[0], tokens[-1] = 0, vocab - 1
        table = rng.standard_normal((vocab, hidden), dtype=np.float32)
        return {"tokens": tokens, "table": table.astype(ml_dtypes.bfloat16)}

    return Case(name, {"hidden": hidden}, inputs, tolerance=0.0, bytes=n * (4 + 6 * hidden))


CASES = (
    _case("first and last token", 5, 201, 64),
    _case("one token", 1, 7, 32),
    _case("hidden not a multiple of the lanes", 3, 11, 50),
    _case("20b hidden, a chunk", 300, 1000, 2880),
)

EMBED = Kernel(
    NAME,
    build=embed,
    items=embed_items,
    reference=embed_ref,
    outputs=lambda inputs, hidden, **_: [((len(inputs["tokens"]), hidden), "float32")],
    cases=CASES,
)
