"""A dense format of 8 bits that the compiler does not have: all that it takes is in this file.

A weight has one float32 scale for 16 neighbouring inputs. `TOY` joins no table by itself.
"""

from __future__ import annotations

import numpy as np
import tvm

from mxforge.schedules.cpu.items import items_in_parallel
from mxforge.schedules.formats import DenseFormat, DenseWeight, Part
from mxforge.schedules.formats.activations import F32
from mxforge.schedules.gpu.items import one_thread_an_item
from mxforge.schedules.kernel import T, Tensor, prim_func
from mxforge.schedules.linear.linear import linear_kernel, plus_options

BLOCK = 16


def quantize(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """i8 [rows, k] and scales f32 [rows, k/16]."""
    blocks = weight.astype(np.float32).reshape(len(weight), -1, BLOCK)
    scales = np.maximum(np.abs(blocks).max(axis=-1), np.float32(1e-30)) / np.float32(127)
    return np.rint(blocks / scales[..., None]).astype(np.int8).reshape(weight.shape), scales


def dequantize(q: np.ndarray, scales: np.ndarray) -> np.ndarray:
    return q * np.repeat(scales.astype(np.float64), BLOCK, axis=1)


def _elements(
    arguments: tuple[Tensor, ...], *, rows: int, k: int, **_options: bool
) -> tvm.tirx.PrimFunc:
    """One item is one output element."""

    @T.inline
    def body(n, x, weight, weight_scale, y, bias=None, residual=None):
        for t, row in T.grid(n, rows):
            with T.sblock("item"):
                vt, vrow = T.axis.remap("SS", [t, row])
                acc = T.sblock_alloc_buffer((1,), "float32", scope="local")
                acc[0] = T.float32(0)
                for i in T.serial(k):
                    acc[0] = acc[0] + x[vt, i] * (
                        T.Cast("float32", weight[vrow, i]) * weight_scale[vrow, i // BLOCK]
                    )
                y[vt, vrow] = plus_options(acc[0], bias, residual, vt, vrow)

    return prim_func(arguments, body)


WEIGHT = DenseWeight(
    parts=(
        Part("", "int8", lambda _k: {"bytes": [0, 255]}),
        Part("_scale", "float32", lambda k: {"constant": k**-0.5 / 74}, per=BLOCK),
    ),
    quantize=quantize,
    values=dequantize,
    multiple=BLOCK,
)
KERNEL = linear_kernel(
    "toy8w_linear",
    WEIGHT,
    F32,
    (items_in_parallel(_elements), one_thread_an_item(_elements)),
)
TOY = DenseFormat("toy8", "toy8", WEIGHT, F32, KERNEL)
