"""What transformers said about the random checkpoints of odd shapes (see make_golden)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest

GOLDEN = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Golden:
    """Outputs of GptOssForCausalLM in float32 on one random checkpoint.

    tokens i32 [n]; rows i32 [m]: the positions that the next two hold; logits f32 [m, V];
    layer_inputs f32 [L, m, H]: the residual stream before each layer; norms f32 [n] of the logits
    and argmax i32 [n] for all positions; about: seed, checkpoint_sha256, versions.
    """

    about: dict[str, str | int]
    tokens: np.ndarray
    rows: np.ndarray
    logits: np.ndarray
    layer_inputs: np.ndarray
    norms: np.ndarray
    argmax: np.ndarray


@cache
def load_golden(name: str) -> Golden:
    with np.load(GOLDEN / f"{name}.npz") as stored:
        arrays = dict(stored)
    return Golden(json.loads(str(arrays.pop("about"))), **arrays)


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Golden]:
    """golden(shape) -> Golden"""
    return load_golden
