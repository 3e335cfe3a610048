"""A worker step by step, without a model: requests, and what came of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mxforge.requests import Request, Submissions
from mxforge.sampling import SamplingParams
from mxforge.scheduler import Worker

from .sequences import VOCAB, ScriptedSequences


def make_worker(
    max_batch: int = 3,
    prefill_chunk: int = 8,
    mixed_chunk: int | None = None,
    max_waiting: int = 1000,
    model: ScriptedSequences | None = None,
) -> tuple[Worker, ScriptedSequences]:
    model = model or ScriptedSequences()
    worker = Worker(
        lambda: model,
        Submissions(max_batch, max_waiting),
        target="cpu:best",
        vocab_size=VOCAB,
        max_batch=max_batch,
        prefill_chunk=prefill_chunk,
        mixed_chunk=mixed_chunk or prefill_chunk,
    )
    worker._open()
    return worker, model


def request(tokens: Sequence[int], max_tokens: int = 5, **others: Any) -> Request:
    names = ("priority", "index", "inbox", "stops", "made_up")
    known = {name: others.pop(name) for name in names if name in others}
    params = SamplingParams(**others)
    return Request(tokens=list(tokens), params=params, max_tokens=max_tokens, **known)


def answers(tokens: Sequence[int], count: int, max_tokens: int = 5) -> list[Request]:
    """Several answers to one prompt."""
    made = [request(tokens, max_tokens, index=index) for index in range(count)]
    for one in made:
        one.first = made[0]
    return made


def logits_request(count: int) -> Request:
    return Request(tokens=list(range(count)), params=None)


def submit(worker: Worker, *requests: Request) -> None:
    worker._submissions.submit(requests)
    worker._receive()


def received(one: Request) -> list[Any]:
    items = []
    while not one.inbox.empty():
        items.append(one.inbox.get())
    return items


def run(worker: Worker, most: int = 1000) -> int:
    """Steps until nothing runs or waits."""
    for step in range(most):
        if not worker._running and not worker._waiting and not worker._steps:
            return step
        worker._step()
    raise AssertionError("it does not end")


def told(one: Request) -> list[int]:
    return [token for piece in received(one) for token in piece.token_ids]
