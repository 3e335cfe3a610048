"""The worker: several answers of one prompt, masks by a function, counters, all together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from support.sequences import VOCAB, ScriptedSequences, continued
from support.workers import (
    answers,
    make_worker,
    received,
    request,
    run,
    submit,
    told,
)

from mxforge.errors import (
    MaskError,
)
from mxforge.requests import Request
from mxforge.sampling import SamplingParams, token_bitmask


@pytest.fixture(autouse=True, params=[False, True], ids=["at once", "behind"])
def _either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test holds whether steps run when they are submitted, or behind."""
    monkeypatch.setattr(ScriptedSequences, "runs_behind", request.param)


# -------------------------------------------------------------------- several answers of one prompt


def test_several_answers_compute_their_prompt_once() -> None:
    worker, model = make_worker(max_batch=4)
    prompt = list(range(20))
    three, other = answers(prompt, 3), request([7], 9)
    submit(worker, *three, other)
    run(worker)
    assert len(model.forks) == 2
    assert {source for source, _ in model.forks} == {1}
    # All but the last token once, then the last one in each of three sequences.
    assert sum(map(sum, model.sizes)) == 19 + 3 * 5 + 9
    for index, one in enumerate(three):
        pieces = received(one)
        assert [token for piece in pieces for token in piece.token_ids] == continued(prompt, 5)
        assert {piece.index for piece in pieces} == {index}
        assert pieces[-1].usage.prompt_tokens == 20
    assert told(other) == continued([7], 9)
    assert not model.tokens


@pytest.mark.parametrize("length", [1, 2, 8, 9, 17])
@pytest.mark.parametrize("max_batch", [1, 2, 3, 6])
def test_answers_for_which_there_is_no_place_yet_come_later(length: int, max_batch: int) -> None:
    worker, model = make_worker(max_batch)
    prompt, between = list(range(length)), request([9, 9], 3)
    five = answers(prompt, 5)
    submit(worker, *five, between)
    run(worker)
    assert [told(one) for one in five] == [continued(prompt, 5)] * 5
    assert told(between) == continued([9, 9], 3)
    assert sorted([*five, between], key=lambda one: one.admitted)[-1] is between
    computed = sum(map(sum, model.sizes))
    assert computed == length - 1 + 5 * 5 + 4
    assert not model.tokens


def test_answers_go_on_where_one_of_them_fails_or_all_are_cancelled() -> None:
    worker, model = make_worker(max_batch=3)
    three = answers(list(range(20)), 3, 9)
    three[0].params = SamplingParams(bitmask=lambda tokens: 1 / 0)
    submit(worker, *three)
    run(worker)
    assert [type(item) for item in received(three[0])] == [MaskError]
    assert [told(one) for one in three[1:]] == [continued(range(20), 9)] * 2
    three = answers(list(range(30, 50)), 3, 9)
    submit(worker, *three)
    worker._step()
    for one in three:
        one.abandoned = True
    worker._step()
    assert [received(one)[-1].finish_reason for one in three] == ["cancelled"] * 3
    assert not model.tokens


# ------------------------------------------------------------------------------------------- masks


