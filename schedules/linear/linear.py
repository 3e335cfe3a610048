"""What all dense layers share: y = x·Wᵀ (+ bias) (+ residual).

    x [n, k] as the format of the activations says, f32 [n, k] otherwise
    W [rows, k] as the format of the weight says, bf16 otherwise
    bias f32 [rows]   residual f32 [n, rows]   y f32 [n, rows]

Roofline of decoding: the weight's bytes a step, whatever n is.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from ..formats.activations import ActivationFormat
from ..formats.dense import DenseWeight
from ..kernel import Case, Kernel, Schedule, Signature, Size, T, f32


def linear_kernel(
    name: str,
    weight: DenseWeight,
    inputs: ActivationFormat,
    schedules: tuple[Schedule, ...],
    extra_cases: tuple[Case, ...] = (),
) -> Kernel:
    """The dense layer of a weight in one format and inputs in another.

    Its static arguments are rows, k, with_bias and with_residual. A schedule's `build` gets the
    arguments x…, weight…, [bias], [residual], y, where … are the tensors of both formats.
    """
    return Kernel(
        name,
        partial(signature, weight, inputs),
        partial(linear_ref, weight, inputs),
        (*_cases(weight, inputs), *extra_cases),
        schedules,
    )


def signature(
    weight: DenseWeight,
    inputs: ActivationFormat,
    *,
    rows: int,
    k: int,
    with_bias: bool = False,
    with_residual: bool = False,
) -> Signature:
    n = Size("n")
    return Signature(
        (
            *inputs.tensors("x", n, k),
            *weight.tensors("weight", rows, k),
            *((f32("bias", rows),) if with_bias else ()),
            *((f32("residual", n, rows),) if with_residual else ()),
        ),
        (f32("y", n, rows),),
    )


def linear_ref(
    weight: DenseWeight,
    inputs: ActivationFormat,
    /,
    *,
    rows: int,
    k: int,
    bias: np.ndarray | None = None,
    residual: np.ndarray | None = None,
    **arrays: Any,
) -> tuple[np.ndarray]:
    """y = x·Wᵀ + bias + residual in float64, of what x and W stand for."""
    parts = [arrays[tensor.name] for tensor in weight.tensors("weight", rows, k)]
    y = inputs.taken("x", k, arrays) @ weight.values(*parts).T
    if bias is not None:
        y = y + bias
    if residual is not None:
        y = y + residual
    return (y,)


def plus_options(product: Any, bias: Any, residual: Any, token: Any, row: Any) -> Any:
    """An element of y: its product with the bias and the residual, where there are such."""
    zero = T.float32(0)
    with_bias = product + (zero if bias is None else bias[row])
    return with_bias + (zero if residual is None else residual[token, row])


def case(
    weight: DenseWeight,
    inputs: ActivationFormat,
    name: str,
    n: int,
    rows: int,
    k: int,
    bias: bool = False,
    residual: bool = False,
    spike: int = 1,
    size: float = 1,
) -> Case:
    """One case; `spike` scales an input channel, `size` all weights."""

    def arrays(rng: np.random.Generator) -> dict[str, np.ndarray]:
        x = rng.standard_normal((n, k), dtype=np.float32)
        x[:, k // 2] *= spike
        w = rng.standard_normal((rows, k), dtype=np.float32) * np.float32(size)
        if rows > 1:
            w[0, :32] = 0  # a block without a scale, where weights have one
        parts = weight.quantize(w.astype(ml_dtypes.bfloat16))
        made = inputs.arrays("x", x)
        made |= {t.name: p for t, p in zip(weight.tensors("weight", rows, k), parts, strict=True)}
        if bias:
            made["bias"] = rng.standard_normal(rows, dtype=np.float32)
        if residual:
            made["residual"] = rng.standard_normal((n, rows), dtype=np.float32)
        return made

    static = {"rows": rows, "k": k, "with_bias": bias, "with_residual": residual}
    tensors = (*weight.tensors("weight", rows, k), *inputs.tensors("x", n, k))
    return Case(
        name,
        static,
        arrays,
        flops=2 * n * rows * k,
        bytes=sum(tensor.nbytes for tensor in tensors) + 4 * n * rows,
    )


def _cases(weight: DenseWeight, inputs: ActivationFormat) -> tuple[Case, ...]:
    of = partial(case, weight, inputs)
    return (
        of("one token, partial rows", 1, 72, 96),
        of("tokens not a multiple of the tile", 7, 128, 160, bias=True),
        of("one row", 3, 1, 32, residual=True),
        of("17 tokens, a row more than fills tiles", 17, 37, 224, residual=True),
        of("one channel 1000 times the others", 5, 200, 96, bias=True, residual=True, spike=1000),
        of("two tokens, more inputs than a block has in flight", 2, 24, 4256, bias=True),
        of("17 tokens, more inputs than a block has in flight", 17, 40, 2144, residual=True),
        of("17 tokens, an odd number of tiles of rows", 17, 4232, 64),
        of("three tokens, an odd number of tiles of rows", 3, 4232, 64, bias=True),
        of("two tokens, many rows, more inputs than a block has in flight", 2, 4232, 1312),
        of("200 tokens, partial rows, half a step", 200, 72, 288, bias=True),
        of("130 tokens, one block of inputs", 130, 40, 32, residual=True),
        of("large, 130 tokens", 130, 22_500, 32, bias=True),
        of("20b attention output, one token", 1, 2880, 4096, bias=True, residual=True),
    )
