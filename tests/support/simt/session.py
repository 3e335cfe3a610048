"""The harness's runtime, built once for a run of the tests."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mxforge.native.build import BuildError

from .toolchain import build_runtime, compiler

MACHINES = ("x86_64", "aarch64", "arm64")


def runtime(once: Callable[..., Path]) -> Path:
    """The folder that has it, by the fixture `once`; skips, saying why, where there can be none."""
    if sys.platform != "linux" or platform.machine() not in MACHINES:
        _unavailable(f"it knows Linux on x86_64 and aarch64, and this is {platform.platform()}")
    try:
        compiler()
    except BuildError:
        _unavailable("there is no C++ compiler: neither g++, clang++ nor the package ziglang")
    return once("simt", build_runtime)


def _unavailable(reason: str) -> None:
    """Skip; or fail, where MXFORGE_REQUIRE_SIMT says that everything is installed."""
    if os.environ.get("MXFORGE_REQUIRE_SIMT") == "1":
        pytest.fail(f"MXFORGE_REQUIRE_SIMT=1, but {reason}")
    pytest.skip(f"CUDA and Metal text cannot run here: {reason}")
