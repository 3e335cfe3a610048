"""nano, compiled for CPUs that this machine does not have, answering on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from support.qemu import open_cpu

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


@pytest.mark.parametrize(
    ("level", "numerics"), [("avx2", "fast"), ("neon-dotprod", "exact"), ("neon-i8mm", "fast")]
)
def test_nano_answers_as_here(level: str, numerics: str, compiled, expected):
    prompt, tokens = expected
    artifact = compiled(f"cpu:{level}", numerics)
    done = open_cpu(level).run("answer", artifact, json.dumps(prompt), str(TOKENS))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == tokens


def test_missing_features_are_named(compiled):
    artifact = compiled("cpu:neon-dotprod", "exact")
    done = open_cpu("neon").run("answer", artifact, "[1]", "1")
    assert "cpu:neon-dotprod needs dotprod" in done.stdout, done.stderr
