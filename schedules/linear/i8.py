"""Dense layer with 8-bit weights and 15-bit inputs; see `linear`.

A weight has one float16 scale for 32 neighbouring inputs, as in llama.cpp's Q8_0:
q = round(w / scale), scale = max|w| / 127.
"""

from __future__ import annotations

import numpy as np

from ..formats.blocks import BLOCK
from ..formats.dense import DENSE, DenseFormat, DenseWeight, Part
from ..quantize import I16
from .i8_cpu import SCHEDULES
from .linear import linear_kernel


def quantize_weight(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """i8 [rows, k] and scales f16 [rows, k/32], rounded first, of a weight [rows, k]."""
    blocks = weight.astype(np.float32).reshape(len(weight), -1, BLOCK)
    scales = (np.abs(blocks).max(axis=-1) / np.float32(127)).astype(np.float16)
    wide = scales.astype(np.float32)[..., None]
    with np.errstate(divide="ignore"):
        inverse = np.where(wide > 0, 1 / wide, 0)
    q = np.clip(np.rint(blocks * inverse), -127, 127).astype(np.int8)
    return q.reshape(weight.shape), scales


def dequantize_weight(q: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float64 [rows, k] of what quantize_weight gives."""
    return q * np.repeat(scales.astype(np.float64), BLOCK, axis=1)


I8_WEIGHT = DenseWeight(
    parts=(
        Part("", "int8", lambda _k: {"bytes": [0, 255]}),
        # A random byte has a root mean square of 74.
        Part("_scale", "float16", lambda k: {"constant": k**-0.5 / 74}, per=BLOCK),
    ),
    quantize=quantize_weight,
    values=dequantize_weight,
    multiple=BLOCK,
)

# Inputs of 8 bits would cost as much accuracy as the weights do.
LINEAR_I8 = linear_kernel("i8w_i16_linear", I8_WEIGHT, I16, SCHEDULES)

I8 = DENSE.add(DenseFormat("i8", "int8", I8_WEIGHT, I16, LINEAR_I8))

__all__ = ["I8", "LINEAR_I8", "dequantize_weight", "quantize_weight"]
