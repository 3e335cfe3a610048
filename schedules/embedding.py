"""Embedding: the rows of a bfloat16 table that belong to the tokens, widened to float32.

    tokens i32 [n]   table bf16 [vocabulary, hidden]   x f32 [n, hidden]

The table is stored by rows on every target. Token ids are trusted: the host has checked that
they lie in the vocabulary, and an id outside of it reads foreign memory.

Roofline: 2·hidden bytes read and 4·hidden written a token.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import tvm

from .cpu.items import items_in_parallel
from .cpu.vectors import LANES
from .gpu.items import one_thread_an_item
from .kernel import Case, Kernel, Signature, Size, T, Tensor, f32, i32, prim_func

NAME = "bf16w_embed"


def embed_ref(tokens: np.ndarray, table: np.ndarray, **_static: Any) -> tuple[np.ndarray]:
    """table[tokens]; shapes as in the module's text."""
    return (table[tokens].astype(np.float64),)


def signature(*, hidden: int) -> Signature:
    n, vocab = Size("n"), Size("vocab")
    return Signature(
        (i32("tokens", n), Tensor("table", (vocab, hidden), "bfloat16")), (f32("x", n, hidden),)
    )


def _rows(arguments: tuple[Tensor, ...], *, hidden: int) -> tvm.tirx.PrimFunc:
    """One item is one row."""

    @T.inline
    def body(n, tokens, table, x):
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

    return prim_func(arguments, body)


def _elements(arguments: tuple[Tensor, ...], *, hidden: int) -> tvm.tirx.PrimFunc:
    """One item is one element."""

    @T.inline
    def body(n, tokens, table, x):
        for t, i in T.grid(n, hidden):
            with T.sblock("item"):
                vt, vi = T.axis.remap("SS", [t, i])
                x[vt, vi] = T.Cast("float32", table[tokens[vt], vi])

    return prim_func(arguments, body)


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
    signature,
    embed_ref,
    CASES,
    (items_in_parallel(_rows), one_thread_an_item(_elements)),
)
