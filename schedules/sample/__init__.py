"""From logits to a token, and to the next step: edits, the draw, log-probabilities."""

from __future__ import annotations

from .adjust_logits import ADJUST_LOGITS
from .next_tokens import NEXT_TOKENS
from .sample_token import SAMPLE_TOKEN
from .token_logprobs import TOKEN_LOGPROBS

__all__ = ["ADJUST_LOGITS", "NEXT_TOKENS", "SAMPLE_TOKEN", "TOKEN_LOGPROBS"]
