from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints.shapes import ODD_SHAPES, SHAPES

from mxforge.compile.checkpoint import HFCheckpoint
from mxforge.compile.diff import random_tokens
from mxforge.compile.models.gpt_oss.reference import (
    ReferenceModel,
    dequantize_mxfp4,
    rms_norm,
    swiglu,
    transformers_logits,
    transformers_model,
)
from mxforge.errors import TokenRangeError

Checkpoints = Callable[[str], Path]


def relative_error(ours: np.ndarray, truth: np.ndarray) -> float:
    return float(np.linalg.norm(ours - truth) / np.linalg.norm(truth))


# -- against transformers, as recorded -----------------------------------------------------------


@pytest.mark.parametrize("name", ODD_SHAPES)
def test_generator_still_makes_the_recorded_checkpoint(name, odd_checkpoint: Checkpoints, golden):
    about = golden(name).about
    assert about["shape"] == name
    assert HFCheckpoint(odd_checkpoint(name)).sha256() == about["checkpoint_sha256"], (
        "the random checkpoint changed: run scripts/make_golden and commit tests/compile/golden"
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ODD_SHAPES)
def test_logits_equal_the_golden_ones(name, dtype, odd_checkpoint: Checkpoints, golden):
    truth = golden(name)
    assert len(truth.tokens) >= 300
    logits = ReferenceModel(odd_checkpoint(name), dtype).logits(truth.tokens)
    assert logits.dtype == dtype
    assert relative_error(logits[truth.rows], truth.logits) <= 1e-5
    assert relative_error(np.linalg.norm(logits, axis=1), truth.norms) <= 1e-5
    assert (logits.argmax(axis=1) == truth.argmax).all()


@pytest.mark.parametrize("name", ODD_SHAPES)
def test_layer_inputs_equal_the_golden_ones(name, odd_checkpoint: Checkpoints, golden):
    truth = golden(name)
    model = ReferenceModel(odd_checkpoint(name))
    stream = [model.embed(truth.tokens)]
    stream += [trace.output for trace in model.trace(truth.tokens)]
    for ours, recorded in zip(stream[:-1], truth.layer_inputs, strict=True):
        assert relative_error(ours[truth.rows], recorded) <= 1e-5


@pytest.mark.live
@pytest.mark.parametrize("name", ODD_SHAPES)
def test_logits_equal_those_of_transformers(name, odd_checkpoint: Checkpoints):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    checkpoint = HFCheckpoint(odd_checkpoint(name))
    tokens = random_tokens(checkpoint.config.vocab_size, 333, seed=7)
    truth, _ = transformers_logits(transformers_model(checkpoint), tokens)
    assert relative_error(ReferenceModel(checkpoint).logits(tokens), truth) <= 1e-5


# -- by boundary -----------------------------------------------------------------------------------


def test_dequantization_of_every_code_and_scale():
    codes = np.arange(16, dtype=np.uint8)
    blocks = np.repeat((codes | codes[::-1] << 4)[None, None], 255, axis=0)
    scales = np.arange(255, dtype=np.uint8)[:, None]
    values = dequantize_mxfp4(blocks, scales, np.float64)
    assert values.shape == (255, 1 * 32)
    magnitude = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    signed = np.array(magnitude + [-m for m in magnitude])
    expected = np.stack([signed, signed[::-1]], axis=1).reshape(32)  # low nibble first
    assert (values == expected * 2.0 ** (scales.astype(float) - 127)).all()
    # 6 · 2^126 is beyond float32, smaller scales are exact.
    assert (dequantize_mxfp4(blocks[:252], scales[:252]) == values[:252]).all()


def test_swiglu_limits_gate_above_and_up_on_both_sides():
    gate_up = np.array([[9.0, 9.0, -900.0, -9.0, 1.0, 0.5]])
    y = swiglu(gate_up, 7.0, 1.702)

    def silu(gate: float) -> float:
        return gate / (1 + np.exp(-1.702 * gate))

    assert y[0] == pytest.approx([silu(7.0) * 8, 0.0, silu(1.0) * 1.5], abs=1e-12)


