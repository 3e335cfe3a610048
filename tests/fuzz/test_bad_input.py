"""Damaged files by the thousand: each is taken or refused by name, and nothing else happens.

No crash, no other exception, no input that takes 10 seconds, no growth of memory, no file that
comes or goes. See `fuzz.subjects` for what is damaged, `fuzz.sweep` for what is checked.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from fuzz import sweep
from fuzz.mutations import damage_bytes, damage_text
from fuzz.subjects import SUBJECTS

EVERYDAY, FULL = 300, 10_000
PROCESSES = 2  # in a full run
LIMIT = 900  # seconds of a process, far beyond what it takes

Child = tuple["subprocess.Popen[str]", Path]


def start(subject: str, artifact: Path, first: int, last: int, folder: Path) -> Child:
    at = folder / f"at-{first}"
    command = [sys.executable, sweep.__file__, subject, str(artifact), "--at", str(at)]
    command += ["--seeds", str(first), str(last)]
    quiet = {"RUST_BACKTRACE": "0", "TOKENIZERS_PARALLELISM": "false"}
    environment = {**os.environ, **quiet}
    with at.with_suffix(".err").open("w") as said:
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=said, text=True
        ), at


def result_of(child: Child) -> dict[str, int]:
    """How many inputs had which end; the test fails with the seeds that had a bad one."""
    process, at = child
    out, _ = process.communicate(timeout=LIMIT)
    said = at.with_suffix(".err").read_text(errors="replace")
    if process.returncode != 0:
        pytest.fail(f"exit code {process.returncode} at seed {at.read_text()}: {said[-3000:]}")
    result = json.loads(out)
    if result["failures"]:
        pytest.fail("\n\n".join(f"seed {k}: {v}" for k, v in result["failures"].items()))
    return result["outcomes"]


@pytest.mark.parametrize("inputs", [EVERYDAY, pytest.param(FULL, marks=pytest.mark.full)])
@pytest.mark.parametrize("subject", SUBJECTS)
def test_damaged_input_is_taken_or_refused_by_name(
    subject: str, inputs: int, text_artifact: Path, tmp_path: Path
) -> None:
    step = inputs if inputs == EVERYDAY else inputs // PROCESSES
    children = [
        start(subject, text_artifact, first, first + step, tmp_path)
        for first in range(0, inputs, step)
    ]
    try:
        outcomes = [result_of(child) for child in children]
    finally:
        for process, _ in children:
            process.kill()
    assert sum(sum(outcome.values()) for outcome in outcomes) == inputs
    taken = sum(outcome.get("taken", 0) for outcome in outcomes)
    assert 0.01 < taken / inputs < 0.5, "the damage is too hard or too soft"


def test_a_seed_always_gives_the_same_damage() -> None:
    value = {"a": [1, {"b": "x"}], "c": None}
    for seed in range(50):
        once, again = random.Random(seed), random.Random(seed)
        assert damage_bytes(once, b"0123456789") == damage_bytes(again, b"0123456789")
        assert damage_text(once, value) == damage_text(again, value)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os; os.abort()", "exit code -6 at seed"),
        ("raise KeyError('k')", "KeyError"),
        ("from mxforge.errors import MxforgeError; raise MxforgeError('\\x1b')", "not printable"),
        ("import pathlib; pathlib.Path(self.folder, 'more').touch()", "came or went"),
        ("b'x' * (80 << 20)", "memory grew"),
        ("import time; time.sleep(60)", "exit code 1 at seed"),
    ],
)
def test_the_sweep_sees_what_goes_wrong(
    code: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "sweep.py"
    program.write_text(
        f"import sys; sys.path[:0] = {sweep.HELPERS!r}\n"
        "from fuzz import subjects, sweep\n"
        "class Broken(subjects.Subject):\n"
        "    used = 0\n"
        "    def damage(self, rng): pass\n"
        "    def use(self):\n"
        "        self.used += 1\n"
        f"        if self.used == 3: {code}\n"
        "subjects.SUBJECTS['broken'] = Broken\n"
        "sweep.SECONDS, sweep.GROWTH = 2, 40 << 20\n"
        "sweep.main()\n"
    )
    monkeypatch.setattr(sweep, "__file__", str(program))
    with pytest.raises(pytest.fail.Exception, match=said):
        result_of(start("broken", tmp_path, 0, 5, tmp_path))
