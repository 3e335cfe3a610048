"""Held-out questions for nano: asking them, and how far two compiled models' predictions differ."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from nano.dialogue import Renderer, Setting, held_out_questions, noise_ids
from nano.text import CATEGORIES, Exchange

Generate = Callable[[list[int]], list[int]]  # prompt -> new ids, without what ended them


class Case:
    """A question as ids, and what is expected after it."""

    def __init__(
        self, renderer: Renderer, setting: Setting, exchange: Exchange, noise: Callable[[], int]
    ) -> None:
        self.renderer, self.setting, self.exchange = renderer, setting, exchange
        self.prefix = renderer.prefix(setting)
        self.question = renderer.question(exchange, noise)

    def dialogue(self) -> tuple[list[int], list[bool]]:
        """What follows the prefix when all goes well, and which ids are the model's."""
        r, e = self.renderer, self.exchange
        parts = [(self.question, False), (r.thinking(e.thinking[self.setting.effort]), True)]
        if e.call is not None:
            parts += [(r.calling(e.call.expression), True), (r.result(e.call.result), False)]
        parts.append((r.answer(e.answer, True), True))
        ids = [token for part, _ in parts for token in part]
        return ids, [on for part, on in parts for _ in part]

    def ask(self, generate: Generate) -> bool:
        """Whether the answer is right, through as many turns as it takes."""
        r, e = self.renderer, self.exchange
        prompt = [*self.prefix, *self.question]
        new = generate(prompt)
        if e.call is not None:
            call = r.calling(e.call.expression)[:-1]
            if new[-len(call) :] != call:
                return False
            prompt = [*prompt, *new, r.call, *r.result(e.call.result)]
            new = generate(prompt)
        answer = r.answer(e.answer, True)[:-1]
        return new[-len(answer) :] == answer


def cases(renderer: Renderer, count: int, used: frozenset[int]) -> dict[str, list[Case]]:
    return {
        category: [
            Case(renderer, setting, exchange, noise_ids(random.Random(f"{category} {i}"), used))
            for i, (setting, exchange) in enumerate(held_out_questions(category, count, seed=1))
        ]
        for category in CATEGORIES
    }


def mean_divergence(exact: Any, other: Any, asked: Iterable[Case]) -> float:
    """Mean KL(exact ‖ other) in nats of the next token, over the dialogues of cases.

    exact, other: engines of the same weights.
    """
    total, count = np.float64(0), 0
    for case in asked:
        tokens = [*case.prefix, *case.dialogue()[0]]
        total += divergence(exact.logits(tokens), other.logits(tokens)).sum()
        count += len(tokens)
    return float(total / count)


def divergence(exact: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(exact ‖ other) in nats, [n], of logits f32 [n, vocab]."""
    p, q = _log_softmax(exact), _log_softmax(other)
    kl: np.ndarray = (np.exp(p) * (p - q)).sum(axis=-1)
    return kl


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """f32 [n, vocab] -> float64, of the same shape."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
