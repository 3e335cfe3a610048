"""What the kernels over rows of logits share: which rows have a distribution, case data.

Logits are compared by their keys (math.order_key).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..kernel import T
from ..math import KEY_MINUS_INF, KEY_PLUS_INF

TOP = 20  # log-probabilities listed a row


def usable(largest: Any, smallest: Any) -> Any:
    """Whether a row has neither NaN nor +inf and something above -inf, by its extreme keys."""
    return T.And(T.And(largest < KEY_PLUS_INF, largest > KEY_MINUS_INF), smallest >= KEY_MINUS_INF)


def random_logits(rng: np.random.Generator, m: int, vocab: int, spike: float = 4.0) -> np.ndarray:
    return rng.standard_normal((m, vocab), dtype=np.float32) * np.float32(spike)


def tie_logits(logits: np.ndarray) -> None:
    """Make many logits equal, with zeros of both signs."""
    np.rint(logits, out=logits)
    logits[logits == 0] = -0.0
    logits[:, ::2] += 0.0  # half of the zeros become +0


def spoil_logits(logits: np.ndarray) -> None:
    """Rows of every kind that has no distribution, and some with much at -inf."""
    logits[0, 3] = np.nan
    logits[1, 3] = -np.nan
    logits[2, 3] = np.inf
    logits[3] = -np.inf
    logits[4:7, 1:] = -np.inf
    logits[7, ::2] = -np.inf
    logits[8] = np.nan
