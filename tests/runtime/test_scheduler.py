"""The worker step by step, with sequences that only note what they are given."""

from __future__ import annotations

import queue
from typing import Any

import numpy as np
import pytest
from support.sequences import ScriptedSequences, continued
from support.workers import (
    logits_request,
    make_worker,
    received,
    request,
    run,
    submit,
    told,
)

from mxforge.errors import (
    CancelledError,
    NumericsError,
    QueueFullError,
    UsageError,
)
from mxforge.results import Piece
from mxforge.scheduler import LOGITS_CHUNK, Worker, shares


@pytest.fixture(autouse=True, params=[False, True], ids=["at once", "behind"])
def _either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test holds whether steps run when they are submitted, or behind."""
    monkeypatch.setattr(ScriptedSequences, "runs_behind", request.param)


# ------------------------------------------------------------------------------------- what is run


def test_a_prompt_goes_in_chunks_and_a_token_is_drawn_at_its_end() -> None:
    worker, model = make_worker()
    one = request(range(10, 30), max_tokens=3)
    submit(worker, one)
    assert run(worker) == 5
    assert model.sizes == [[8], [8], [4], [1], [1]]
    draws = [part.draw is one.draw for step in model.steps for part in step]
    assert draws == [False, False, True, True, True]
    pieces = received(one)
    assert [piece.token_ids for piece in pieces] == [
        (token,) for token in continued(range(10, 30), 3)
    ]
    assert [piece.finish_reason for piece in pieces] == [None, None, "length"]
    assert not model.tokens


def test_no_step_is_larger_than_a_chunk_and_a_token_of_each_answer() -> None:
    worker, model = make_worker(max_batch=3, prefill_chunk=8)
    submit(worker, *(request(range(length), max_tokens=20) for length in (3, 40, 5, 44, 1)))
    run(worker)
    assert max(map(sum, model.sizes)) <= 8 + 2
    assert not model.tokens


def test_an_answer_goes_on_at_every_step_of_anothers_prompt() -> None:
    worker, model = make_worker(prefill_chunk=20, mixed_chunk=8)
    running, long = request([1, 2], max_tokens=30), request([3] * 100, max_tokens=1)
    submit(worker, running)
    worker._step()
    submit(worker, long)
    for step in range(2, 14):
        worker._step()
        assert running.generated == step
        assert long.generated == 0
    worker._step()
    assert long.generated == 1
    # No step has more of the prompt than those may that others wait for.
    assert model.sizes[1:] == [[1, 8]] * 12 + [[1, 4]]


def test_a_prompt_alone_takes_the_whole_chunk() -> None:
    worker, model = make_worker(prefill_chunk=20, mixed_chunk=8)
    submit(worker, request([3] * 50, max_tokens=1))
    run(worker)
    assert model.sizes == [[20], [20], [10]]


def test_prompts_share_a_step_equally_and_short_ones_end_early() -> None:
    worker, model = make_worker(max_batch=4, prefill_chunk=30)
    submit(worker, *(request([n] * length, 1) for n, length in enumerate((100, 4, 60, 12))))
    worker._step()
    assert model.sizes == [[8, 4, 9, 9]]
    worker._step()
    assert model.sizes[1:] == [[13, 14, 3]]
    run(worker)
    assert not model.tokens


@pytest.mark.parametrize(
    ("wanted", "budget", "given"),
    [
        ([], 5, []),
        ([7], 5, [5]),
        ([2], 5, [2]),
        ([9, 9], 5, [3, 2]),
        ([9, 1, 9], 9, [4, 1, 4]),
        ([9, 0, 9], 0, [0, 0, 0]),
        ([9, 8, 7], 1, [0, 0, 1]),
        ([1, 1, 1], 9, [1, 1, 1]),
    ],
)
def test_shares_are_equal_and_leave_nothing_that_is_wanted(
    wanted: list[int], budget: int, given: list[int]
) -> None:
    assert shares(wanted, budget) == given


def test_logits_of_several_requests_share_one_bound_of_logits() -> None:
    worker, model = make_worker(max_batch=3, prefill_chunk=500)
    first, second, answer = logits_request(100), logits_request(70), request([1], max_tokens=9)
    submit(worker, first, second, answer)
    run(worker)
    assert max(sum(part.logits for part in step) for step in model.steps) == LOGITS_CHUNK
    for one, length in ((first, 100), (second, 70)):
        blocks = np.concatenate(received(one))
        assert blocks[:, 0].tolist() == list(range(length))
    assert len(received(answer)) == 9
    assert not model.tokens


# ------------------------------------------------------------------------------------ what waits


def test_requests_beyond_the_batch_wait_in_order() -> None:
    worker, model = make_worker(max_batch=2)
    requests = [request([n], max_tokens=4) for n in range(5)]
    submit(worker, *requests)
    worker._step()
    assert [one.generated for one in requests] == [1, 1, 0, 0, 0]
    run(worker)
    assert [len(received(one)) for one in requests] == [4] * 5
    assert sorted(requests, key=lambda one: one.admitted) == requests
    assert not model.tokens


def test_a_smaller_priority_runs_first_and_equal_ones_in_order_of_arrival() -> None:
    worker, _model = make_worker(max_batch=1)
    priorities = (0, 5, 0, -1, 5, -1)
    requests = [request([n], 2, priority=priority) for n, priority in enumerate(priorities)]
    submit(worker, requests[0])
    worker._step()  # what runs is not put back
    submit(worker, *requests[1:])
    run(worker)
    order = sorted(range(6), key=lambda n: requests[n].admitted)
    assert order == [0, 3, 5, 2, 1, 4]


def test_more_requests_than_may_wait_are_refused_until_one_ends() -> None:
    worker, _model = make_worker(max_batch=2, max_waiting=1)
    submit(worker, *(request([n], 2) for n in range(3)))
    with pytest.raises(QueueFullError, match="3 requests run or wait, .* at most 3, but 1 more"):
        submit(worker, request([3], 2))
    run(worker)
    with pytest.raises(QueueFullError, match="0 requests run or wait, .* but 4 more"):
        submit(worker, *(request([n], 2) for n in range(4)))
    submit(worker, *(request([n], 2) for n in range(3)))  # all or nothing
    run(worker)
    assert worker.metrics().refused == 5


# ---------------------------------------------------------------------------------- how it ends


def test_what_is_cancelled_ends_before_the_next_step() -> None:
    worker, model = make_worker(max_batch=2)
    requests = [request([1], 50), logits_request(100), request([2], 50), logits_request(3)]
    submit(worker, *requests)
    worker._step()
    before = len(model.steps)
    for one in requests:
        one.abandoned = True
    worker._step()
    assert len(model.steps) == before
    assert not worker._running
    assert not worker._waiting
    ends = [received(one)[-1] for one in requests]
    assert [getattr(end, "finish_reason", type(end)) for end in ends] == [
        "cancelled",
        CancelledError,
        "cancelled",
        CancelledError,
    ]
    timings = ends[2].timings
    assert timings.queue_s >= 0
    assert (timings.prefill_s, timings.decode_s, timings.decode_tok_s) == (0, 0, 0)
    assert not model.tokens


def test_the_first_of_two_stop_reasons_counts() -> None:
    worker, _model = make_worker(model=ScriptedSequences(lambda tokens: tokens[-1] + 1))
    at_stop = request([7], max_tokens=2, stops=frozenset([9]))
    asked = request([20], max_tokens=9, stops=frozenset([9, 22]))
    submit(worker, at_stop, asked)
    run(worker)
    assert [piece.finish_reason for piece in received(at_stop)] == [None, "stop"]
    assert [piece.token_ids for piece in received(asked)] == [(21,), (22,)]


def test_a_token_that_cannot_be_drawn_fails_its_request_alone() -> None:
    worker, model = make_worker(
        model=ScriptedSequences(lambda tokens: -1 if tokens == [1, 2, 2] else 2)
    )
    bad, good = request([1], 5), request([2], 5)
    submit(worker, bad, good)
    run(worker)
    items = received(bad)
    assert [item.token_ids for item in items[:-1]] == [(2,), (2,)]
    assert isinstance(items[-1], NumericsError)
    assert told(good) == [2] * 5
    assert worker.metrics().finished == {"stop": 0, "length": 1, "cancelled": 0, "error": 1}
    assert not model.tokens


class Inbox(queue.SimpleQueue):
    """Ends the worker with the last item."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def put(self, item: Any, *others: Any) -> None:
        super().put(item)
        if not isinstance(item, Piece) or item.finish_reason:
            self.worker._submissions.close()


