"""Every way for an answer or an engine to end."""

from __future__ import annotations

import dataclasses
import gc
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from support.prompts import CONTEXT, ENDLESS, GREEDY, forced, prompt
from support.sequences import Watched

from mxforge import Engine, SamplingParams
from mxforge.errors import (
    CancelledError,
    NumericsError,
    UsageError,
)
from mxforge.sampling import token_bitmask
from mxforge.scheduler import Worker

Load = Callable[..., Engine]
Until = Callable[..., None]


def test_max_tokens_and_a_full_context_end_with_length(engine: Engine) -> None:
    one = engine.generate(prompt(3), SamplingParams(max_tokens=1, temperature=0, ignore_eos=True))
    assert (len(one.token_ids), one.finish_reason) == (1, "length")
    full = engine.generate(prompt(CONTEXT - 3), ENDLESS)
    assert (len(full.token_ids), full.finish_reason) == (3, "length")
    most = engine.generate(prompt(CONTEXT - 1), dataclasses.replace(ENDLESS, max_tokens=2**31 - 1))
    assert (len(most.token_ids), most.finish_reason) == (1, "length")


def test_stop_ids_end_the_answer_and_are_part_of_it(engine: Engine) -> None:
    assert engine.manifest.stop_token_ids == (0,)
    own = engine.generate(prompt(3), forced(0))
    assert (own.token_ids, own.text, own.finish_reason) == ((0,), "", "stop")
    ignored = engine.generate(prompt(3), forced(0, max_tokens=5, ignore_eos=True))
    assert (ignored.token_ids, ignored.finish_reason) == ((0,) * 5, "length")
    asked = engine.generate(
        prompt(3), forced(0, 5, stop_token_ids=[5], ignore_eos=True, temperature=100.0, seed=0)
    )
    assert asked.finish_reason == "stop"
    assert asked.token_ids.index(5) == len(asked.token_ids) - 1


def test_text_goes_in_and_comes_out(text_engine: Engine) -> None:
    tokenizer = text_engine.tokenizer
    hello, blank = tokenizer.encode("hello ")
    answer = text_engine.generate(
        "hello hello",
        SamplingParams(max_tokens=3, bitmask=token_bitmask([hello], text_engine.vocab_size)),
    )
    assert answer.usage.prompt_tokens == 3
    assert answer.text == "hello" * 3
    assert answer.token_ids == (hello,) * 3
    stopped = text_engine.generate(
        "hello", SamplingParams(bitmask=token_bitmask([0], text_engine.vocab_size))
    )
    assert text_engine.tokenizer.token_bytes(0) == b"!"
    assert (stopped.text, stopped.token_ids, stopped.finish_reason) == ("", (0,), "stop")
    assert text_engine.encode("hello hello") == [hello, *tokenizer.encode(" hello")]
    assert blank != hello
    # What looks special in a text is text.
    assert len(text_engine.encode("<|end|>")) > 1


def test_characters_split_over_tokens_arrive_whole(
    text_engine: Engine, script: Callable[[Sequence[int]], None]
) -> None:
    tokens = text_engine.tokenizer.encode("a€b")
    assert len(tokens) == 5
    script(tokens)
    params = dataclasses.replace(GREEDY, max_tokens=5)
    pieces = [piece.text for piece in text_engine.stream([7], params)]
    assert pieces == ["a", "", "", "€", "b"]
    cut = dataclasses.replace(GREEDY, max_tokens=3)
    assert text_engine.generate([7], cut).text == "a\N{REPLACEMENT CHARACTER}"


