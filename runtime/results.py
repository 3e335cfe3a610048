"""What the engine answers with: pieces of a stream, whole completions, their counts and times."""

from __future__ import annotations

from collections.abc import Mapping
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
    full) or "cancelled". `index` tells which answer it belongs to, where several were asked for.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    index: int = 0


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


@dataclass(frozen=True)
class Metrics:
    """What an engine has done since it was loaded: counts that only grow, but for the first two.

    An answer counts as a request: several answers of one prompt are several.

    running, waiting        requests now
    refused                 that found the queue full
    finished                ended requests by reason: "stop", "length", "cancelled" and "error"
    prompt_tokens           of requests that began to run; cached_tokens of these were not computed
    generated_tokens        that were drawn
    steps, step_s           steps, and the seconds in them
    queue_s                 from submission until a request began to run, summed over requests
    prefill_s               from then to its first token, summed
    decode_s                from then to its last, of those that ended, summed
    """

    running: int
    waiting: int
    refused: int
    finished: Mapping[str, int]
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    steps: int
    step_s: float
    queue_s: float
    prefill_s: float
    decode_s: float
