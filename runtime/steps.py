"""Sequences of a model, and steps of them: what a worker needs of whatever runs a model.

A step takes the next tokens of some sequences, computes them together, and draws a token after some
of them:

    sequence, known = model.create(prompt)       what a kept prefix has need not be computed
    model.submit([Part(sequence, prompt[known:], draw=draw)])
    (result,) = model.wait()
    model.submit([Part(sequence, [result.token], draw=draw)])
    model.wait()
    model.keep(sequence)                         for later prompts that begin alike
    model.free(sequence)

A step can be submitted while the one before it runs; then the tokens of its parts are None: what is
being drawn, which only the device knows yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from .results import TokenLogprob
from .sampling import SamplingParams


@dataclass(frozen=True, eq=False)
class Draw:
    """How the tokens of a sequence are drawn, from its first to its last.

    `seed` is that of the whole answer. Which tokens are allowed is told with each part.
    """

    params: SamplingParams
    seed: int


@dataclass(slots=True)
class Part:
    """What one sequence contributes to a step: its next tokens, or None for the one drawn last.

    logits  of so many of the last ones the logits are wanted
    draw    or a token is drawn after the last one; the same object in every step of a sequence
    mask    for this draw: uint32 [ceil(vocabulary / 32)], bit t % 32 of word t // 32 allows
            token t; None: all are allowed
    """

    sequence: int
    tokens: Sequence[int] | None
    logits: int = 0
    draw: Draw | None = None
    mask: np.ndarray | None = None


@dataclass(slots=True)
class Result:
    """What came of a part.

    token    what was drawn; -1 where the logits hold nothing to choose by
    logprob  of it, and of the likeliest, where the part asked for them
    logits   f32 [logits, vocabulary]
    """

    token: int = -1
    logprob: TokenLogprob | None = None
    logits: np.ndarray | None = None


class Sequences(Protocol):
    """The sequences of one model on its device; for one thread.

    A sequence is a number that is never 0, and never used twice. Those of a step that was not
    awaited yet cannot be forked, kept or freed.

    runs_behind   a step runs while its submission has returned, so that another one can be
                  submitted meanwhile
    """

    runs_behind: bool

    def create(self, tokens: Sequence[int]) -> tuple[int, int]:
        """A sequence that begins with a prompt, and how many of its tokens are known already.

        The last one always has to be computed, for its logits. Without tokens nothing is known.
        """
        ...

    def fork(self, sequence: int) -> int:
        """A second sequence with the same past and its own future."""
        ...

    def pretend(self, sequence: int, tokens: Sequence[int]) -> None:
        """Let the next tokens count as computed, with copies of what is known in their place.

        So a benchmark stands far into a context at once. What is known must fill whole pages;
        an error otherwise.
        """
        ...

    def keep(self, sequence: int) -> None:
        """Keep what is computed, for later prompts that begin alike, while memory lasts."""
        ...

    def free(self, sequence: int) -> None:
        """Give up what it holds."""
        ...

    def submit(self, parts: Sequence[Part]) -> None:
        """Begin a step of parts, each of another sequence; a second one before the first is
        awaited, but no third.

        Raises KVMemoryError where there is no room for it; then no part was computed.
        """
        ...

    def wait(self) -> list[Result]:
        """Wait for the oldest step; a result for each of its parts."""
        ...

    def synchronize(self) -> None:
        """Wait for the device; raises what went wrong on it."""
        ...

    def close(self) -> None:
        """Free all memory; of no use afterwards."""
        ...

    def forsake(self) -> None:
        """Close it where its device was lost."""
        ...
