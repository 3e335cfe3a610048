"""Sampling parameters: what is refused, and how a call of `sample` is laid out."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mxforge.errors import SamplingError
from mxforge.sampling import (
    SamplingParams,
    new_seed,
    token_bitmask,
)

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-1, NAN, INF, -INF, 101, "1", None, True, 1e-9, 1j, 10**400]),
        ("top_p", [-0.1, 1.1, NAN, "x", None, [1]]),
        ("min_p", [-0.1, 1.1, NAN]),
        ("top_k", [-1, 1.5, 2**31, True, None, "3", NAN]),
        ("max_tokens", [0, -1, 2.0, 2**31, False]),
        ("repetition_penalty", [0, -1, NAN, INF, 101]),
        ("presence_penalty", [NAN, INF, 101, -101]),
        ("frequency_penalty", [NAN, -INF, 101, "0"]),
        ("seed", [-1, 2**64, 1.0, "7"]),
        ("logprobs", [-1, 21, 1.0, True]),
        ("stop", [[""], "", [1], 3, {"a": 1}, ["a"] * 65, b"x"]),
        ("stop_token_ids", [[-1], [1.0], 5, "12", [2**31], [True]]),
        ("ignore_eos", [1, None]),
        ("logit_bias", [[1], {-1: 0.0}, {1: NAN}, {1: -INF}, {1: 2e4}, {"1": 0.0}, {1: None}]),
        ("bitmask", [[1], np.zeros(3, np.int32), np.zeros((1, 3), np.uint32)]),
    ],
)
def test_absurd_values_are_refused_by_name(name, values):
    for value in values:
        with pytest.raises(SamplingError, match=name):
            SamplingParams(**{name: value})


def test_edges_and_numpy_numbers_are_taken():
    params = SamplingParams(
        max_tokens=np.int64(1), temperature=0, top_p=np.float32(0), top_k=np.int32(0), min_p=1,
        seed=2**64 - 1, logprobs=0, logit_bias={np.int64(3): -100}, stop=["a", "b"],
        stop_token_ids=np.array([1, 2]),
    )  # fmt: skip
    assert params.greedy
    assert not params.penalized
    assert params.logit_bias == {3: -100.0}
    assert params.stop_token_ids == (1, 2)
    assert SamplingParams(stop="x").stop_strings == ("x",)
    assert type(params.max_tokens) is int


def test_params_are_frozen_and_own_their_mask():
    mask = token_bitmask([5], 40)
    params = SamplingParams(bitmask=mask)
    mask[:] = 0
    assert params.bitmask[0] == 1 << 5
    with pytest.raises(ValueError, match="read-only"):
        params.bitmask[0] = 1
    with pytest.raises(AttributeError):
        params.seed = 1


def test_equality():
    mask = token_bitmask([1], 40)
    assert SamplingParams() == SamplingParams(temperature=1)
    assert SamplingParams(seed=1) != SamplingParams(seed=2)
    assert SamplingParams(bitmask=mask) == SamplingParams(bitmask=mask)
    assert SamplingParams(bitmask=mask) != SamplingParams()
    assert SamplingParams(bitmask=mask) != SamplingParams(bitmask=token_bitmask([2], 40))


def test_bitmask_bits():
    mask = token_bitmask([0, 31, 32, 69], 70)
    assert mask.dtype == np.uint32
    assert mask.tolist() == [0x80000001, 1, 1 << 5]
    with pytest.raises(SamplingError, match="70"):
        token_bitmask([70], 70)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"logit_bias": {70: 1.0}}, "logit_bias"),
        ({"stop_token_ids": [1000]}, "1000"),
        ({"bitmask": np.ones(2, np.uint32)}, "3 words"),
        ({"bitmask": np.zeros(3, np.uint32)}, "allows none"),
        ({"bitmask": np.array([0, 0, 1 << 6], np.uint32)}, "allows none"),  # token 70 of 70
    ],
)
def test_what_does_not_fit_the_vocabulary_is_refused(params, message):
    with pytest.raises(SamplingError, match=message):
        SamplingParams(**params).check(70)


def test_what_fits_the_vocabulary_passes():
    SamplingParams(logit_bias={69: 1.0}, stop_token_ids=[0], bitmask=token_bitmask([69], 70)).check(
        70
    )
    SamplingParams(bitmask=token_bitmask([63], 64)).check(64)


def test_new_seeds_differ_and_fit():
    seeds = {new_seed() for _ in range(10)}
    assert len(seeds) == 10
    assert all(SamplingParams(seed=seed).seed == seed for seed in seeds)
