"""Quantize activations, one step per 32 neighbours: q = round(x / step).

    1 plane    step = max|x| / 127            q i8 [n, k]
    2 planes   step = max|x| / (127·128)      q in digits: i8 [n, 2k], high·128 + low

x f32 [n, k] -> q, step f32 [n, k/32], total i32 [n, k/32] = Σq

The total is for products with biased weights (see isa.py). Rounding is to nearest, half away from
zero; a block whose peak is below 1e-30 counts as zeros. The low digit is -64 to 63.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import tvm

from .int8 import BLOCK, DIGIT_BITS
from .kernel import Case, Kernel, T, Target, bind_items, scheduled
from .vectors import LANES, add, horizontal

NAMES = {1: "f32_quantize_i8", 2: "f32_quantize_i16"}
LARGEST = {1: 127, 2: 127 << DIGIT_BITS}
HALF_DIGIT = 1 << DIGIT_BITS - 1


def quantize_ref(
    x: np.ndarray, *, planes: int = 1, **_static: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The module's formula; the reciprocal is rounded to float32, as in the kernel."""
    blocks = x.reshape(len(x), -1, BLOCK)
    peak = np.abs(blocks).max(axis=-1).astype(np.float32)
    largest = np.float32(LARGEST[planes])
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(peak > 1e-30, largest / peak, np.float32(0)).astype(np.float32)
    scaled = (blocks * inverse[..., None]).astype(np.float32)
    whole = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int32)
    total = whole.sum(axis=-1, dtype=np.int32)
    q = whole.reshape(x.shape)
    if planes == 2:
        high = (q + HALF_DIGIT) >> DIGIT_BITS
        q = np.concatenate([high, q - (high << DIGIT_BITS)], axis=1)
    return q.astype(np.int8), peak / largest, total


def dequantize(q: np.ndarray, step: np.ndarray) -> np.ndarray:
    """float64 [n, k] that quantize_ref's q and step stand for."""
    k = step.shape[1] * BLOCK
    whole = q.astype(np.float64)
    if q.shape[1] == 2 * k:
        whole = whole[:, :k] * (1 << DIGIT_BITS) + whole[:, k:]
    return whole * np.repeat(step.astype(np.float64), BLOCK, axis=1)


@cache
def quantize(target: Target, *, k: int, planes: int = 1) -> tvm.tirx.PrimFunc:
    """(x, q, step, total) -> None, scheduled for `target`."""
    if target.is_gpu:
        return bind_items(quantize_items(k=k, planes=planes), NAMES[planes])
    return _cpu(k, planes)


def quantize_items(*, k: int, planes: int = 1) -> tvm.tirx.PrimFunc:
    """One item is one block of 32."""
    largest = float(LARGEST[planes])

    @T.inline
    def write(q, t, i, whole):
        if planes == 1:
            q[t, i] = T.Cast("int8", whole)
        else:
            high: T.let = (whole + HALF_DIGIT) >> DIGIT_BITS
            q[t, i] = T.Cast("int8", high)
            q[t, k + i] = T.Cast("int8", whole - (high << DIGIT_BITS))

    @T.prim_func(s_tir=True, private=True)
    def main(xp: T.handle, qp: T.handle, sp: T.handle, op: T.handle):
        n = T.int64()
        x = T.match_buffer(xp, (n, k), "float32")
        q = T.match_buffer(qp, (n, planes * k), "int8")
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
                    whole[0] = _round(x[vt, vb * BLOCK + i] * _inverse(peak[0], largest))
                    write(q, vt, vb * BLOCK + i, whole[0])
                    total[0] = total[0] + whole[0]
                step[vt, vb] = peak[0] / T.float32(largest)
                totals[vt, vb] = total[0]

    return main


