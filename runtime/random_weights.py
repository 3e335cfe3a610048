"""Random packed weights, made at load: full-size speed anywhere, without a checkpoint.

Every weight of the manifest says how to fill it so that activations stay near 1. Large weights
repeat a random stretch: memory traffic is what counts, and a generator would take minutes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

STRETCH = 1 << 22  # elements drawn before they repeat; odd, so that rows do not line up


def random_weight(name: str, shape: tuple[int, ...], dtype: str, fill: Any, seed: int) -> np.ndarray:
    """The content of one weight as bytes, u8 [size]; the same for the same name and seed.

    `fill` is one of {"values": [...]}, {"constant": c}, {"normal": standard deviation},
    {"bytes": [lowest, highest]}.
    """
    size = int(np.prod(shape, dtype=np.int64))
    rng = np.random.default_rng([seed, *name.encode()])
    (kind, value), = fill.items()
    if kind == "values":
        return np.asarray(value, np.float32).view(np.uint8)
    if kind == "constant":
        return _encode(np.full(size, value, np.float32), dtype)
    drawn = min(size, STRETCH - 1)
    if kind == "bytes":
        stretch = rng.integers(value[0], value[1], drawn, np.uint8, endpoint=True)
    else:
        stretch = _encode(rng.standard_normal(drawn, np.float32) * np.float32(value), dtype)
    itemsize = len(stretch) // drawn
    return np.resize(stretch, size * itemsize)


def _encode(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        # Truncation is rounding enough for noise.
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    return values.astype(dtype).view(np.uint8)
