"""The compiled model as a whole: the same numbers as transformers, however the work is cut."""

from __future__ import annotations

import dataclasses
import shutil
import threading
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints.random_checkpoint import write_checkpoint
from checkpoints.shapes import ODD_SHAPES
from support.steps import CONTEXT, Steps

from mxforge import Engine, SamplingParams
from mxforge.compile import compile_model
from mxforge.compile.checkpoint import HFCheckpoint
from mxforge.compile.diff import compare, random_tokens
from mxforge.compile.models.gpt_oss.reference import (
    ReferenceModel,
    transformers_logits,
    transformers_model,
)
from mxforge.machine import usable_cores
from mxforge.safetensors import open_safetensors

EXACT = 1e-4  # against the reference
AGREE = 1e-5  # of two ways through the same artifact

Compiled = Callable[..., Path]
Checkpoints = Callable[[str], Path]


def relative_error(ours: np.ndarray, truth: np.ndarray) -> float:
    return float(np.linalg.norm(ours - truth) / np.linalg.norm(truth))


@pytest.fixture(scope="module")
def steps(compiled: Compiled) -> Callable[[str], Steps]:
    @cache
    def load(name: str, numerics: str = "exact") -> Steps:
        return Steps(compiled(name, numerics))

    return load


@pytest.fixture(scope="module")
def engine(compiled: Compiled) -> Iterator[Callable[..., Engine]]:
    """engine(shape, numerics="exact") -> one that is shared and closed at the end."""
    loaded: list[Engine] = []

    @cache
    def load(name: str, numerics: str = "exact") -> Engine:
        loaded.append(Engine.load(compiled(name, numerics), context_length=CONTEXT))
        return loaded[-1]

    yield load
    for one in loaded:
        one.close()


def tokens_of(engine: Engine, count: int, seed: int) -> list[int]:
    return random_tokens(engine.vocab_size, count, seed).tolist()


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0, ignore_eos=True)


# -- against transformers --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ODD_SHAPES)
def test_exact_logits_equal_the_golden_ones(name, engine, golden):
    truth = golden(name)
    logits = engine(name).logits(truth.tokens)
    assert logits.dtype == np.float32
    assert relative_error(logits[truth.rows], truth.logits) <= EXACT
    # Every position, the others by their norm and their largest logit.
    assert relative_error(np.linalg.norm(logits, axis=1), truth.norms) <= EXACT
    largest = logits.max(axis=1)
    behind = largest - logits[np.arange(len(logits)), truth.argmax]
    assert (behind <= EXACT * truth.norms).all()


@pytest.mark.live
@pytest.mark.parametrize("name", ODD_SHAPES)
def test_exact_logits_equal_those_of_transformers(name, engine, odd_checkpoint: Checkpoints):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    checkpoint = HFCheckpoint(odd_checkpoint(name))
    tokens = random_tokens(checkpoint.config.vocab_size, 333, seed=7)
    truth, _ = transformers_logits(transformers_model(checkpoint), tokens)
    assert relative_error(engine(name).logits(tokens), truth) <= EXACT


# -- the same numbers, however the work is cut -----------------------------------------------------


@pytest.fixture(scope="module")
def one_shot(steps) -> Callable[[str], tuple[np.ndarray, np.ndarray]]:
    """one_shot(shape) -> 320 tokens and their logits, computed in one call."""

    @cache
    def run(name: str) -> tuple[np.ndarray, np.ndarray]:
        steps_ = steps(name)
        tokens = random_tokens(steps_.vocab_size, 320, seed=3)
        return tokens, steps_.prefill(tokens, len(tokens))

    return run


# Below, at and past a page; across the windows of 1, 5, 17, 20 and 128; an uneven rest.
@pytest.mark.parametrize("chunk", [3, 16, 17, 100, 319])
@pytest.mark.parametrize("name", ODD_SHAPES)
def test_chunked_prefill_agrees_with_one_shot(name, chunk, steps, one_shot):
    tokens, whole = one_shot(name)
    assert relative_error(steps(name).prefill(tokens, chunk), whole) <= AGREE


@pytest.mark.parametrize("name", ODD_SHAPES)
def test_token_by_token_agrees_with_one_shot(name, steps, one_shot):
    tokens, whole = one_shot(name)
    one = steps(name)
    begun = one.begin()
    logits = np.concatenate([one.run([(begun, token)])[0] for token in tokens[:, None]])
    one.end(begun)
    assert relative_error(logits, whole) <= AGREE


