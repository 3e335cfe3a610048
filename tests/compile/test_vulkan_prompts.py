"""Long prompts and ragged batches on a Vulkan device, which many tokens' kernels compute."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from checkpoints.random_checkpoint import write_checkpoint
from checkpoints.shapes import Shape
from nano.evaluation import divergence
from support.steps import Steps

from mxforge import Engine, SamplingParams, compile_model
from mxforge.compile.diff import random_tokens

pytestmark = pytest.mark.slow

# Of two ways through the same artifact, by the cache's dtype: numbers that differ by 1e-7 may be
# rounded to float16 in two ways.
AGREE = {"float32": 1e-5, "float16": 1e-4}
CONTEXT = 1024
NATS = 0.01  # of `fast` from `exact`
# Sizes that all tuned schedules take, and few logits.
SHAPE = {
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": 20,
    "vocab_size": 203,
}


def relative_error(ours: np.ndarray, truth: np.ndarray) -> float:
    return float(np.linalg.norm(ours - truth) / np.linalg.norm(truth))


@pytest.fixture(scope="module")
def nanos(vulkan, nano: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Target -> nano: exactly on the CPU, fast on Vulkan."""
    folder = tmp_path_factory.mktemp("nano")
    return {
        "cpu": compile_model(nano, "cpu", folder / "cpu", "exact"),
        "vulkan": compile_model(nano, "vulkan", folder / "vulkan", prefill_chunk=640),
    }


# A cache in float16 is what attention of chunks takes on Vulkan; all else is exact there too.
EXACT = {"float32": {"numerics": "exact"}, "float16": {"kv": "f16", "dense": "bf16"}}


@pytest.fixture(scope="module", params=EXACT)
def kv(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def steps(vulkan, kv: str, tmp_path_factory: pytest.TempPathFactory) -> Steps:
    """A model of SHAPE, with a cache of that dtype, 640 tokens in a step."""
    folder = tmp_path_factory.mktemp("small")
    checkpoint = write_checkpoint(folder / "checkpoint", Shape("small, few logits", SHAPE))
    artifact = compile_model(checkpoint, "vulkan", folder / "exact", prefill_chunk=640, **EXACT[kv])
    return Steps(artifact, context=CONTEXT)


def test_a_prompt_of_600_tokens_is_answered_as_on_the_cpu(nanos: dict[str, Path]):
    messages = []
    for a in range(20, 62, 2):
        messages += [
            {"role": "user", "content": f"What is {a} + {a + 7}?"},
            {"role": "assistant", "content": f"{a} + {a + 7} = {2 * a + 7}."},
        ]
    messages += [{"role": "user", "content": "What is 17 + 25?"}]
    params = SamplingParams(temperature=0, max_tokens=40)
    answers = []
    for artifact in nanos.values():
        with Engine.load(artifact, context_length=CONTEXT) as engine:
            answers.append(engine.chat(messages, params))
    assert answers[0].usage.prompt_tokens >= 600
    assert answers[0].usage.completion_tokens > 8
    assert answers[0].token_ids == answers[1].token_ids


def test_prompts_agree_however_they_are_cut(kv: str, steps: Steps):
    """One call, chunks, token by token behind a chunk, and beside others in ragged calls."""
    one, agree = steps, AGREE[kv]
    tokens = random_tokens(one.vocab_size, 600, seed=3)
    whole = one.prefill(tokens, 600)
    for chunk in (100, 319):
        assert relative_error(one.prefill(tokens, chunk), whole) <= agree
    # Of the long sequence, then of two short ones: tokens in each call.
    short = [random_tokens(one.vocab_size, 8, seed=n) for n in (1, 2)]
    alone = [one.prefill(text, 8) for text in short]
    sequences = [one.begin() for _ in range(3)]
    got: list[list[np.ndarray]] = [[], [], []]
    for counts in [(0, 3, 1), (511, 1, 1), (9, 1, 1), (75, 1, 4), *[(1, 0, 0)] * 5, (0, 2, 1)]:
        taken = [i for i, count in enumerate(counts) if count]
        texts = [tokens, *short]
        parts = [
            (sequences[i], texts[i][sequences[i].length : sequences[i].length + counts[i]])
            for i in taken
        ]
        for i, logits in zip(taken, one.run(parts), strict=True):
            got[i].append(logits)
    one.end(*sequences)
    for rows, truth in zip(got, [whole, *alone], strict=True):
        assert relative_error(np.concatenate(rows), truth) <= agree


def test_the_same_prompt_gives_the_same_bits(steps: Steps):
    tokens = random_tokens(steps.vocab_size, 300, seed=5)
    assert np.array_equal(steps.prefill(tokens, 300), steps.prefill(tokens, 300))


def test_fast_says_nearly_what_exact_says(nanos: dict[str, Path]):
    """The mean over a conversation of the Kullback-Leibler divergence, in nats."""
    text = " ".join(f"What is {a} + {3 * a}? {a} + {3 * a} = {4 * a}." for a in range(10, 18))
    logits = []
    for artifact in nanos.values():
        with Engine.load(artifact, context_length=CONTEXT) as engine:
            logits.append(engine.logits(engine.encode(text)))
    exact, fast = logits
    assert len(exact) >= 100
    assert divergence(exact, fast).mean() <= NATS
