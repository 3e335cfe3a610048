from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints.shapes import hf_config

from mxforge import Engine
from mxforge.artifact import open_artifact, read_manifest
from mxforge.compile import compile_model, cuda, linker, targets
from mxforge.compile.diff import compare
from mxforge.compile.models.gpt_oss.config import GptOssConfig
from mxforge.compile.targets import CPU_LEVELS, known_targets, resolve
from mxforge.errors import ArtifactTargetError, TargetError
from mxforge.machine import architecture, missing_cpu_features

Compiled = Callable[..., Path]
Checkpoints = Callable[[str], Path]

LEVELS = [level for level in CPU_LEVELS if level.machine == architecture()]


def relative_error(ours: np.ndarray, truth: np.ndarray) -> float:
    return float(np.linalg.norm(ours - truth) / np.linalg.norm(truth))


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "gpu", "CPU", "cpu ", "vulcan:1", "cudasm_80", ":cpu"])
def test_an_unknown_target_names_the_known_ones(name):
    with pytest.raises(TargetError, match="Unknown target") as caught:
        resolve(name)
    assert all(known in str(caught.value) for known in known_targets())


def test_nothing_but_the_levels_tells_llvm_of_a_cpu():
    """Elsewhere it would be code for one CPU, run on whichever machine there is."""
    root = Path(__file__).resolve().parents[2]
    folders = ("compile", "runtime", "schedules", "tests")
    files = [path for folder in folders for path in (root / folder).rglob("*.py")]
    files += [path for path in (root / "scripts").rglob("*") if path.suffix in ("", ".py")]
    naming = {path for path in files if path.is_file() and "mcpu" in path.read_text()}
    assert naming == {root / "compile" / "targets.py", Path(__file__)}


@pytest.mark.parametrize("name", ["cpu:avx1024", "cpu:sm_80", "cpu:AVX2"])
def test_an_unknown_cpu_level_names_the_known_ones(name):
    with pytest.raises(TargetError, match=name.partition(":")[2]) as caught:
        resolve(name)
    assert all(f"cpu:{level.name}" in str(caught.value) for level in CPU_LEVELS)


def test_an_unknown_cuda_architecture_names_the_known_ones():
    with pytest.raises(TargetError, match="sm_42") as caught:
        resolve("cuda:sm_42")
    assert all(arch in str(caught.value) for arch in cuda.ARCHS)


def test_metal_has_no_variants():
    with pytest.raises(TargetError, match="metal:m3"):
        resolve("metal:m3")


