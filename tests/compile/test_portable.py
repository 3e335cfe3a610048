"""cpu:portable: a library for each CPU level and one packing of the weights for all of them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoints.shapes import ODD_SHAPES

from mxforge import Engine
from mxforge.artifact import CPU_VARIABLE, open_artifact, read_manifest, verify
from mxforge.bench import measure
from mxforge.compile import compile_model, targets
from mxforge.compile.checkpoint import HFCheckpoint
from mxforge.compile.diff import compare
from mxforge.compile.formats import Precision
from mxforge.compile.targets import (
    CPU_LEVELS,
    NUMERICS,
    PORTABLE,
    CompileTarget,
    resolve,
    resolve_all,
)
from mxforge.compile.weights import packed_weights
from mxforge.errors import ArtifactCorruptError, ArtifactTargetError, TargetError
from mxforge.machine import architecture, missing_cpu_features
from mxforge.schedules.kernel import Kernel, Layout, Schedule, Target
from mxforge.schedules.linear import LINEAR

Compiled = Callable[..., Path]
Checkpoints = Callable[[str], Path]

LEVELS = [level for level in CPU_LEVELS if level.machine == architecture()]
RUNNABLE = [level for level in LEVELS if not missing_cpu_features(level.required)]
SHAPE = "odd-1"


def test_a_portable_target_has_every_level_best_first():
    assert resolve_all(PORTABLE) == tuple(resolve(f"cpu:{level.name}") for level in LEVELS)
    assert resolve_all("cpu:x86-64" if architecture() == "x86_64" else "cpu:neon") == (
        resolve(f"cpu:{LEVELS[-1].name}"),
    )


def test_there_is_none_for_an_unknown_architecture(monkeypatch):
    monkeypatch.setattr(targets, "architecture", lambda: "vax")
    with pytest.raises(TargetError, match="no CPU level for this machine, vax"):
        resolve_all(PORTABLE)


# -- one packing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("numerics", NUMERICS)
@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_every_level_has_the_same_weights_byte_by_byte(
    shape, numerics, odd_checkpoint: Checkpoints
):
    checkpoint = HFCheckpoint(odd_checkpoint(shape))
    kernels = [Target("cpu", frozenset({"cpu", *level.required})) for level in CPU_LEVELS]
    precision = resolve("cpu").precision(numerics, checkpoint.config)
    listed = checkpoint.family.weights(checkpoint.config)
    lists = [packed_weights(listed, target, precision) for target in kernels]
    for first, *others in zip(*lists, strict=True):
        content = np.concatenate(list(first.chunks(checkpoint)))
        for other in others:
            assert (other.name, other.shape, other.dtype) == (first.name, first.shape, first.dtype)
            theirs = np.concatenate(list(other.chunks(checkpoint)))
            assert theirs.tobytes() == content.tobytes(), first.name


def portable_job(checkpoint: Path, tmp_path: Path, numerics: str = "fast", **options) -> Path:
    return compile_model(checkpoint, PORTABLE, tmp_path / "artifact", numerics, **options)


def other_layout(monkeypatch, change: Callable[[Layout], Layout]) -> None:
    """The router's weight in a changed layout, on all levels but the best."""
    real = Kernel.choose

    def choose(self: Kernel, target: Target, **static) -> Schedule:
        schedule = real(self, target, **static)
        if self is not LINEAR or target.features.issuperset(LEVELS[0].required):
            return schedule
        return replace(schedule, layouts={"weight": change(schedule.layout("weight"))})

    monkeypatch.setattr(Kernel, "choose", choose)


def other_bytes(monkeypatch) -> None:
    other_layout(
        monkeypatch, lambda layout: replace(layout, pack=lambda weight: layout.pack(-weight))
    )


def other_shape(monkeypatch) -> None:
    other_layout(
        monkeypatch, lambda layout: replace(layout, shape=lambda shape: (*layout.shape(shape), 1))
    )


def other_precision(monkeypatch) -> None:
    real = CompileTarget.precision

    def precision(self, numerics, config, formats=None):
        return (
            Precision("float32", "i8")
            if self == resolve_all(PORTABLE)[-1]
            else real(self, numerics, config, formats)
        )

    monkeypatch.setattr(CompileTarget, "precision", precision)


@pytest.mark.skipif(len(LEVELS) < 2, reason="one level only")
@pytest.mark.parametrize(
    ("break_it", "message", "random_weights"),
    [
        (other_bytes, "router.weight packed differently", False),
        (other_shape, "router.weight packed differently", False),
        (other_shape, "router.weight packed differently", True),
        (other_precision, "should compute alike", False),
    ],
)
def test_libraries_that_cannot_share_the_weights_are_refused(
    break_it, message, random_weights, odd_checkpoint: Checkpoints, tmp_path: Path, monkeypatch
):
    checkpoint = odd_checkpoint(SHAPE)
    break_it(monkeypatch)
    with pytest.raises(TargetError, match=f"{message}.*compile for one of them") as caught:
        portable_job(checkpoint, tmp_path, random_weights=random_weights)
    assert f"cpu:{LEVELS[0].name}" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# -- the artifact ----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=NUMERICS)