@pytest.fixture
def script(text_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Callable[[Sequence[int]], None]:
    """script(tokens): let the model of `text_engine` write these, and no others."""
    model = text_engine._worker._model
    submit, wait, submitted = model.submit, model.wait, []

    def write(tokens: Sequence[int]) -> None:
        written: dict[int, Iterator[int]] = {}

        def noting(parts):
            submit(parts)
            submitted.append(parts)

        def scripted():
            results = wait()
            for part, result in zip(submitted.pop(0), results, strict=True):
                if part.draw is not None:
                    result.token = next(written.setdefault(part.sequence, iter(tokens)))
            return results

        monkeypatch.setattr(model, "submit", noting)
        monkeypatch.setattr(model, "wait", scripted)

    return write


@pytest.mark.parametrize(
    ("stop", "text", "count", "reason"),
    [
        ("lo w", "say hel", 7, "stop"),  # over three tokens
        (["zzz", "w"], "say hello ", 7, "stop"),
        (["hello world", "y"], "sa", 3, "stop"),
        ("say", "", 3, "stop"),
        ("worlds", "say hello world", 11, "length"),  # held back, then given out
        ((), "say hello world", 11, "length"),
    ],
)
def test_stop_strings_cut_the_text_wherever_tokens_end(
    text_engine: Engine,
    script: Callable[[Sequence[int]], None],
    stop: str | list[str],
    text: str,
    count: int,
    reason: str,
) -> None:
    encode = text_engine.tokenizer.encode
    tokens = [*encode("say "), *encode("hello"), *encode(" "), *encode("world")]
    script(tokens)
    params = dataclasses.replace(GREEDY, stop=stop, max_tokens=len(tokens))
    answer = text_engine.generate([7], params)
    assert (answer.text, answer.finish_reason) == (text, reason)
    assert answer.token_ids == tuple(tokens[:count])
    assert "".join(piece.text for piece in text_engine.stream([7], params)) == text


def test_an_event_cancels_between_steps(load: Load) -> None:
    engine, cancel = load(), threading.Event()
    stream = engine.stream(prompt(5), ENDLESS, cancel=cancel)
    pieces = [next(stream), next(stream)]
    cancel.set()
    pieces += list(stream)
    assert pieces[-1].finish_reason == "cancelled"
    assert 2 <= sum(len(piece.token_ids) for piece in pieces) < CONTEXT - 5
    before = engine.generate(prompt(5), ENDLESS, cancel=cancel)
    assert (before.token_ids, before.finish_reason) == ((), "cancelled")
    assert all(value >= 0 for value in dataclasses.asdict(before.timings).values())


def test_one_event_may_belong_to_many_requests(load: Load) -> None:
    engine, cancel = load(), threading.Event()
    for _ in range(3):
        assert engine.generate(prompt(5), GREEDY, cancel=cancel).finish_reason == "length"
    assert not cancel.is_set()


def test_a_request_is_cancelled_while_it_waits_for_a_place(load: Load) -> None:
    engine, cancel = load(max_batch=1), threading.Event()
    running = engine.stream(prompt(5), ENDLESS)
    next(running)
    waiting = engine.stream(prompt(6), ENDLESS, cancel=cancel)
    cancel.set()
    assert next(waiting).finish_reason == "cancelled"
    running.close()


@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize("forgotten", [True, False])
def test_closing_or_forgetting_a_stream_cancels_it(
    load: Load, workers: list[Worker], until: Until, started: bool, forgotten: bool
) -> None:
    engine = load(context_length=100_000)
    stream = engine.stream(prompt(5), ENDLESS)
    if started:
        next(stream)
    if forgotten:
        del stream
    else:
        stream.close()
        assert list(stream) == []
    until(lambda: not workers[0]._running and not workers[0]._waiting)


@pytest.mark.parametrize("method", ["generate", "logits"])
def test_ctrl_c_ends_a_call_and_its_request(
    load: Load, workers: list[Worker], until: Until, method: str
) -> None:
    engine = load(context_length=100_000, prefill_chunk=1)
    arguments = {"generate": (prompt(5), ENDLESS), "logits": (prompt(50_000),)}[method]
    interrupt = threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGINT))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        getattr(engine, method)(*arguments)
    until(lambda: not workers[0]._running)
    assert engine.generate(prompt(5), GREEDY).finish_reason == "length"


