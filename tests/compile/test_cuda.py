"""NVIDIA's compiler: where it is found, and what it is asked for."""

from __future__ import annotations

import importlib.machinery
import os
from pathlib import Path

import pytest

from mxforge.compile import cuda
from mxforge.compile.targets import resolve
from mxforge.errors import TargetError


def tool(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where NVIDIA's packages would be installed; nothing else is found."""
    folder = tmp_path / "nvidia"
    spec = importlib.machinery.ModuleSpec("nvidia", None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    monkeypatch.setattr(cuda, "find_spec", lambda name: spec if folder.exists() else None)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return folder


def test_without_nvcc_the_error_says_what_to_install(packages: Path):
    with pytest.raises(TargetError, match=r"pip install 'mxforge\[compile,cuda\]'"):
        resolve("cuda")


def test_the_package_goes_before_the_path(packages: Path, tmp_path: Path):
    on_path = tool(tmp_path / "bin" / "nvcc", "")
    assert cuda.find_nvcc() == str(on_path)
    installed = tool(packages / "cu13" / "bin" / "nvcc", "")
    assert cuda.find_nvcc() == str(installed)


def test_a_portable_artifact_has_code_for_each_architecture_and_ptx_of_the_last(
    packages: Path, tmp_path: Path
):
    tool(tmp_path / "bin" / "nvcc", 'for a; do case $a in *.fatbin) echo "$*" > $a;; esac; done')
    os.environ["PATH"] += ":/usr/bin:/bin"
    asked = cuda.compiled("text", resolve("cuda").archs, tmp_path).decode()
    assert asked.count("-gencode") == len(cuda.PORTABLE_ARCHS) >= 8
    assert "arch=compute_80,code=[sm_80]" in asked
    assert "arch=compute_121,code=[sm_121,compute_121]" in asked
    assert cuda.compiled("text", ["sm_90a"], tmp_path).decode().count("compute_") == 1
    assert not list(tmp_path.glob("nvcc-*"))


def test_what_nvcc_complains_of_is_told(packages: Path, tmp_path: Path):
    tool(tmp_path / "bin" / "nvcc", "echo 'device.cu(3): error: no such thing' >&2; exit 2")
    with pytest.raises(TargetError, match=r"for sm_80: device.cu\(3\): error: no such thing"):
        cuda.compiled("text", ["sm_80"], tmp_path)


KERNELS = """
extern "C" __global__ void __launch_bounds__(128) one_kernel(float* __restrict__ x_ptr);
extern "C" __global__ void __launch_bounds__(128) one_kernel(float* __restrict__ x_ptr) {
  x_ptr[threadIdx.x] = 1;
}
extern "C" __global__ void __launch_bounds__(64) two_kernel(float* __restrict__ x_ptr) {
  float weight = x_ptr[threadIdx.x];
  asm volatile("griddepcontrol.wait;" ::: "memory");
}
extern "C" __global__ void __launch_bounds__(64) three_kernel(float* __restrict__ x_ptr) {
  float weight = x_ptr[threadIdx.x];
  mx_griddepcontrol_wait();
}
"""


def test_every_kernel_waits_for_the_one_before_it_once():
    one, two, three = cuda.with_overlap(KERNELS).split("{\n")[1:]
    assert [line for line in one.splitlines() if "griddep" in line][1].endswith(
        'asm volatile("griddepcontrol.wait;" ::: "memory");'
    )
    assert (one.count(".wait"), two.count(".wait")) == (1, 1)
    assert two.index("launch_dependents") < two.index("x_ptr") < two.index(".wait")
    assert "launch_dependents" in three
    assert ".wait" not in three


@pytest.mark.parametrize(
    ("target", "overlap"),
    [("cuda:sm_90a", True), ("cuda:sm_120", True), ("cuda:sm_89", False), ("cuda", False)],
)
def test_launches_overlap_where_all_cards_can(
    target: str, overlap: bool, packages: Path, tmp_path: Path
):
    tool(tmp_path / "bin" / "nvcc", "")
    assert cuda.all_overlap(resolve(target).archs) == overlap


def test_cpus_have_no_launches_to_overlap():
    assert not cuda.all_overlap(resolve("cpu").archs)
