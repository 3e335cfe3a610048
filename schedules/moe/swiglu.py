"""SwiGLU as gpt-oss has it: gate · σ(1.702·gate) · (up + 1), of clamped gate and up."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..kernel import T
from ..math import sigmoid_f32

ALPHA = 1.702


def swiglu_ref(gate: np.ndarray, up: np.ndarray, limit: float) -> np.ndarray:
    """gate ← min(gate, limit), up ← clamp(up, −limit, limit); then the module's formula."""
    gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit)
    with np.errstate(over="ignore"):
        return gate / (1 + np.exp(-ALPHA * gate)) * (up + 1)


def swiglu(gate: Any, up: Any, limit: float) -> Any:
    gate = T.min(gate, T.float32(limit))
    up = T.max(T.min(up, T.float32(limit)), T.float32(-limit))
    return gate * sigmoid_f32(gate * T.float32(ALPHA)) * (up + T.float32(1))
