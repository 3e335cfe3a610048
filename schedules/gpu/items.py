"""The simple GPU schedule: one thread computes one work item.

It is right for every kernel and tuned for none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import tvm

from ..kernel import Schedule, Tensor, TileConfig, gpu

ONE_THREAD = "one thread an item"


@dataclass(frozen=True)
class GpuTile(TileConfig):
    threads: int = 128  # of a block


def bind_items(func: tvm.tirx.PrimFunc, tile: GpuTile, block: str = "item") -> tvm.tirx.PrimFunc:
    """Spread the loops around the block named `block` over blocks of `tile.threads` threads.

    Devices take 65,535 blocks an axis and no more: the first loop, over tokens or pages, is an
    axis of its own wherever the others fill a block.
    """
    sch = tvm.s_tir.Schedule(func)
    first, *others = sch.get_loops(sch.get_sblock(block))
    sizes = [sch.get(loop).extent for loop in others]
    constant = all(isinstance(size, tvm.tirx.IntImm) for size in sizes)
    if others and constant and math.prod(int(size) for size in sizes) >= tile.threads:
        sch.bind(first, "blockIdx.y")
    else:
        others = [first, *others]
    outer, inner = sch.split(sch.fuse(*others), factors=[None, tile.threads])
    sch.bind(outer, "blockIdx.x")
    sch.bind(inner, "threadIdx.x")
    return sch.mod["main"]


def one_thread_an_item(
    items: Callable[..., tvm.tirx.PrimFunc], blocks: tuple[str, ...] = ("item",)
) -> Schedule:
    """The schedule that binds items(arguments, **static), serial code in blocks of these names."""
    return Schedule(ONE_THREAD, gpu(), partial(_bound, items, blocks), GpuTile())


def _bound(
    items: Callable[..., tvm.tirx.PrimFunc],
    blocks: tuple[str, ...],
    arguments: tuple[Tensor, ...],
    *,
    tile: GpuTile,
    **static: Any,
) -> tvm.tirx.PrimFunc:
    function = items(arguments, **static)
    for block in blocks:
        function = bind_items(function, tile, block)
    return function
