"""MXFP4 weights: what the bits mean.

A value is e2m1 (sign, two exponent bits, one mantissa bit) times 2^(scale − 127); 32 neighbours
along the input dimension share a scale byte (OCP Microscaling Formats 1.0). As stored, 16 bytes
hold a block, the low nibble first:

    blocks u8 [..., rows, k/32, 16]   scales u8 [..., rows, k/32]

The weights are never expanded in memory: registers only.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm.script import tirx as T

from .blocks import BLOCK

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = np.array([*E2M1, *(-value for value in E2M1)], np.float32)


def dequantize(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """u8 [..., rows, k/32, 16] and u8 [..., rows, k/32] -> f32 [..., rows, k], exactly."""
    values = np.stack([VALUES[blocks & 15], VALUES[blocks >> 4]], axis=-1)
    values = values.reshape(*scales.shape, BLOCK)
    values = np.ldexp(values, scales.astype(np.int32)[..., None] - 127)
    return values.reshape(*scales.shape[:-1], scales.shape[-1] * BLOCK)


def nibble_value(nibble: Any) -> Any:
    """f32 value of an e2m1 nibble held in a uint32 expression, by integer arithmetic alone."""
    magnitude = T.bitwise_and(nibble, T.uint32(7))
    normal = T.reinterpret("float32", T.shift_left(magnitude + T.uint32(252), T.uint32(22)))
    value = T.Select(
        magnitude >= T.uint32(2), normal, T.Cast("float32", magnitude) * T.float32(0.5)
    )
    return T.Select(nibble >= T.uint32(8), -value, value)


def scale_value(scale: Any) -> Any:
    """f32 2^(scale − 127) of a uint8 expression; scale 0 is the denormal 2^-127."""
    bits = T.shift_left(T.Cast("uint32", scale), T.uint32(23))
    return T.reinterpret("float32", T.max(bits, T.uint32(0x00400000)))
