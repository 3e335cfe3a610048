"""Quantize activations, one scale for 32 neighbours: q = round(x / scale).

    1 digit     scale = max|x| / 127            q i8 [n, k]
    2 digits    scale = max|x| / (127·128)      q = hi·128 + lo: hi i8 [n, k], then lo i8 [n, k]

x f32 [n, k] -> q i8 [n, digits·k], scale f32 [n, k/32], sum i32 [n, k/32] = Σq

The sum is for products with biased weights (see cpu/isa.py). Rounding is to nearest, half away from
zero; a block whose peak is below 1e-30 counts as zeros. lo is -64 to 63.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import tvm

from .cpu.vectors import LANES, add, horizontal
from .formats.activations import ACTIVATIONS, ActivationFormat
from .formats.blocks import BLOCK, DIGIT_BITS, TINY
from .gpu.items import one_thread_an_item
from .kernel import Case, Kernel, Schedule, Signature, Size, T, Tensor, cpu, f32, i32, prim_func
from .math import add_half

NAMES = {1: "f32_quantize_i8", 2: "f32_quantize_i16"}
LARGEST = {1: 127, 2: 127 << DIGIT_BITS}
HALF_DIGIT = 1 << DIGIT_BITS - 1


def quantize_ref(
    digits: int, x: np.ndarray, **_static: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The module's formula; the reciprocal is rounded to float32, as in the kernel."""
    blocks = x.reshape(len(x), -1, BLOCK)
    peak = np.abs(blocks).max(axis=-1).astype(np.float32)
    largest = np.float32(LARGEST[digits])
    with np.errstate(divide="ignore", over="ignore"):
        inverse = np.where(peak > TINY, largest / peak, np.float32(0)).astype(np.float32)
    scaled = (blocks * inverse[..., None]).astype(np.float32)
    whole = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int32)
    sums = whole.sum(axis=-1, dtype=np.int32)
    q = whole.reshape(x.shape)
    if digits == 2:
        hi = (q + HALF_DIGIT) >> DIGIT_BITS
        q = np.concatenate([hi, q - (hi << DIGIT_BITS)], axis=1)
    return q.astype(np.int8), peak / largest, sums


def dequantize(q: np.ndarray, scale: np.ndarray, _sums: np.ndarray) -> np.ndarray:
    """float64 [n, k] that quantize_ref's results stand for."""
    k = scale.shape[1] * BLOCK
    whole = q.astype(np.float64)
    if q.shape[1] == 2 * k:
        whole = whole[:, :k] * (1 << DIGIT_BITS) + whole[:, k:]
    return whole * np.repeat(scale.astype(np.float64), BLOCK, axis=1)


def signature(digits: int, *, k: int) -> Signature:
    n = Size("n")
    return Signature(
        (f32("x", n, k),),
        (
            Tensor("q", (n, digits * k), "int8"),
            f32("scale", n, k // BLOCK),
            i32("sum", n, k // BLOCK),
        ),
    )


def _blocks(digits: int, arguments: tuple[Tensor, ...], *, k: int) -> tvm.tirx.PrimFunc:
    """One item is one block of 32."""
    largest = float(LARGEST[digits])

    @T.inline
    def write(q, t, i, whole):
        if digits == 1:
            q[t, i] = T.Cast("int8", whole)
        else:
            hi: T.let = (whole + HALF_DIGIT) >> DIGIT_BITS
            q[t, i] = T.Cast("int8", hi)
            q[t, k + i] = T.Cast("int8", whole - (hi << DIGIT_BITS))

    @T.inline
    def body(n, x, q, scale, sum):
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
                scale[vt, vb] = peak[0] / T.float32(largest)
                sum[vt, vb] = total[0]

    return prim_func(arguments, body)


def _cpu(digits: int, arguments: tuple[Tensor, ...], *, k: int) -> tvm.tirx.PrimFunc:
    """One item is one block of 32, two vectors."""
    largest = float(LARGEST[digits])

    @T.inline
    def write(q, t, i, whole, at):
        if digits == 1:
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

    @T.inline
    def body(n, x, q, scale, sum):
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
                scale[t, b] = peak[0] / T.float32(largest)
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
                sum[t, b] = whole[0]

    return prim_func(arguments, body)


def _inverse(peak: Any, largest: float) -> Any:
    return T.if_then_else(peak > T.float32(TINY), T.float32(largest) / peak, T.float32(0))


def _round(value: Any) -> Any:
    return T.Cast("int32", add_half(value))


def _cases(digits: int) -> tuple[Case, ...]:
    def case(name: str, n: int, k: int, spike: float = 1, zero_block: bool = False) -> Case:
        def inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
            x = rng.standard_normal((n, k), dtype=np.float32)
            x[:, k // 2] *= spike
            if zero_block:
                x[0, :BLOCK] = 0
            return {"x": x}

        return Case(name, {"k": k}, inputs, flops=2 * n * k, bytes=(4 + digits) * n * k)

    return (
        case("one block", 1, 32),
        case("a block of zeros", 3, 96, zero_block=True),
        case("one channel 1000 times the others", 5, 160, spike=1000),
        case("20b hidden", 4, 2880),
    )


def _kernel(digits: int) -> Kernel:
    return Kernel(
        NAMES[digits],
        partial(signature, digits),
        partial(quantize_ref, digits),
        _cases(digits),
        (
            Schedule("blocks in parallel, vectors of 16", cpu(), partial(_cpu, digits)),
            one_thread_an_item(partial(_blocks, digits)),
        ),
    )


def _format(digits: int, name: str, option: str | None, kernel: Kernel) -> ActivationFormat:
    return ACTIVATIONS.add(
        ActivationFormat(
            name,
            option,
            parts=lambda k: (
                ("", digits * k, "int8"),
                ("_scale", k // BLOCK, "float32"),
                ("_sum", k // BLOCK, "int32"),
            ),
            quantize=partial(quantize_ref, digits),
            values=dequantize,
            kernel=kernel,
        )
    )


QUANTIZE_I8, QUANTIZE_I16 = _kernel(1), _kernel(2)
I8 = _format(1, "i8", "int8", QUANTIZE_I8)
I16 = _format(2, "i16", None, QUANTIZE_I16)  # 15 bits, of two digits
