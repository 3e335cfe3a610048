"""nano, compiled for aarch64 on this machine and answering on that one."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from support.aarch64 import CPUS, Machine

from mxforge import Engine, SamplingParams, compile_model
from mxforge.messages import read_messages

ROOT = Path(__file__).resolve().parents[1]
TOKENS = 16  # enough for the first sum's digits

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def compiled(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """compiled(target, numerics) -> artifact of the demo model."""
    folder = tmp_path_factory.mktemp("nano")

    @cache
    def artifact(target: str, numerics: str) -> Path:
        output = folder / target.replace(":", "-")
        return compile_model(nano, target, output, numerics, max_batch=1, prefill_chunk=32)

    return artifact


@pytest.fixture(scope="module")
def expected(compiled) -> tuple[list[int], list[int]]:
    """A prompt, and the tokens that exact numerics answer on this machine."""
    with Engine.load(compiled("cpu", "exact"), context_length=256) as engine:
        prompt = engine.harmony.prompt(
            read_messages([{"role": "user", "content": "What is 17 + 25?"}])
        )
        greedy = SamplingParams(max_tokens=TOKENS, temperature=0)
        return prompt, list(engine.generate(prompt, greedy).token_ids)


@pytest.mark.parametrize(("level", "numerics"), [("neon-dotprod", "exact"), ("neon-i8mm", "fast")])
def test_nano_answers_as_here(level: str, numerics: str, aarch64: Machine, compiled, expected):
    prompt, tokens = expected
    artifact = compiled(f"cpu:{level}", numerics)
    done = aarch64.run(CPUS[level], "answer", artifact, json.dumps(prompt), str(TOKENS))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == tokens


def test_missing_features_are_named(aarch64: Machine, compiled):
    artifact = compiled("cpu:neon-dotprod", "exact")
    done = aarch64.run(CPUS["neon"], "answer", artifact, "[1]", "1")
    assert "cpu:neon-dotprod needs dotprod" in done.stdout, done.stderr