def test_rms_norm_keeps_the_dtype():
    x = np.full((2, 64), 3e4, np.float32)
    normed = rms_norm(x, np.ones(64, np.float32), 1e-5)
    assert normed.dtype == np.float32
    assert normed == pytest.approx(1.0, rel=1e-6)


def test_window_counts_the_query_itself(odd_checkpoint: Checkpoints):
    model = ReferenceModel(odd_checkpoint("odd-1"))
    x = model.embed(random_tokens(model.config.vocab_size, 12))
    whole = model.layer(0, x)  # window 5
    tail = model.layer(0, x[3:], np.arange(3, 12))
    # From the fifth token of the tail on, nothing that was cut off is visible.
    assert relative_error(tail.attention[4:], whole.attention[7:]) <= 1e-6
    assert relative_error(tail.attention[3], whole.attention[6]) > 1e-3


def test_a_window_of_one_sees_only_itself_and_the_sink(odd_checkpoint: Checkpoints):
    model = ReferenceModel(odd_checkpoint("odd-5"))
    x = model.embed(random_tokens(model.config.vocab_size, 20))
    together = model.layer(0, x).output
    alone = np.concatenate(
        [model.layer(0, x[i : i + 1], np.array([i])).output for i in range(len(x))]
    )
    assert relative_error(together, alone) <= 1e-6


def test_a_prefix_does_not_depend_on_what_follows(odd_checkpoint: Checkpoints):
    model = ReferenceModel(odd_checkpoint("odd-2"))
    tokens = random_tokens(model.config.vocab_size, 60)
    whole = model.logits(tokens)
    assert relative_error(model.logits(tokens[:33]), whole[:33]) <= 1e-5
    assert relative_error(model.logits(tokens, rows=[59, 0]), whole[[59, 0]]) <= 1e-5


@pytest.mark.parametrize("name", ODD_SHAPES)
def test_routing_is_spread_and_idle_experts_stay_idle(name, odd_checkpoint: Checkpoints, golden):
    model = ReferenceModel(odd_checkpoint(name))
    config, idle = model.config, SHAPES[name].idle_experts
    for trace in model.trace(golden(name).tokens):
        counts = np.bincount(trace.expert_ids.ravel(), minlength=config.num_local_experts)
        busy = np.delete(counts, idle)
        assert (counts[list(idle)] == 0).all()
        assert busy.min() > 0
        assert trace.expert_weights.sum(axis=1) == pytest.approx(1, rel=1e-6)
        assert 0.5 < trace.output.std() < 5
        if config.num_local_experts > config.num_experts_per_tok:
            assert (trace.router_gap >= 0).all()
        else:
            assert np.isinf(trace.router_gap).all()


def test_some_activations_reach_the_swiglu_limit(odd_checkpoint: Checkpoints, golden):
    model = ReferenceModel(odd_checkpoint("odd-1"))
    trace = next(model.trace(golden("odd-1").tokens))
    gate_up = trace.mlp_input @ model.expert(0, "gate_up_proj", 0).T
    reached = np.abs(gate_up) > model.config.swiglu_limit
    assert 0 < reached.mean() < 0.1


def test_routing_can_be_pinned(odd_checkpoint: Checkpoints):
    model = ReferenceModel(odd_checkpoint("odd-4"))
    x = model.embed(random_tokens(model.config.vocab_size, 9))
    free = model.layer(0, x)
    assert (model.layer(0, x, expert_ids=free.expert_ids).output == free.output).all()
    others = (free.expert_ids + 1) % model.config.num_local_experts
    pinned = model.layer(0, x, expert_ids=others)
    assert (pinned.expert_ids == others).all()
    assert relative_error(pinned.output, free.output) > 1e-3


@pytest.mark.parametrize("token", [-1, 1003])
def test_token_outside_the_vocabulary(odd_checkpoint: Checkpoints, token: int):
    with pytest.raises(TokenRangeError, match=r"0…1002"):
        ReferenceModel(odd_checkpoint("odd-1")).logits([1, token])
