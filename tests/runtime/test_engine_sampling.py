"""Tokens are chosen as the parameters say, by the logits that the engine itself tells."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from support.prompts import GREEDY, VOCAB, forced, prompt

from mxforge import Engine, SamplingParams


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
    from mxforge.schedules.sample.sample_token import sample_token_ref

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
