"""compile-model, killed at any moment: what is to be seen is complete, and the next one works."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from fuzz.sweep import HELPERS
from support.small import make_artifact, small_checkpoint

from mxforge.artifact import read_manifest, verify
from mxforge.compile.artifact_writer import ArtifactWriter
from mxforge.errors import OutputError

PACKING = "packing the weights"
SEED = 20


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def hidden(folder: Path, kind: str) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(f".artifact.{kind}-")]


@dataclass
class Compilation:
    """compile-model in a process group of its own."""

    checkpoint: Path
    output: Path
    scratch: Path  # for temporary files

    def start(self, *options: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "mxforge.compile.cli", str(self.checkpoint)]
        command += ["--output", str(self.output), "--target", "cpu:x86-64", *options]
        return subprocess.Popen(
            command,
            env={**os.environ, "TMPDIR": str(self.scratch)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def measure(self) -> tuple[float, float]:
        """Seconds from the start to the packing, and from there until the output is there."""
        began = time.perf_counter()
        with self.start() as process:
            packing = self.wait_for_packing(process)
            while process.poll() is None and not self.output.exists():
                time.sleep(0.001)
            there = time.perf_counter()
        assert process.returncode == 0
        return packing - began, there - packing

    def kill(self, delay: float, packing: bool, force: bool) -> None:
        """SIGKILL `delay` seconds after the start, or after the packing began."""
        with self.start(*(["--force"] if force else [])) as process:
            if packing:
                self.wait_for_packing(process)
            time.sleep(delay)
            os.killpg(process.pid, signal.SIGKILL)

    @staticmethod
    def wait_for_packing(process: subprocess.Popen[str]) -> float:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if PACKING in line:
                return time.perf_counter()
        pytest.fail(f"it never packed: {''.join(said)}")


@pytest.mark.slow
@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.full)])
def test_a_compilation_killed_at_any_moment_leaves_nothing_half(kills: int, tmp_path: Path) -> None:
    checkpoint = small_checkpoint(
        tmp_path, num_hidden_layers=1, layer_types=["full_attention"], vocab_size=5000
    )
    folder, scratch, kept = tmp_path / "out", tmp_path / "scratch", tmp_path / "kept"
    folder.mkdir()
    scratch.mkdir()
    output = folder / "artifact"
    compilation = Compilation(checkpoint, output, scratch)
    before, after = compilation.measure()
    shutil.copytree(output, kept)

    rng = random.Random(SEED)
    for kill in range(kills):
        packing, force = kill % 2 == 0, rng.random() < 0.5
        if force and not output.exists():
            shutil.copytree(kept, output)
        if not force:
            shutil.rmtree(output, ignore_errors=True)
        compilation.kill(rng.uniform(0, 1.2 * after if packing else before + after), packing, force)
        if output.exists():
            verify(output, progress=False).check()
            assert visible(folder) == ["artifact"]
        elif force:  # between two renames; the next start puts it back
            (old,) = hidden(folder, "old")
            verify(old, progress=False).check()
        else:
            assert visible(folder) == []

    with compilation.start("--force") as process:
        assert process.wait() == 0
    assert [path.name for path in folder.iterdir()] == ["artifact"]
    verify(output, progress=False).check()
    assert read_manifest(output) == read_manifest(kept)
    assert list(scratch.iterdir()) == []


# Replaces the artifact for each line of stdin, in a child that is killed before its N-th step.
KILLED_AT_A_STEP = """
import os, signal, sys
sys.path[:0] = sys.argv[1].split(os.pathsep)
from support.small import make_artifact, small_checkpoint

steps = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir")
folder, left = os.path.dirname(sys.argv[2]), 0

def count(event, arguments):
    global left
    if event == "fcntl.flock" or event in steps and folder in str(arguments[0]):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(count)
for line in sys.stdin:
    left = int(line)
    if (child := os.fork()) == 0:
        make_artifact(sys.argv[2], force=True)
        os._exit(0)
    left = 0
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_a_writer_killed_before_each_of_its_steps(tmp_path: Path) -> None:
    """Also between the two renames of a replacement, which no clock would meet."""
    folder = tmp_path / "out"
    output = make_artifact(folder / "artifact")
    command = [sys.executable, "-c", KILLED_AT_A_STEP, os.pathsep.join(HELPERS), str(output)]
    step, put_back = 0, 0
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        while True:
            step += 1
            print(step, file=process.stdin, flush=True)
            code = int(process.stdout.readline())
            if code == 0:
                break
            assert code == -signal.SIGKILL
            if not output.exists():
                put_back += 1
                with pytest.raises(OutputError, match="exists already"), ArtifactWriter(output):
                    pass
            verify(output, progress=False).check()
            with ArtifactWriter(output, force=True):  # what it finds it removes
                pass
            assert [path.name for path in folder.iterdir()] == ["artifact"]
    assert step > 20
    assert put_back == 1
