"""RMSNorm: y = x / sqrt(mean(x²) + eps) · weight.

    x f32 [n, hidden]   weight f32 [hidden]   y f32 [n, hidden]

The squares are summed in 64 float32 partial sums whose order is fixed, so each one adds few
terms and the result does not depend on the number of threads.

Roofline: 8·hidden bytes a token.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import tvm

from .cpu.items import items_in_parallel
from .cpu.vectors import LANES
from .gpu.items import one_thread_an_item
from .kernel import Case, Kernel, Signature, Size, T, Tensor, f32, prim_func
from .rms_norm_gpu import SCHEDULES

NAME = "f32_rms_norm"
BLOCK = 64  # partial sums: four vectors, so that additions do not wait for each other


def rms_norm_ref(
    x: np.ndarray, weight: np.ndarray, eps: float, **_static: Any
) -> tuple[np.ndarray]:
    """The module's formula in float64."""
    x = x.astype(np.float64)
    return (x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight,)


def signature(*, hidden: int, **_eps: float) -> Signature:
    n = Size("n")
    return Signature((f32("x", n, hidden), f32("weight", hidden)), (f32("y", n, hidden),))


def _items(
    lanes: int, arguments: tuple[Tensor, ...], *, hidden: int, eps: float
) -> tvm.tirx.PrimFunc:
    """One item is one token; vectors are `lanes` wide."""
    vectors = BLOCK // lanes

    @T.inline
    def body(n, x, weight, y):
        for t in T.serial(n):
            with T.sblock("item"):
                vt = T.axis.spatial(n, t)
                partial = T.sblock_alloc_buffer((BLOCK,), "float32", scope="local")
                total = T.sblock_alloc_buffer((1,), "float32", scope="local")
                scale = T.sblock_alloc_buffer((1,), "float32", scope="local")
                for v in T.serial(vectors):
                    for lane in T.vectorized(lanes):
                        partial[v * lanes + lane] = T.float32(0)
                for b in T.serial(hidden // BLOCK):
                    for v in T.serial(vectors):
                        for lane in T.vectorized(lanes):
                            partial[v * lanes + lane] = (
                                partial[v * lanes + lane]
                                + x[vt, b * BLOCK + v * lanes + lane]
                                * x[vt, b * BLOCK + v * lanes + lane]
                            )
                for i in T.serial(hidden % BLOCK):
                    partial[i] = (
                        partial[i]
                        + x[vt, hidden // BLOCK * BLOCK + i] * x[vt, hidden // BLOCK * BLOCK + i]
                    )
                total[0] = T.float32(0)
                for i in T.serial(BLOCK):
                    total[0] = total[0] + partial[i]
                scale[0] = T.float32(1) / T.sqrt(total[0] / T.float32(hidden) + T.float32(eps))
                for v in T.serial(hidden // lanes):
                    for lane in T.vectorized(lanes):
                        y[vt, v * lanes + lane] = (
                            x[vt, v * lanes + lane] * scale[0] * weight[v * lanes + lane]
                        )
                for i in T.serial(hidden % lanes):
                    y[vt, hidden // lanes * lanes + i] = (
                        x[vt, hidden // lanes * lanes + i]
                        * scale[0]
                        * weight[hidden // lanes * lanes + i]
                    )

    return prim_func(arguments, body)


def _case(name: str, n: int, hidden: int, scale: float = 1.0, spike: float = 1.0) -> Case:
    def inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
        x = rng.standard_normal((n, hidden), dtype=np.float32) * np.float32(scale)
        x[:, hidden // 3] *= spike
        return {"x": x, "weight": rng.standard_normal(hidden, dtype=np.float32)}

    static = {"hidden": hidden, "eps": 1e-5}
    bytes_ = 8 * n * hidden + 4 * hidden
    return Case(name, static, inputs, tolerance=1e-6, flops=4 * n * hidden, bytes=bytes_)


CASES = (
    _case("one token", 1, 96),
    _case("hidden not a multiple of the block", 3, 160),
    _case("hidden not a multiple of the lanes", 2, 50),
    _case("one channel 1000 times the others", 5, 2880, spike=1000.0),
    _case("smaller than eps", 2, 64, scale=1e-4),
    _case("20b hidden, a chunk", 100, 2880),
    _case("hidden of more than a block's registers", 2, 8200),
)

RMS_NORM = Kernel(
    NAME,
    signature,
    rms_norm_ref,
    CASES,
    (
        items_in_parallel(partial(_items, LANES)),
        *SCHEDULES,
        one_thread_an_item(partial(_items, 1)),
    ),
)