def test_compiling_for_cuda_without_nvcc_leaves_nothing(
    odd_checkpoint: Checkpoints, tmp_path: Path
):
    result = subprocess.run(
        [sys.executable, "-m", "mxforge.compile.cli", str(odd_checkpoint("odd-5")),
         "--target", "cuda", "--output", str(tmp_path / "artifact")],
        env={"PATH": ""}, capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 1
    assert "nvcc" in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


# -- CPU levels ------------------------------------------------------------------------------------


def test_cpu_is_the_best_level_that_this_machine_has():
    best = next(level for level in LEVELS if not missing_cpu_features(level.required))
    assert resolve("cpu") == resolve(f"cpu:{best.name}")
    assert resolve("cpu").name == f"cpu:{best.name}"


def test_cpu_falls_back_level_by_level(monkeypatch):
    lacking: set[str] = set()
    monkeypatch.setattr(
        targets, "_host_has", lambda level: not lacking.intersection(level.required)
    )
    for level, lower in zip(LEVELS, [*LEVELS[1:], None], strict=True):
        assert resolve("cpu").name == f"cpu:{level.name}"
        lacking.update(set(level.required) - set(lower.required if lower else ()))


def test_an_architecture_without_levels_can_compile_for_the_others(monkeypatch):
    monkeypatch.setattr(targets, "architecture", lambda: "riscv64")
    with pytest.raises(TargetError, match=r"riscv64.*cpu:neon"):
        resolve("cpu")
    assert resolve("cpu:neon").host == "linux-aarch64"


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize(
    ("here", "own"), [("linux", "unknown-linux-gnu"), ("darwin", "apple-macos11.0")]
)
def test_levels_of_another_architecture_are_for_linux(monkeypatch, machine, here, own):
    monkeypatch.setattr(targets, "architecture", lambda: machine)
    monkeypatch.setattr(targets, "host_system", lambda: f"{here}-{machine}")
    for level in CPU_LEVELS:
        target = resolve(f"cpu:{level.name}")
        local = level.machine == machine
        assert target.host == f"{here if local else 'linux'}-{level.machine}"
        assert target.tvm["mtriple"].endswith(own if local else "unknown-linux-gnu")
        assert target.required_features == level.required


def config_of(experts: int) -> GptOssConfig:
    changes = {"num_local_experts": experts, "num_experts_per_tok": 1}
    return GptOssConfig.from_hf(hf_config("tiny", changes))


def test_8_bit_experts_need_more_than_one_expert():
    for level in LEVELS:
        target = resolve(f"cpu:{level.name}")
        fast = target.precision("fast", config_of(experts=2))
        assert (fast.activations, fast.dense) == ("i8", "i8")
        assert fast.kv == "bfloat16"
        one = target.precision("fast", config_of(experts=1))
        assert (one.activations, one.kv) == ("f32", "bfloat16")
        exact = target.precision("exact", config_of(experts=2))
        assert (exact.activations, exact.kv) == ("f32", "float32")


@pytest.mark.parametrize("level", LEVELS, ids=lambda level: level.name)
def test_a_cpu_level_compiles_and_is_exact(level, compiled: Compiled, golden):
    artifact = compiled("odd-1", "exact", target=f"cpu:{level.name}")
    manifest = read_manifest(artifact)
    assert manifest.target.name == f"cpu:{level.name}"
    assert [library.features for library in manifest.libraries] == [level.required]
    if missing := missing_cpu_features(level.required):
        pytest.skip(f"this CPU lacks {', '.join(missing)}: compiled, but not run")
    truth = golden("odd-1")
    with Engine.load(artifact, context_length=512) as engine:
        logits = engine.logits(truth.tokens)
    assert relative_error(logits[truth.rows], truth.logits) <= 1e-4


@pytest.mark.parametrize("level", LEVELS, ids=lambda level: level.name)
def test_every_cpu_level_is_fast_within_its_bound(
    level, compiled: Compiled, odd_checkpoint: Checkpoints
):
    artifact = compiled("odd-1", "fast", target=f"cpu:{level.name}")
    precision = read_manifest(artifact).precision
    assert (precision.kv_dtype, precision.experts, precision.dense) == ("bfloat16", "i8", "i8")
    if missing := missing_cpu_features(level.required):
        pytest.skip(f"this CPU lacks {', '.join(missing)}: compiled, but not run")
    compare(artifact, odd_checkpoint("odd-1"), tokens=100).check()


ELF_MACHINES = {"x86_64": 62, "aarch64": 183}


def test_a_level_of_another_architecture_compiles_for_its_machine(
    compiled: Compiled, monkeypatch: pytest.MonkeyPatch
):
    foreign = next(level for level in CPU_LEVELS if level not in LEVELS)
    artifact = compiled("odd-1", "fast", target=f"cpu:{foreign.name}")
    manifest = read_manifest(artifact)
    assert manifest.target.host == f"linux-{foreign.machine}"
    assert manifest.libraries[0].features == foreign.required
    elf = (artifact / "model.so").read_bytes()
    assert elf[:4] == b"\x7fELF"
    assert int.from_bytes(elf[18:20], "little") == ELF_MACHINES[foreign.machine]
    with pytest.raises(ArtifactTargetError, match=rf"linux-{foreign.machine}.*{architecture()}"):
        Engine.load(artifact)


def test_what_ziglang_links_for_another_machine_runs(
    odd_checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, golden
):
    """This machine, as another would compile for it."""
    pytest.importorskip("ziglang")
    monkeypatch.setattr(linker, "host_system", lambda: "linux-riscv64")
    artifact = compile_model(odd_checkpoint("odd-1"), "cpu", tmp_path / "artifact", "exact")
    truth = golden("odd-1")
    with Engine.load(artifact, context_length=512) as engine:
        logits = engine.logits(truth.tokens)
    assert relative_error(logits[truth.rows], truth.logits) <= 1e-4


def test_linking_for_another_machine_needs_ziglang(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(TargetError, match=r"linux-riscv64.*ziglang"):
        linker.compiler("linux-riscv64")


def test_another_level_than_the_best_gets_its_own_code(compiled: Compiled):
    libraries = {
        open_artifact(compiled("odd-1", "fast", target=f"cpu:{level.name}")).library.read_bytes()
        for level in LEVELS
        if not missing_cpu_features(level.required)
    }
    assert len(libraries) == len(
        [level for level in LEVELS if not missing_cpu_features(level.required)]
    )


# -- GPUs, without one -----------------------------------------------------------------------------


def check_gpu_artifact(artifact: Path, kind: str, numerics: str) -> None:
    manifest = open_artifact(artifact).manifest
    assert manifest.target.kind == kind
    assert manifest.numerics == numerics
    assert [library.features for library in manifest.libraries] == [()]  # the CPU's part is plain
    assert all(kernel.target == manifest.target.name for kernel in manifest.kernels)
    assert all(kernel.schedule for kernel in manifest.kernels)


@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_metal(numerics, odd_checkpoint: Checkpoints, tmp_path: Path):
    artifact = tmp_path / "artifact"
    compile_model(
        odd_checkpoint("odd-1"), "metal", artifact, numerics, debug_dump=tmp_path / "dump"
    )
    check_gpu_artifact(artifact, "metal", numerics)
    shaders = [f.read_text() for f in (tmp_path / "dump").iterdir() if "metal" in f.name]
    assert any("kernel void" in shader for shader in shaders)
    # Metal has no 64-bit floats.
    assert not any("double" in shader for shader in shaders)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("target", ["cuda:sm_90a", pytest.param("cuda", marks=pytest.mark.slow)])
def test_cuda(target, odd_checkpoint: Checkpoints, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(cuda, "PORTABLE_ARCHS", ("sm_80", "sm_120"))  # all take a minute
    artifact = tmp_path / "artifact"
    compile_model(odd_checkpoint("odd-1"), target, artifact, "fast")
    check_gpu_artifact(artifact, "cuda", "fast")
    assert read_manifest(artifact).target.name == target
