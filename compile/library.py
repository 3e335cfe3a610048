"""From TVM's executable to a shared library on disk, the same bytes for the same input.

Linking uses the machine's C compiler, or the one inside the `ziglang` wheel where there is none.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tvm import relax

from mxforge.errors import TargetError

SUFFIX = ".dylib" if sys.platform == "darwin" else ".so"
_COMPILERS = ("cc", "gcc", "clang")
_FLAGS = {
    # The runtime that loads the library provides TVM's symbols.
    "darwin": ["-dynamiclib", "-Wl,-undefined,dynamic_lookup", "-Wl,-install_name,model.dylib"],
    "linux": ["-shared", "-fPIC", "-Wl,--build-id=none"],
}


def export(executable: relax.VMExecutable, path: Path) -> None:
    """Write `executable` as a shared library; TargetError where nothing here can link."""
    with tempfile.TemporaryDirectory(prefix="mxforge-link-") as scratch:
        executable.export_library(str(path), fcompile=_link, workspace_dir=scratch)


def _link(output: str, objects: Sequence[str], **_options: object) -> None:
    flags = _FLAGS["darwin" if sys.platform == "darwin" else "linux"]
    # Temporary folders have random names; relative paths keep them out of the library.
    inputs = [str(Path(name).name) for name in objects]
    folder = Path(objects[0]).parent
    command = [*_linker(), *flags, "-o", str(Path(output).resolve()), *inputs]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise TargetError(
            f"Linking the library with {command[0]} failed: {result.stderr.strip()[-400:]}"
        )


def _linker() -> list[str]:
    for name in _COMPILERS:
        if found := shutil.which(name):
            return [found]
    if importlib.util.find_spec("ziglang"):
        return [sys.executable, "-m", "ziglang", "cc"]
    raise TargetError(
        "Linking needs a C compiler (cc, gcc or clang) or the package ziglang, and neither is "
        "here; install one, for example with: pip install ziglang"
    )
