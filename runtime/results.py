"""What the engine answers with: pieces of a stream, whole completions, their counts and times."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Usage:
    """Tokens of one request; `cached_tokens` of the prompt were computed for an earlier one."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


@dataclass(frozen=True)
class Timings:
    """Seconds of one request, and output tokens a second after the first."""

    queue_s: float
    prefill_s: float
    decode_s: float
    decode_tok_s: float


@dataclass(frozen=True)
class TokenLogprob:
    """Natural log-probability of a chosen token, and the most likely ones, of the raw logits."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Piece:
    """What a step added to a request. The last piece has a finish reason.

    finish_reason is "stop" (a stop id or stop string), "length" (max_tokens, or the context is
    full) or "cancelled".
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    usage: Usage | None = None
    timings: Timings | None = None


@dataclass(frozen=True)
class Completion:
    """A whole answer. `token_ids` hold everything generated, the stop token included; `text` is
    without it. `logprobs` is None if they were not requested."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    usage: Usage
    timings: Timings
    logprobs: tuple[TokenLogprob, ...] | None = None
