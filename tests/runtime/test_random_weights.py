"""Weights out of nothing: repeatable, of the asked distribution, and enough to run on."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints.shapes import hf_config

from mxforge import Engine, SamplingParams, compile_model
from mxforge.random_weights import STRETCH, fill_random


def filled(size: int, dtype: str, fill: dict, name: str = "w", seed: int = 0) -> np.ndarray:
    out = np.full(size, 0xAA, np.uint8)
    fill_random(out, name, dtype, fill, seed)
    return out


def test_the_same_name_and_seed_give_the_same_bytes() -> None:
    fill = {"normal": 1.0}
    first = filled(4000, "float32", fill)
    np.testing.assert_array_equal(first, filled(4000, "float32", fill))
    assert (first != filled(4000, "float32", fill, name="v")).any()
    assert (first != filled(4000, "float32", fill, seed=1)).any()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_normal_has_its_deviation(dtype: str) -> None:
    numpy_dtype = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    values = filled(40_000, dtype, {"normal": 0.25}).view(numpy_dtype).astype(np.float32)
    assert abs(values.mean()) < 0.01
    assert values.std() == pytest.approx(0.25, rel=0.05)


def test_bytes_reach_both_ends() -> None:
    values = filled(10_000, "uint8", {"bytes": [5, 9]})
    assert sorted(set(values.tolist())) == [5, 6, 7, 8, 9]
    assert set(filled(100, "uint8", {"bytes": [118, 118]}).tolist()) == {118}


def test_constants_and_listed_values() -> None:
    assert filled(40, "float32", {"constant": 1.5}).view(np.float32).tolist() == [1.5] * 10
    values = [0.5, -2.0, 3.25]
    assert filled(12, "float32", {"values": values}).view(np.float32).tolist() == values
    halves = filled(6, "bfloat16", {"values": values}).view(ml_dtypes.bfloat16)
    assert halves.astype(np.float32).tolist() == values


def test_words_hold_numbers_of_another_dtype() -> None:
    fill = {"normal": 0.25}
    words = filled(40_000, "uint32", {**fill, "of": "bfloat16"})
    np.testing.assert_array_equal(words, filled(40_000, "bfloat16", fill))


@pytest.mark.parametrize("extra", [-1, 0, 1, 1000])
def test_long_weights_repeat_a_stretch(extra: int) -> None:
    size = 2 * STRETCH + extra
    values = filled(size, "uint8", {"bytes": [0, 255]})
    np.testing.assert_array_equal(values[STRETCH : 2 * STRETCH - 1], values[: STRETCH - 1])
    if extra > 0:
        np.testing.assert_array_equal(values[2 * STRETCH :], values[:extra])
    assert STRETCH % 2 == 1


def test_an_artifact_without_weights_runs_and_repeats(tmp_path: Path) -> None:
    overrides = {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 32,
        "vocab_size": 300,
        "num_local_experts": 4,
    }
    config = tmp_path / "bare" / "config.json"
    config.parent.mkdir()
    config.write_text(json.dumps(hf_config("tiny", overrides)))
    artifact = compile_model(config, output=tmp_path / "artifact", random_weights=True)
    assert not list(artifact.glob("*.safetensors"))
    answers, logits = [], []
    for _ in range(2):
        with Engine.load(artifact, context_length=128) as engine:
            params = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)
            answers.append(engine.generate([1, 2, 3], params).token_ids)
            logits.append(engine.logits(list(range(100))))
    assert answers[0] == answers[1]
    assert np.isfinite(logits[0]).all()
    assert 0.1 < logits[0].std() < 10
    np.testing.assert_array_equal(*logits)
