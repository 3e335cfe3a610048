"""The whole model as CUDA and Metal text: prompt and decoding give the CPU's numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoints.random_checkpoint import write_checkpoint
from checkpoints.shapes import Shape
from nano.evaluation import divergence
from support.simt.kernels import TARGETS
from support.simt.model import SimtModel
from support.targets import BLACKWELL

from mxforge import Engine, compile_model
from mxforge.compile.checkpoint import HFCheckpoint
from mxforge.compile.formats import Precision
from mxforge.compile.models.gpt_oss.reference import ReferenceModel
from mxforge.schedules.attention.attend_chunk_cuda import ChunkTile
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
EXACT, FAST = 1e-4, 1e-2
FAST_FORMATS = Precision("float16", "bf16", "i8xf32")  # of CUDA
NATS = 0.01


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


@pytest.mark.slow
def test_fast_layers_are_within_the_bound(simt, checkpoint):
    """On the inputs that the reference gives them; by turns many tokens, some, few and one."""
    opened = HFCheckpoint(checkpoint)
    model = SimtModel(simt, "cuda", opened, opened.config, FAST_FORMATS, sequences=1, pages=13)
    reference = ReferenceModel(opened)
    tokens = np.random.default_rng(7).integers(1, SHAPE["vocab_size"], 200)
    assert len(tokens) * SHAPE["num_experts_per_tok"] >= (
        MANY["cuda"][1] * SHAPE["num_local_experts"]
    )
    for count in (200, 20, 3, 1):
        x = reference.embed(tokens[:count])
        for layer, kind in enumerate(opened.config.kinds):
            truth = reference.layer(layer, x)
            *_, ids, _, y = model.layer(kind, x)
            same = (np.sort(ids) == np.sort(truth.expert_ids)).all(axis=1)
            assert same.mean() >= 0.95
            assert error(y[same], truth.output[same]) <= FAST
            x = truth.output


@pytest.mark.slow
def test_fast_says_nearly_what_exact_says(simt, nano, tmp_path):
    """The mean of the Kullback-Leibler divergence over some of a conversation, in nats."""
    text = " ".join(f"What is {a} + {3 * a}? {a} + {3 * a} = {4 * a}." for a in range(10, 18))
    with Engine.load(compile_model(nano, "cpu", tmp_path / "exact", "exact")) as engine:
        tokens = engine.encode(text)
        exact = engine.logits(tokens)
    opened = HFCheckpoint(nano)
    model = SimtModel(simt, "cuda", opened, opened.config, FAST_FORMATS, sequences=1, pages=10)
    rows = range(3, len(tokens), 8)
    fast = model.forward(tokens, range(len(tokens)), [0] * len(tokens), rows)
    assert len(rows) >= 12
    assert divergence(exact[list(rows)], fast).mean() <= NATS


@pytest.mark.slow
def test_layers_with_mxfp8_on_blackwell(simt, checkpoint, monkeypatch):
    """Many tokens and few have the same numbers, and err as docs/numerics.md has it."""
    monkeypatch.setitem(TARGETS, "cuda", BLACKWELL)
    opened = HFCheckpoint(checkpoint)
    precision = Precision("float16", "mxfp8", "i8xf32")
    model = SimtModel(simt, "cuda", opened, opened.config, precision, sequences=1, pages=13)
    reference = ReferenceModel(opened)
    tokens = np.random.default_rng(7).integers(1, SHAPE["vocab_size"], 200)
    x = reference.embed(tokens)
    truth = reference.layer(0, x)
    few = 3
    layers = [model.layer(opened.config.kinds[0], x[:count]) for count in (len(x), few)]
    assert any(name.endswith("scaled") for name in model.called)
    (*_, ids, _, y), (*_, few_ids, _, few_y) = layers
    same = (np.sort(ids) == np.sort(truth.expert_ids)).all(axis=1)
    assert same.mean() >= 0.95
    assert FAST < error(y[same], truth.output[same]) <= 5 * FAST
    assert (ids[:few] == few_ids).all()
    assert error(few_y, y[:few]) <= FAST / 5


@pytest.mark.slow
def test_chunks_of_prompts_beside_decoding(simt, tmp_path):
    shape = Shape("small, heads of 64", {**SHAPE, "head_dim": 64})
    checkpoint = write_checkpoint(tmp_path / "checkpoint", shape)
    tokens = [np.random.default_rng(n).integers(1, SHAPE["vocab_size"], n) for n in (84, 88)]
    artifact = compile_model(
        checkpoint, "cpu", tmp_path / "artifact", kv="f16", activations="f32", dense="bf16"
    )
    with Engine.load(artifact, context_length=96) as engine:
        truth = [engine.logits(list(map(int, row))) for row in tokens]
    opened = HFCheckpoint(checkpoint)

    def model() -> SimtModel:
        precision = Precision(kv="float16")
        return SimtModel(simt, "cuda", opened, opened.config, precision, sequences=2, pages=6)

    def forward(model: SimtModel, begins: list[int], counts: tuple[int, int]) -> np.ndarray:
        spans = [range(at, at + count) for at, count in zip(begins, counts, strict=True)]
        logits = model.forward(
            np.concatenate([row[span] for row, span in zip(tokens, spans, strict=True)]),
            np.concatenate(spans),
            np.repeat([0, 1], counts),
        )
        wanted = np.concatenate([of[span] for of, span in zip(truth, spans, strict=True)])
        assert error(logits, wanted) <= EXACT
        return logits

    whole = 82, 86
    assert np.array_equal(forward(model(), [0, 0], whole), forward(model(), [0, 0], whole))
    chunked, begins = model(), [0, 0]
    for counts in ((67, 1), (1, 85), (14, 0)):
        assert sum(counts) - 2 >= ChunkTile().least or counts[1] == 0
        forward(chunked, begins, counts)
        begins = [at + count for at, count in zip(begins, counts, strict=True)]
    for step in range(2):
        at = [n + step for n in whole]
        logits = chunked.decode([row[i] for row, i in zip(tokens, at, strict=True)], at)
        assert error(logits, np.stack([of[i] for of, i in zip(truth, at, strict=True)])) <= EXACT


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
