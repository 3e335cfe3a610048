"""The plan of the mixture of experts: which tokens an expert gets.

The slots (token t's choice j is slot t·top_k + j) sorted by expert, stably.

    ids i32 [n, top_k] -> offsets i32 [experts + 1], order i32 [n·top_k]

Expert e's slots are order[offsets[e] : offsets[e + 1]]. It is a counting sort by one work item or
one block of threads: a chunk has a few thousand slots, and more would race for places.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm

from ..gpu.items import one_thread_an_item
from ..kernel import Case, Kernel, Schedule, Signature, Size, T, Tensor, cpu, i32, prim_func
from . import plan_gpu

NAME = "moe_plan"


def moe_plan_ref(ids: np.ndarray, experts: int, **_static: Any) -> tuple[np.ndarray, np.ndarray]:
    """The slots sorted stably by expert, and where each expert's begin."""
    flat = ids.ravel()
    counts = np.bincount(flat, minlength=experts)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    return offsets.astype(np.int32), np.argsort(flat, kind="stable").astype(np.int32)


def signature(*, experts: int, top_k: int) -> Signature:
    """Ids must lie in [0, experts)."""
    n = Size("n")
    return Signature(
        (i32("ids", n, top_k),), (i32("offsets", experts + 1), i32("order", n * top_k))
    )


def _sort(arguments: tuple[Tensor, ...], *, experts: int, top_k: int) -> tvm.tirx.PrimFunc:
    """The only item is the whole sort."""

    @T.inline
    def body(n, ids, offsets, order):
        for i in T.serial(1):
            with T.sblock("item"):
                _unused = T.axis.spatial(1, i)
                T.reads(ids[0:n, 0:top_k])
                T.writes(offsets[0 : experts + 1], order[0 : n * top_k])
                place = T.sblock_alloc_buffer((experts,), "int32", scope="local")
                for e in T.serial(experts):
                    place[e] = 0
                for t, j in T.grid(n, top_k):
                    place[ids[t, j]] = place[ids[t, j]] + 1
                offsets[0] = 0
                for e in T.serial(experts):
                    offsets[e + 1] = offsets[e] + place[e]
                    place[e] = offsets[e]
                for t, j in T.grid(n, top_k):
                    order[place[ids[t, j]]] = T.Cast("int32", t * top_k + j)
                    place[ids[t, j]] = place[ids[t, j]] + 1

    return prim_func(arguments, body)


def _case(name: str, n: int, experts: int, top_k: int, only: int | None = None) -> Case:
    """`only` is the number of experts that get tokens, the last ones."""

    def inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
        width = only or experts
        rows = [rng.permutation(width)[:top_k] if top_k <= width else [0] * top_k for _ in range(n)]
        return {"ids": (np.array(rows) + experts - width).astype(np.int32)}

    bytes_ = 8 * n * top_k + 4 * (experts + 1)
    return Case(name, {"experts": experts, "top_k": top_k}, inputs, bytes=bytes_)


CASES = (
    _case("one token", 1, 32, 4),
    _case("experts with no tokens", 9, 12, 4, only=5),
    _case("all tokens on the last expert", 33, 8, 1, only=1),
    _case("20b, a chunk", 512, 32, 4),
    _case("120b, a partial chunk", 77, 128, 4),
    _case("more experts than a block has threads", 9, 300, 3),
)

MOE_PLAN = Kernel(
    NAME,
    signature,
    moe_plan_ref,
    CASES,
    (Schedule("serial", cpu(), _sort), *plan_gpu.SCHEDULES, one_thread_an_item(_sort)),
)
