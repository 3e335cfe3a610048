"""Compiles the runtime, and kernels against it, with the machine's C++ compiler or ziglang's."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

from mxforge.native.build import find_compiler

HERE = Path(__file__).parent
SOURCES = sorted((HERE / "runtime").glob("*.cc"))
RUNTIME = "libsimt.so"

COMMON = ("-std=c++17", "-fPIC")
RUNTIME_FLAGS = ("-O2", "-Wall", "-Wextra", "-Werror")
# -fsanitize=thread makes accesses call the runtime; locals begin as a pattern that is no number.
# No contraction: what a * b + c rounds to must not depend on the machine.
KERNEL_FLAGS = (
    "-O1", "-g1", "-w", "-fsanitize=thread", "-ftrivial-auto-var-init=pattern", "-ffp-contract=off",
    "-fno-strict-aliasing", f"-I{HERE / 'include'}",
)  # fmt: skip


class CompileError(Exception):
    """The C++ compiler refused a kernel: the text uses what the headers lack."""


@cache
def compiler() -> tuple[str, ...]:
    return tuple(find_compiler())


def build_runtime(folder: Path) -> None:
    """RUNTIME in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    _run(*COMMON, *RUNTIME_FLAGS, "-shared", *map(str, SOURCES), "-o", str(folder / RUNTIME))


def build_kernel(source: str, folder: Path) -> Path:
    """The shared library of a translated text, from `folder` if it was compiled before."""
    key = hashlib.sha256(source.encode()).hexdigest()[:24]
    library = folder / f"{key}.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Beside others that may compile the same; with a name that a debugger can show.
        begun = folder / f"{key}.{os.getpid()}"
        file, made = begun.with_suffix(f"{begun.suffix}.cc"), begun.with_suffix(f"{begun.suffix}.o")
        file.write_text(source)
        _run(*COMMON, *KERNEL_FLAGS, "-c", str(file), "-o", str(made))
        # Linked apart, so that the compiler's own runtime for -fsanitize=thread stays out.
        _run("-shared", str(made), "-o", str(begun))
        made.unlink()
        begun.rename(library)
    return library


def statement_at(address: int) -> str:
    """The line of a kernel's C++ whose code ends at an address of this process; "" where the
    machine lacks addr2line, which comes with g++."""
    tool = shutil.which("addr2line")
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    libraries: dict[str, int] = {}  # path -> where it begins
    for fields in maps:
        begin, end = (int(bound, 16) for bound in fields[0].split("-"))
        path = fields[-1]
        libraries.setdefault(path, begin)
        if tool and begin < address <= end and path.endswith(".so"):
            offset = hex(address - 1 - libraries[path])
            found = subprocess.run([tool, "-e", path, offset], capture_output=True, text=True)
            file, _, line = found.stdout.split(" ")[0].strip().rpartition(":")
            if line.isdigit() and Path(file).is_file():
                return Path(file).read_text().splitlines()[int(line) - 1].strip()
    return ""


def _run(*arguments: str) -> None:
    result = subprocess.run([*compiler(), *arguments], capture_output=True, text=True)
    if result.returncode:
        raise CompileError(f"{' '.join([*compiler(), *arguments])}\n{result.stderr[:4000]}")