def test_an_error_ends_all_requests_that_run_and_none_that_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker, model = make_worker(max_batch=2)
    requests = [request(range(30), 3), request([1], 3), request([2], 3, inbox=Inbox(worker))]
    failure = RuntimeError("once")
    failures = iter([None, failure])

    def step(parts):
        if error := next(failures, None):
            raise error
        return ScriptedSequences.step(model, parts)

    monkeypatch.setattr(model, "step", step)
    worker._submissions.submit(requests)
    ready: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    worker.run(ready)
    assert ready.get() is None
    assert received(requests[0]) == [failure]
    assert received(requests[1])[-1] is failure
    assert told(requests[2]) == continued([2], 3)
    assert not model.tokens
    assert model.closed
    assert worker.metrics().finished == {"stop": 0, "length": 1, "cancelled": 0, "error": 2}


def test_a_failed_load_is_told() -> None:
    worker, _model = make_worker()

    def fail() -> ScriptedSequences:
        raise MemoryError("no room")

    worker._open_model = fail
    early = request([1])
    worker._submissions.submit([early])
    ready: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    worker.run(ready)
    assert isinstance(ready.get(), MemoryError)
    assert [type(item) for item in received(early)] == [CancelledError]


@pytest.mark.parametrize("error", [None, SystemExit(3)])
def test_every_inbox_hears_of_the_workers_end(error: BaseException | None) -> None:
    """Whether it was closed or fell: what ran, what waited, and what was just submitted."""
    worker, model = make_worker(max_batch=1)
    running, waiting, untaken = (request([n], 50) for n in range(3))

    def step(parts):
        worker._submissions.close()
        worker._submissions._closed = False  # so that one may still come, after the close
        worker._submissions.submit([untaken])
        if error is not None:
            raise error
        return ScriptedSequences.step(model, parts)

    model.step = step  # type: ignore[method-assign]
    worker._submissions.submit([running, waiting])
    ready: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    if error is None:
        worker.run(ready)
    else:
        with pytest.raises(SystemExit):
            worker.run(ready)
    for one in (running, waiting, untaken):
        assert isinstance(received(one)[-1], CancelledError)
    with pytest.raises(UsageError, match="was closed"):
        worker._submissions.submit([request([1])])


@pytest.mark.parametrize("broken", ["keep", "free"])
def test_a_request_hears_of_its_end_where_its_sequence_cannot_be_let_go(broken: str) -> None:
    worker, model = make_worker()
    one = request([1], 1, inbox=Inbox(worker))

    def fail(_: int) -> None:
        raise RuntimeError("not now")

    setattr(model, broken, fail)
    worker._submissions.submit([one])
    worker.run(queue.SimpleQueue())
    assert worker._submissions.open == 0
    last = received(one)[-1]
    assert isinstance(last, RuntimeError) or last.finish_reason == "length"


def test_an_inbox_that_nobody_can_read_cancels_its_request() -> None:
    class Dead(queue.SimpleQueue):
        def put(self, item: Any, *others: Any) -> None:
            raise RuntimeError("its event loop was closed")

    worker, model = make_worker()
    dead, living = request([1], 40, inbox=Dead()), request([2], 3)
    submit(worker, dead, living)
    assert run(worker) <= 4
    assert told(living) == continued([2], 3)
    assert not model.tokens
