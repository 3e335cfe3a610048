"""libmxforge's core under sanitizers: programs in C++, each of which runs its own tests."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.native import THREADS, CoreTests, run

from mxforge.native.build import CORE

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def core_tests(once: Callable[..., Path]) -> CoreTests:
    return CoreTests(once)


def test_units(core_tests: CoreTests, tmp_path: Path):
    sources = [HERE / "check.cc", *sorted(HERE.glob("test_*.cc"))]
    done = run(core_tests.program("units", sources), tmp_path)
    assert done.stdout.count(b"\nok ") > 20


def test_misuse(core_tests: CoreTests, artifact: Path):
    program = core_tests.program("misuse", [HERE / "check.cc", HERE / "misuse.cc"])
    assert run(program, artifact).stdout.count(b"\nok ") > 10


@pytest.mark.slow
def test_threads(core_tests: CoreTests, artifact: Path):
    program = core_tests.program("threads", [HERE / "check.cc", HERE / "threads.cc"], THREADS)
    assert run(program, artifact).stdout.count(b"ok ") == 6


FEW_THREADS = """
import ctypes, resource, struct, sys
core = ctypes.CDLL(sys.argv[1])
core.mxf_error.restype = ctypes.c_char_p
resource.setrlimit(resource.RLIMIT_AS, (1 << 31, 1 << 31))  # a thread's stack takes 8 MB of it
options = struct.pack("=i4xqiii4xQ", 4096, 64, 1, 0, 0, 0)
status = core.mxf_model_open(sys.argv[2].encode(), options, ctypes.byref(ctypes.c_void_p()))
print(status, core.mxf_error().decode())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits of the address space are Linux's")
def test_threads_that_the_system_does_not_give(artifact: Path):
    done = subprocess.run(
        [sys.executable, "-c", FEW_THREADS, CORE.output, artifact], capture_output=True, text=True
    )
    assert done.stdout.startswith("4 The system gives no more than"), (done.stdout, done.stderr)
    assert "of 4096 threads; load the model with fewer" in done.stdout
