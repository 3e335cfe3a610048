"""What both halves of an expert share on GPUs without matrix units: their table of schedules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import tvm

from ..gpu.mxfp4 import ExpertsTile, layouts
from ..kernel import Schedule, gpu

# Of devices with small blocks: with two instead of one, Adreno's compiler spills.
FEW = (1, 4)


def schedules(
    build: Callable[..., tvm.tirx.PrimFunc], tiles: Mapping[tuple[str, ...], ExpertsTile]
) -> tuple[Schedule, ...]:
    """One for each key of `tiles`: a family, and what a target has to have besides, best first."""
    return tuple(
        Schedule(
            f"some rows a block, {' '.join(features)}",
            gpu(*features),
            partial(build, features[0]),
            tile,
            layouts(tile.rows),
            unused=frozenset({"offsets", "order"}),
        )
        for features, tile in tiles.items()
    )
