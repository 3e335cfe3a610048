"""The whole model as CUDA and Metal text: prompt and decoding give the CPU's numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoints.random_checkpoint import write_checkpoint
from checkpoints.shapes import Shape
from support.simt.model import SimtModel

from mxforge import Engine, compile_model
from mxforge.compile.checkpoint import HFCheckpoint
from mxforge.compile.formats import Precision
from mxforge.schedules.cuda.dense import DenseTile
from mxforge.schedules.linear import rows_gpu
from mxforge.schedules.moe import grouped_gpu
from mxforge.schedules.moe.grouped_cuda import Grouped

# Sizes that tuned schedules take, kept as small as can be.
SHAPE = {
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 16,
    "num_experts_per_tok": 2,
    "sliding_window": 20,
    "vocab_size": 203,
}
EXACT = 1e-4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(
        tmp_path_factory.mktemp("tuned") / "checkpoint",
        Shape("small, of sizes that tuned schedules take", SHAPE),
    )


@pytest.fixture(scope="module")
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(1, SHAPE["vocab_size"], (2, 27))


@pytest.fixture(scope="module")
def expected(checkpoint: Path, tokens: np.ndarray) -> np.ndarray:
    """Logits of every position [2, 27, vocab], by the CPU in exact numerics."""
    artifact = compile_model(checkpoint, "cpu", checkpoint.parent / "artifact", "exact")
    with Engine.load(artifact, context_length=64) as engine:
        return np.stack([engine.logits(list(map(int, row))) for row in tokens])


# Of each family: from how many tokens on, and slots an expert.
MANY = {
    "cuda": (DenseTile().least, Grouped().least),
    "metal": (rows_gpu.MANY.least, grouped_gpu.MANY.least),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MANY)
def test_long_prompts_take_products_of_many_tokens(simt, kind, checkpoint):
    lengths = (110, 90)
    slots = sum(lengths) * SHAPE["num_experts_per_tok"]
    least_tokens, least_slots = MANY[kind]
    assert sum(lengths) >= least_tokens
    assert slots >= least_slots * SHAPE["num_local_experts"]
    tokens = [np.random.default_rng(n).integers(1, SHAPE["vocab_size"], n) for n in lengths]
    artifact = compile_model(checkpoint, "cpu", checkpoint.parent / f"long-{kind}", "exact")
    with Engine.load(artifact, context_length=128) as engine:
        truth = np.concatenate([engine.logits(list(map(int, row))) for row in tokens])
    opened = HFCheckpoint(checkpoint)
    model = SimtModel(simt, kind, opened, opened.config, Precision(), sequences=2, pages=7)
    positions = np.concatenate([np.arange(n) for n in lengths])
    logits = model.forward(np.concatenate(tokens), positions, np.repeat([0, 1], lengths))
    assert error(logits, truth) <= EXACT


@pytest.mark.parametrize("kind", ["cuda", "metal"])
def test_prompt_then_decoding(simt, kind, checkpoint, tokens, expected):
    opened = HFCheckpoint(checkpoint)
    model = SimtModel(simt, kind, opened, opened.config, Precision(), sequences=2, pages=2)
    lengths = (25, 21)  # decoding begins here
    prompts = np.concatenate([row[:n] for row, n in zip(tokens, lengths, strict=True)])
    positions = np.concatenate([np.arange(n) for n in lengths])
    logits = model.forward(prompts, positions, np.repeat([0, 1], lengths))
    truth = np.concatenate([rows[:n] for rows, n in zip(expected, lengths, strict=True)])
    assert error(logits, truth) <= EXACT
    for step in range(2):
        at = [n + step for n in lengths]
        logits = model.decode(tokens[[0, 1], at], at)
        assert error(logits, expected[[0, 1], at]) <= EXACT


def error(ours: np.ndarray, truth: np.ndarray) -> float:
    return float(np.linalg.norm(ours - truth) / np.linalg.norm(truth))