def _cpu(k: int, planes: int) -> tvm.tirx.PrimFunc:
    """One item is one block of 32, two vectors."""
    largest = float(LARGEST[planes])

    @T.inline
    def write(q, t, i, whole, at):
        if planes == 1:
            for lane in T.vectorized(LANES):
                q[t, i + lane] = T.Cast("int8", whole[at + lane])
        else:
            for lane in T.vectorized(LANES):
                q[t, i + lane] = T.Cast("int8", (whole[at + lane] + HALF_DIGIT) >> DIGIT_BITS)
            for lane in T.vectorized(LANES):
                q[t, k + i + lane] = T.Cast(
                    "int8",
                    whole[at + lane]
                    - ((whole[at + lane] + HALF_DIGIT) >> DIGIT_BITS << DIGIT_BITS),
                )

    @T.prim_func(s_tir=True, private=True)
    def main(xp: T.handle, qp: T.handle, sp: T.handle, op: T.handle):
        n = T.int64()
        x = T.match_buffer(xp, (n, k), "float32")
        q = T.match_buffer(qp, (n, planes * k), "int8")
        step = T.match_buffer(sp, (n, k // BLOCK), "float32")
        totals = T.match_buffer(op, (n, k // BLOCK), "int32")
        for item in T.parallel(n * (k // BLOCK)):
            with T.sblock("item"):
                t = T.axis.spatial(n, item // (k // BLOCK))
                b = T.axis.spatial(k // BLOCK, item % (k // BLOCK))
                peak = T.sblock_alloc_buffer((LANES,), "float32")
                whole = T.sblock_alloc_buffer((BLOCK,), "int32")
                for lane in T.vectorized(LANES):
                    peak[lane] = T.max(
                        T.fabs(x[t, b * BLOCK + lane]), T.fabs(x[t, b * BLOCK + LANES + lane])
                    )
                horizontal(peak, T.max)
                step[t, b] = peak[0] / T.float32(largest)
                inverse: T.let = _inverse(peak[0], largest)
                for half in T.unroll(BLOCK // LANES):
                    for lane in T.vectorized(LANES):
                        whole[half * LANES + lane] = _round(
                            x[t, b * BLOCK + half * LANES + lane] * inverse
                        )
                    write(q, t, b * BLOCK + half * LANES, whole, half * LANES)
                for lane in T.vectorized(LANES):
                    whole[lane] = whole[lane] + whole[LANES + lane]
                horizontal(whole, add)
                totals[t, b] = whole[0]

    return scheduled(main, NAMES[planes], "blocks in parallel, vectors of 16")


def _inverse(peak: Any, largest: float) -> Any:
    return T.if_then_else(peak > T.float32(1e-30), T.float32(largest) / peak, T.float32(0))


def _round(value: Any) -> Any:
    return T.Cast("int32", value + T.Select(value < T.float32(0), T.float32(-0.5), T.float32(0.5)))


def _cases(planes: int) -> tuple[Case, ...]:
    def case(name: str, n: int, k: int, spike: float = 1, zero_block: bool = False) -> Case:
        def inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
            x = rng.standard_normal((n, k), dtype=np.float32)
            x[:, k // 2] *= spike
            if zero_block:
                x[0, :BLOCK] = 0
            return {"x": x}

        static = {"k": k, "planes": planes}
        return Case(name, static, inputs, flops=2 * n * k, bytes=(4 + planes) * n * k)

    return (
        case("one block", 1, 32),
        case("a block of zeros", 3, 96, zero_block=True),
        case("one channel 1000 times the others", 5, 160, spike=1000),
        case("20b hidden", 4, 2880),
    )


def _kernel(planes: int) -> Kernel:
    return Kernel(
        NAMES[planes],
        build=quantize,
        items=quantize_items,
        reference=quantize_ref,
        outputs=lambda inputs, k, **_: [
            ((len(inputs["x"]), planes * k), "int8"),
            ((len(inputs["x"]), k // BLOCK), "float32"),
            ((len(inputs["x"]), k // BLOCK), "int32"),
        ],
        cases=_cases(planes),
    )


QUANTIZE_I8, QUANTIZE_I16 = _kernel(1), _kernel(2)