def portable(request, compiled: Compiled) -> Path:
    return compiled(SHAPE, request.param, target=PORTABLE)


@pytest.mark.slow
def test_the_manifest_lists_a_library_for_every_level(portable: Path):
    manifest = read_manifest(portable)
    assert (manifest.target.kind, manifest.target.name) == ("cpu", PORTABLE)
    names = [f"cpu:{level.name}" for level in LEVELS]
    assert [library.target for library in manifest.libraries] == names
    assert [library.features for library in manifest.libraries] == [lv.required for lv in LEVELS]
    assert {kernel.target for kernel in manifest.kernels} == set(names)
    verify(portable, progress=False).check()


@pytest.mark.slow
def test_its_files_are_those_of_an_artifact_for_one_level(portable: Path, compiled: Compiled):
    """So whatever is true of cpu:LEVEL is true of that library, and of what it takes."""
    manifest = read_manifest(portable)
    workspaces = []
    for library in manifest.libraries:
        one = read_manifest(compiled(SHAPE, manifest.numerics, target=library.target))
        (alone,) = one.libraries
        assert manifest.files[library.file] == one.files[alone.file]
        assert [k for k in manifest.kernels if k.target == library.target] == list(one.kernels)
        assert manifest.weights == one.weights
        assert {n: f for n, f in manifest.files.items() if n.endswith(".safetensors")} == {
            n: f for n, f in one.files.items() if n.endswith(".safetensors")
        }
        workspaces.append(one.memory.workspace_bytes)
    assert manifest.memory.workspace_bytes == max(workspaces)


@pytest.mark.slow
def test_the_best_level_of_this_cpu_runs(portable: Path):
    assert open_artifact(portable).variant.target == f"cpu:{RUNNABLE[0].name}"
    with Engine.load(portable, context_length=64) as engine:
        assert engine.target == f"cpu:{RUNNABLE[0].name}"


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS, ids=lambda level: level.name)
def test_every_library_keeps_its_bound(
    level, portable: Path, odd_checkpoint: Checkpoints, golden, monkeypatch
):
    monkeypatch.setenv(CPU_VARIABLE, level.name)
    if level not in RUNNABLE:
        with pytest.raises(ArtifactTargetError, match=f"cpu:{level.name} needs"):
            open_artifact(portable)
        return
    report = compare(portable, odd_checkpoint(SHAPE), tokens=100)
    report.check()
    assert report.target == f"cpu:{level.name}"
    if report.numerics == "exact":
        truth = golden(SHAPE)
        with Engine.load(portable, context_length=512) as engine:
            logits = engine.logits(truth.tokens)[truth.rows]
        error = np.linalg.norm(logits - truth.logits) / np.linalg.norm(truth.logits)
        assert error <= 1e-4


@pytest.mark.slow
def test_a_measurement_names_the_library(portable: Path, monkeypatch):
    monkeypatch.setenv(CPU_VARIABLE, RUNNABLE[-1].name)
    result = measure(portable, prompt_tokens=4, new_tokens=2, context_length=64)
    assert result["target"] == f"cpu:{RUNNABLE[-1].name}"


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS, ids=lambda level: level.name)
def test_a_library_that_is_gone_is_named(level, portable: Path, tmp_path: Path):
    folder = shutil.copytree(portable, tmp_path / "artifact", copy_function=os.link)
    library = next(x for x in read_manifest(folder).libraries if x.target == f"cpu:{level.name}")
    (folder / library.file).unlink()
    with pytest.raises(ArtifactCorruptError, match=f"{library.file} is missing"):
        Engine.load(folder)


@pytest.mark.slow
def test_progress_names_the_level(odd_checkpoint: Checkpoints, tmp_path: Path, monkeypatch):
    """Two levels, and their dumps apart."""
    monkeypatch.setattr(targets, "CPU_LEVELS", (*LEVELS[:1], *LEVELS[-1:]))
    said: list[str] = []
    portable_job(
        odd_checkpoint("odd-5"),
        tmp_path,
        "exact",
        announce=said.append,
        debug_dump=tmp_path / "dump",
    )
    for number, level in enumerate((LEVELS[0], LEVELS[-1]), 1):
        prefix = f"cpu:{level.name} ({number} of 2): "
        assert any(line.startswith(f"{prefix}library compiled in") for line in said)
        assert (tmp_path / "dump" / level.name / "code-llvm.txt").is_file()
