"""The worker step by step, with a model that only notes what it is given."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mxforge.errors import CancelledError
from mxforge.kv import page_needs
from mxforge.kv_layout import PAGE_TOKENS
from mxforge.results import Piece
from mxforge.sampling import SamplingParams, TokenHistory
from mxforge.scheduler import LOGITS_CHUNK, MIN_PREFIXES, Request, Worker
from mxforge.text import TextStream

WINDOW, CONTEXT, VOCAB = 20, 200, 50
STOP = 9


class NotingModel:
    """Logits whose row is the token it belongs to; the next token is that plus one."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[int], list[int], int]] = []
        self.copies: list[tuple[str, list[tuple[int, int]]]] = []

    def close(self) -> None:
        pass

    def forward(self, tokens, positions, token_seq, rows, _tables) -> np.ndarray:
        self.calls.append(("forward", list(tokens), list(positions), len(rows)))
        assert len(tokens) == len(positions) == len(token_seq)
        return np.array([[tokens[row]] * VOCAB for row in rows], np.float32).reshape(-1, VOCAB)

    def decode(self, tokens, positions, token_seq, tables) -> np.ndarray:
        logits = self.forward(tokens, positions, token_seq, range(len(tokens)), tables)
        self.calls[-1] = ("decode", *self.calls[-1][1:])
        return logits

    def sample(self, logits, arguments, logprobs):
        count = len(arguments.step)
        return [int(row[0]) + 1 for row in logits[:count]], None

    def read_logits(self, logits, start: int, count: int) -> np.ndarray:
        return logits[start : start + count]

    def copy_pages(self, kind: str, copies: Sequence[tuple[int, int]]) -> None:
        if copies:
            self.copies.append((kind, list(copies)))


