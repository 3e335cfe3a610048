"""Round activations to MXFP8: e4m3 times a power of two that 32 neighbours share.

    x f32 [n, k] -> bits u16 [n, k]: what the MXFP8 stand for, which bfloat16 holds exactly

The elements and scales are those of OCP Microscaling Formats 1.0, e4m3 and e8m0. The scale is the
least with which the largest of a block does not exceed 448, e4m3's largest; elements are rounded to
nearest, ties to even. A block whose peak is below 1e-30 counts as zeros, one that has no finite
peak is NaN.

Whoever multiplies them takes them as bfloat16, or as MXFP8, which the bfloat16 become again without
loss (`e4m3_scale`, `e4m3_bits`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
import tvm

from .cpu.items import items_in_parallel
from .cuda.warps import shared_with
from .formats.activations import ACTIVATIONS, ActivationFormat
from .formats.blocks import BLOCK, TINY
from .gpu.items import one_thread_an_item
from .kernel import Case, Kernel, Schedule, Signature, Size, T, Tensor, f32, gpu, prim_func
from .round_bf16 import BF16, widen

NAME = "f32_round_mxfp8"
LARGEST = 448.0  # of e4m3, 1.75 · 2^8
THREADS = 256  # of a block of `_lanes`
_INFINITE = 0x7F800000
_NAN = 0x7FC00000


def round_ref(x: np.ndarray, **_static: Any) -> tuple[np.ndarray]:
    """The module's formula."""
    blocks = x.reshape(len(x), -1, BLOCK).astype(np.float64)
    peak = np.abs(blocks).max(axis=-1, keepdims=True)
    finite = np.isfinite(peak)
    counts = finite & (peak > np.float32(TINY))
    scale = 2.0 ** np.ceil(np.log2(np.where(counts, peak, LARGEST) / LARGEST))
    elements = np.where(counts, blocks, np.copysign(0, blocks)) / scale
    values = elements.astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale
    rounded = np.where(finite, values, np.copysign(np.nan, blocks)).reshape(x.shape)
    return (rounded.astype(ml_dtypes.bfloat16).view(np.uint16),)


def signature(*, k: int) -> Signature:
    n = Size("n")
    return Signature((f32("x", n, k),), (Tensor("bits", (n, k), "uint16"),))


def e4m3_scale(peak: Any) -> Any:
    """u32 e8m0 of the scale, the exponent's bits of a float32, of a block's peak, u32 bits of one.

    The same of a peak before and after it is rounded, but where it becomes 224 times the scale:
    then half of it, with which e4m3 holds the same numbers.
    """
    least = T.max(peak, T.uint32(8 << 23))
    return T.shift_right(least + T.uint32(0x001FFFFF), T.uint32(23)) - T.uint32(8)


def power_of_two(exponent: Any) -> Any:
    """f32 of its exponent's bits, u32."""
    return T.reinterpret("float32", T.shift_left(exponent, T.uint32(23)))


def e4m3_bits(value: Any, scale: Any) -> Any:
    """u32: the byte of a float32 that is a multiple of e4m3 and this scale.

    Times 2^-120 an e4m3 is a float32 with the same bits, subnormal where it is.
    """
    multiple = value * power_of_two(T.uint32(254) - scale)
    bits = T.reinterpret("uint32", multiple * T.float32(2.0**-120))
    return T.bitwise_or(
        T.bitwise_and(T.shift_right(bits, T.uint32(20)), T.uint32(0x7F)),
        T.bitwise_and(T.shift_right(bits, T.uint32(24)), T.uint32(0x80)),
    )


@T.inline
def _peak(x, count, peak):
    """peak[0] = bits of the largest magnitude of so many f32, and of what it was; those of NaN are
    larger than others."""
    for i in T.serial(count):
        bits: T.let = T.reinterpret("uint32", x[i])
        peak[0] = T.max(peak[0], T.bitwise_and(bits, T.uint32(0x7FFFFFFF)))


@T.inline
def _scales(peak, up, down):
    """What numbers are multiplied with to become e4m3, and then to be what they were."""
    counts: T.let = T.reinterpret("float32", peak[0]) > T.float32(TINY)
    scale: T.let = e4m3_scale(peak[0])
    up[0] = T.Select(counts, power_of_two(T.uint32(254) - scale), T.float32(0))
    down[0] = power_of_two(scale)


def _rounded(value: Any, down: Any, peak: Any) -> Any:
    """The bits, u32, of an e4m3 · down: of a float32 of at most 448, rounded. NaN's where the
    block's peak is not finite.

    By integers, as compilers may take x + c - c for x.
    """
    bits = T.reinterpret("uint32", value)
    exponent = T.bitwise_and(T.shift_right(bits, T.uint32(23)), T.uint32(0xFF))
    least = T.max(exponent, T.uint32(127 - 6))  # smaller ones are subnormal
    dropped = T.min(T.uint32(20) + (least - exponent), T.uint32(25))
    digits = T.bitwise_or(T.bitwise_and(bits, T.uint32(0x007FFFFF)), T.uint32(0x00800000))
    odd = T.bitwise_and(T.shift_right(digits, dropped), T.uint32(1))
    half = T.shift_left(T.uint32(1), dropped - T.uint32(1)) - T.uint32(1)
    whole = T.Cast("float32", T.shift_right(digits + half + odd, dropped))
    element = whole * power_of_two(least - T.uint32(3))
    magnitude = T.Select(
        peak < T.uint32(_INFINITE), T.reinterpret("uint32", element * down), T.uint32(_NAN)
    )
    return T.bitwise_or(magnitude, T.bitwise_and(bits, T.uint32(0x80000000)))


