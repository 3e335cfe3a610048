"""Calls of every function of a compiled model, with arguments that it may be given."""

from __future__ import annotations

from typing import Any

import ml_dtypes  # noqa: F401 (NumPy's names of bfloat16)
import numpy as np

from mxforge.plan import Function, Symbol, Tensor

PAGES = 20
# Sizes of a call of each function: of one token and of several, with uneven tables.
CALLS: list[tuple[str, dict[str, int]]] = [
    ("forward", {"n": 7, "m": 2, "b": 1, "columns": 2}),
    ("forward", {"n": 60, "m": 60, "b": 3, "columns": 5}),
    ("decode", {"b": 3, "columns": 2}),
    ("decode", {"b": 1, "columns": 7}),
    ("sample", {"m": 3, "e": 2, "g": 1}),
    ("logprobs", {"m": 2}),
    ("next_tokens", {"n": 4, "m": 3}),
    ("kv_copy_pages_sliding", {"c": 3}),
    ("kv_copy_pages_full", {"c": 1}),
    ("embed", {"n": 9}),
    ("layer_sliding", {"n": 5, "b": 1, "columns": 1}),
    ("layer_full", {"n": 5, "b": 1, "columns": 1}),
    ("head", {"n": 4}),
]


def arguments(function: Function, sizes: dict[str, int], vocabulary: int) -> list[np.ndarray]:
    """What a call of these sizes may be given."""
    rng = np.random.default_rng(0)

    def extent(value: int) -> int:
        known = function.values[value]
        if not isinstance(known, Symbol):
            return known.number  # type: ignore[union-attr]
        name = known.name
        named = "columns" if name.endswith("_columns") else name
        return PAGES if name.endswith("pages") else sizes[named]

    def filled(tensor: Tensor) -> np.ndarray:
        shape, name, dtype = tuple(map(extent, tensor.shape)), tensor.name, np.dtype(tensor.dtype)
        if name == "tokens":
            made: Any = rng.integers(0, vocabulary, shape)
        elif name in ("positions", "token_seq"):
            # The tokens of each sequence follow each other.
            each = shape[0] // sizes["b"]
            made = np.arange(shape[0])
            made = made % each if name == "positions" else made // each
        elif name.endswith("_table"):
            made = np.arange(np.prod(shape)).reshape(shape) % PAGES
        elif name in ("source", "destination"):
            made = np.arange(*shape) + (0 if name == "source" else 10)
        elif name.endswith("_row") or name == "mask_row":
            made = np.full(shape, -1)
        elif name.endswith("_first") or name in ("logit_indices", "ids"):
            made = np.zeros(shape)
        elif dtype.name.startswith(("int32", "uint32")):
            made = rng.integers(0, 3, shape)
        elif dtype.itemsize == 1:
            made = rng.integers(118, 124, shape)
        else:
            made = rng.standard_normal(shape) * 0.1
        return np.ascontiguousarray(np.asarray(made).astype(dtype))

    return [filled(tensor) for tensor in function.arguments]
