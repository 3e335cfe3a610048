"""Programs in C++ that test libmxforge's core, compiled with a sanitizer.

`CoreTests.program` gives one of them. What they share, the core itself, is compiled once a run for
each sanitizer.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mxforge.native import build

TESTS = Path(__file__).resolve().parents[1]
CORE = TESTS.parent / "runtime" / "native" / "core"
MEMORY = "address,undefined"
THREADS = "thread"

_FLAGS = [
    "-std=c++17", "-g1", "-fno-sanitize-recover=all", "-Wall", "-Wextra", "-Werror",
    # AddressSanitizer finds these, too, and they make compiling take more than twice as long.
    "-fno-sanitize=null,alignment,object-size,vptr",
]  # fmt: skip
# A leak is an error, and so is a sanitizer that nobody hears.
_ENVIRONMENT = {
    "ASAN_OPTIONS": "detect_leaks=1:detect_stack_use_after_return=1:exitcode=99",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "exitcode=99:halt_on_error=0",
}


class CoreTests:
    """Compiles into folders that `once` of conftest.py gives."""

    def __init__(self, once: Callable[..., Path]) -> None:
        self._once = once
        found = shutil.which("g++") or shutil.which("clang++")
        if found is None:
            pytest.skip("no compiler that has sanitizers; Debian: g++")
        self._compiler: str = found

    def program(self, name: str, sources: Sequence[Path], sanitizer: str = MEMORY) -> Path:
        """The program of these sources and the core."""

        def make(folder: Path) -> None:
            # Compiling takes longer than the tests do.
            objects = self._compile(folder, sources, f"-fsanitize={sanitizer}", "-O0")
            self._run(f"-fsanitize={sanitizer}", *objects, self._core(sanitizer), "-o",
                      folder / name, "-ldl", "-pthread")  # fmt: skip

        return self._once(f"{name}-{sanitizer.replace(',', '-')}", make) / name

    def _core(self, sanitizer: str) -> Path:
        def make(folder: Path) -> None:
            objects = self._compile(
                folder, build.CORE.parts[0].matching("*.cc"), f"-fsanitize={sanitizer}", "-O1"
            )
            subprocess.run(["ar", "rc", folder / "core.a", *objects], check=True)

        return self._once(f"core-{sanitizer.replace(',', '-')}", make) / "core.a"

    def _compile(self, folder: Path, sources: Sequence[Path], *flags: str) -> list[Path]:
        folder.mkdir(exist_ok=True)
        includes = [f"-I{CORE}", *(f"-I{path}" for path in {path.parent for path in sources})]
        includes.append(f"-I{TESTS / 'native'}")

        def compiled(source: Path) -> Path:
            made = folder / f"{source.parent.name}-{source.stem}.o"
            self._run(*_FLAGS, *flags, *includes, "-c", source, "-o", made)
            return made

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(compiled, sources))

    def _run(self, *arguments: object) -> None:
        done = subprocess.run(
            [self._compiler, *map(str, arguments)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


def run(program: Path, *arguments: object) -> subprocess.CompletedProcess[bytes]:
    """Run it with sanitizers that say what they find; fails where it does not end well."""
    done = subprocess.run(
        [program, *map(str, arguments)], capture_output=True, env={**os.environ, **_ENVIRONMENT}
    )
    said = (done.stdout[-4000:] + b"\n" + done.stderr[-8000:]).decode(errors="replace")
    assert done.returncode == 0, f"{program.name} ended with {done.returncode}:\n{said}"
    return done
