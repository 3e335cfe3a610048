"""Answers for threads and for tasks of event loops, from an engine without a model."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.sequences import ScriptedSequences, continued

import mxforge.engine
from mxforge import Engine, SamplingParams
from mxforge.errors import CancelledError, MaskError, QueueFullError, UsageError
from mxforge.steps import Part, Result
from mxforge.streams import LoopInbox

Load = Callable[..., Engine]
Until = Callable[..., None]

SIX = SamplingParams(max_tokens=6, ignore_eos=True)
ENDLESS = SamplingParams(ignore_eos=True)  # for many seconds: until the context is full


class Paced(ScriptedSequences):
    """Steps that take a millisecond, later more, and wait while `go` is not set."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()
        self.go.set()

    def step(self, parts: Sequence[Part]) -> list[Result]:
        time.sleep(0.001 if len(self.steps) < 100 else 0.02)  # on a busy machine, too
        assert self.go.wait(20)
        return super().step(parts)


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> list[Paced]:
    """Those that engines opened, oldest first."""
    opened: list[Paced] = []

    def open_model(*_: object, **__: object) -> Paced:
        opened.append(Paced())
        return opened[-1]

    monkeypatch.setattr(mxforge.engine, "open_model", open_model)
    return opened


@pytest.fixture
def load(made: Path, models: list[Paced]) -> Iterator[Load]:
    """load(options) -> an engine whose sequences are `Paced`: all of them have to be freed."""
    engines: list[Engine] = []

    def load_engine(**options: Any) -> Engine:
        engines.append(Engine.load(made, **options))
        return engines[-1]

    yield load_engine
    for model in models:
        model.go.set()
    for engine in engines:
        engine.close()


def run(task: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(task, 20))


def idle(engine: Engine) -> Callable[[], bool]:
    return lambda: engine.metrics().running == engine.metrics().waiting == 0


# ------------------------------------------------------------------------------------ event loops


def test_a_task_gets_what_a_thread_gets(load: Load) -> None:
    engine = load()

    async def ask() -> None:
        answer = await engine.agenerate([1, 2], SIX)
        assert answer.token_ids == engine.generate([1, 2], SIX).token_ids
        assert answer.token_ids == tuple(continued([1, 2], 6))
        pieces = [piece async for piece in engine.astream([1, 2], SIX)]
        assert [piece.token_ids for piece in pieces] == [(token,) for token in answer.token_ids]
        assert [piece.finish_reason for piece in pieces] == [None] * 5 + ["length"]

    run(ask())


def test_many_tasks_of_several_loops_share_an_engine(load: Load) -> None:
    engine = load()

    async def ask(own: int) -> list[tuple[int, ...]]:
        answers = await asyncio.gather(
            *(engine.agenerate([own, n], SIX) for n in range(20)),
        )
        return [answer.token_ids for answer in answers]

    with ThreadPoolExecutor(3) as pool:
        for own, answers in enumerate(pool.map(lambda own: run(ask(own)), range(3))):
            assert answers == [tuple(continued([own, n], 6)) for n in range(20)]


@pytest.mark.parametrize("streams", [True, False])
def test_a_cancelled_task_cancels_its_request(
    load: Load, models: list[Paced], until: Until, streams: bool
) -> None:
    engine = load()

    async def read() -> None:
        async for _ in engine.astream([1], ENDLESS):
            pass

    async def ask() -> None:
        task = asyncio.create_task(read() if streams else engine.agenerate([1], ENDLESS))
        while engine.metrics().generated_tokens < 3:
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.to_thread(until, idle(engine))
        assert engine.metrics().finished["cancelled"] == 1
        assert (await engine.agenerate([2], SIX)).finish_reason == "length"  # of the same loop

    run(ask())
    assert not models[0].tokens


@pytest.mark.parametrize("way", ["with", "close", "forget", "cancel"])
def test_leaving_a_stream_cancels_it(load: Load, until: Until, way: str) -> None:
    engine = load()

    async def ask() -> None:
        if way == "with":
            async with engine.astream([1], ENDLESS) as stream:
                await anext(stream)
        else:
            stream = engine.astream([1], ENDLESS)
            await anext(stream)
        if way == "close":
            await stream.aclose()
        if way == "cancel":
            stream.cancel()
            assert [piece async for piece in stream][-1].finish_reason == "cancelled"
        elif way == "forget":
            del stream
            gc.collect()
        else:
            assert [piece async for piece in stream] == []
        await asyncio.to_thread(until, idle(engine))

    run(ask())
    assert engine.metrics().finished["cancelled"] == 1