def test_a_mask_is_asked_for_before_each_draw_with_the_answer_so_far() -> None:
    worker, model = make_worker()
    asked: list[list[int]] = []

    def allow(tokens: Sequence[int]) -> np.ndarray | None:
        asked.append(list(tokens))
        return None if len(tokens) == 1 else token_bitmask([len(tokens)], VOCAB)

    one, still = request(range(20), 4, bitmask=allow), token_bitmask([3, 4], VOCAB)
    submit(worker, one, request([1], 2, bitmask=still))
    run(worker)
    answer = told(one)
    assert asked == [answer[:length] for length in range(4)]
    masks = [part.mask for step in model.steps for part in step if part.draw is one.draw]
    assert [None if mask is None else mask.tolist() for mask in masks] == [
        [1, 0], None, [4, 0], [8, 0],
    ]  # fmt: skip
    others = [part for step in model.steps for part in step if part.draw not in (one.draw, None)]
    assert [part.mask.tolist() for part in others] == [still.tolist()] * 2


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (lambda tokens: 1 / len(tokens[2:]) and None, "failed after 0 tokens: ZeroDivisionError"),
        (lambda tokens: [1, 2], "bitmask must be a uint32 array"),
        (lambda tokens: np.zeros(2, np.int64), "uint32 array of one dimension, but is int64"),
        (lambda tokens: np.ones(3, np.uint32), "must have 2 words for a vocabulary of 50"),
        (lambda tokens: np.zeros(2, np.uint32), "at least one token, but allows none"),
    ],
)
def test_a_mask_that_fails_ends_its_request_alone(mask: Any, message: str) -> None:
    worker, model = make_worker()
    bad, good = request([1], 5, bitmask=mask), request([2], 5)
    submit(worker, bad, good)
    run(worker)
    (error,) = received(bad)
    assert isinstance(error, MaskError)
    assert message in str(error)
    assert told(good) == continued([2], 5)
    assert not model.tokens


# ---------------------------------------------------------------------------------------- counters


def test_metrics_count_what_was_done() -> None:
    worker, model = make_worker(max_batch=2, prefill_chunk=100)
    prompt = list(range(20))
    submit(worker, request(prompt, 3), request([1], 50))
    worker._step()
    submit(worker, request([5], 1), request([6], 1))
    now = worker.metrics()
    assert (now.running, now.waiting, now.steps, now.generated_tokens) == (2, 2, 1, 2)
    run(worker)
    submit(worker, request([*prompt, 3], 1))
    run(worker)
    done = worker.metrics()
    assert (done.running, done.waiting) == (0, 0)
    assert done.finished == {"stop": 0, "length": 5, "cancelled": 0, "error": 0}
    assert done.prompt_tokens == 20 + 1 + 1 + 1 + 21
    assert done.cached_tokens == 20
    assert done.generated_tokens == 3 + 50 + 1 + 1 + 1
    assert done.steps == len(model.steps)
    for name in ("step_s", "queue_s", "prefill_s", "decode_s"):
        assert getattr(done, name) > 0


def test_hundreds_of_requests_get_the_answers_that_follow_from_their_prompts() -> None:
    """Conversations that go on, branch, are several, and are cancelled."""
    rng = np.random.default_rng(1)
    worker, model = make_worker(4, 40, 16)
    past: list[list[int]] = [[]]
    open_requests: list[Request] = []
    cached = answered = 0
    while answered < 300:
        while len(open_requests) < 8:
            begin = past[rng.integers(len(past))]
            begin = begin[: rng.integers(len(begin) + 1)] if rng.random() < 0.5 else begin
            tokens = [*begin, *rng.integers(0, VOCAB, rng.integers(1, 60)).tolist()][:180]
            several = answers(tokens, int(rng.integers(1, 5)), int(rng.integers(1, 20)))
            worker._submissions.submit(several)
            open_requests += several
        if rng.random() < 0.1:
            open_requests[rng.integers(len(open_requests))].abandoned = True
        worker._receive()
        for _ in range(rng.integers(1, 30)):
            worker._step()
        for one in [r for r in open_requests if not r.inbox.empty()]:
            if one in worker._running or any(entry[-1] is one for entry in worker._waiting):
                continue
            open_requests.remove(one)
            pieces = received(one)
            answer = [token for piece in pieces for token in piece.token_ids]
            assert answer == continued(one.tokens[: one.prompt_length], len(answer))
            if pieces[-1].finish_reason == "length":
                answered += 1
                assert len(answer) == one.max_tokens
                assert pieces[-1].usage.cached_tokens == one.cached
            cached += one.cached
            past.append(one.tokens)
        past, model.kept = past[-30:], model.kept[-30:]
    run(worker, 10_000)
    assert cached > 0
    assert not model.tokens
    assert worker._submissions.open == 0