def test_closing_ends_running_and_waiting_requests(
    load: Load, workers: list[Worker], until: Until
) -> None:
    engine = load(max_batch=1, context_length=100_000)
    ended: list[BaseException] = []

    def run() -> None:
        try:
            engine.generate(prompt(5), ENDLESS)
        except CancelledError as error:
            ended.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    until(lambda: len(workers[0]._running) == 1 and len(workers[0]._waiting) == 2)
    engine.close()
    engine.close()
    for thread in threads:
        thread.join(timeout=10)
    assert [str(error) for error in ended] == ["The engine was closed while it answered."] * 3


def test_a_closed_engine_says_so(load: Load) -> None:
    engine = load()
    with engine:
        pass
    for use in (
        lambda: engine.generate([1]),
        lambda: engine.stream([1]),
        lambda: engine.logits([1]),
    ):
        with pytest.raises(UsageError, match="was closed; load the artifact again"):
            use()


def test_a_closed_engine_frees_its_memory(
    odd_artifact: Path, watched_models: list[Watched]
) -> None:
    engine = Engine.load(odd_artifact, context_length=64)
    (model,) = watched_models
    living = weakref.ref(model.inner)
    assert not model.closed
    engine.close()
    assert model.closed
    watched_models.clear()
    del engine, model
    gc.collect()
    assert living() is None


def test_a_forgotten_engine_gives_its_thread_back(odd_artifact: Path, until: Until) -> None:
    engine = Engine.load(odd_artifact, context_length=64)
    stream = engine.stream([1, 2], ENDLESS)
    thread = engine._thread
    del engine
    gc.collect()
    assert len(list(stream)) == 62  # the stream keeps its engine
    del stream
    gc.collect()
    until(lambda: not thread.is_alive())


def test_an_error_of_a_step_reaches_everyone_and_the_engine_goes_on(
    load: Load, watched_models: list[Watched]
) -> None:
    engine = load()
    broken = threading.Event()

    def fragile(parts, step):
        if broken.is_set():
            broken.clear()
            raise RuntimeError("the kernel said no")
        return step(parts)

    watched_models[0].alter = fragile
    streams = [engine.stream(prompt(20, seed), ENDLESS) for seed in range(3)]
    for stream in streams:
        next(stream)
    broken.set()
    for stream in streams:
        with pytest.raises(RuntimeError, match="the kernel said no"):
            list(stream)
        assert list(stream) == []
    assert engine.generate(prompt(20), GREEDY).finish_reason == "length"


def test_logits_of_no_number_fail_one_request_only(
    load: Load, watched_models: list[Watched]
) -> None:
    engine = load()
    drawn: dict[int, int] = {}

    def fourth_is_none(parts, step):
        results = step(parts)
        for part, result in zip(parts, results, strict=True):
            if part.draw is not None:
                drawn[part.sequence] = drawn.get(part.sequence, 0) + 1
                if drawn[part.sequence] == 4:
                    result.token = -1
        return results

    watched_models[0].alter = fourth_is_none
    with pytest.raises(NumericsError, match="all are NaN or forbidden"):
        engine.generate(prompt(5), GREEDY)
    short = dataclasses.replace(GREEDY, max_tokens=3)
    assert engine.generate(prompt(5), short).finish_reason == "length"


def test_a_process_may_end_while_an_engine_runs(odd_artifact: Path) -> None:
    code = (
        "import sys, mxforge\n"
        "engine = mxforge.Engine.load(sys.argv[1], context_length=100_000)\n"
        "stream = engine.stream([1, 2], mxforge.SamplingParams(temperature=0, ignore_eos=True))\n"
        "print(next(stream).token_ids)\n"
        "sys.stream = stream  # so that nothing closes it first\n"
    )
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, "-c", code, odd_artifact], capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stderr) == (0, "")