def test_requests_of_a_loop_that_was_closed_end(load: Load, until: Until) -> None:
    engine = load()

    async def ask() -> Any:
        stream = engine.astream([1], ENDLESS)
        await anext(stream)
        return stream

    kept = run(ask())
    until(idle(engine))
    del kept
    assert engine.metrics().finished["cancelled"] == 1
    assert engine.generate([1], SIX).finish_reason == "length"


def test_items_that_come_together_wake_their_loop_once() -> None:
    async def receive() -> None:
        loop, calls = asyncio.get_running_loop(), []
        call = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda *of: calls.append(of) or call(*of)  # type: ignore[method-assign]
        inboxes = [LoopInbox() for _ in range(10)]
        for _ in range(2):
            for item, inbox in enumerate(inboxes):
                inbox.put(RuntimeError(item))
            received = [await inbox.queue.get() for inbox in inboxes]
            assert [error.args for error in received] == [(n,) for n in range(10)]
        assert len(calls) == 2

    run(receive())


def test_a_loop_that_is_closed_takes_nothing_more() -> None:
    """Also where a call that would have delivered what came before was never made."""
    loop = asyncio.new_event_loop()

    async def inbox() -> LoopInbox:
        return LoopInbox()

    made = loop.run_until_complete(inbox())
    made.put(RuntimeError("not delivered"))
    loop.close()
    with pytest.raises(RuntimeError, match="event loop was closed"):
        made.put(RuntimeError("nor this"))


def test_closing_an_engine_ends_what_tasks_and_threads_wait_for(
    load: Load, models: list[Paced], until: Until
) -> None:
    engine = load(max_batch=1)
    models[0].go.clear()

    async def ask() -> list[BaseException]:
        tasks = [asyncio.create_task(engine.agenerate([n], ENDLESS)) for n in range(3)]
        thread = asyncio.create_task(asyncio.to_thread(engine.generate, [9], ENDLESS))
        logits = asyncio.create_task(asyncio.to_thread(engine.logits, [9]))
        await asyncio.to_thread(until, lambda: engine.metrics().waiting == 4)
        models[0].go.set()
        engine.close()
        return await asyncio.gather(*tasks, thread, logits, return_exceptions=True)  # type: ignore[return-value]

    ends = run(ask())
    assert [type(end) for end in ends] == [CancelledError] * 5
    assert {str(end) for end in ends} == {"The engine was closed while it answered."}
    for use in (engine.astream, engine.stream, engine.generate, engine.logits):
        with pytest.raises(UsageError, match="was closed; load"):
            run(_called(use))


async def _called(use: Callable[..., Any]) -> Any:
    return use([1])