def _blocks(vectors: bool, arguments: tuple[Tensor, ...], *, k: int) -> tvm.tirx.PrimFunc:
    """One item is one block of 32, in `vectors` or one after the other."""
    each = T.vectorized if vectors else T.serial

    @T.inline
    def body(n, x, bits):
        for t, c in T.grid(n, k // BLOCK):
            with T.sblock("item"):
                vt, vc = T.axis.remap("SS", [t, c])
                all = T.sblock_alloc_buffer((BLOCK,), "float32", scope="local")
                peak = T.sblock_alloc_buffer((1,), "uint32", scope="local")
                up = T.sblock_alloc_buffer((1,), "float32", scope="local")
                down = T.sblock_alloc_buffer((1,), "float32", scope="local")
                for i in each(BLOCK):
                    all[i] = x[vt, vc * BLOCK + i]
                peak[0] = T.uint32(0)
                _peak(all, BLOCK, peak)
                _scales(peak, up, down)
                for i in each(BLOCK):
                    value: T.let = all[i] * up[0]
                    bits[vt, vc * BLOCK + i] = T.Cast(
                        "uint16", T.shift_right(_rounded(value, down[0], peak[0]), T.uint32(16))
                    )

    return prim_func(arguments, body)


def _lanes(arguments: tuple[Tensor, ...], *, k: int) -> tvm.tirx.PrimFunc:
    """A lane has four inputs: eight lanes share a block of 32."""
    quads = k // 4

    @T.inline
    def round_quad(t, at, n, x, bits):
        four = T.sblock_alloc_buffer((4,), "float32", scope="local")
        peak = T.sblock_alloc_buffer((1,), "uint32", scope="local")
        up = T.sblock_alloc_buffer((1,), "float32", scope="local")
        down = T.sblock_alloc_buffer((1,), "float32", scope="local")
        pairs = T.sblock_alloc_buffer((2,), "uint32", scope="local")
        words = T.decl_buffer((n, k // 2), "uint32", data=bits.data)
        peak[0] = T.uint32(0)
        if t < n:
            four[T.ramp(0, 1, 4)] = x[t, T.ramp(at, 1, 4)]
            _peak(four, 4, peak)
        for i in T.unroll(3):
            peak[0] = T.max(peak[0], shared_with(peak[0], 1 << i))
        _scales(peak, up, down)
        if t < n:
            for i in T.unroll(2):
                low: T.let = _rounded(four[2 * i] * up[0], down[0], peak[0])
                high: T.let = _rounded(four[2 * i + 1] * up[0], down[0], peak[0])
                pairs[i] = T.bitwise_or(
                    T.shift_right(low, T.uint32(16)), T.bitwise_and(high, T.uint32(0xFFFF0000))
                )
            words[t, T.ramp(at // 2, 1, 2)] = pairs[T.ramp(0, 1, 2)]

    @T.inline
    def body(n, x, bits):
        for block in T.thread_binding(T.ceildiv(n * quads, THREADS), thread="blockIdx.x"):
            for thread in T.thread_binding(THREADS, thread="threadIdx.x"):
                with T.sblock("quad"):
                    vb, tx = T.axis.remap("SS", [block, thread])
                    T.reads(x[0:n, 0:k])
                    T.writes(bits[0:n, 0:k])
                    item: T.let = vb * THREADS + tx
                    round_quad(item // quads, item % quads * 4, n, x, bits)

    return prim_func(arguments, body)


def _case(name: str, n: int, k: int, extremes: bool = False) -> Case:
    def inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
        x = rng.standard_normal((n, k), dtype=np.float32)
        if extremes:
            x[:, BLOCK:] *= 2.0 ** rng.integers(-40, 40, (n, k - BLOCK)).astype(np.float32)
            x[0, :8] = 448, 449, 447, 17, 19, 2**-7, 3 * 2**-10, 2**-10  # ties among them
            x[1, :BLOCK] *= np.float32(1e-32)
            x[2, 3], x[2, BLOCK + 3], x[3, 5] = np.inf, np.nan, 3e38
            x[4, :BLOCK] = 223.99 / 448
            x[4, 0] = 224.01
        return {"x": x}

    return Case(name, {"k": k}, inputs, flops=n * k, bytes=6 * n * k)


CASES = (
    _case("one block", 1, 32),
    _case("ties, peaks of all sizes, none that is finite", 6, 96, extremes=True),
    _case("20b hidden", 4, 2880),
)

ROUND_MXFP8 = Kernel(
    NAME,
    signature,
    round_ref,
    CASES,
    (
        items_in_parallel(partial(_blocks, True)),
        Schedule("eight lanes a block", gpu("cuda", "sm_80"), _lanes),
        one_thread_an_item(partial(_blocks, False)),
    ),
)

MXFP8 = ACTIVATIONS.add(
    ActivationFormat(
        "mxfp8",
        "mxfp8",
        parts=lambda k: (("", k, "uint16"),),
        quantize=round_ref,
        values=widen,
        kernel=ROUND_MXFP8,
        multiplied_as=BF16.name,
    )
)
