"""Requests get the same answers alone and in company, on any number of threads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from support.prompts import CONTEXT, ENDLESS, GREEDY, VOCAB, prompt
from support.sequences import Watched

from mxforge import Engine, SamplingParams
from mxforge.machine import usable_cores
from mxforge.sampling import token_bitmask

Load = Callable[..., Engine]


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


def test_steps_that_are_submitted_ahead_change_nothing(
    load: Load, alone: list[tuple], watched_models: list[Watched]
) -> None:
    engine = load()
    (model,) = watched_models
    model.runs_behind = True  # of a CPU that is only so in that it has no result before its time
    assert [ask(engine, request) for request in REQUESTS] == alone
    with ThreadPoolExecutor(len(REQUESTS)) as pool:
        assert list(pool.map(lambda request: ask(engine, request), REQUESTS)) == alone
    assert model.ahead > 100


def test_several_answers_are_those_of_their_seeds(load: Load) -> None:
    engine, fresh = load(), load()
    params = SamplingParams(max_tokens=12, temperature=1.3, seed=5, ignore_eos=True)
    for length in (1, 16, 40):
        answers = engine.generate(prompt(length), params, n=6)
        for index, answer in enumerate(answers):
            own = dataclasses.replace(params, seed=5 + index)
            assert answer.token_ids == fresh.generate(prompt(length), own).token_ids
    # With four places, two answers begin from the prompt that was kept.
    computed = engine.metrics().prompt_tokens - engine.metrics().cached_tokens
    assert computed == sum(length - 1 + 6 for length in (1, 16, 40))


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


# ------------------------------------------------------------------------------------------ threads


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


def computes(task: int) -> bool:
    """Whether the thread is one that runs kernels, and does not map weights."""
    return Path(f"/proc/self/task/{task}/comm").read_text().strip() != "mxf-prefault"


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
@pytest.mark.skipif(usable_cores() < 2, reason="needs two cores")
def test_kernels_run_on_as_many_threads_as_asked(load: Load) -> None:
    """Each engine has its own number of threads, whichever was loaded last, and uses them all."""
    engines, own = {}, {}
    for threads in (2, 1):
        before = cpu_ticks()
        engines[threads] = load(threads=threads)
        engines[threads].logits(prompt(5))  # all of its threads have names by then
        own[threads] = {task for task in cpu_ticks().keys() - before.keys() if computes(task)}
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
    assert short._inbox.qsize() == 59  # complete before the 100 chunks were
