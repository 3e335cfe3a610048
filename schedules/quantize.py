"""Quantize activations to 8 bits, one scale per 32: q = round(x / step), step = max|x| / 127.

x f32 [n, k] -> q i8 [n, k], step f32 [n, k/32], total i32 [n, k/32] = Σq

The total is for products with biased weights (see isa.py). Rounding is to nearest, half away from
zero; a block whose peak is below 1e-30 counts as zeros.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import tvm

from .int8 import BLOCK
from .kernel import Case, Kernel, T, Target, bind_items, parallel_items

NAME = "f32_quantize_i8"


def quantize_ref(x: np.ndarray, **_static: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The module's formula; the reciprocal is rounded to float32, as in the kernel."""
    blocks = x.reshape(len(x), -1, BLOCK)
    peak = np.abs(blocks).max(axis=-1).astype(np.float32)
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(peak > 1e-30, np.float32(127) / peak, np.float32(0)).astype(np.float32)
    scaled = (blocks * inverse[..., None]).astype(np.float32)
    q = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8)
    total = q.astype(np.int32).sum(axis=-1, dtype=np.int32)
    return q.reshape(x.shape), peak / np.float32(127), total


@cache
def quantize(target: Target, *, k: int) -> tvm.tirx.PrimFunc:
    """(x, q, step, total) -> None, scheduled for `target`."""
    schedule = bind_items if target.is_gpu else parallel_items
    return schedule(quantize_items(k=k), NAME)


def quantize_items(*, k: int) -> tvm.tirx.PrimFunc:
    """One item is one block of 32."""

    @T.prim_func(s_tir=True, private=True)
    def main(xp: T.handle, qp: T.handle, sp: T.handle, op: T.handle):
        n = T.int64()
        x = T.match_buffer(xp, (n, k), "float32")
        q = T.match_buffer(qp, (n, k), "int8")
        step = T.match_buffer(sp, (n, k // BLOCK), "float32")
        totals = T.match_buffer(op, (n, k // BLOCK), "int32")
        for t, b in T.grid(n, k // BLOCK):
            with T.sblock("item"):
                vt, vb = T.axis.remap("SS", [t, b])
                peak = T.sblock_alloc_buffer((1,), "float32", scope="local")
                whole = T.sblock_alloc_buffer((1,), "int32", scope="local")
                total = T.sblock_alloc_buffer((1,), "int32", scope="local")
                peak[0] = T.float32(0)
                total[0] = 0
                for i in T.serial(BLOCK):
                    peak[0] = T.max(peak[0], T.fabs(x[vt, vb * BLOCK + i]))
                for i in T.serial(BLOCK):
                    whole[0] = _round(x[vt, vb * BLOCK + i] * _inverse(peak[0]))
                    q[vt, vb * BLOCK + i] = T.Cast("int8", whole[0])
                    total[0] = total[0] + whole[0]
                step[vt, vb] = peak[0] / T.float32(127)
                totals[vt, vb] = total[0]

    return main


def _inverse(peak: Any) -> Any:
    return T.if_then_else(peak > T.float32(1e-30), T.float32(127) / peak, T.float32(0))


def _round(value: Any) -> Any:
    return T.Cast("int32", value + T.Select(value < T.float32(0), T.float32(-0.5), T.float32(0.5)))


def _case(name: str, n: int, k: int, spike: float = 1, zero_block: bool = False) -> Case:
    def inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
        x = rng.standard_normal((n, k), dtype=np.float32)
        x[:, k // 2] *= spike
        if zero_block:
            x[0, :BLOCK] = 0
        return {"x": x}

    return Case(name, {"k": k}, inputs, flops=2 * n * k, bytes=5 * n * k)


CASES = (
    _case("one block", 1, 32),
    _case("a block of zeros", 3, 96, zero_block=True),
    _case("one channel 1000 times the others", 5, 160, spike=1000),
    _case("20b hidden", 4, 2880),
)

QUANTIZE = Kernel(
    NAME,
    build=quantize,
    items=quantize_items,
    reference=quantize_ref,
    outputs=lambda inputs, k, **_: [
        (inputs["x"].shape, "int8"),
        ((len(inputs["x"]), k // BLOCK), "float32"),
        ((len(inputs["x"]), k // BLOCK), "int32"),
    ],
    cases=CASES,
)
