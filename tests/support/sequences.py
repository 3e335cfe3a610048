"""Sequences without a model, and sequences of which a test changes something."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mxforge.steps import Part, Result, Sequences

VOCAB = 50


def following(tokens: Sequence[int]) -> int:
    """What `ScriptedSequences` draw after these tokens: any other past, another token."""
    past = 0
    for token in tokens:
        past = (past * 31 + token + 1) % 1_000_003
    return past % VOCAB


def continued(tokens: Sequence[int], count: int) -> list[int]:
    """The answer of `count` tokens that `ScriptedSequences` give to these."""
    all_ = list(tokens)
    for _ in range(count):
        all_.append(following(all_))
    return all_[len(tokens) :]


class ScriptedSequences:
    """Sequences that note each step, and draw what `following` says of all tokens before.

    The logits after a token are that token, again and again.

    steps   the parts of each, and sizes their tokens
    most    steps that were submitted at once
    """

    runs_behind = False

    def __init__(self, following: Callable[[Sequence[int]], int] = following) -> None:
        self.following = following
        self.sizes: list[list[int]] = []
        self.most = 0
        self._submitted: deque[tuple[Sequence[Part], list[Result]]] = deque()
        self._drawn: dict[int, int] = {}
        self.tokens: dict[int, list[int]] = {}  # that are computed, of each sequence
        self.kept: list[list[int]] = []
        self.steps: list[list[Part]] = []
        self.forks: list[tuple[int, int]] = []
        self.closed = False
        self._last = 0

    def create(self, tokens: Sequence[int]) -> tuple[int, int]:
        known: list[int] = []
        for kept in self.kept:
            same = 0
            for one, other in zip(kept, tokens[:-1], strict=False):
                if one != other:
                    break
                same += 1
            known = max(known, list(tokens[:same]), key=len)
        return self._new(known), len(known)

    def fork(self, sequence: int) -> int:
        self._check_awaited(sequence)
        fork = self._new(self.tokens[sequence])
        self.forks.append((sequence, fork))
        return fork

    def pretend(self, sequence: int, tokens: Sequence[int]) -> None:
        self.tokens[sequence] += tokens

    def keep(self, sequence: int) -> None:
        self._check_awaited(sequence)
        self.kept.append(list(self.tokens[sequence]))

    def free(self, sequence: int) -> None:
        self._check_awaited(sequence)
        del self.tokens[sequence]

    def submit(self, parts: Sequence[Part]) -> None:
        assert len(self._submitted) < 2
        self._submitted.append((parts, self.step(parts)))
        self.most = max(self.most, len(self._submitted))

    def wait(self) -> list[Result]:
        return self._submitted.popleft()[1]

    def step(self, parts: Sequence[Part]) -> list[Result]:
        assert len({part.sequence for part in parts}) == len(parts)
        self.steps.append(list(parts))
        self.sizes.append([1 if part.tokens is None else len(part.tokens) for part in parts])
        return [self._result(part) for part in parts]

    def synchronize(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    forsake = close

    def _new(self, tokens: Sequence[int]) -> int:
        self._last += 1
        self.tokens[self._last] = list(tokens)
        return self._last

    def _check_awaited(self, sequence: int) -> None:
        for parts, _ in self._submitted:
            assert all(part.sequence != sequence for part in parts), "its step was not awaited"

    def _result(self, part: Part) -> Result:
        tokens = self.tokens[part.sequence]
        new = [self._drawn.pop(part.sequence)] if part.tokens is None else part.tokens
        assert len(new) > 0
        assert not (part.draw and part.logits)
        tokens += new
        if part.draw is not None:
            self._drawn[part.sequence] = self.following(tokens)
            return Result(self._drawn[part.sequence])
        if part.logits:
            rows = np.repeat(tokens[-part.logits :], VOCAB).reshape(-1, VOCAB)
            return Result(logits=rows.astype(np.float32))
        return Result()


class Watched:
    """A model's sequences: which are not free yet, and a place for tests to change steps.

    alter   what a step gives instead: called with the parts, and a function that runs them
    """

    def __init__(self, inner: Sequences) -> None:
        self.inner = inner
        self.open: set[int] = set()
        self._submitted: deque[Sequence[Part]] = deque()
        self.closed = False
        self.ahead = 0  # steps that were submitted while another ran
        self.alter: Callable[[Sequence[Part], Callable[..., list[Result]]], list[Result]] = (
            lambda parts, step: step(parts)
        )

    def create(self, tokens: Sequence[int]) -> tuple[int, int]:
        made, known = self.inner.create(tokens)
        self.open.add(made)
        return made, known

    def fork(self, sequence: int) -> int:
        made = self.inner.fork(sequence)
        self.open.add(made)
        return made

    def free(self, sequence: int) -> None:
        self.inner.free(sequence)
        self.open.remove(sequence)

    def submit(self, parts: Sequence[Part]) -> None:
        self.inner.submit(parts)
        self._submitted.append(parts)
        self.ahead += len(self._submitted) - 1

    def wait(self) -> list[Result]:
        results = self.inner.wait()
        return self.alter(self._submitted.popleft(), lambda _: results)

    def close(self) -> None:
        self.inner.close()
        self.closed = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)