class RememberingModel(NotingModel):
    """Keeps in each slot of each page what a sequence was up to there, and says the next token
    by what the pages hold: any page mixed up or dropped too early changes an answer."""

    def __init__(self) -> None:
        super().__init__()
        self.slots: dict[tuple[str, int, int], int] = {}  # (kind, page, slot) -> past up to there

    def forward(self, tokens, positions, token_seq, rows, tables) -> np.ndarray:
        super().forward(tokens, positions, token_seq, rows, tables)
        pasts = []
        for token, position, row in zip(tokens, positions, token_seq, strict=True):
            past = self.read("full", tables.full_table[row], 0, position - 1) if position else 0
            past = extended(past, token)
            first = tables.sliding_first[row]
            for kind, table, begin in (
                ("full", tables.full_table[row], 0),
                ("sliding", tables.sliding_table[row], first),
            ):
                page = int(table[position // PAGE_TOKENS - begin])
                self.slots[kind, page, position % PAGE_TOKENS] = past
                for key in range(max(0, position - WINDOW + 1), position):
                    assert self.read(kind, table, begin, key) == self.read(
                        "full", tables.full_table[row], 0, key
                    )
            pasts.append(past)
        return np.array([[pasts[row]] * VOCAB for row in rows], np.float64).reshape(-1, VOCAB)

    def read(self, kind: str, table: np.ndarray, first: int, position: int) -> int:
        page = int(table[position // PAGE_TOKENS - first])
        return self.slots[kind, page, position % PAGE_TOKENS]

    def sample(self, logits, arguments, logprobs):
        return [int(row[0]) % VOCAB for row in logits[: len(arguments.step)]], None

    def copy_pages(self, kind: str, copies: Sequence[tuple[int, int]]) -> None:
        for source, destination in copies:
            for slot in range(PAGE_TOKENS):
                self.slots[kind, destination, slot] = self.slots.get((kind, source, slot), -1)


def extended(past: int, token: int) -> int:
    return (past * 31 + token + 1) % 1_000_003


def expected_answer(tokens: Sequence[int], count: int) -> list[int]:
    """What RememberingModel says after `tokens`."""
    past, answer = 0, []
    for token in tokens:
        past = extended(past, token)
    for _ in range(count):
        answer.append(past % VOCAB)
        past = extended(past, answer[-1])
    return answer


def make_worker(
    max_batch: int = 3, prefill_chunk: int = 8, model: NotingModel | None = None
) -> tuple[Worker, NotingModel]:
    needs = page_needs(CONTEXT, max_batch, prefill_chunk + max_batch, WINDOW, 1, 1)
    manifest: Any = SimpleNamespace(
        config={"vocab_size": VOCAB, "sliding_window": WINDOW}, stop_token_ids=(STOP,)
    )
    worker = Worker(
        SimpleNamespace(  # type: ignore[arg-type]
            manifest=manifest, variant=SimpleNamespace(target="cpu:best")
        ),
        queue.SimpleQueue(),
        needs,
        threads=1,
        context_length=CONTEXT,
        max_batch=max_batch,
        prefill_chunk=prefill_chunk,
    )
    model = model or NotingModel()
    worker._model = model  # type: ignore[assignment]
    return worker, model


def request(tokens: Sequence[int], max_tokens: int = 5, **params) -> Request:
    sampling = SamplingParams(ignore_eos=True, **params)
    return Request(
        tokens=list(tokens),
        prompt_length=len(tokens),
        params=sampling,
        max_tokens=max_tokens,
        history=TokenHistory(tokens),
        text=TextStream(),
    )


def logits_request(count: int) -> Request:
    return Request(tokens=list(range(count)), prompt_length=count, params=None)


def submit(worker: Worker, *requests: Request) -> None:
    for one in requests:
        worker._requests.put(one)
    worker._receive()


def received(one: Request) -> list[Any]:
    items = []
    while not one.inbox.empty():
        items.append(one.inbox.get())
    return items


def run(worker: Worker, most: int = 1000) -> int:
    """Steps until nothing runs or waits."""
    for step in range(most):
        if not worker._running and not worker._waiting:
            return step
        worker._step()
    raise AssertionError("it does not end")


def is_clean(worker: Worker) -> bool:
    kv = worker._kv
    kv.clear()
    return (kv.full.free, kv.sliding.free) == (kv.full.size, kv.sliding.size)


def test_a_prompt_goes_in_chunks_and_only_its_end_has_logits() -> None:
    worker, model = make_worker()
    one = request(range(10, 30), max_tokens=3)
    submit(worker, one)
    assert run(worker) == 5
    assert [(name, len(tokens), rows) for name, tokens, _, rows in model.calls] == [
        ("forward", 8, 0),
        ("forward", 8, 0),
        ("forward", 4, 1),
        ("decode", 1, 1),
        ("decode", 1, 1),
    ]
    assert [position for _, _, positions, _ in model.calls for position in positions] == list(
        range(22)
    )
    assert [piece.token_ids for piece in received(one)] == [(30,), (31,), (32,)]
    assert is_clean(worker)


def test_no_step_is_larger_than_a_chunk_and_a_token_of_each_answer() -> None:
    worker, model = make_worker(max_batch=3, prefill_chunk=8)
    submit(worker, *(request(range(length), max_tokens=20) for length in (3, 40, 5, 60, 1)))
    run(worker)
    assert max(len(tokens) for _, tokens, _, _ in model.calls) <= 8 + 2
    assert is_clean(worker)


def test_an_answer_goes_on_at_every_step_of_anothers_prompt() -> None:
    worker, _model = make_worker(prefill_chunk=8)
    running, long = request([1, 2], max_tokens=30), request(range(100), max_tokens=1)
    submit(worker, running)
    worker._step()
    submit(worker, long)
    for step in range(2, 14):
        worker._step()
        assert running.generated == step
        assert long.generated == 0
    worker._step()
    assert long.generated == 1


def test_requests_beyond_the_batch_wait_in_order() -> None:
    worker, _model = make_worker(max_batch=2)
    requests = [request([n], max_tokens=4) for n in range(5)]
    submit(worker, *requests)
    worker._step()
    assert [one.generated for one in requests] == [1, 1, 0, 0, 0]
    run(worker)
    assert [len(received(one)) for one in requests] == [4] * 5
    assert requests[4].admitted > requests[0].admitted
    assert is_clean(worker)


def test_logits_of_several_requests_share_one_bound_of_logits() -> None:
    worker, model = make_worker(max_batch=3, prefill_chunk=500)
    first, second, answer = logits_request(100), logits_request(70), request([1], max_tokens=9)
    submit(worker, first, second, answer)
    run(worker)
    rows = [rows for name, _, _, rows in model.calls if name == "forward"]
    assert max(rows) == LOGITS_CHUNK + 1
    for one, count in ((first, 100), (second, 70)):
        blocks = np.concatenate(received(one))
        assert blocks[:, 0].tolist() == list(range(count))
    assert len(received(answer)) == 9
    assert is_clean(worker)


def test_what_is_cancelled_ends_before_the_next_step() -> None:
    worker, model = make_worker(max_batch=2)
    requests = [request([1], 50), logits_request(100), request([2], 50), logits_request(3)]
    submit(worker, *requests)
    worker._step()
    before = len(model.calls)
    for one in requests:
        one.abandoned.set()
    worker._step()
    assert len(model.calls) == before
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
    assert is_clean(worker)


def test_the_first_of_two_stop_reasons_counts() -> None:
    worker, _model = make_worker()
    at_stop = request([STOP - 2], max_tokens=2)
    at_stop.params = SamplingParams()
    asked = request([20], max_tokens=9, stop_token_ids=[22])
    submit(worker, at_stop, asked)
    run(worker)
    assert [piece.finish_reason for piece in received(at_stop)] == [None, "stop"]
    assert [piece.token_ids for piece in received(asked)] == [(21,), (22,)]


def test_a_shared_page_is_copied_before_it_is_written() -> None:
    worker, model = make_worker()
    first = request(range(20), max_tokens=3)
    submit(worker, first)
    run(worker)
    second = request([*range(20), 40, 41], max_tokens=3)
    submit(worker, second)
    model.copies.clear()
    worker._step()
    assert second.cached == 20
    assert sorted(kind for kind, _ in model.copies) == ["full", "sliding"]
    assert model.calls[-1][2] == [20, 21]


def test_an_error_ends_all_requests_that_run_and_none_that_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker, model = make_worker(max_batch=2)
    requests = [request(range(30), max_tokens=3), request([1], max_tokens=3), request([2], 3)]
    failure = RuntimeError("once")
    calls = iter([None, failure])

    def forward(*arguments):
        if error := next(calls, None):
            raise error
        return NotingModel.forward(model, *arguments)

    monkeypatch.setattr(model, "forward", forward)
    monkeypatch.setattr("mxforge.scheduler.Model", lambda *_: model)
    monkeypatch.setattr("mxforge.scheduler.Library.use_threads", lambda _: None)
    for one in requests:
        worker._requests.put(one)
    finished = requests[2].inbox
    ready: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    class ThenClose(queue.SimpleQueue):
        """Ends the worker with the last answer."""

        def put(self, item, *args) -> None:
            finished.put(item)
            if isinstance(item, Piece) and item.finish_reason:
                worker._requests.put(None)

    requests[2].inbox = ThenClose()
    worker.run(ready)
    assert ready.get() is None
    assert received(requests[0]) == [failure]
    assert received(requests[1])[-1] is failure
    last = finished
    tokens = [last.get().token_ids for _ in range(last.qsize())]
    assert tokens == [(3,), (4,), (5,)]
    assert is_clean(worker)


def test_a_failed_load_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_):
        raise MemoryError("no room")

    worker, _model = make_worker()
    monkeypatch.setattr("mxforge.scheduler.Library.use_threads", lambda _: None)
    monkeypatch.setattr("mxforge.scheduler.Model", fail)
    ready: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
    worker.run(ready)
    assert isinstance(ready.get(), MemoryError)


@pytest.mark.parametrize(("max_batch", "prefill_chunk"), [(1, 8), (3, 5), (4, 40), (6, 1)])
def test_hundreds_of_requests_never_see_each_others_pages(
    max_batch: int, prefill_chunk: int
) -> None:
    """Conversations that go on, branch and are cancelled, in pools without a page to spare."""
    rng = np.random.default_rng([max_batch, prefill_chunk])
    worker, _model = make_worker(max_batch, prefill_chunk, RememberingModel())
    past: list[list[int]] = [[]]
    open_requests: list[Request] = []
    cached = answered = 0
    while answered < 150:
        while len(open_requests) < 2 * max_batch:
            begin = past[rng.integers(len(past))]
            begin = begin[: rng.integers(len(begin) + 1)] if rng.random() < 0.5 else begin
            tokens = [*begin, *rng.integers(0, VOCAB, rng.integers(1, 60)).tolist()]
            tokens = tokens[: CONTEXT - 20]
            one = request(tokens, int(rng.integers(1, 20)))
            open_requests.append(one)
            worker._requests.put(one)
        if rng.random() < 0.1:
            open_requests[rng.integers(len(open_requests))].abandoned.set()
        worker._receive()
        for _ in range(rng.integers(1, 30)):
            worker._step()
        for one in [r for r in open_requests if r.inbox.qsize()]:
            if one in worker._running or one in worker._waiting:
                continue
            open_requests.remove(one)
            pieces = received(one)
            answer = [token for piece in pieces for token in piece.token_ids]
            assert answer == expected_answer(one.tokens[: one.prompt_length], len(answer))
            if pieces[-1].finish_reason == "length":
                answered += 1
                assert len(answer) == one.max_tokens
                assert pieces[-1].usage.cached_tokens == one.cached
            cached += one.cached
            past.append(one.tokens)
    run(worker, 10_000)
    assert cached > 0
    assert is_clean(worker)


def test_large_batches_keep_a_prefix_for_each_sequence() -> None:
    assert make_worker(max_batch=3)[0]._kv.cache.limit == MIN_PREFIXES
    assert make_worker(max_batch=MIN_PREFIXES + 1)[0]._kv.cache.limit == MIN_PREFIXES + 1