@pytest.mark.parametrize("name", ["odd-1", "odd-3"])
def test_a_ragged_batch_agrees_with_each_sequence_alone(name, steps):
    """Sequences that prefill, others that decode, at different positions, in one call."""
    one = steps(name)
    lengths = (150, 33, 16, 90)
    texts = [random_tokens(one.vocab_size, n, seed=n) for n in lengths]
    alone = [one.prefill(text, len(text)) for text in texts]
    # Tokens of each sequence in each call: none, one (as decoding does), or a chunk.
    plan = [(40, 1, 0, 17), (1, 15, 16, 1), (0, 1, 0, 50), (109, 16, 0, 22)]
    sequences = [one.begin() for _ in texts]
    got: list[list[np.ndarray]] = [[] for _ in texts]
    for counts in plan:
        taken = [i for i, count in enumerate(counts) if count]
        parts = [
            (sequences[i], texts[i][sequences[i].length : sequences[i].length + counts[i]])
            for i in taken
        ]
        for i, logits in zip(taken, one.run(parts), strict=True):
            got[i].append(logits)
    one.end(*sequences)
    for rows, truth in zip(got, alone, strict=True):
        assert relative_error(np.concatenate(rows), truth) <= AGREE


def test_decoding_a_batch_agrees_with_each_sequence_alone(steps):
    one = steps("odd-1")
    texts = [random_tokens(one.vocab_size, 60, seed=n) for n in range(4)]
    starts = (3, 16, 31, 48)  # positions of the last prompt tokens, differing in page and slot
    alone = [one.prefill(text, 60) for text in texts]
    sequences = [one.begin() for _ in texts]
    for sequence, text, start in zip(sequences, texts, starts, strict=True):
        one.run([(sequence, text[:start])])
    for step in range(12):
        parts = [
            (sequence, text[start + step : start + step + 1])
            for sequence, text, start in zip(sequences, texts, starts, strict=True)
        ]
        for row, truth, start in zip(one.run(parts), alone, starts, strict=True):
            assert relative_error(row[0], truth[start + step]) <= AGREE
    one.end(*sequences)


def test_several_threads_get_the_logits_of_their_own_tokens(engine):
    one = engine("odd-1")
    texts = [tokens_of(one, n, seed=n) for n in (200, 7, 90, 64, 1)]
    alone = [one.logits(text) for text in texts]
    together: list[np.ndarray] = [np.empty(0)] * len(texts)

    def ask(index: int) -> None:
        together[index] = one.logits(texts[index])

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, truth in zip(together, alone, strict=True):
        assert relative_error(ours, truth) <= AGREE


# -- generation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["odd-1", "odd-4"])
def test_greedy_generation_takes_the_largest_logit(name, engine):
    one = engine(name)
    prompt = tokens_of(one, 37, seed=11)
    answer = one.generate(prompt, greedy(40))
    assert answer.finish_reason == "length"
    assert len(answer.token_ids) == 40
    logits = one.logits([*prompt, *answer.token_ids])[len(prompt) - 1 : -1]
    chosen = logits[np.arange(40), list(answer.token_ids)]
    assert (logits.max(axis=1) - chosen <= AGREE * np.linalg.norm(logits, axis=1)).all()


@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_tokens_and_logits_are_the_same_every_run_and_for_every_thread_count(
    numerics, compiled: Compiled
):
    artifact = compiled("odd-1", numerics)
    params = SamplingParams(max_tokens=50, temperature=1.0, top_p=0.95, seed=5, ignore_eos=True)
    answers, logits = set(), set()
    for threads in {1, usable_cores()}:
        for _run in range(2):
            with Engine.load(artifact, threads=threads, context_length=CONTEXT) as one:
                assert one.threads == threads
                prompt = tokens_of(one, 100, seed=2)
                answers.add(one.generate(prompt, params).token_ids)
                answers.add(one.generate(prompt, params).token_ids)  # its prefix is known now
                logits.add(one.logits(prompt).tobytes())
    assert len(answers) == 1
    assert len(logits) == 1


def test_another_seed_gives_other_tokens(engine):
    one = engine("odd-1")
    prompt = tokens_of(one, 20, seed=2)
    answers = {
        one.generate(prompt, SamplingParams(max_tokens=20, seed=seed, ignore_eos=True)).token_ids
        for seed in range(4)
    }
    assert len(answers) == 4


