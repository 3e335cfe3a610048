"""What a measurement counts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.small import PREFILL_CHUNK

from mxforge import bench
from mxforge.bench import AS_GOOD, Rounds, measure, sweep
from mxforge.engine import Engine
from mxforge.errors import UsageError
from mxforge.sampling import SamplingParams
from mxforge.scheduler import Worker

PROMISED = {
    "prefill_tok_s",
    "decode_tok_s",
    "first_token_s",
    "load_s",
    "peak_rss_bytes",
    "threads",
    "target",
}


def test_a_measurement_has_what_is_promised(odd_artifact: Path) -> None:
    result = measure(odd_artifact, prompt_tokens=20, new_tokens=5, batch=2, repeats=3)
    json.dumps(result, allow_nan=False)
    assert result.keys() >= PROMISED
    assert all(math.isfinite(result[key]) and result[key] > 0 for key in PROMISED - {"target"})
    assert (result["batch"], result["prompt_tokens"], result["new_tokens"]) == (2, 20, 5)
    assert result["peak_rss_bytes"] > 10e6
    assert result["first_token_s"] > result["load_s"]
    rates = sorted(sample["decode_tok_s"] for sample in result["samples"])
    assert len(rates) == 3
    assert result["decode_tok_s"] == rates[1]


@pytest.mark.parametrize(("batch", "count", "new"), [(1, 40, 7), (4, 70, 9), (3, 1, 1)])
def test_the_second_half_decodes_only(
    odd_artifact: Path, monkeypatch: pytest.MonkeyPatch, batch: int, count: int, new: int
) -> None:
    usages = []
    stream = Engine.stream

    def noting(self, prompt, params):
        pieces = list(stream(self, prompt, params))
        usages.append(pieces[-1].usage)
        return iter(pieces)

    with Engine.load(odd_artifact, context_length=256, max_batch=batch) as engine:
        prompts = [[7 + n] * count for n in range(batch)]
        monkeypatch.setattr(Engine, "stream", noting)
        ticks = iter([0.0, 2.0, 10.0, 15.0])
        monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
        sample = bench._sample(engine, prompts, new)
    assert sample == {"prefill_tok_s": batch * count / 2, "decode_tok_s": batch * new / 5}
    assert [usage.completion_tokens for usage in usages] == [1] * batch + [new] * batch
    assert [usage.cached_tokens for usage in usages[batch:]] == [count] * batch


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_tokens": 0}, "prompt_tokens must be"),
        ({"new_tokens": -1}, "new_tokens must be"),
        ({"batch": 0}, "batch must be"),
        ({"batch": 5}, "at most 4, as compiled"),
        ({"repeats": 0}, "repeats must be"),
        ({"depth": -1}, "depth must be 0 or"),
        ({"depth": 7}, "depth must be 0 or a whole number of at least 16, found 7"),
        ({"depth": 8192}, "less than the context of 8192"),
        (
            {"prompt_tokens": 60, "new_tokens": 4, "context_length": 64},
            "less than the context of 64",
        ),
        ({"prompt_tokens": 10**12}, "less than the context of 8192"),
    ],
)
def test_absurd_sizes_are_refused(odd_artifact: Path, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        measure(odd_artifact, **options)


@pytest.mark.parametrize(("depth", "batch"), [(16, 1), (100, 2), (400, 1)])
def test_a_depth_is_stood_at_without_computing_it(
    odd_artifact: Path, monkeypatch: pytest.MonkeyPatch, depth: int, batch: int
) -> None:
    steps = []  # of the tokens before each part, and those in it
    plan = Worker._plan

    def noting(self):
        requests, parts = plan(self)
        if parts:
            computed = [request.computed for request in requests]
            steps.append([(n, len(p.tokens)) for n, p in zip(computed, parts, strict=True)])
        return requests, parts

    monkeypatch.setattr(Worker, "_plan", noting)
    sizes = {"prompt_tokens": 5, "new_tokens": 3, "batch": batch, "context_length": 512}
    result = measure(odd_artifact, depth=depth, **sizes)
    assert (result["depth"], result["prompt_tokens"]) == (depth, 5)
    first = next(i for i, step in enumerate(steps) if (depth, 5) in step)  # the first prompt
    assert all(start >= depth for step in steps[first:] for start, _ in step)
    computed = sum(count for step in steps[:first] for _, count in step)
    assert computed <= 16 + batch * (PREFILL_CHUNK + 1)  # warm-up, what is copied, a token each
    assert steps[-1] == [(depth + 7, 1)] * batch


def test_rounds_of_several_depths_take_turns(odd_artifact: Path) -> None:
    with Engine.load(odd_artifact, context_length=256, max_batch=1) as engine:
        rounds = Rounds(engine)
        for _ in range(3):
            for depth in (0, 32, 200):
                taken = rounds.take(5, 2, depth)  # raises where the depth was not kept
                assert min(taken["prefill_tok_s"], taken["decode_tok_s"]) > 0


def test_made_up_tokens_are_known_and_answered_after(odd_artifact: Path) -> None:
    """They count as computed, and what is in their place is numbers."""
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=3, ignore_eos=True)
    with Engine.load(odd_artifact, context_length=256, max_batch=1) as engine:
        tokens = [index % 50 for index in range(100)]
        truly = engine.generate([*tokens, 1, 2], params)
    with Engine.load(odd_artifact, context_length=256, max_batch=1) as engine:
        bench._past(engine, tokens)
        made_up = engine.generate([*tokens, 1, 2], params)
    assert made_up.usage.cached_tokens >= 100 > truly.usage.cached_tokens
    assert made_up.logprobs is not None
    assert made_up.logprobs != truly.logprobs  # the first 96 tokens stand for the last ones too
    for token in made_up.logprobs:
        assert -20 < token.logprob <= 0


def test_the_whole_context_can_be_measured(odd_artifact: Path) -> None:
    measure(odd_artifact, prompt_tokens=50, new_tokens=13, batch=4, context_length=64)
    measure(odd_artifact, prompt_tokens=1, new_tokens=1, context_length=3)


def test_a_sweep_measures_every_size_once(
    odd_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks: list[int] = []
    load = Engine.load

    def noting(*args, prefill_chunk=None, **options):
        chunks.append(prefill_chunk)
        return load(*args, prefill_chunk=prefill_chunk, **options)

    monkeypatch.setattr(Engine, "load", noting)
    result = sweep(odd_artifact, new_tokens=4, context_length=256, repeats=3)
    json.dumps(result, allow_nan=False)
    assert [row["batch"] for row in result["decode"]] == [1, 2, 4]
    listed = [row["prefill_chunk"] for row in result["prefill"]]
    assert listed == chunks[1:]
    assert listed[0] == min(32, PREFILL_CHUNK)
    assert listed[-1] == result["prompt_tokens"] == PREFILL_CHUNK
    for row in (*result["decode"], *result["prefill"]):
        assert len(row["samples"]) == 3
        assert row["step_s"] > 0


def test_the_prompts_of_a_sweep_are_new(
    odd_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What an engine has seen costs nothing, and would be timed as if it were fast."""
    seen: set[tuple[int, ...]] = set()

    def unseen(engine, prompts, new_tokens, depth=0):
        for prompt in prompts:
            assert tuple(prompt) not in seen
            seen.add(tuple(prompt))
        return {"prefill_tok_s": 1.0, "decode_tok_s": 1.0}

    monkeypatch.setattr(bench, "_sample", unseen)
    sweep(odd_artifact, new_tokens=4, context_length=256, most=4, repeats=2)
    assert len(seen) >= 2 * (1 + 2 + 4)


def test_the_best_is_the_smallest_that_is_nearly_as_fast(
    odd_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = {1: 10.0, 2: 100 * AS_GOOD, 4: 100.0}

    def speeds(engine, prompts, new_tokens, depth=0):
        return {"prefill_tok_s": 50.0, "decode_tok_s": decode[len(prompts)]}

    monkeypatch.setattr(bench, "_sample", speeds)
    result = sweep(odd_artifact, new_tokens=4, context_length=256)
    smallest = result["prefill"][0]["prefill_chunk"]
    assert result["best"] == {"prefill_chunk": smallest, "max_batch": 2}
    assert [row["step_s"] for row in result["decode"]] == [0.1, 2 / 95, 0.04]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_tokens": 0}, "prompt_tokens must be"),
        ({"new_tokens": 0}, "new_tokens must be"),
        ({"repeats": 0}, "repeats must be"),
        ({"most": 5}, "at most 4, as compiled"),
        ({"prompt_tokens": 64, "context_length": 64}, "less than the context of 64, found 64 and"),
        ({"new_tokens": 48, "context_length": 64}, "less than the context of 64, found"),
    ],
)
def test_absurd_sweeps_are_refused(odd_artifact: Path, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sweep(odd_artifact, **options)
