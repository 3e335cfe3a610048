"""The engine on small compiled models: the same answers alone and in company, every way to end."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import mxforge
from mxforge import Engine, SamplingParams
from mxforge.artifact import verify
from mxforge.errors import (
    ArtifactCorruptError,
    ArtifactError,
    ArtifactTargetError,
    ArtifactVersionError,
    CancelledError,
    ContextLengthError,
    KVMemoryError,
    MxforgeError,
    NumericsError,
    SamplingError,
    TokenizerError,
    TokenRangeError,
    UsageError,
)
from mxforge.library import usable_cores
from mxforge.model import Model
from mxforge.sampling import token_bitmask
from mxforge.scheduler import Worker

CONTEXT = 512
VOCAB = 1003
Load = Callable[..., Engine]
Until = Callable[..., None]

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0, ignore_eos=True)  # until the context is full


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([seed, length]).integers(1, VOCAB, length).tolist()


def forced(*tokens: int, **others) -> SamplingParams:
    """Parameters that allow no other tokens."""
    return SamplingParams(bitmask=token_bitmask(tokens, VOCAB), **others)


@pytest.fixture(scope="module")
def engine(odd_artifact: Path) -> Iterator[Engine]:
    with Engine.load(odd_artifact, context_length=CONTEXT) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def text_engine(text_artifact: Path) -> Iterator[Engine]:
    with Engine.load(text_artifact, context_length=CONTEXT) as loaded:
        yield loaded


# ------------------------------------------------------------------------------- the interface


def test_an_answer_has_tokens_reason_usage_and_timings(engine: Engine) -> None:
    answer = engine.generate(prompt(40), GREEDY)
    assert len(answer.token_ids) == 12
    assert all(type(token) is int and 0 <= token < VOCAB for token in answer.token_ids)
    assert (answer.text, answer.finish_reason, answer.logprobs) == ("", "length", None)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (40, 12)
    timings = dataclasses.asdict(answer.timings)
    assert all(math.isfinite(value) and value >= 0 for value in timings.values()), timings
    assert answer.timings.decode_tok_s > 0


def test_a_stream_is_the_answer_piece_by_piece(engine: Engine) -> None:
    whole = engine.generate(prompt(7), GREEDY)
    pieces = list(engine.stream(prompt(7), GREEDY))
    assert tuple(token for piece in pieces for token in piece.token_ids) == whole.token_ids
    assert [piece.finish_reason for piece in pieces] == [None] * 11 + ["length"]
    assert all(piece.usage is None for piece in pieces[:-1])
    assert pieces[-1].usage is not None
    assert pieces[-1].timings is not None


def test_prompts_may_be_any_whole_numbers(engine: Engine) -> None:
    expected = engine.generate([1, 2, 3], GREEDY).token_ids
    for same in ((1, 2, 3), np.array([1, 2, 3]), np.array([1, 2, 3], np.uint8), iter([1, 2, 3])):
        assert engine.generate(same, GREEDY).token_ids == expected


def test_default_parameters_sample_until_the_end(engine: Engine) -> None:
    answer = engine.generate(prompt(CONTEXT - 5))
    assert answer.finish_reason in ("stop", "length")
    assert 1 <= len(answer.token_ids) <= 5


def test_logits_are_float32_for_every_position(engine: Engine) -> None:
    tokens = prompt(150)
    logits = engine.logits(tokens)
    assert logits.shape == (150, VOCAB)
    assert logits.dtype == np.float32
    assert np.isfinite(logits).all()
    for length in (1, 2, 31, 32, 33, 64, 65, 149):
        np.testing.assert_array_equal(engine.logits(tokens[:length]), logits[:length])
    assert engine.logits(prompt(CONTEXT)).shape == (CONTEXT, VOCAB)


def test_the_package_exports_what_answers_are_made_of() -> None:
    for name in mxforge.__all__:
        assert getattr(mxforge, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Motor'"):
        _ = mxforge.Motor


# ------------------------------------------------------------------------------------ sampling


def continued(engine: Engine, tokens: Sequence[int], answer: Sequence[int]) -> np.ndarray:
    """The logits that each token of the answer was chosen by: f32 [len(answer), vocabulary]."""
    return engine.logits([*tokens, *answer[:-1]])[len(tokens) - 1 :]


def test_temperature_0_takes_the_largest_logit(engine: Engine) -> None:
    tokens = prompt(50)
    answer = engine.generate(tokens, GREEDY).token_ids
    assert answer == tuple(continued(engine, tokens, answer).argmax(axis=1))


def test_top_k_1_is_greedy(engine: Engine) -> None:
    params = SamplingParams(max_tokens=12, temperature=1.5, top_k=1, ignore_eos=True)
    assert (
        engine.generate(prompt(9), params).token_ids == engine.generate(prompt(9), GREEDY).token_ids
    )


def test_logprobs_are_log_softmax_of_the_raw_logits(engine: Engine) -> None:
    tokens = prompt(30)
    params = SamplingParams(
        max_tokens=10, temperature=1.3, seed=5, logprobs=7, ignore_eos=True, logit_bias={3: 4.0}
    )
    answer = engine.generate(tokens, params)
    assert answer.logprobs is not None
    logits = continued(engine, tokens, answer.token_ids).astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert len(answer.logprobs) == 10
    for row, token, logprob in zip(expected, answer.token_ids, answer.logprobs, strict=True):
        assert logprob.token_id == token
        assert logprob.logprob == pytest.approx(row[token], abs=1e-4)
        top = np.argsort(-row, kind="stable")[:7]
        assert [candidate for candidate, _ in logprob.top] == top.tolist()
        np.testing.assert_allclose([value for _, value in logprob.top], row[top], atol=1e-4)


def test_logprobs_0_lists_the_chosen_token_only(engine: Engine) -> None:
    params = SamplingParams(max_tokens=3, temperature=0, logprobs=0)
    answer = engine.generate(prompt(5), params)
    assert answer.logprobs is not None
    assert [logprob.top for logprob in answer.logprobs] == [()] * len(answer.token_ids)


def test_penalties_and_bias_change_the_logits_as_documented(engine: Engine) -> None:
    tokens = [4, 4, 9, 300, 17, 9]
    bias = {17: 1.5, 2: -3.0, 998: 2.0}
    params = SamplingParams(
        max_tokens=40,
        temperature=0,
        repetition_penalty=1.4,
        presence_penalty=0.3,
        frequency_penalty=0.2,
        logit_bias=bias,
        ignore_eos=True,
    )
    answer = engine.generate(tokens, params).token_ids
    expected = []
    for step, row in enumerate(continued(engine, tokens, answer).astype(np.float64)):
        output = answer[:step]
        for token in {*tokens, *output}:
            row[token] = row[token] / 1.4 if row[token] > 0 else row[token] * 1.4
        for token in set(output):
            row[token] -= 0.2 * output.count(token) + 0.3
        for token, value in bias.items():
            row[token] += value
        expected.append(int(row.argmax()))
    assert list(answer) == expected
    assert answer[:12] != engine.generate(tokens, GREEDY).token_ids


def test_a_bitmask_leaves_only_what_it_allows(engine: Engine) -> None:
    allowed = [7, 31, 32, 500, VOCAB - 1]
    tokens = prompt(20)
    params = forced(*allowed, max_tokens=12, temperature=0, ignore_eos=True)
    answer = engine.generate(tokens, params).token_ids
    rows = continued(engine, tokens, answer)[:, allowed]
    assert list(answer) == [allowed[column] for column in rows.argmax(axis=1)]
    sampled = forced(*allowed, max_tokens=60, temperature=100.0, seed=1, ignore_eos=True)
    assert set(engine.generate(tokens, sampled).token_ids) == set(allowed)


def test_a_seed_repeats_and_others_differ(engine: Engine) -> None:
    def answer(seed: int | None) -> tuple[int, ...]:
        params = SamplingParams(max_tokens=20, temperature=1.5, seed=seed, ignore_eos=True)
        return engine.generate(prompt(8), params).token_ids

    by_seed = {seed: answer(seed) for seed in (0, 1, 2**32, 2**64 - 1)}
    assert len(set(by_seed.values())) == 4
    assert all(answer(seed) == tokens for seed, tokens in by_seed.items())
    assert answer(None) != answer(None)


def test_each_token_is_drawn_by_seed_and_step(engine: Engine) -> None:
    from mxforge.schedules.sample_token import sample_token_ref

    tokens, seed = prompt(8), 2**40 + 5
    answer = engine.generate(
        tokens,
        SamplingParams(
            max_tokens=30, temperature=1.5, top_k=80, top_p=0.95, seed=seed, ignore_eos=True
        ),
    ).token_ids
    logits = continued(engine, tokens, answer)
    count = len(logits)
    ids, _ = sample_token_ref(
        logits,
        np.full(count, 1.5, np.float32),
        np.full(count, 80, np.int32),
        np.full(count, 0.95, np.float32),
        np.zeros(count, np.float32),
        np.tile(np.array([seed & 0xFFFFFFFF, seed >> 32], np.int32), (count, 1)),
        np.arange(count, dtype=np.int32),
    )
    # A draw that falls between two tokens may go either way in f32.
    assert sum(a == b for a, b in zip(answer, ids.tolist(), strict=True)) >= count - 1


# ---------------------------------------------------------------------------- the same answers


REQUESTS = [
    (prompt(length, seed=length), SamplingParams(ignore_eos=True, **params))
    for length, params in (
        (1, {"max_tokens": 20, "temperature": 0}),
        (150, {"max_tokens": 5, "temperature": 0, "logprobs": 3}),
        (33, {"max_tokens": 15, "temperature": 1.2, "seed": 1, "top_k": 50}),
        (32, {"max_tokens": 30, "temperature": 0.9, "seed": 2, "top_p": 0.9}),
        (64, {"max_tokens": 1, "temperature": 2.0, "seed": 3, "min_p": 0.01}),
        (5, {"max_tokens": 40, "temperature": 0, "repetition_penalty": 1.3}),
        (17, {"max_tokens": 25, "temperature": 1.0, "seed": 4, "logit_bias": {5: 9.0}}),
        (100, {"max_tokens": 10, "temperature": 0, "bitmask": token_bitmask(range(90), VOCAB)}),
    )
]


def ask(engine: Engine, request: tuple[list[int], SamplingParams]) -> tuple:
    answer = engine.generate(*request)
    return answer.token_ids, answer.logprobs


@pytest.fixture(scope="module")
def alone(odd_artifact: Path) -> list[tuple]:
    """The answers to REQUESTS, one after another."""
    with Engine.load(odd_artifact, context_length=CONTEXT, max_batch=1) as engine:
        return [ask(engine, request) for request in REQUESTS]


def test_threads_that_share_an_engine_get_the_answers_they_get_alone(
    load: Load, alone: list[tuple]
) -> None:
    engine = load()
    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        for _ in range(3):
            assert list(pool.map(lambda request: ask(engine, request), REQUESTS)) == alone


def test_more_requests_than_places_wait_and_all_finish(load: Load, alone: list[tuple]) -> None:
    engine = load(max_batch=2)
    streams = [engine.stream(*request) for request in REQUESTS]
    answers = [[token for piece in s for token in piece.token_ids] for s in reversed(streams)]
    assert [tuple(tokens) for tokens in reversed(answers)] == [tokens for tokens, _ in alone]


@pytest.mark.parametrize("prefill_chunk", [1, 5, 32])
def test_the_size_of_chunks_changes_nothing(
    load: Load, alone: list[tuple], prefill_chunk: int
) -> None:
    engine = load(prefill_chunk=prefill_chunk)
    assert [ask(engine, request) for request in REQUESTS] == alone


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_changes_nothing(
    load: Load, alone: list[tuple], threads: int
) -> None:
    if threads > usable_cores():
        pytest.skip(f"needs {threads} cores")
    engine = load(threads=threads)
    assert engine.threads == threads
    assert [ask(engine, request) for request in REQUESTS] == alone


def test_logits_are_the_same_whatever_else_runs(load: Load, engine: Engine) -> None:
    tokens = prompt(200)
    expected = engine.logits(tokens)
    busy = load()
    running = [busy.stream(prompt(20, seed), ENDLESS) for seed in range(2)]
    for stream in running:
        next(stream)
    with ThreadPoolExecutor(2) as pool:
        for logits in pool.map(busy.logits, [tokens, tokens]):
            np.testing.assert_array_equal(logits, expected)
    for stream in running:
        stream.close()


def test_a_prompt_seen_before_is_not_computed_again(load: Load) -> None:
    engine = load()
    tokens = prompt(77)
    first = engine.generate(tokens, GREEDY)
    assert first.usage.cached_tokens == 0
    again = engine.generate(tokens, GREEDY)
    assert again.token_ids == first.token_ids
    assert again.usage.cached_tokens == 76

    fresh = load()
    for longer in (
        [*tokens, *first.token_ids, 5, 6, 7],  # the next turn of a conversation
        [*tokens, 5, 6, 7],  # another one from the same prompt
    ):
        turn = engine.generate(longer, GREEDY)
        assert turn.usage.cached_tokens >= 77
        assert turn.token_ids == fresh.generate(longer, GREEDY).token_ids


def test_prompts_that_share_their_beginning_stay_apart(load: Load) -> None:
    engine, fresh = load(), load()
    common = prompt(40)
    engine.generate(common, GREEDY)
    branches = [[*common, token] for token in (1, 2, 3, 4)]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda tokens: engine.generate(tokens, ENDLESS), branches))
    for tokens, answer in zip(branches, answers, strict=True):
        assert answer.usage.cached_tokens == 40
        assert answer.token_ids == fresh.generate(tokens, ENDLESS).token_ids


def test_prefixes_give_way_to_running_sequences(load: Load) -> None:
    engine = load(max_batch=1, context_length=64)
    for seed in range(6):
        answer = engine.generate(prompt(50, seed), ENDLESS)
        assert answer.usage.completion_tokens == 14


# ------------------------------------------------------------------------------------- threads


def cpu_ticks() -> dict[int, int]:
    """CPU time of each thread of this process, in clock ticks."""
    ticks = {}
    for task in Path("/proc/self/task").iterdir():
        try:
            fields = (task / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        ticks[int(task.name)] = int(fields[11]) + int(fields[12])
    return ticks


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
@pytest.mark.skipif(usable_cores() < 2, reason="needs two cores")
def test_kernels_run_on_as_many_threads_as_asked(load: Load) -> None:
    """Each engine has its own number of threads, whichever was loaded last, and uses them all."""
    engines, own = {}, {}
    for threads in (2, 1):
        before = cpu_ticks()
        engines[threads] = load(threads=threads)
        own[threads] = cpu_ticks().keys() - before.keys()
        assert len(own[threads]) == threads
    for threads, engine in engines.items():
        before, idle = cpu_ticks(), own[threads]
        for _ in range(100):  # a tick is 10 ms: how many calls one takes depends on the machine
            engine.logits(prompt(500))
            after = cpu_ticks()
            idle = {task for task in own[threads] if after[task] <= before[task]}
            if not idle:
                break
        assert not idle, f"of {threads} threads, {len(idle)} never worked"


def test_all_usable_cores_are_taken_by_default(engine: Engine) -> None:
    assert engine.threads == usable_cores()  # of a machine without a CPU quota


def test_two_engines_of_two_models_run_at_once(
    load: Load, text_artifact: Path, text_engine: Engine, alone: list[tuple]
) -> None:
    first, second = load(), load(text_artifact)
    expected = text_engine.generate([7, 8, 9], GREEDY).token_ids
    with ThreadPoolExecutor(2) as pool:
        odd = pool.submit(lambda: [ask(first, request) for request in REQUESTS])
        text = [second.generate([7, 8, 9], GREEDY).token_ids for _ in range(20)]
        assert odd.result() == alone
    assert text == [expected] * 20


def test_a_long_prompt_does_not_hold_up_a_running_answer(load: Load) -> None:
    engine = load(prefill_chunk=4)
    short = engine.stream(prompt(3), dataclasses.replace(GREEDY, max_tokens=60))
    next(short)
    list(engine.stream(prompt(400), dataclasses.replace(GREEDY, max_tokens=1)))
    assert short._request.inbox.qsize() == 59  # complete before the 100 chunks were


# ---------------------------------------------------------------------------------- how it ends


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
    text_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = text_engine.tokenizer.encode("a€b")
    assert len(tokens) == 5
    script(monkeypatch, tokens)
    params = dataclasses.replace(GREEDY, max_tokens=5)
    pieces = [piece.text for piece in text_engine.stream([7], params)]
    assert pieces == ["a", "", "", "€", "b"]
    cut = dataclasses.replace(GREEDY, max_tokens=3)
    assert text_engine.generate([7], cut).text == "a\N{REPLACEMENT CHARACTER}"


def script(monkeypatch: pytest.MonkeyPatch, tokens: Sequence[int]) -> None:
    """Let sampling give these tokens, by each request's step."""

    def sample(_self, _logits, arguments, logprobs):
        return [tokens[step] for step in arguments.step], None

    monkeypatch.setattr(Model, "sample", sample)


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
    monkeypatch: pytest.MonkeyPatch,
    stop: str | list[str],
    text: str,
    count: int,
    reason: str,
) -> None:
    encode = text_engine.tokenizer.encode
    tokens = [*encode("say "), *encode("hello"), *encode(" "), *encode("world")]
    script(monkeypatch, tokens)
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


