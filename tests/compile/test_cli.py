"""The command `compile-model` as its users call it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from checkpoints.shapes import hf_config
from support.small import SMALL_SHAPE, small_checkpoint

from mxforge import Engine, SamplingParams
from mxforge.artifact import read_manifest, verify
from mxforge.compile import compile_model
from mxforge.compile.cli import main, parser
from mxforge.compile.cuda import OLDEST
from mxforge.compile.targets import CPU_LEVELS, VULKAN_PROFILES
from mxforge.errors import UsageError

COMPILE_MODEL = [
    sys.executable,
    "-c",
    "import sys; from mxforge.compile.cli import main; sys.exit(main())",
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def here(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of the command run in this process."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return code, captured.out, captured.err


def nothing_but(folder: Path, *names: str) -> bool:
    return sorted(path.name for path in folder.iterdir()) == sorted(names)


def test_an_artifact_lands_under_artifacts_and_runs(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = here(capsys, checkpoint, "--max-batch", 3, "--prefill-chunk", 20)
    assert (code, out) == (0, "artifacts/small-cpu\n")
    assert "phase " in err
    assert "warning: there is no tokenizer.json" in err
    artifact = tmp_path / "artifacts" / "small-cpu"
    assert nothing_but(artifact.parent, "small-cpu")
    verify(artifact, progress=False).check()
    manifest = read_manifest(artifact)
    assert (manifest.name, manifest.numerics) == ("small", "fast")
    assert (manifest.limits.max_batch, manifest.limits.prefill_chunk) == (3, 20)
    with Engine.load(artifact, context_length=64) as engine:
        params = SamplingParams(max_tokens=5, ignore_eos=True)
        assert len(engine.generate(list(range(50)), params).token_ids) == 5

    # An artifact that is there stays, unless --force says otherwise.
    before = (artifact / "manifest.json").stat().st_ino
    code, out, err = here(capsys, checkpoint)
    assert (code, out) == (1, "")
    assert "exists already" in err
    assert (artifact / "manifest.json").stat().st_ino == before
    code, _, _ = here(capsys, checkpoint, "--force", "--numerics", "exact")
    assert code == 0
    assert read_manifest(artifact).numerics == "exact"
    assert nothing_but(artifact.parent, "small-cpu")


def test_a_bare_config_takes_random_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "bare" / "config.json"
    config.parent.mkdir()
    config.write_text(json.dumps(hf_config("tiny", SMALL_SHAPE)))
    output = tmp_path / "out"
    code, out, err = here(capsys, config, "--output", output)
    assert (code, out) == (2, "")
    assert "add --random-weights" in err
    dump = tmp_path / "dump"
    code, out, _ = here(
        capsys, config, "--output", output, "--random-weights", "--debug-dump", dump
    )
    assert (code, out) == (0, f"{output}\n")
    manifest = read_manifest(output)
    assert (manifest.name, manifest.random_seed) == ("bare", 0)
    assert any(dump.iterdir())


@pytest.mark.parametrize(
    "options",
    [
        ("--max-batch", "0"),
        ("--max-batch", "100000"),
        ("--max-batch", "many"),
        ("--prefill-chunk", "-1"),
        ("--prefill-chunk", str(10**12)),
        ("--numerics", "loose"),
        ("--unknown",),
        ("another",),
    ],
    ids=" ".join,
)
def test_absurd_options_exit_with_2(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: Sequence[str]
) -> None:
    code, out, err = here(capsys, checkpoint, "--output", tmp_path / "out", *options)
    assert (code, out) == (2, "")
    assert err.startswith(("usage:", "compile-model:"))
    assert nothing_but(tmp_path)


@pytest.mark.parametrize("target", ["abacus", "cpu:abacus", "cuda:abacus", "", ":", "\udcff"])
def test_unknown_targets_exit_with_1(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str
) -> None:
    code, out, err = here(capsys, checkpoint, "--output", tmp_path / "out", "--target", target)
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("compile-model: ")
    assert nothing_but(tmp_path)


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "found nothing there"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
        (_truncate, "model.safetensors"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json"),
    ],
    ids=["nothing", "no config", "garbled config", "no weights", "truncated", "tokenizer"],
)
def test_damaged_checkpoints_exit_with_1_and_leave_nothing(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage, message: str
) -> None:
    folder = Path(shutil.copytree(checkpoint, tmp_path / "damaged"))
    damage(folder)
    output = tmp_path / "outputs" / "out"
    code, out, err = here(capsys, folder, "--output", output)
    assert (code, out) == (1, "")
    assert message in err.splitlines()[-1]
    assert not output.parent.exists() or nothing_but(output.parent)


def test_outputs_that_cannot_be_written_exit_with_1(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "precious").write_text("")
    for output, force in ((file, False), (file, True), (folder, True), (file / "below", False)):
        code, out, err = here(capsys, checkpoint, "--output", output, *["--force"][: int(force)])
        assert (code, out) == (1, "")
        assert str(output) in err
    assert file.read_text() == "precious"
    assert nothing_but(folder, "precious")


def test_a_dump_that_cannot_be_written_exits_with_1(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    for dump in (file, file / "below", tmp_path / ("x" * 300)):
        code, out, err = here(
            capsys, checkpoint, "--output", tmp_path / "out", "--debug-dump", dump
        )
        assert (code, out) == (1, "")
        last = err.splitlines()[-1]
        assert last.startswith("compile-model: --debug-dump needs a folder to write into, but ")
        assert str(dump) in last
        assert "name another folder" in last
    assert file.read_text() == "precious"
    assert nothing_but(tmp_path, "file")


def test_an_interrupted_compile_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    command = [*COMPILE_MODEL, str(checkpoint), "--output", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        while b"phase" not in process.stderr.readline():
            pass
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, b"")
    assert err.splitlines()[-1] == b"compile-model: interrupted"
    assert b"Traceback" not in err
    assert nothing_but(tmp_path)


@pytest.mark.slow
def test_a_killed_compile_is_cleaned_up_by_the_next(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    command = [*COMPILE_MODEL, str(checkpoint), "--output", str(output)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        while b"phase" not in process.stderr.readline():
            pass
        process.kill()
        process.wait(timeout=60)
    assert not output.exists()
    time.sleep(0.05)
    assert here(capsys, checkpoint, "--output", output)[0] == 0
    assert nothing_but(tmp_path, "out")


def test_help_names_the_targets(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = here(capsys, "--help")
    assert (code, err) == (0, "")
    for word in ("cpu", "cuda:sm_XX", "metal", "--random-weights", "--debug-dump"):
        assert word in out


def test_the_function_checks_its_arguments_like_the_command(checkpoint: Path) -> None:
    for options in ({"numerics": "loose"}, {"max_batch": 1.5}, {"prefill_chunk": True}):
        with pytest.raises(UsageError, match="must be"):
            compile_model(checkpoint, **options)


def test_the_help_names_every_target():
    named = set(re.findall(r"[\w.-]+", parser().format_help()))
    variants = [preset.name for preset in (*CPU_LEVELS, *VULKAN_PROFILES)]
    assert {*variants, OLDEST, "portable", "metal"} <= named
