"""The whole model on a Vulkan device: the numbers of transformers, the text of the CPU."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.prompts import NANO_PROMPTS

from mxforge import Engine, SamplingParams, compile_model
from mxforge.artifact import read_manifest
from mxforge.compile.checkpoint import HFCheckpoint
from mxforge.compile.diff import compare
from mxforge.compile.models.gpt_oss.reference import transformers_logits, transformers_model
from mxforge.compile.targets import VULKAN_PROFILES, resolve
from mxforge.errors import TargetError
from mxforge.inspect import describe
from mxforge.vulkan import check

EXACT = 1e-4
ROOT = Path(__file__).resolve().parents[2]
PROFILES = [profile.name for profile in VULKAN_PROFILES]
Compiled = Callable[..., Path]
Checkpoints = Callable[[str], Path]


def relative_error(ours: np.ndarray, truth: np.ndarray) -> float:
    return float(np.linalg.norm(ours - truth) / np.linalg.norm(truth))


@pytest.mark.parametrize(
    "shape",
    ["odd-1", "odd-5", *(pytest.param(f"odd-{n}", marks=pytest.mark.slow) for n in (2, 3, 4))],
)
def test_exact_on_shapes_of_every_kind(vulkan, shape: str, compiled: Compiled, golden):
    truth = golden(shape)
    with Engine.load(compiled(shape, "exact", target="vulkan"), context_length=512) as engine:
        logits = engine.logits(truth.tokens)
    assert relative_error(logits[truth.rows], truth.logits) <= EXACT


@pytest.mark.parametrize("profile", PROFILES)
def test_fast_within_its_bound_on_every_profile(
    vulkan, profile: str, compiled: Compiled, odd_checkpoint: Checkpoints
):
    artifact = compiled("odd-1", "fast", target=f"vulkan:{profile}")
    manifest = read_manifest(artifact)
    assert manifest.target.name == f"vulkan:{profile}"
    assert manifest.precision.kv_dtype == ("float32" if profile == "minimum" else "float16")
    compare(artifact, odd_checkpoint("odd-1"), tokens=100).check()
    # Which matrices of its kernels this device has; where it has none of theirs, others run.
    device, matrices = check(), describe(artifact)["matrices"]
    assert bool(matrices) == (profile == "desktop")
    for each in matrices:
        product, size = each["matrices"]
        assert size.startswith("by subgroups of ")
        has = product in device.matrices and int(size.split()[-1]) == device.subgroup_size[0]
        assert each["runs_here"] == ("runs here" if has else "not on the device here")


def test_sampling_is_the_cpus(vulkan, compiled: Compiled):
    """Every sampling parameter, and log-probabilities."""
    params = SamplingParams(
        max_tokens=24, temperature=0.8, top_k=40, top_p=0.9, min_p=0.02, seed=3, logprobs=5,
        repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.1,
        logit_bias={5: 2.0}, ignore_eos=True,
    )  # fmt: skip
    told = []
    for target in ("cpu", "vulkan"):
        artifact = compiled("odd-2", "exact", target=target)
        with Engine.load(artifact, context_length=512) as engine:
            told.append(engine.generate([1, 2, 3, 4], params))
    ours, theirs = told
    assert ours.token_ids == theirs.token_ids
    assert ours.logprobs is not None
    assert theirs.logprobs is not None
    np.testing.assert_allclose(
        [each.logprob for each in ours.logprobs], [each.logprob for each in theirs.logprobs], 1e-4
    )


def test_unknown_profile():
    with pytest.raises(TargetError, match=r"'laptop'; the known ones are desktop, mobile, minimum"):
        resolve("vulkan:laptop")


# -- nano ------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def nano_artifacts(vulkan, nano: Path) -> dict[str, Path]:
    """Target -> nano with exact numerics."""
    return {
        target: compile_model(nano, target, nano.parent / target, numerics="exact")
        for target in ("cpu", "vulkan")
    }


@pytest.mark.slow
def test_nano_writes_what_it_writes_on_the_cpu(nano_artifacts: dict[str, Path]):
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    written: dict[str, Any] = {}
    for target, artifact in nano_artifacts.items():
        with Engine.load(artifact, context_length=512) as engine, ThreadPoolExecutor(16) as pool:
            answers = pool.map(lambda prompt: engine.generate(prompt, params), NANO_PROMPTS)
            written[target] = [answer.token_ids for answer in answers]
    assert all(len(ids) == 64 for ids in written["cpu"])
    assert written["vulkan"] == written["cpu"]


@pytest.mark.live
def test_nano_agrees_with_transformers(nano: Path, nano_artifacts: dict[str, Path]):
    pytest.importorskip("transformers")
    with Engine.load(nano_artifacts["vulkan"], context_length=512) as engine:
        tokens = engine.encode("What is 17 + 25? 17 + 25 = 42. Which is larger, 905 or 918?")
        logits = engine.logits(tokens)
    truth, _ = transformers_logits(transformers_model(HFCheckpoint(nano)), tokens)
    assert relative_error(logits, truth) <= EXACT


@pytest.mark.slow
def test_nano_fast_is_right(vulkan, nano: Path, tmp_path: Path):
    artifact = compile_model(nano, "vulkan", tmp_path / "nano")
    with Engine.load(artifact, context_length=512) as engine:
        question = {"role": "user", "content": "What is 17 + 25?"}
        answer = engine.chat([question], SamplingParams(temperature=0, max_tokens=100))
    assert answer.content == "17 + 25 = 42."
