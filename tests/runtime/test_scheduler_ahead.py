"""The worker on a device that runs behind: steps that are submitted while one runs."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest
from support.sequences import ScriptedSequences, continued
from support.workers import (
    make_worker,
    received,
    request,
    run,
    submit,
    told,
)

# --------------------------------------------------------------------------------- steps ahead


@pytest.fixture
def behind(monkeypatch: pytest.MonkeyPatch) -> ScriptedSequences:
    """Sequences of a device that runs behind: 7 is drawn after any 6 tokens."""
    model = ScriptedSequences(lambda tokens: 7 if len(tokens) == 6 else continued(tokens, 1)[0] + 8)
    monkeypatch.setattr(model, "runs_behind", True, raising=False)
    return model


def test_a_step_is_submitted_while_the_one_before_runs(behind: ScriptedSequences) -> None:
    worker, model = make_worker(model=behind)
    submit(worker, request([1], 9), request([2], 5))
    run(worker)
    assert model.most == 2
    # None is computed in vain where an answer's length is known before.
    assert model.sizes == [[1, 1]] * 5 + [[1]] * 4
    given = [[part.tokens is None for part in step] for step in model.steps]
    assert given == [[False, False]] * 2 + [[True, True]] * 3 + [[True]] * 4
    assert not model.tokens


def test_what_ends_early_is_let_go_after_its_step(behind: ScriptedSequences) -> None:
    worker, model = make_worker(model=behind)
    stops, goes_on = request([1], 50, stops=frozenset([7])), request([2, 3], 9)
    submit(worker, stops, goes_on)
    run(worker)
    answer = told(stops)
    assert len(answer) == 6
    assert answer[-1] == 7
    assert len(told(goes_on)) == 9
    assert sum(map(sum, model.sizes)) == 6 + 1 + 2 + 8  # one of the first in vain
    assert [1, *answer] in model.kept
    assert not model.tokens
    assert worker.metrics().generated_tokens == 15


def test_nothing_is_submitted_ahead_of_what_the_worker_has_to_know(
    behind: ScriptedSequences,
) -> None:
    worker, model = make_worker(model=behind, max_batch=2)
    asked = request([1], 6, bitmask=lambda tokens: None)
    submit(worker, asked)
    run(worker)
    assert model.most == 1
    long = request([1], 30)
    submit(worker, long, request([2], 5))
    for _ in range(3):
        worker._step()
    assert model.most == 2
    late = request([3] * 20, 3)
    submit(worker, late)  # which waits for a place, and gets it at once when there is one
    for _ in range(12):
        worker._step()
    assert len(told(late)) == 3
    assert long in worker._running
    run(worker)
    cancelled = request([4], 30)
    submit(worker, cancelled)
    for _ in range(4):
        worker._step()
    cancelled.abandoned = True
    run(worker, 3)
    assert received(cancelled)[-1].finish_reason == "cancelled"
    assert not model.tokens


@pytest.mark.parametrize("call", ["submit", "wait"])
@pytest.mark.parametrize("number", range(1, 8))
def test_an_error_of_any_step_leaves_none_behind(
    behind: ScriptedSequences, monkeypatch: pytest.MonkeyPatch, call: str, number: int
) -> None:
    worker, model = make_worker(model=behind)
    requests = [request([1], 12), request([2], 6), request([5], 3)]
    healthy, numbers = getattr(model, call), count(1)

    def fail(*parts: Any) -> Any:
        if next(numbers) != number:
            return healthy(*parts)
        if call == "wait":  # a step that failed is over
            healthy()
        raise RuntimeError("the device said no")

    monkeypatch.setattr(model, call, fail)
    submit(worker, *requests)
    for _ in range(30):
        try:
            worker._step()
        except RuntimeError as error:
            worker._fail_all(error)
    assert not worker._running
    assert not worker._steps
    assert not model.tokens
    assert worker._submissions.open == 0
    ends = [received(one)[-1] for one in requests]
    assert any(isinstance(end, RuntimeError) for end in ends)
