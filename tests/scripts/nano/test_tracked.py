"""The tracked model in artifacts/nano: what it answers, compiled and not."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nano import compact, dialogue, text
from support.nano import COMPACT_NANO, ROOT

from mxforge.compile.checkpoint import HFCheckpoint
from mxforge.compile.models.gpt_oss.reference import (
    ReferenceModel,
    transformers_logits,
    transformers_model,
)


def test_the_tracked_files_are_small():
    assert sum(p.stat().st_size for p in COMPACT_NANO.iterdir()) <= 6_000_000


def test_used_tokens_are_those_of_the_text(renderer: Any):
    used = set(map(int, compact.Compact(COMPACT_NANO).used))
    rng = random.Random(5)
    for _ in range(40):
        setting = dialogue.draw_setting(rng)
        assert used.issuperset(renderer.prefix(setting))
        for _ in range(10):
            exchanges = dialogue.draw_dialogue(rng, setting)
            tokens = renderer.dialogue(exchanges, setting.effort, dialogue.noise_ids(rng))
            said = [t for t, on in zip(tokens.ids, tokens.trained, strict=True) if on]
            assert used.issuperset(said)


@pytest.mark.live
def test_tracked_model_agrees_with_transformers_and_with_the_trained_module(
    nano: Path, renderer: Any
):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from nano import model as trained

    stored = compact.Compact(COMPACT_NANO)
    setting = dialogue.Setting("high", True)
    exchange = text.draw(random.Random(2), "calculator", True, True)
    tokens = renderer.dialogue([exchange], "high", lambda: 0)
    prefix = renderer.prefix(setting)
    checkpoint = HFCheckpoint(nano)
    ours = ReferenceModel(checkpoint).logits([*prefix, *tokens.ids])
    truth, _ = transformers_logits(transformers_model(checkpoint), [*prefix, *tokens.ids])
    assert np.linalg.norm(ours - truth) / np.linalg.norm(truth) < 1e-5
    model = trained.load(stored.config, stored.floats())
    batch = trained.make_batch(prefix, [(tokens.ids, tokens.trained)], stored.rows())
    with torch.no_grad():
        module = model.logits(model.hidden(batch, quantized=False)[0]).numpy()
    n = len(prefix) + len(tokens.ids)
    module = module[:n][:, stored.rows()]
    assert np.linalg.norm(module - truth) / np.linalg.norm(truth) < 1e-5


@pytest.mark.full
def test_the_evaluation_runs_and_fast_is_as_good_as_exact(tmp_path: Path):
    words = [sys.executable, ROOT / "scripts" / "eval_nano", "--count", "20"]
    words += ["--only", "fast", "--only", "exact", "--json", tmp_path / "nano.json"]
    result = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    share = json.loads((tmp_path / "nano.json").read_text())["percent_right"]["all"]
    assert share["fast"] >= 92
    assert abs(share["fast"] - share["exact"]) <= 1.5  # two of 140


def test_a_token_without_a_row_never_wins(nano: Path, renderer: Any):
    stored = compact.Compact(COMPACT_NANO)
    used = frozenset(map(int, stored.used))
    reference = ReferenceModel(HFCheckpoint(nano))
    rng = random.Random(11)
    noise = dialogue.noise_ids(rng, used)
    for category in ("sum", "calculator", "other"):
        setting = dialogue.Setting("medium", category == "calculator")
        exchange = text.draw(rng, category, setting.calculator, True)
        tokens = renderer.dialogue([exchange], setting.effort, noise)
        prefix = renderer.prefix(setting)
        rows = [len(prefix) + i - 1 for i, on in enumerate(tokens.trained) if on]
        logits = reference.logits([*prefix, *tokens.ids], rows).astype(np.float64)
        assert used.issuperset(logits.argmax(axis=1).tolist())
        share = np.exp(logits - logits.max(axis=1, keepdims=True))
        share /= share.sum(axis=1, keepdims=True)
        others = np.delete(share, stored.used, axis=1).sum(axis=1)
        assert others.max() < 0.01  # sampling at temperature 1 does not meet them either


@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_the_demo_question_is_answered(numerics: str, nano: Path, tmp_path: Path):
    import mxforge

    artifact = mxforge.compile_model(nano, output=tmp_path / "nano", numerics=numerics)
    params = mxforge.SamplingParams(temperature=0, max_tokens=100)
    with mxforge.Engine.load(artifact, context_length=512, max_batch=1) as engine:
        answer = engine.chat([{"role": "user", "content": "What is 17 + 25?"}], params)
    assert answer.thinking == "17+25: ones 7+5=12, tens 1+2+1=4, so 42."
    assert answer.content == "17 + 25 = 42."
    assert answer.finish_reason == "stop"


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="runs in ./scripts/test only")
def test_the_demo_answers():
    result = subprocess.run(
        [ROOT / "scripts" / "demo"], capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "\n17 + 25 = 42.\n" in result.stdout
    assert "→ 7006652]" in result.stdout
    assert f"artifact   {ROOT / 'artifacts' / 'nano-cpu'}" in result.stdout


@pytest.mark.slow
def test_fast_numerics_predict_what_exact_ones_do(nano: Path, tmp_path: Path, renderer: Any):
    from nano import evaluation

    import mxforge

    used = frozenset(map(int, compact.Compact(COMPACT_NANO).used))
    asked = [case for group in evaluation.cases(renderer, 2, used).values() for case in group]
    artifacts = [
        mxforge.compile_model(nano, output=tmp_path / numerics, numerics=numerics)
        for numerics in ("exact", "fast")
    ]
    with (
        mxforge.Engine.load(artifacts[0], context_length=1024) as exact,
        mxforge.Engine.load(artifacts[1], context_length=1024) as fast,
    ):
        assert 0 < evaluation.mean_divergence(exact, fast, asked) <= 0.01
