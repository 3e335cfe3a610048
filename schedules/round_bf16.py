"""Round activations to the nearest bfloat16, ties to even.

    x f32 [n, k] -> bits u16 [n, width], the width being k, or k + 1 where k is odd

Products take neighbours in pairs (cpu/bf16.py): behind an odd number of them stands a zero. Kernels
whose results are taken so round them themselves: this one is for what no such kernel makes.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import tvm

from .cpu.items import items_in_parallel
from .formats.activations import ACTIVATIONS, ActivationFormat
from .formats.bf16 import rounded
from .gpu.items import one_thread_an_item
from .kernel import Case, Kernel, Signature, Size, T, Tensor, f32, prim_func

NAME = "f32_round_bf16"
CHUNK = 32  # inputs of a work item


def width(k: int) -> int:
    """k, made even."""
    return k + k % 2


def round_ref(x: np.ndarray, **_static: Any) -> tuple[np.ndarray]:
    """The module's formula."""
    bits = x.astype(ml_dtypes.bfloat16).view(np.uint16)
    return (np.pad(bits, ((0, 0), (0, width(x.shape[1]) - x.shape[1]))),)


def widen(bits: np.ndarray) -> np.ndarray:
    """bfloat16 of these bits."""
    return bits.view(ml_dtypes.bfloat16)


def signature(*, k: int) -> Signature:
    n = Size("n")
    return Signature((f32("x", n, k),), (Tensor("bits", (n, width(k)), "uint16"),))


def _chunks(arguments: tuple[Tensor, ...], *, k: int) -> tvm.tirx.PrimFunc:
    """One item is CHUNK inputs, the last one of a row what is left."""

    @T.inline
    def body(n, x, bits):
        for t, c in T.grid(n, -(-k // CHUNK)):
            with T.sblock("item"):
                vt, vc = T.axis.remap("SS", [t, c])
                if vc < k // CHUNK:
                    for i in T.vectorized(CHUNK):
                        bits[vt, vc * CHUNK + i] = rounded(x[vt, vc * CHUNK + i])
                else:
                    for i in T.serial(k % CHUNK):
                        bits[vt, vc * CHUNK + i] = rounded(x[vt, vc * CHUNK + i])
                    for i in T.serial(k % 2):
                        bits[vt, k + i] = T.uint16(0)

    return prim_func(arguments, body)


def _elements(arguments: tuple[Tensor, ...], *, k: int) -> tvm.tirx.PrimFunc:
    """One item is one of a row's bits."""

    @T.inline
    def body(n, x, bits):
        for t, i in T.grid(n, width(k)):
            with T.sblock("item"):
                vt, vi = T.axis.remap("SS", [t, i])
                if vi < k:
                    bits[vt, vi] = rounded(x[vt, vi])
                else:
                    bits[vt, vi] = T.uint16(0)

    return prim_func(arguments, body)


def _case(name: str, n: int, k: int, extremes: bool = False) -> Case:
    def inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
        x = rng.standard_normal((n, k), dtype=np.float32)
        if extremes:
            below, tie, above = 0x3F807FFF, 0x3F808000, 0x3F808001
            odd_tie, largest, denormal = 0x3F818000, 0x7F7FFFFF, 0x00018001
            bits = np.array([below, tie, above, odd_tie, largest, denormal], np.uint32)
            x[0, :6], x[1, :6] = bits.view(np.float32), (bits | 0x80000000).view(np.float32)
            x[2, :4] = np.inf, -np.inf, np.nan, -0.0
        return {"x": x}

    return Case(name, {"k": k}, inputs, flops=n * k, bytes=6 * n * k)


CASES = (
    _case("one input", 1, 1),
    _case("ties, infinities, denormals", 3, 48, extremes=True),
    _case("an odd number of inputs, less than a chunk left", 5, 97),
    _case("20b hidden", 4, 2880),
)

ROUND_BF16 = Kernel(
    NAME,
    signature,
    round_ref,
    CASES,
    (items_in_parallel(_chunks), one_thread_an_item(_elements)),
)

BF16 = ACTIVATIONS.add(
    ActivationFormat(
        "bf16",
        "bf16",
        parts=lambda k: (("", width(k), "uint16"),),
        quantize=round_ref,
        values=widen,
        kernel=ROUND_BF16,
        put=rounded,
    )
)
