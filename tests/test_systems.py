"""nano, compiled here for other systems, answers there in a program of C: no Python, no TVM."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.qemu import open_cpu
from support.systems import built_answer
from support.wine import Wine, open_wine

from mxforge import Engine, SamplingParams, compile_model

TOKENS = 16
# The demo model's words for "What is 17 + 25?".
PROMPT = [200006, 1428, 200008, 4827, 382, 220, 1422, 659, 220, 1161, 30, 200007, 200006, 173781]

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def expected(nano: Path, tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """What exact numerics answer on this machine."""
    artifact = tmp_path_factory.mktemp("here") / "nano"
    compile_model(nano, "cpu", artifact, "exact", max_batch=1, prefill_chunk=32)
    with Engine.load(artifact, context_length=256) as engine:
        greedy = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
        return list(engine.generate(PROMPT, greedy).token_ids)


@pytest.fixture(scope="module")
def wine() -> Iterator[Wine]:
    opened = open_wine()
    yield opened
    opened.close()


def compiled(nano: Path, target: str, host: str, folder: Path) -> Path:
    artifact = folder / f"nano-{host}"
    return compile_model(nano, target, artifact, "exact", host=host, max_batch=1, prefill_chunk=32)


def answered(done: subprocess.CompletedProcess[str]) -> list[int]:
    assert done.returncode == 0, done.stderr
    return list(map(int, done.stdout.split()))


@pytest.mark.parametrize("threads", [1, 3])
def test_linux_on_aarch64(threads, nano, expected, tmp_path):
    cpu = open_cpu("neon-dotprod")
    program = built_answer("linux-aarch64", tmp_path)
    artifact = compiled(nano, "cpu:neon-dotprod", "linux-aarch64", tmp_path)
    done = cpu.run_program(program, artifact, threads, TOKENS, *PROMPT)
    assert answered(done) == expected


@pytest.mark.parametrize("threads", [1, 3])
def test_windows(threads, nano, expected, wine, tmp_path):
    program = built_answer("windows-x86_64", tmp_path)
    artifact = compiled(nano, "cpu:x86-64-v2", "windows-x86_64", tmp_path)
    done = wine.run(program, artifact, threads, TOKENS, *PROMPT)
    assert answered(done) == expected


def test_windows_says_what_is_wrong(nano, wine, tmp_path):
    program = built_answer("windows-x86_64", tmp_path)
    artifact = compiled(nano, "cpu:x86-64-v2", "linux-x86_64", tmp_path)
    done = wine.run(program, artifact, 1, 1, 1)
    assert done.returncode == 1
    assert "linux-x86_64, but this machine is windows-x86_64" in done.stderr
    done = wine.run(program, tmp_path / "none", 1, 1, 1)
    assert "none/manifest.json should be a file" in done.stderr
    assert "(error " in done.stderr


def test_android_needs_no_libraries_of_its_own(nano, expected, tmp_path):
    """Its kernels run on Linux: they import nothing, and the CPU is the same."""
    cpu = open_cpu("neon-dotprod")
    program = built_answer("linux-aarch64", tmp_path)
    artifact = compiled(nano, "cpu:neon-dotprod", "android-aarch64", tmp_path)
    manifest = artifact / "manifest.json"
    manifest.write_text(manifest.read_text().replace("android-aarch64", "linux-aarch64"))
    assert answered(cpu.run_program(program, artifact, 2, TOKENS, *PROMPT)) == expected