def test_a_worker_that_falls_tells_those_who_wait(
    load: Load, models: list[Paced], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load()
    monkeypatch.setattr(threading, "excepthook", lambda _: None)

    def fall(_: object) -> list[Result]:
        raise SystemExit

    models[0].step = fall  # type: ignore[method-assign]
    with pytest.raises(CancelledError):
        engine.generate([1], SIX)
    with pytest.raises(UsageError):
        engine.generate([1], SIX)


# ------------------------------------------------------------------------------ several answers


def test_several_answers_come_in_their_order_and_with_seeds_of_their_own(
    load: Load, models: list[Paced]
) -> None:
    engine = load()
    params = SamplingParams(max_tokens=4, seed=2**64 - 2, ignore_eos=True)
    answers = engine.generate([5, 6, 7], params, n=4)
    assert [answer.token_ids for answer in answers] == [tuple(continued([5, 6, 7], 4))] * 4
    draws = [part.draw for step in models[0].steps for part in step if part.draw is not None]
    assert sorted({draw.seed for draw in draws}) == [0, 1, 2**64 - 2, 2**64 - 1]
    pieces = list(engine.stream([5, 6, 7], params, n=3))
    assert sorted(piece.index for piece in pieces) == [0] * 4 + [1] * 4 + [2] * 4
    ends = [piece.index for piece in pieces if piece.finish_reason]
    assert sorted(ends) == [0, 1, 2]
    first, *others = (piece.usage for piece in pieces if piece.usage)
    assert first.prompt_tokens == 3
    assert [usage.completion_tokens for usage in others] == [4, 4]


def test_a_single_answer_is_no_tuple_and_one_of_n_is(load: Load) -> None:
    engine = load()
    assert engine.generate([1], SIX).token_ids == tuple(continued([1], 6))
    (answer,) = engine.generate([1], SIX, n=1)
    assert answer.token_ids == tuple(continued([1], 6))

    async def ask() -> None:
        two = await engine.agenerate([1], SIX, n=2)
        assert [answer.token_ids for answer in two] == [tuple(continued([1], 6))] * 2

    run(ask())


def test_an_error_of_one_answer_ends_the_others_of_its_request_only(
    load: Load, until: Until
) -> None:
    engine = load()
    other = engine.stream([3], ENDLESS)
    next(other)
    calls = iter(range(5))
    params = SamplingParams(bitmask=lambda _: [][0] if next(calls) == 4 else None, ignore_eos=True)
    with pytest.raises(MaskError, match="failed after 2 tokens: IndexError"):
        list(engine.stream([1], params, n=2))
    until(lambda: engine.metrics().running == 1)
    assert next(other).finish_reason is None


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n must be a whole number from 1 to 128, found 0"),
        ({"n": 129}, "n must be .* found 129"),
        ({"n": True}, "n must be .* found True"),
        ({"n": 2.0}, "n must be .* found 2.0"),
        ({"priority": 0.5}, "priority must be a whole number from -2147483648 to 2147483647"),
        ({"priority": 2**31}, "priority must be"),
        ({"priority": None}, "priority must be .* found None"),
    ],
)
def test_absurd_wishes_are_refused(load: Load, options: dict[str, Any], message: str) -> None:
    engine = load()

    async def ask(use: Callable[..., Any]) -> Any:
        return use([1], **options)

    for use in (engine.generate, engine.stream, engine.astream):
        with pytest.raises(UsageError, match=message):
            run(ask(use))
    with pytest.raises(UsageError, match=message):
        run(engine.agenerate([1], **options))
    assert engine.metrics().prompt_tokens == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_waiting": -1}, "max_waiting must be a whole number from 0 to"),
        ({"max_waiting": None}, "max_waiting must be .* found None"),
        ({"mixed_chunk": 0}, "mixed_chunk must be a whole number of at least 1"),
        ({"mixed_chunk": 65}, "mixed_chunk must be at most 64, the prefill_chunk; found 65"),
        ({"mixed_chunk": 33, "prefill_chunk": 32}, "mixed_chunk must be at most 32"),
    ],
)
def test_absurd_limits_are_refused(load: Load, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(**options)


def test_streams_for_tasks_need_a_running_loop(load: Load) -> None:
    with pytest.raises(RuntimeError, match="no running event loop"):
        load().astream([1])


def test_a_full_queue_refuses_at_once(load: Load, models: list[Paced]) -> None:
    engine = load(max_batch=1, max_waiting=1)
    models[0].go.clear()
    running, waiting = engine.stream([1], SIX), engine.stream([2], SIX)
    for use in (engine.stream, engine.generate, engine.astream, engine.logits):
        with pytest.raises(QueueFullError, match="2 requests run or wait"):
            run(_called(use))
    models[0].go.set()
    assert len(list(running)) == len(list(waiting)) == 6
    assert len(engine.generate([3], SIX, n=2)) == 2
    assert engine.metrics().refused == 4


def test_urgent_requests_run_first(load: Load, models: list[Paced]) -> None:
    engine = load(max_batch=1)
    models[0].go.clear()
    priorities = {60: 0, 61: 2, 62: 1, 63: 1, 64: -5}  # by prompts of tokens that are never drawn
    streams = [engine.stream([token], SIX, priority=p) for token, p in priorities.items()]
    models[0].go.set()
    for stream in streams:
        list(stream)
    order = [token for step in models[0].steps for token in step[0].tokens if token in priorities]
    assert [token for token in order if token != 60] == [64, 62, 63, 61]


def test_an_engine_can_be_forgotten_while_a_task_reads(load: Load, made: Path) -> None:
    async def ask() -> int:
        stream = Engine.load(made).astream([1], SIX)
        gc.collect()
        return len([piece async for piece in stream])

    assert run(ask()) == 6