def living_models() -> int:
    gc.collect()
    return sum(type(thing) is Model for thing in gc.get_objects())


def test_a_closed_engine_frees_its_memory(odd_artifact: Path) -> None:
    before = living_models()
    engine = Engine.load(odd_artifact, context_length=64)
    assert living_models() == before + 1
    engine.close()
    assert living_models() == before


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
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load()
    healthy = Model.decode
    broken = threading.Event()

    def decode(self, *arguments):
        if broken.is_set():
            broken.clear()
            raise RuntimeError("the kernel said no")
        return healthy(self, *arguments)

    monkeypatch.setattr(Model, "decode", decode)
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
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load()
    healthy = Model.sample

    def sample(self, logits, arguments, logprobs):
        ids, listed = healthy(self, logits, arguments, logprobs)
        steps = arguments.step.tolist()
        return [-1 if step == 3 else token for step, token in zip(steps, ids, strict=True)], listed

    monkeypatch.setattr(Model, "sample", sample)
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


# ----------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("method", ["generate", "stream", "logits"])
@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([], UsageError, "at least one token, found none"),
        ([1, VOCAB], TokenRangeError, f"0 to {VOCAB - 1}, found {VOCAB}"),
        ([1, -1], TokenRangeError, "found -1"),
        ([10**30], TokenRangeError, "found 1000000"),
        ([1, 2.0], UsageError, "found 2.0"),
        (["1"], UsageError, "found '1'"),
        ([True], UsageError, "found True"),
        (b"12", UsageError, "found b'12'"),
        (None, UsageError, "found None"),
        (7, UsageError, "found 7"),
        (np.array([1.5]), UsageError, r"found np.float64\(1.5\)|found 1.5"),
        ([[1, 2]], UsageError, r"found \[1, 2\]"),
        ([1] * (CONTEXT + 1), ContextLengthError, f"{CONTEXT} tokens, found {CONTEXT + 1}"),
        ("text", TokenizerError, "compiled without a tokenizer"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_prompt_that_cannot_be_answered_is_refused(
    engine: Engine, method: str, tokens: object, error: type[MxforgeError], message: str
) -> None:
    with pytest.raises(error, match=message):
        getattr(engine, method)(tokens)


def test_a_prompt_that_fills_the_context_leaves_no_answer(engine: Engine) -> None:
    with pytest.raises(ContextLengthError, match=f"fewer than {CONTEXT} tokens, found {CONTEXT}"):
        engine.generate(prompt(CONTEXT))


def test_parameters_have_to_fit_the_vocabulary(engine: Engine) -> None:
    for params in (
        SamplingParams(logit_bias={VOCAB: 1.0}),
        SamplingParams(stop_token_ids=[VOCAB]),
        SamplingParams(bitmask=np.zeros(3, np.uint32)),
        SamplingParams(bitmask=np.zeros(-(-VOCAB // 32), np.uint32)),
    ):
        with pytest.raises(SamplingError, match="must"):
            engine.generate([1], params)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads must be from 1 to"),
        ({"threads": 100_000}, "found 100000"),
        ({"threads": True}, "found True"),
        ({"threads": "two"}, "found 'two'"),
        ({"context_length": 0}, "context_length must be a whole number of at least 1, found 0"),
        ({"context_length": 1.5}, "found 1.5"),
        ({"max_batch": 0}, "max_batch must be a whole number"),
        ({"context_length": 131_073}, "context_length must be at most 131072, as compiled"),
        ({"max_batch": 5}, "max_batch must be at most 4, as compiled; found 5"),
        ({"prefill_chunk": 33}, "prefill_chunk must be at most 32"),
    ],
)
def test_absurd_options_are_refused(odd_artifact: Path, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Engine.load(odd_artifact, **options)


def test_the_default_context_fits_itself_to_the_model(odd_artifact: Path, tmp_path: Path) -> None:
    artifact = tmp_path / "short"
    shutil.copytree(odd_artifact, artifact)
    manifest = json.loads((artifact / "manifest.json").read_text())
    manifest["limits"]["context"] = 4096
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    with Engine.load(artifact) as engine:
        assert engine.context_length == 4096


def test_stop_strings_need_text(engine: Engine) -> None:
    with pytest.raises(TokenizerError, match="Stop strings end a text, .* use stop_token_ids"):
        engine.generate([1], SamplingParams(stop="end"))


class NothingIsBuilt:
    def __init__(self, *_: object, **__: object) -> None:
        raise AssertionError("something was allocated")


def test_a_kv_pool_that_does_not_fit_is_refused_with_the_numbers(
    odd_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mxforge.engine.available_memory", lambda: 600 << 20)
    monkeypatch.setattr("mxforge.engine.Worker", NothingIsBuilt)
    with pytest.raises(KVMemoryError) as caught:
        Engine.load(odd_artifact, context_length=131_072, max_batch=4)
    found = str(caught.value)
    assert "4 x 131072 tokens needs 0.25 GiB" in found
    assert "0.59 GiB of memory are available" in found
    assert "would fit" in found


def test_without_a_wish_as_many_sequences_run_as_fit(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load(context_length=131_072).max_batch == 4
    # A sequence of 131,072 tokens takes 64 MiB beside the 512 MiB that are always set aside.
    monkeypatch.setattr("mxforge.engine.available_memory", lambda: (512 + 2 * 64 + 40) << 20)
    assert load(context_length=131_072).max_batch == 2
    monkeypatch.setattr("mxforge.engine.available_memory", lambda: None)
    assert load(context_length=131_072).max_batch == 4


def test_random_weights_count_as_memory(
    odd_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = copied(odd_artifact, tmp_path)

    def random_and_huge(manifest: dict) -> None:
        manifest["random_seed"] = 0
        manifest["memory"]["weights_bytes"] = 1 << 34

    edit_manifest(artifact, random_and_huge)
    monkeypatch.setattr("mxforge.engine.available_memory", lambda: 1 << 34)
    monkeypatch.setattr("mxforge.engine.Worker", NothingIsBuilt)
    with pytest.raises(KVMemoryError, match=r"16.50 GiB for the rest, but 16.00 GiB"):
        Engine.load(artifact)


def copied(artifact: Path, folder: Path) -> Path:
    return Path(shutil.copytree(artifact, folder / "copy"))


def edit_manifest(artifact: Path, edit: Callable[[dict], None]) -> None:
    path = artifact / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def _weights(artifact: Path) -> Path:
    (path,) = artifact.glob("weights-*.safetensors")
    return path


def _library(artifact: Path) -> Path:
    (path,) = artifact.glob("model.*")
    return path


def _flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], object], type[ArtifactError], str]] = {
    "nothing there": (lambda a: shutil.rmtree(a), ArtifactError, "nothing at that path"),
    "no manifest": (
        lambda a: (a / "manifest.json").unlink(),
        ArtifactError,
        "manifest.json cannot be read",
    ),
    "a checkpoint": (
        lambda a: (a / "manifest.json").rename(a / "config.json"),
        ArtifactError,
        "looks like a checkpoint",
    ),
    "garbled manifest": (
        lambda a: (a / "manifest.json").write_text("{"),
        ArtifactCorruptError,
        "not readable JSON",
    ),
    "another format": (
        lambda a: edit_manifest(a, lambda m: m.update(format_version=99)),
        ArtifactVersionError,
        "format_version 99",
    ),
    "another ABI": (
        lambda a: edit_manifest(a, lambda m: m.update(abi_version=0)),
        ArtifactVersionError,
        "abi_version 0",
    ),
    "another CPU": (
        lambda a: edit_manifest(a, lambda m: m["target"]["features"].append("quantum")),
        ArtifactTargetError,
        "compiled for a CPU with quantum",
    ),
    "another system": (
        lambda a: edit_manifest(a, lambda m: m["target"].update(host="plan9-mips")),
        ArtifactTargetError,
        "compiled for 'plan9-mips'",
    ),
    "changed library": (
        lambda a: _flip_last_byte(_library(a)),
        ArtifactCorruptError,
        "has another content than was written",
    ),
    "missing library": (lambda a: _library(a).unlink(), ArtifactCorruptError, "is missing"),
    "truncated weights": (
        lambda a: os.truncate(_weights(a), 4096),
        ArtifactCorruptError,
        "but has 4096",
    ),
    "missing weights": (lambda a: _weights(a).unlink(), ArtifactCorruptError, "is missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_artifact_is_refused(odd_artifact: Path, tmp_path: Path, damage: str) -> None:
    artifact = copied(odd_artifact, tmp_path)
    inflict, error, message = DAMAGE[damage]
    inflict(artifact)
    with pytest.raises(error, match=message):
        Engine.load(artifact)


def test_changed_weights_are_left_to_verify(odd_artifact: Path, tmp_path: Path) -> None:
    artifact = copied(odd_artifact, tmp_path)
    _flip_last_byte(_weights(artifact))
    Engine.load(artifact, context_length=64).close()
    with pytest.raises(ArtifactCorruptError, match=r"changed: 'weights-00001.safetensors'"):
        verify(artifact, progress=False).check()
