"""nano, compiled for CPUs that this machine does not have, answering on them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from qemu import open_cpu

from mxforge import Engine, SamplingParams, compile_model
from mxforge.messages import read_messages

ROOT = Path(__file__).resolve().parents[1]
TOKENS = 16  # enough for the first sum's digits

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """nano(target, numerics) -> artifact."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from _nano_compact import expand
    finally:
        sys.path.pop(0)
    folder = tmp_path_factory.mktemp("nano")
    checkpoint = expand(ROOT / "artifacts" / "nano", folder / "nano")

    @cache
    def compiled(target: str, numerics: str) -> Path:
        output = folder / target.replace(":", "-")
        return compile_model(checkpoint, target, output, numerics, max_batch=1, prefill_chunk=32)

    return compiled


@pytest.fixture(scope="module")
def expected(nano) -> tuple[list[int], list[int]]:
    """A prompt, and the tokens that exact numerics answer on this machine."""
    with Engine.load(nano("cpu", "exact"), context_length=256) as engine:
        prompt = engine.harmony.prompt(
            read_messages([{"role": "user", "content": "What is 17 + 25?"}])
        )
        greedy = SamplingParams(max_tokens=TOKENS, temperature=0)
        return prompt, list(engine.generate(prompt, greedy).token_ids)


@pytest.mark.parametrize(
    ("level", "numerics"), [("avx2", "fast"), ("neon-dotprod", "exact"), ("neon-i8mm", "fast")]
)
def test_nano_answers_as_here(level: str, numerics: str, nano, expected):
    prompt, tokens = expected
    artifact = nano(f"cpu:{level}", numerics)
    done = open_cpu(level).run("answer", artifact, json.dumps(prompt), str(TOKENS))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == tokens


def test_missing_features_are_named(nano):
    artifact = nano("cpu:neon-dotprod", "exact")
    done = open_cpu("neon").run("answer", artifact, "[1]", "1")
    assert "cpu:neon-dotprod needs dotprod" in done.stdout, done.stderr
