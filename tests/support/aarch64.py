"""An aarch64 machine for tests: qemu-user runs a Debian Python with the wheels of our runtime.

What it runs is `aarch64_guest.py`. Python and the wheels are fetched once, by apt and pip, into
build/aarch64. Nothing of this machine is changed for it, and root is not needed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from support.folders import SetupError, made, run
from support.kernels import call_of, made_inputs
from support.targets import PLAIN_CPU

from mxforge.compile.library import export
from mxforge.compile.targets import resolve
from mxforge.schedules.kernel import Case, Kernel

ROOT = Path(__file__).resolve().parents[2]
MACHINE = ROOT / "build" / "aarch64"
GUEST = Path(__file__).with_name("aarch64_guest.py")

DEBS = ("python3", "libstdc++6")  # and what they depend on
WHEELS = tuple(
    f"{name}=={version(name)}"
    for name in ("apache-tvm", "apache-tvm-ffi", "numpy", "regex", "tiktoken", "typing_extensions")
)
PLATFORMS = tuple(f"manylinux_2_{minor}_aarch64" for minor in range(28, 16, -1))

# Of each level a CPU that qemu knows, without what the next level asks for.
CPUS = {"neon": "cortex-a72", "neon-dotprod": "cortex-a76", "neon-i8mm": "max"}


def unavailable(reason: str) -> Any:
    """Skip; or fail, where MXFORGE_REQUIRE_AARCH64 says that everything is installed."""
    if os.environ.get("MXFORGE_REQUIRE_AARCH64") == "1":
        pytest.fail(f"MXFORGE_REQUIRE_AARCH64=1, but {reason}")
    pytest.skip(reason)


@dataclass(frozen=True)
class Machine:
    qemu: str
    folder: Path

    def run(self, cpu: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """What `aarch64_guest.py` says with these arguments, on this CPU."""
        root = self.folder / "root"
        emulator = (self.qemu, "-cpu", cpu, "-L", root)
        command = (*emulator, root / "usr" / "bin" / "python3", GUEST, *arguments)
        environment = {**os.environ, "PYTHONPATH": str(self.folder / "site")}
        for name in ("LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONHOME"):
            environment.pop(name, None)
        return subprocess.run(
            list(map(str, command)), env=environment, capture_output=True, text=True, timeout=600
        )


def open_machine() -> Machine:
    """The machine, made where it is missing; skips (or fails, see `unavailable`) where it cannot
    be."""
    qemu = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if qemu is None:
        unavailable("qemu-aarch64 is missing; Debian has it in qemu-user")
    try:
        _make()
    except SetupError as error:
        unavailable(f"an aarch64 Python cannot be fetched: {error}")
    return Machine(str(qemu), MACHINE)


def _make() -> None:
    def make(folder: Path) -> None:
        _unpack_python(folder / "root", folder / "apt")
        _install_wheels(folder / "root", folder / "site")
        (folder / "site" / "mxforge").symlink_to(ROOT / "runtime")

    made(MACHINE, json.dumps({"debs": DEBS, "wheels": WHEELS, "source": str(ROOT)}), make)


def _unpack_python(root: Path, apt: Path) -> None:
    """Let apt work out and fetch what DEBS need on a machine on which nothing is installed."""
    for partial in (apt / "lists" / "partial", apt / "archives" / "partial"):
        partial.mkdir(parents=True)
    (apt / "status").touch()
    settings = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "root",  # apt's own user may have no access to this folder
        "Debug::NoLocking": "1",
        "Dir::Cache": apt,
        "Dir::State": apt,
        "Dir::State::status": apt / "status",
    }
    options = [f"--option={name}={value}" for name, value in settings.items()]
    # Where one of several sources has nothing for arm64, the others may do.
    run("apt-get", *options, "update", check=False)
    install = ("install", "--download-only", "--yes", "--no-install-recommends")
    run("apt-get", *options, *install, *DEBS)
    root.mkdir()
    for package in sorted((apt / "archives").glob("*.deb")):
        run("dpkg-deb", "--extract", package, root)
    if not (root / "lib").exists():  # that it is usr/lib is said by a package that is not here
        (root / "lib").symlink_to("usr/lib")
    shutil.rmtree(apt)


def _install_wheels(root: Path, site: Path) -> None:
    python = (root / "usr" / "bin" / "python3").readlink().name  # python3.11
    platforms = [f"--platform={platform}" for platform in PLATFORMS]
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-compile")
    foreign = (f"--python-version={python.removeprefix('python')}", "--only-binary=:all:")
    run(*pip, "--no-deps", *foreign, *platforms, f"--target={site}", *WHEELS)
    (site / "tvm" / "lib" / "libtvm_compiler.so").unlink()  # 240 MB that nothing here loads


class KernelCalls:
    """Calls of kernels, which one process makes one after the other: to start it takes seconds."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._arrays: dict[str, np.ndarray] = {}
        self._calls: list[dict[str, Any]] = []
        self._functions: dict[str, tuple[str, Kernel, Mapping[str, Any]]] = {}

    def add(self, kernel: Kernel, case: Case) -> None:
        call = call_of(kernel, PLAIN_CPU, made_inputs(case), case.static)  # on every level
        arrays = {f"{len(self._calls)}-{i}": array for i, array in enumerate(call.arrays)}
        self._arrays.update(arrays)
        keys = list(arrays)
        function = (f"f{len(self._functions)}", kernel, case.static)
        name, *_ = self._functions.setdefault(f"{kernel.name} {case.static}", function)
        self._calls.append(
            {
                "what": f"{kernel.name}: {case.name}",
                "function": name,
                "arguments": [(key, a.shape, a.dtype.name) for key, a in arrays.items()],
                "results": call.results(keys),
            }
        )

    def write(self) -> None:
        """What all levels share."""
        contents = {
            key: np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            for key, array in self._arrays.items()
        }
        np.savez(self._folder / "inputs.npz", **contents)
        (self._folder / "calls.json").write_text(json.dumps(self._calls))

    def compile(self, level: str) -> Path:
        """The library of all kernels for a level."""
        target = resolve(f"cpu:{level}")
        functions = {
            name: kernel.build(target.kernels, **static).with_attr("global_symbol", name)
            for name, kernel, static in self._functions.values()
        }
        library = self._folder / f"{level}.so"
        export(tvm.compile(tvm.IRModule(functions), target.tvm), library, target.host)
        return library

    def run(self, machine: Machine, cpu: str, library: Path) -> dict[str, list[np.ndarray]]:
        """By kernel and case: fresh outputs, then the new values of the inputs it updates."""
        outputs = library.with_suffix(".npz")
        done = machine.run(cpu, "kernels", self._folder, library, outputs)
        assert done.returncode == 0, done.stderr[-2000:]
        with np.load(outputs) as stored:
            return {
                call["what"]: [
                    stored[key].view(self._arrays[key].dtype).reshape(self._arrays[key].shape)
                    for key in call["results"]
                ]
                for call in self._calls
            }
