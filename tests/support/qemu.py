"""CPUs that this machine does not have, for tests: qemu-user runs our runtime on them.

It starts `qemu_guest.py`: on a CPU of this machine's architecture with the Python that runs the
tests, on another with Debian's Python and the wheels of our runtime, which are fetched once, by apt
and pip, into build/qemu. Nothing of this machine is changed for it, and root is not needed.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
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
from support.systems import built_core
from support.targets import PLAIN_CPU

from mxforge.compile import kernels
from mxforge.compile.plan_values import Values
from mxforge.compile.targets import CPU_LEVELS, resolve
from mxforge.machine import architecture
from mxforge.plan import Function, Plan, Role, Step, Tensor
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
WHEELS = tuple(f"{name}=={version(name)}" for name in ("ml_dtypes", "numpy", "regex", "tiktoken"))
GLIBC = range(28, 16, -1)  # versions 2.x that wheels may be built for


def unavailable(reason: str) -> Any:
    """Skip; or fail, where MXFORGE_REQUIRE_QEMU says that everything is installed."""
    if os.environ.get("MXFORGE_REQUIRE_QEMU") == "1":
        pytest.fail(f"MXFORGE_REQUIRE_QEMU=1, but {reason}")
    pytest.skip(reason)


@dataclass(frozen=True)
class Cpu:
    """command: qemu on this CPU with a Python; site: folders of packages that the Python does not
    have"""

    command: tuple[str, ...]
    site: tuple[Path, ...] = ()

    def run(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """What `qemu_guest.py` says with these arguments."""
        # OpenBLAS takes some of qemu's CPUs for others, which have more instructions.
        environment = {**os.environ, "OPENBLAS_CORETYPE": "generic"}
        if self.site:
            environment = _foreign(environment)
            environment["PYTHONPATH"] = os.pathsep.join(map(str, self.site))
        command = [*self.command, str(GUEST), *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)

    def run_program(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """A program for this CPU, and its arguments."""
        command = [*self.command[:-1], *map(str, words)]
        environment = _foreign(dict(os.environ))
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


def _foreign(environment: dict[str, str]) -> dict[str, str]:
    """Without what is meant for this machine's programs."""
    others = ("LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONHOME")
    return {name: value for name, value in environment.items() if name not in others}


def open_cpu(level: str) -> Cpu:
    """The CPU of a level; skips (or fails, see `unavailable`) where there can be none."""
    (machine,) = (each.machine for each in CPU_LEVELS if each.name == level)
    qemu = shutil.which(f"qemu-{machine}") or shutil.which(f"qemu-{machine}-static")
    if qemu is None:
        unavailable(f"qemu-{machine} is missing; Debian has it in qemu-user")
    command = (str(qemu), "-cpu", CPUS[level])
    if machine == architecture():
        return Cpu((*command, sys.executable))
    try:
        folder = _made(machine)
    except SetupError as error:
        unavailable(f"a Python for {machine} cannot be fetched: {error}")
    root = folder / "root"
    python = str(root / "usr/bin/python3")
    return Cpu((*command, "-L", str(root), python), (_package(machine), folder / "site"))


@cache
def _made(machine: str) -> Path:
    """The folder with `root`, Debian's Python, and `site`, its packages."""

    def make(folder: Path) -> None:
        _unpack_python(machine, folder / "root", folder / "apt")
        _install_wheels(machine, folder / "root", folder / "site")

    stamp = json.dumps({"debs": DEBS, "wheels": WHEELS})
    return made(ROOT / "build" / "qemu" / machine, stamp, make)


@cache
def _package(machine: str) -> Path:
    """A folder with the package as this checkout has it, and libmxforge for Linux there."""
    folder = Path(tempfile.mkdtemp(prefix="mxforge-site-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    runtime, native = ROOT / "runtime", folder / "mxforge" / "native"
    native.mkdir(parents=True)
    for of, to in ((runtime, native.parent), (runtime / "native", native)):
        for entry in of.iterdir():
            if not (entry.name == "native" or entry.name.startswith("libmxforge")):
                (to / entry.name).symlink_to(entry)
    core = built_core(f"linux-{machine}")
    (native / core.name).symlink_to(core)
    return folder


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
        functions = tuple(_call(f"call{i}", call) for i, call in enumerate(self._calls))
        (self._folder / "calls.plan").write_bytes(Plan(functions, workspace=0).to_bytes())

    def compile(self, level: str) -> Path:
        """The library of all kernels for a level."""
        target = resolve(f"cpu:{level}")
        functions = {
            name: kernel.build(target.kernels, **static)
            for name, kernel, static in self._functions.values()
        }
        library = self._folder / f"{level}.so"
        assert target.host is not None
        built = kernels.of_cpu(tvm.IRModule(functions), target)
        kernels.write_library(built, library, target.host)
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


def _call(name: str, call: Mapping[str, Any]) -> Function:
    """One call of a kernel, as a function of a launch plan: all of its arguments may change."""
    values, tensors = Values(), []
    for key, shape, dtype in call["arguments"]:
        extents = tuple(map(values.constant, shape))
        tensors.append(Tensor(Role.KV, dtype, extents, key))
    step = Step(call["function"], tuple(range(len(tensors))))
    return Function(name, values.all(), tuple(tensors), (), (step,), ())
