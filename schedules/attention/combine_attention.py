"""What the splits of SPLIT_ATTENTION are together, and the sink.

    partial f32 [n, SPLITS, Hq·D]   stats f32 [n, SPLITS, Hq, 2]   sinks f32 [Hq]
    ->   out f32 [n, Hq·D]

    m = max(sink, max_i largest_i)   w_i = exp(largest_i - m), 0 where sum_i is 0
    out = Σ_i w_i·partial_i / (exp(sink - m) + Σ_i w_i·sum_i)

Where sum_i is 0, largest_i and partial_i may be anything, NaN included.

Roofline: 4·Hq·D bytes a split that has keys.
"""

from __future__ import annotations

import numpy as np

from ..kernel import Case, Kernel, Signature, Size, f32
from . import combine_attention_gpu
from .splits import SPLITS

NAME = "f32_combine_attention"


def combine_attention_ref(
    partial: np.ndarray, stats: np.ndarray, sinks: np.ndarray, *, heads: int, head_dim: int
) -> tuple[np.ndarray]:
    """The module's formula in float64."""
    largest, total = np.moveaxis(stats.astype(np.float64), -1, 0)  # [n, SPLITS, heads]
    used = total > 0
    largest = np.where(used, largest, -np.inf)
    top = np.maximum(largest.max(axis=1), sinks)
    weight = np.exp(largest - top[:, None])
    parts = partial.astype(np.float64).reshape(*weight.shape, head_dim)
    sums = (weight[..., None] * np.where(used[..., None], parts, 0)).sum(axis=1)
    below = (weight * total).sum(axis=1) + np.exp(sinks - top)
    return ((sums / below[..., None]).reshape(len(partial), -1),)


def signature(*, heads: int, head_dim: int) -> Signature:
    n = Size("n")
    return Signature(
        (
            f32("partial", n, SPLITS, heads * head_dim),
            f32("stats", n, SPLITS, heads, 2),
            f32("sinks", heads),
        ),
        (f32("out", n, heads * head_dim),),
    )


def _case(
    name: str,
    used: list[int],
    *,
    heads: int = 8,
    head_dim: int = 16,
    spread: float = 1.0,
    sink: float = 0.0,
) -> Case:
    """A case of a token for each number of `used` splits.

    The largest scores are normal numbers times `spread`; `sink` shifts the sinks.
    """
    n = len(used)

    def inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
        partial = rng.standard_normal((n, SPLITS, heads * head_dim), dtype=np.float32)
        stats = np.empty((n, SPLITS, heads, 2), np.float32)
        stats[..., 0] = spread * rng.standard_normal((n, SPLITS, heads))
        stats[..., 1] = rng.uniform(1, 100, (n, SPLITS, heads))
        for t, count in enumerate(used):
            partial[t, count:] = np.nan
            stats[t, count:] = np.nan, 0
        sinks = rng.standard_normal(heads, dtype=np.float32) + np.float32(sink)
        return {"partial": partial, "stats": stats, "sinks": sinks}

    return Case(
        name,
        {"heads": heads, "head_dim": head_dim},
        inputs,
        flops=2 * sum(used) * heads * head_dim,
        bytes=4 * (sum(used) + n) * heads * head_dim,
    )


CASES = (
    _case("one split", [1]),
    _case("every split", [SPLITS]),
    _case("two and three splits", [2, 3]),
    _case("17 tokens", [*range(1, 18)], heads=2),
    _case("odd heads", [7, SPLITS], heads=3, head_dim=40),
    _case("head of 6", [5, SPLITS - 1], heads=5, head_dim=6),
    _case("head of 160", [9], heads=2, head_dim=160),
    _case("one split above all others", [12], spread=1000.0),
    _case("sink above all scores", [12], sink=60.0),
    _case("no sink", [12], sink=float("-inf")),
    _case("20b, one token", [SPLITS], heads=64, head_dim=64),
)

COMBINE_ATTENTION = Kernel(
    NAME, signature, combine_attention_ref, CASES, combine_attention_gpu.SCHEDULES
)
