"""Formats of dense weights: attention's projections and the output layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from ..kernel import Kernel, Tensor
from .activations import ActivationFormat
from .table import FormatTable


@dataclass(frozen=True)
class Part:
    """One tensor of a weight [rows, k].

    suffix: what is added to the weight's name
    fill(k): the random content that keeps outputs near 1 (see `runtime/native/core/weights.cc`)
    per: inputs that share one of its elements
    """

    suffix: str
    dtype: str
    fill: Callable[[int], dict[str, Any]]
    per: int = 1


@dataclass(frozen=True, eq=False)
class DenseWeight:
    """How a weight [rows, k], bf16 in checkpoints, is kept.

    parts: the tensors that it becomes
    quantize(weight): these tensors, of any number of rows
    values(*tensors): float64 [rows, k] that they stand for
    multiple: k must be one of it
    """

    parts: tuple[Part, ...]
    quantize: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    values: Callable[..., np.ndarray]
    multiple: int = 1

    def tensors(self, name: str, rows: int, k: int) -> tuple[Tensor, ...]:
        """The arguments that the weight called `name` becomes."""
        return tuple(Tensor(name + p.suffix, (rows, k // p.per), p.dtype) for p in self.parts)


@dataclass(frozen=True, eq=False)
class DenseFormat:
    """How dense layers are kept and computed.

    kernel: reads `weight` and inputs in the format `inputs` (see `linear.linear_kernel`)
    """

    name: str
    option: str | None
    weight: DenseWeight
    inputs: ActivationFormat
    kernel: Kernel


DENSE: FormatTable[DenseFormat] = FormatTable("dense weight")


def _as_bf16(weight: np.ndarray) -> tuple[np.ndarray]:
    return (weight.astype(ml_dtypes.bfloat16, copy=False),)


BF16_WEIGHT = DenseWeight(
    parts=(Part("", "bfloat16", lambda k: {"normal": k**-0.5}),),
    quantize=_as_bf16,
    values=lambda weight: weight.astype(np.float64),
)
