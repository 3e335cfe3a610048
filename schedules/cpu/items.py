"""The simple CPU schedule: work items in parallel."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import tvm

from ..kernel import Schedule, Tensor, cpu


def items_in_parallel(
    items: Callable[..., tvm.tirx.PrimFunc], blocks: tuple[str, ...] = ("item",)
) -> Schedule:
    """The schedule that runs items(arguments, **static), serial code in blocks of these names.

    The loops around a block run in parallel, an item's own loops stay. Work is split statically, so
    results do not depend on the number of threads.
    """
    return Schedule("parallel items", cpu(), partial(_parallel, items, blocks))


def _parallel(
    items: Callable[..., tvm.tirx.PrimFunc],
    blocks: tuple[str, ...],
    arguments: tuple[Tensor, ...],
    **static: Any,
) -> tvm.tirx.PrimFunc:
    sch = tvm.s_tir.Schedule(items(arguments, **static))
    for block in blocks:
        sch.parallel(sch.fuse(*sch.get_loops(sch.get_sblock(block))))
    return sch.mod["main"]