def test_sampled_tokens_do_not_depend_on_what_else_is_in_the_batch(compiled: Compiled):
    def ask(one: Engine, index: int) -> tuple[int, ...]:
        prompt = tokens_of(one, 10 + 23 * index, seed=index)
        params = SamplingParams(max_tokens=30, temperature=0.8, seed=index, ignore_eos=True)
        return one.generate(prompt, params).token_ids

    with Engine.load(compiled("odd-1"), context_length=CONTEXT) as one:
        alone = [ask(one, index) for index in range(5)]
    with Engine.load(compiled("odd-1"), context_length=CONTEXT) as one:
        together: dict[int, tuple[int, ...]] = {}
        threads = [
            threading.Thread(target=lambda i=index: together.update({i: ask(one, i)}))
            for index in range(5)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [together[index] for index in range(5)] == alone


# odd-4 has a window of 128: nothing of 64 positions is dropped. odd-2 has one of 20: once 64
# positions are computed, only prefixes of more than 50 still have the window before them.
@pytest.mark.parametrize(
    ("name", "common", "cached"),
    [("odd-4", n, n) for n in (1, 15, 16, 17, 40, 63)] + [("odd-2", 40, 0), ("odd-2", 60, 60)],
)
def test_a_known_prefix_changes_nothing(name, common, cached, compiled: Compiled):
    """Prefixes that end inside a page and at its edges, continued in two ways."""
    params = dataclasses.replace(greedy(20), logprobs=0)

    def answer(one: Engine, prompt: list[int]) -> tuple[tuple[int, ...], np.ndarray, int]:
        completion = one.generate(prompt, params)
        assert completion.logprobs is not None
        chosen = np.array([token.logprob for token in completion.logprobs])
        return completion.token_ids, chosen, completion.usage.cached_tokens

    with Engine.load(compiled(name), context_length=CONTEXT, max_batch=2) as one:
        first = tokens_of(one, 64, seed=1)
        second = [*first[:common], *tokens_of(one, 64 - common, seed=2)]
        fresh = answer(one, second)
    with Engine.load(compiled(name), context_length=CONTEXT, max_batch=2) as one:
        original, branched = answer(one, first), answer(one, second)
        repeated, untouched = answer(one, second), answer(one, first)
    assert [fresh[2], original[2], branched[2], repeated[2], untouched[2]] == [0, 0, cached, 63, 63]
    for ours, truth in ((branched, fresh), (repeated, fresh), (untouched, original)):
        assert ours[0] == truth[0]
        assert np.abs(ours[1] - truth[1]).max() <= 1e-4


# -- 120b shapes -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_120b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """128 experts, four a token, two layers; narrow, so that it fits an everyday run."""
    narrow = {
        "hidden_size": 96,
        "intermediate_size": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 1003,
    }
    folder = tmp_path_factory.mktemp("120b") / "small-120b"
    return write_checkpoint(folder, "120b-2layers", seed=1, overrides=narrow)


@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_128_experts_agree(numerics, small_120b: Path, tmp_path: Path):
    artifact = compile_model(small_120b, output=tmp_path / "artifact", numerics=numerics)
    report = compare(artifact, small_120b, tokens=200)
    report.check()
    assert report.routed == 400
    with Engine.load(artifact, context_length=CONTEXT) as one:
        tokens = random_tokens(one.vocab_size, 300, seed=4)
        logits = one.logits(tokens)
    if numerics == "exact":
        assert relative_error(logits, ReferenceModel(small_120b).logits(tokens)) <= EXACT


def made_larger(checkpoint: Path, tensor: str, exponent: int) -> None:
    """Multiply a tensor of bfloat16 by 2^exponent in the file."""
    (file,) = checkpoint.glob("*.safetensors")
    where = open_safetensors(file).tensors[tensor]
    with file.open("r+b") as stored:
        stored.seek(where.begin)
        content = np.frombuffer(stored.read(where.end - where.begin), ml_dtypes.bfloat16)
        stored.seek(where.begin)
        stored.write((content * np.float32(2**exponent)).astype(ml_dtypes.bfloat16).tobytes())


@pytest.mark.parametrize("target", ["cpu", pytest.param("vulkan", marks=pytest.mark.slow)])
def test_a_residual_beyond_float16_agrees(
    target, small_120b: Path, tmp_path: Path, request: pytest.FixtureRequest
):
    """The residual of 120b is known to leave the range of float16."""
    if target == "vulkan":
        request.getfixturevalue("vulkan")
    checkpoint = shutil.copytree(small_120b, tmp_path / "checkpoint")
    made_larger(checkpoint, "model.layers.0.mlp.experts.down_proj_bias", 22)
    artifact = compile_model(checkpoint, target, tmp_path / "artifact", numerics="fast")
    compare(artifact, checkpoint).check()
    reference = ReferenceModel(checkpoint)
    residual = reference.layer(0, reference.embed(np.arange(10))).output
    assert np.abs(residual).max() > np.finfo(np.float16).max


@pytest.fixture(scope="module")
def real_120b(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("120b-2layers")
    yield write_checkpoint(folder / "checkpoint", "120b-2layers", seed=1)
    shutil.rmtree(folder)  # 5.7 GB that pytest would keep


@pytest.mark.full
@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_120b_shapes_agree(numerics, real_120b: Path, tmp_path: Path):
    artifact = compile_model(real_120b, output=tmp_path / "artifact", numerics=numerics)
    try:
        report = compare(artifact, real_120b, tokens=40)
    finally:
        shutil.rmtree(artifact)
    report.check()
    assert report.routed == 80
