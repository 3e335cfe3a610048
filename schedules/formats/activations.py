"""Formats of activations: how the f32 inputs of a product reach it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..kernel import Kernel, Size, Tensor
from .table import FormatTable


@dataclass(frozen=True, eq=False)
class ActivationFormat:
    """How x f32 [n, k] is passed to the kernels that multiply it.

    parts(k): of each tensor that x becomes, what is added to x's name, the size of its second
        axis, and its dtype
    quantize(x): these tensors
    values(*tensors): what they stand for, [n, k] or, where k is odd, with a zero behind it
    kernel: computes `quantize` from x, with k as its only static argument; None for x itself
    put(value): what the f32 expression becomes, where k is even; None where a number does not
        become one by itself, but with its neighbours
    multiplied_as: the name of another format that its tensors are of too, whose products take them;
        None where it has its own
    """

    name: str
    option: str | None
    parts: Callable[[int], tuple[tuple[str, int, str], ...]]
    quantize: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    values: Callable[..., np.ndarray]
    kernel: Kernel | None
    put: Callable[[Any], Any] | None = None
    multiplied_as: str | None = None

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """What has to run before a product."""
        return () if self.kernel is None else (self.kernel,)

    @property
    def product(self) -> str:
        """The name of the format whose products take its tensors."""
        return self.multiplied_as or self.name

    @property
    def results(self) -> ActivationFormat:
        """In which a kernel writes what another takes in this format: f32 where `kernel` comes
        between them."""
        return F32 if self.put is None else self

    def tensors(self, name: str, n: int | Size, k: int) -> tuple[Tensor, ...]:
        """The arguments that x called `name` becomes."""
        return tuple(
            Tensor(name + suffix, (n, size), dtype) for suffix, size, dtype in self.parts(k)
        )

    def arrays(self, name: str, x: np.ndarray) -> dict[str, np.ndarray]:
        """x f32 [n, k] as these arguments."""
        tensors = self.tensors(name, *x.shape)
        return {t.name: part for t, part in zip(tensors, self.quantize(x), strict=True)}

    def result(self, x: np.ndarray) -> np.ndarray:
        """float64: what a reference returns for a result x in this format, which is one of
        `results`."""
        return np.asarray(self.values(*self.quantize(x)), np.float64)

    def taken(self, name: str, k: int, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        """float64 [n, k]: what x called `name` is among these arguments."""
        parts = [arrays[tensor.name] for tensor in self.tensors(name, 0, k)]
        return np.asarray(self.values(*parts)[:, :k], np.float64)


ACTIVATIONS: FormatTable[ActivationFormat] = FormatTable("activation")

F32 = ACTIVATIONS.add(
    ActivationFormat(
        "f32",
        "f32",
        parts=lambda k: (("", k, "float32"),),
        quantize=lambda x: (x,),
        values=lambda x: x,
        kernel=None,
        put=lambda value: value,
    )
)
