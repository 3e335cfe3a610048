"""libmxforge in this process: what is mapped, what does not load, and how many threads compute."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes  # noqa: F401 (NumPy's names of bfloat16)
import numpy as np
import pytest

from mxforge import Engine, core
from mxforge.artifact import open_artifact
from mxforge.core import CoreLibrary
from mxforge.errors import ArtifactTargetError, MxforgeError, UsageError
from mxforge.machine import usable_cores
from mxforge.native.build import CORE, Library


def in_fresh_process(code: str, *arguments: object, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


LOAD = (
    "from mxforge import core\nfrom mxforge.errors import MxforgeError\n"
    "try:\n    core.load()\nexcept MxforgeError as error:\n    print(error)\n"
)


def test_a_core_that_is_not_there_says_how_to_build_it(tmp_path: Path) -> None:
    (tmp_path / "other.so").write_text("not a library")
    for name in ("none.so", "other.so"):
        path = tmp_path / name
        said = in_fresh_process(LOAD, **{core.LIBRARY_VARIABLE: str(path)})
        assert said.startswith(f"{path} should be libmxforge, but does not load (")
        assert said.endswith("build it with: python -m mxforge.native.build\n")


def test_a_core_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    core.load.cache_clear()
    assert core.load().mxf_build_id().decode() == CORE.build_id() != ""
    core.load.cache_clear()
    monkeypatch.setattr(Library, "build_id", lambda self: "another")
    with pytest.raises(MxforgeError, match=r"other sources .* run: python -m mxforge\.native"):
        core.load()
    monkeypatch.setattr(Library, "build_id", lambda self: "")  # there are no sources
    core.load.cache_clear()
    core.load()


def test_kernels_that_are_no_library_are_refused(odd_artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "model.so").write_bytes(b"not machine code")
    for name in ("model.so", "absent.so"):
        with pytest.raises(ArtifactTargetError, match=name.replace(".", r"\.")):
            CoreLibrary("cpu", odd_artifact / "model.plan", tmp_path / name, threads=1)


def test_a_device_that_is_not_here_is_named(odd_artifact: Path) -> None:
    plan, kernels = odd_artifact / "model.plan", odd_artifact / "model.so"
    with pytest.raises(ArtifactTargetError, match="runs on cpu, .* artifact is for abacus"):
        CoreLibrary("abacus", plan, kernels, threads=1)
    with pytest.raises(ArtifactTargetError, match="for abacus"):
        core.devices("abacus")
    with pytest.raises(ArtifactTargetError, match="for abacus"):
        core.device_memory("abacus")


def test_the_cpu_has_memory_and_features() -> None:
    assert core.devices("cpu") == [{"cores": usable_cores()}]
    assert core.device_memory("cpu")
    assert not core.device_has("cpu", "quantum")


def test_what_is_planned_for_another_model_is_refused(
    odd_artifact: Path, text_artifact: Path, tmp_path: Path
) -> None:
    """Sizes in the manifest, the plan and the weights are of one model."""
    mixed = shutil.copytree(odd_artifact, tmp_path / "mixed")
    for name in ("model.plan", "model.so"):
        shutil.copyfile(text_artifact / name, mixed / name)
    artifact = open_artifact(odd_artifact)
    object.__setattr__(artifact, "path", mixed)  # past the hashes
    with (
        Engine(artifact, context_length=64) as engine,
        pytest.raises(MxforgeError, match="manifest and the launch plan disagree|lacks the weight"),
    ):
        engine.generate([1, 2, 3])


def test_an_affinity_limits_the_threads(odd_artifact: Path) -> None:
    if not hasattr(os, "sched_setaffinity") or usable_cores() < 2:
        pytest.skip("needs two cores and Linux")
    code = (
        "import os, sys\n"
        "os.sched_setaffinity(0, [sorted(os.sched_getaffinity(0))[1]])\n"
        "import mxforge\n"
        "with mxforge.Engine.load(sys.argv[1], context_length=64) as engine:\n"
        "    print(engine.threads, engine.logits([1, 2]).shape[0])\n"
    )
    assert in_fresh_process(code, odd_artifact) == "1 2\n"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_tvm_is_never_mapped(text_artifact: Path) -> None:
    code = (
        "import sys, mxforge\n"
        "with mxforge.Engine.load(sys.argv[1], context_length=64) as engine:\n"
        "    engine.generate('hello', mxforge.SamplingParams(max_tokens=3, logprobs=2))\n"
        "maps = open('/proc/self/maps').read()\n"
        "print('libmxforge.so' in maps, 'tvm' in maps, 'libLLVM' in maps)\n"
        "names = ('tvm', 'tvm_ffi', 'torch', 'transformers')\n"
        "print([name for name in names if name in sys.modules])\n"
    )
    assert in_fresh_process(code, text_artifact) == "True False False\n[]\n"


def test_calls_after_closing_are_errors(odd_artifact: Path) -> None:
    library = CoreLibrary("cpu", odd_artifact / "model.plan", odd_artifact / "model.so", threads=1)
    library.close()
    library.close()
    tokens, table = np.zeros(1, np.int32), np.zeros((1003, 96), "bfloat16")
    with pytest.raises(UsageError, match="The library .* missing"):
        library.call("embed", [tokens, table])
