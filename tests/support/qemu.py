"""CPUs that this machine does not have, for tests: qemu-user runs our runtime on them.

It starts `qemu_guest.py`: on a CPU of this machine's architecture with the Python that runs the
tests, on another with Debian's Python and the wheels of our runtime, which are fetched once, by apt
and pip, into build/qemu. Nothing of this machine is changed for it, and root is not needed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
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
from mxforge.compile.targets import CPU_LEVELS, resolve
from mxforge.machine import architecture
from mxforge.schedules.kernel import Case, Kernel

ROOT = Path(__file__).resolve().parents[2]
GUEST = Path(__file__).with_name("qemu_guest.py")

# Of each CPU level a CPU that qemu 7.2 knows, without what the next level asks for. An instruction
# that it lacks ends the process. No CPU here has AVX-512: qemu does not know it. NumPy's wheels
# need x86-64-v2, so that x86-64 has no CPU of its own.
CPUS = {
    "avx2": "Haswell",
    "x86-64-v2": "Nehalem",
    "x86-64": "Nehalem",
    "neon-i8mm": "max",
    "neon-dotprod": "cortex-a76",
    "neon": "cortex-a72",
}
LEVELS = [level.name for level in CPU_LEVELS if "avx512f" not in level.required]

DEBIAN = {"x86_64": "amd64", "aarch64": "arm64"}  # its names of the architectures
DEBS = ("python3", "libstdc++6")  # and what they depend on
WHEELS = tuple(
    f"{name}=={version(name)}"
    for name in ("apache-tvm", "apache-tvm-ffi", "numpy", "regex", "tiktoken", "typing_extensions")
)
GLIBC = range(28, 16, -1)  # versions 2.x that wheels may be built for


def unavailable(reason: str) -> Any:
    """Skip; or fail, where MXFORGE_REQUIRE_QEMU says that everything is installed."""
    if os.environ.get("MXFORGE_REQUIRE_QEMU") == "1":
        pytest.fail(f"MXFORGE_REQUIRE_QEMU=1, but {reason}")
    pytest.skip(reason)


@dataclass(frozen=True)
class Cpu:
    """command: qemu on this CPU with a Python; site: packages that the Python does not have"""

    command: tuple[str, ...]
    site: Path | None

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """What `qemu_guest.py` says with these arguments."""
        # OpenBLAS takes some of qemu's CPUs for others, which have more instructions.
        environment = {**os.environ, "OPENBLAS_CORETYPE": "generic"}
        if self.site is not None:
            for name in ("LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONHOME"):
                environment.pop(name, None)
            environment["PYTHONPATH"] = str(self.site)
        command = [*self.command, str(GUEST), *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def open_cpu(level: str) -> Cpu:
    """The CPU of a level; skips (or fails, see `unavailable`) where there can be none."""
    (machine,) = (each.machine for each in CPU_LEVELS if each.name == level)
    qemu = shutil.which(f"qemu-{machine}") or shutil.which(f"qemu-{machine}-static")
    if qemu is None:
        unavailable(f"qemu-{machine} is missing; Debian has it in qemu-user")
    command = (str(qemu), "-cpu", CPUS[level])
    if machine == architecture():
        return Cpu((*command, sys.executable), None)
    try:
        folder = _made(machine)
    except SetupError as error:
        unavailable(f"a Python for {machine} cannot be fetched: {error}")
    root = folder / "root"
    return Cpu((*command, "-L", str(root), str(root / "usr/bin/python3")), folder / "site")


@cache
def _made(machine: str) -> Path:
    """The folder with `root`, Debian's Python, and `site`, its packages."""

    def make(folder: Path) -> None:
        _unpack_python(machine, folder / "root", folder / "apt")
        _install_wheels(machine, folder / "root", folder / "site")
        (folder / "site" / "mxforge").symlink_to(ROOT / "runtime")

    stamp = json.dumps({"debs": DEBS, "wheels": WHEELS, "source": str(ROOT)})
    return made(ROOT / "build" / "qemu" / machine, stamp, make)


def _unpack_python(machine: str, root: Path, apt: Path) -> None:
    """Let apt work out and fetch what DEBS need on a machine on which nothing is installed."""
    for partial in (apt / "lists" / "partial", apt / "archives" / "partial"):
        partial.mkdir(parents=True)
    (apt / "status").touch()
    settings = {
        "APT::Architecture": DEBIAN[machine],
        "APT::Architectures": DEBIAN[machine],
        "APT::Sandbox::User": "root",  # apt's own user may have no access to this folder
        "Debug::NoLocking": "1",
        "Dir::Cache": apt,
        "Dir::State": apt,
        "Dir::State::status": apt / "status",
    }
    options = [f"--option={name}={value}" for name, value in settings.items()]
    # Where one of several sources has nothing for the architecture, the others may do.
    run("apt-get", *options, "update", check=False)
    install = ("install", "--download-only", "--yes", "--no-install-recommends")
    run("apt-get", *options, *install, *DEBS)
    root.mkdir()
    for package in sorted((apt / "archives").glob("*.deb")):
        run("dpkg-deb", "--extract", package, root)
    if not (root / "lib").exists():  # that it is usr/lib is said by a package that is not here
        (root / "lib").symlink_to("usr/lib")
    shutil.rmtree(apt)


def _install_wheels(machine: str, root: Path, site: Path) -> None:
    python = (root / "usr" / "bin" / "python3").readlink().name  # python3.11
    platforms = [f"--platform=manylinux_2_{minor}_{machine}" for minor in GLIBC]
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

    def run(self, cpu: Cpu, library: Path) -> dict[str, list[np.ndarray]]:
        """By kernel and case: fresh outputs, then the new values of the inputs it updates."""
        outputs = library.with_suffix(".npz")
        done = cpu.run("kernels", self._folder, library, outputs)
        assert done.returncode == 0, done.stderr[-2000:]
        with np.load(outputs) as stored:
            return {
                call["what"]: [
                    stored[key].view(self._arrays[key].dtype).reshape(self._arrays[key].shape)
                    for key in call["results"]
                ]
                for call in self._calls
            }
