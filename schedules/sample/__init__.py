"""From logits to a token: edits of the logits, the draw, log-probabilities."""

from __future__ import annotations

from .adjust_logits import ADJUST_LOGITS
from .sample_token import SAMPLE_TOKEN
from .token_logprobs import TOKEN_LOGPROBS

__all__ = ["ADJUST_LOGITS", "SAMPLE_TOKEN", "TOKEN_LOGPROBS"]
