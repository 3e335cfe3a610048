"""RMSNorm: y = x / sqrt(mean(x²) + eps) · weight.

    x f32 [n, hidden]   weight f32 [hidden]   y f32 [n, hidden]

The squares are summed in 64 float32 partial sums whose order is fixed, so each one adds few
terms and the result does not depend on the number of threads.

Roofline: 8·hidden bytes a token.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import tvm

from .kernel import Case, Kernel, T, Target, bind_items, parallel_items

NAME = "f32_rms_norm"
LANES = 16
BLOCK = 64  # partial sums: four vectors, so that additions do not wait for each other


def rms_norm_ref(
    x: np.ndarray, weight: np.ndarray, eps: float, **_static: Any
) -> tuple[np.ndarray]:
    """The module's formula in float64."""
    x = x.astype(np.float64)
    return (x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight,)


@cache
def rms_norm(target: Target, *, hidden: int, eps: float) -> tvm.tirx.PrimFunc:
    """(x, weight, y) -> None, scheduled for `target`. On GPUs one thread computes one token."""
    if target.is_gpu:
        return bind_items(rms_norm_items(hidden=hidden, eps=eps), NAME)
    return parallel_items(rms_norm_items(hidden=hidden, eps=eps, lanes=LANES), NAME)


@cache
def rms_norm_items(*, hidden: int, eps: float, lanes: int = 1) -> tvm.tirx.PrimFunc:
    """One item is one token; vectors are `lanes` wide."""
    vectors = BLOCK // lanes

    @T.prim_func(s_tir=True, private=True)
    def main(xp: T.handle, wp: T.handle, yp: T.handle):
        n = T.int64()
        x = T.match_buffer(xp, (n, hidden), "float32")
        weight = T.match_buffer(wp, (hidden,), "float32")
        y = T.match_buffer(yp, (n, hidden), "float32")
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

    return main


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
)

RMS_NORM = Kernel(
    NAME,
    build=rms_norm,
    items=rms_norm_items,
    reference=rms_norm_ref,
    outputs=lambda inputs, hidden, **_: [((len(inputs["x"]), hidden), "float32")],
    cases=CASES,
)
