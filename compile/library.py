"""From TVM's executable to files on disk, the same bytes for the same input.

Linking for this machine uses its C compiler; for another, or where there is none, the one inside
the `ziglang` wheel.
CUDA sources are compiled here by nvcc: TVM 0.27 puts their text into the library, and would have
them compiled by whoever loads it. The runtime hands TVM the compiled code instead, found by the
hash of the text.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import tvm
from tvm import relax

from mxforge.artifact import device_code_name
from mxforge.errors import TargetError
from mxforge.machine import host_system

from . import cuda, metal
from .targets import CompileTarget

_COMPILERS = ("cc", "gcc", "clang")
_GLIBC = "2.28"  # the oldest that apache-tvm's wheels run with
_FLAGS = {
    # The runtime that loads the library provides TVM's symbols.
    "darwin": ["-dynamiclib", "-Wl,-undefined,dynamic_lookup", "-Wl,-install_name,model.dylib"],
    "linux": ["-shared", "-fPIC", "-Wl,--build-id=none"],
}


def file_name(host: str, variant: str = "") -> str:
    """What the library is called on `host`, such as ``linux-x86_64``; one of several by variant."""
    stem = f"model-{variant}" if variant else "model"
    return f"{stem}.dylib" if host.startswith("darwin") else f"{stem}.so"


def export(executable: relax.VMExecutable, path: Path, host: str) -> None:
    """Write `executable` as a shared library for `host`; TargetError where nothing here can link.

    What the linker needs meanwhile lies beside it, where a killed compilation is cleaned up.
    """
    with tempfile.TemporaryDirectory(prefix="link-", dir=path.parent) as scratch:
        link = partial(_link, host)
        executable.export_library(str(path), fcompile=link, workspace_dir=scratch)


def device_code(
    executable: relax.VMExecutable, target: CompileTarget, folder: Path
) -> dict[str, bytes]:
    """Compiled device code by file name; empty for targets whose library needs no such file.

    `folder` is for what nvcc needs meanwhile. Raises TargetError where nvcc fails, or where
    shaders need more than Metal has.
    """
    for module in _imports(executable.mod, "metal"):
        metal.check(str(module.inspect_source()))
    sources = [str(module.inspect_source()) for module in _imports(executable.mod, "cuda")]
    return {
        device_code_name(source): cuda.compiled(source, target.archs, folder) for source in sources
    }


def _imports(module: tvm.runtime.Module, kind: str) -> list[tvm.runtime.Module]:
    found = [module] if module.kind == kind else []
    for imported in module.imports:
        found += _imports(imported, kind)
    return found


def _link(host: str, output: str, objects: Sequence[str], **_options: object) -> None:
    flags = _FLAGS["darwin" if host.startswith("darwin") else "linux"]
    # Temporary folders have random names; relative paths keep them out of the library.
    inputs = [str(Path(name).name) for name in objects]
    folder = Path(objects[0]).parent
    command = [*_linker(host), *flags, "-o", str(Path(output).resolve()), *inputs]
    result = _run(command, folder)
    if result.returncode != 0:
        raise TargetError(
            f"Linking the library with {command[0]} failed: {result.stderr.strip()[-400:]}"
        )


def _run(command: Sequence[str], folder: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a tool in `folder`, its temporary files included."""
    environment = {**os.environ, "TMPDIR": str(Path(folder).resolve())}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def _linker(host: str) -> list[str]:
    here = host == host_system()
    for name in _COMPILERS if here else ():
        if found := shutil.which(name):
            return [found]
    if importlib.util.find_spec("ziglang"):
        # -O2 is for zig's own support library, made at the first use: 4 s instead of 16.
        zig = [sys.executable, "-m", "ziglang", "cc", "-O2"]
        return zig if here else [*zig, "-target", f"{host.partition('-')[2]}-linux-gnu.{_GLIBC}"]
    needed = "a C compiler (cc, gcc or clang) or the" if here else "the"
    raise TargetError(
        f"Linking for {host} needs {needed} package ziglang, and it is not here; install it, for "
        "example with: pip install ziglang"
    )
