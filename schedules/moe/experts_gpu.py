"""What both halves of an expert share on GPUs but CUDA's newer ones: their table of schedules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import tvm

from ..gpu.matrices import MATRICES
from ..gpu.mxfp4 import ExpertsTile, layouts
from ..kernel import Schedule, Tensor, gpu

# Of devices with small blocks: with two instead of one, Adreno's compiler spills.
FEW = (1, 4)


def schedules(
    build: Callable[..., tvm.tirx.PrimFunc],
    tiles: Mapping[tuple[str, ...], ExpertsTile],
    scratch: Callable[..., tuple[Tensor, ...]],
) -> tuple[Schedule, ...]:
    """One for each key of `tiles`: a family, and what a target has to have besides, best first.
    Where it has matrix units, many tokens need the scratch."""
    table = {
        features: Schedule(
            f"some rows a block, {' '.join(features)}",
            gpu(*features),
            partial(build, features),
            tile,
            layouts(tile.rows),
            unused=frozenset({"offsets", "order"}),
        )
        for features, tile in tiles.items()
    }
    return tuple(
        replace(schedule, scratch=scratch) if features in MATRICES else schedule
        for features, schedule in table.items()
    )
