"""Random packed weights, made at load: full-size speed anywhere, without a checkpoint.

Every weight of the manifest says how to fill it so that activations stay near 1. Large weights
repeat a random stretch: memory traffic is what counts, and a generator would take minutes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

STRETCH = (1 << 22) - 1  # elements drawn before they repeat; odd, so that rows do not line up


def fill_random(out: np.ndarray, name: str, dtype: str, fill: Mapping[str, Any], seed: int) -> None:
    """Fill the bytes u8 [size] of one weight; the same for the same name and seed.

    `fill` is one of {"values": [...]}, {"constant": c}, {"normal": standard deviation},
    {"bytes": [lowest, highest]}; with "of", the dtype of the numbers, where the weight's own is
    that of the words they are packed in.
    """
    dtype = fill.get("of", dtype)
    kind, value = next(item for item in fill.items() if item[0] != "of")
    rng = np.random.default_rng([seed, *name.encode()])
    drawn = min(out.size, STRETCH)
    if kind == "values":
        stretch = _encode(np.asarray(value, np.float32), dtype)
    elif kind == "constant":
        stretch = _encode(np.full(drawn, value, np.float32), dtype)
    elif kind == "bytes":
        stretch = rng.integers(value[0], value[1], drawn, np.uint8, endpoint=True)
    else:
        stretch = _encode(rng.standard_normal(drawn, np.float32) * np.float32(value), dtype)
    for start in range(0, out.size, stretch.size):
        chunk = out[start : start + stretch.size]
        chunk[...] = stretch[: chunk.size]


def _encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """The bytes of f32 values as `dtype`."""
    if dtype == "bfloat16":
        # Truncation is rounding enough for noise.
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    return values.astype(dtype).view(np.uint8)
