"""What the two expert kernels share: tile table, routing and weights of the test cases."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .kernel import TileConfig
from .mxfp4 import BLOCK, Activations


@dataclass(frozen=True)
class MoeTile(TileConfig):
    tokens: int  # tokens of one expert that share an unpacked weight


# 32 vector registers: 2 sums and 2 partial sums a token, the rest unpacks.
_CPU_TILES = {"f32": MoeTile(tokens=4), "i8": MoeTile(tokens=4)}


def cpu_tile(activations: Activations) -> MoeTile:
    return _CPU_TILES[activations]


def routing(
    rng: np.random.Generator, n: int, experts: int, top_k: int, choose: range | None
) -> dict[str, np.ndarray]:
    """Distinct random experts for each token, from `choose`, and the plan sorted by expert."""
    pool = np.arange(experts) if choose is None else np.asarray(choose)
    ids = np.stack([rng.permutation(pool)[:top_k] for _ in range(n)]).astype(np.int32)
    order = np.argsort(ids.ravel(), kind="stable").astype(np.int32)
    offsets = np.searchsorted(ids.ravel()[order], np.arange(experts + 1)).astype(np.int32)
    return {"ids": ids, "offsets": offsets, "order": order}


def expert_arrays(
    rng: np.random.Generator, experts: int, rows: int, k: int
) -> dict[str, np.ndarray]:
    """Random MXFP4 experts whose outputs stay near 1, and their bias, as stored."""
    center = 127 - round(np.log2(2.5 * np.sqrt(k)))
    return {
        "blocks": rng.integers(0, 256, (experts, rows, k // BLOCK, 16), dtype=np.uint8),
        "scales": rng.integers(
            center - 2, center + 2, (experts, rows, k // BLOCK), dtype=np.uint8
        ),
        "bias": rng.standard_normal((experts, rows), dtype=np.float32),
    }
