"""Wheels for every system, made here by scripts/wheels: what is in them, and what they need."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from support.binaries import Binary, read_binary

import mxforge
from mxforge.machine import host_system
from mxforge.native import build

ROOT = Path(__file__).resolve().parents[1]
MOST_BYTES = 5 << 20
GLIBC = (2, 28)
# What manylinux lets a wheel count on, and every Windows 10 and macOS has.
LINUX = {"libc.so.6", "libdl.so.2", "libm.so.6", "libpthread.so.0", "ld-linux-x86-64.so.2",
         "ld-linux-aarch64.so.1"}  # fmt: skip
MACOS = {"/usr/lib/libSystem.B.dylib"}
WINDOWS = ("KERNEL32.dll", "api-ms-win-crt-")

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """wheel(system, again=False) -> a wheel that scripts/wheels made, once or again."""
    pytest.importorskip("ziglang")

    @cache
    def make(system: str, again: bool = False) -> Path:
        folder = tmp_path_factory.mktemp("again" if again else "wheel")
        command = [sys.executable, ROOT / "scripts" / "wheels", system, "--output", folder]
        subprocess.run(command, check=True)
        (made,) = folder.iterdir()
        return made

    return make


def members(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def library(wheel: Path, folder: Path) -> Binary:
    """The one library in it."""
    ((name, data),) = (each for each in members(wheel).items() if "/libmxforge" in each[0])
    path = folder / Path(name).name
    path.write_bytes(data)
    return read_binary(path)


@pytest.mark.parametrize("system", build.SYSTEMS)
def test_a_wheel_is_for_its_system_and_no_python_version(system, wheel, tmp_path):
    made, tag = wheel(system), f"py3-none-{build.SYSTEMS[system].platform}"
    assert made.name == f"mxforge-{mxforge.__version__}-{tag}.whl"
    files = members(made)
    (about,) = (data.decode() for name, data in files.items() if name.endswith("/WHEEL"))
    assert f"Tag: {tag}\n" in about
    assert "Root-Is-Purelib: false\n" in about
    assert f"mxforge/native/{build.CORE.output_on(system).name}" in files
    assert "mxforge/native/core/shim.c" in files  # which the compiler links
    assert made.stat().st_size < MOST_BYTES
    binary = library(made, tmp_path)
    functions = {name for name in binary.exports if name.startswith("mxf_")}
    assert {"mxf_model_open", "mxf_step_submit", "mxf_step_wait"} <= functions
    if system.startswith("linux"):
        assert binary.libraries <= LINUX
        assert max(binary.versions) <= GLIBC
        assert binary.exports == functions
    elif system.startswith("darwin"):
        assert binary.libraries == MACOS
        assert binary.versions == {(11, 0)}
        assert binary.signed or system == "darwin-x86_64"
    else:
        assert [name for name in binary.libraries if not name.startswith(WINDOWS)] == []
        assert binary.exports == functions


def test_the_same_commit_gives_the_same_bytes(wheel):
    assert wheel("windows-x86_64").read_bytes() == wheel("windows-x86_64", True).read_bytes()


@pytest.mark.skipif(host_system() not in build.SYSTEMS, reason="no wheel is for this system")
def test_its_library_loads_without_any_other_package(wheel, tmp_path):
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", wheel(host_system())], check=True)
    load = (
        "import ctypes, mxforge; from mxforge.native import build; "
        "core = ctypes.CDLL(str(build.CORE.output)); core.mxf_error.restype = ctypes.c_char_p; "
        "print(core.mxf_model_open(b'none', None, None), core.mxf_error().decode())"
    )
    said = subprocess.run([python, "-c", load], capture_output=True, text=True, check=True).stdout
    assert said.startswith("1 ")
    assert "no place for the model" in said
