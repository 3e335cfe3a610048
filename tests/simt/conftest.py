"""The harness that runs CUDA and Metal text on the CPU."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

MACHINES = ("x86_64", "aarch64", "arm64")


@pytest.fixture(scope="session")
def simt(once: Callable[..., Path]) -> Any:
    """A `support.simt.harness.Simt`; skips, saying why, where there can be none."""
    from support.simt.harness import Simt
    from support.simt.toolchain import build_runtime, compiler

    from mxforge.native.build import BuildError

    if sys.platform != "linux" or platform.machine() not in MACHINES:
        _unavailable(f"it knows Linux on x86_64 and aarch64, and this is {platform.platform()}")
    try:
        compiler()
    except BuildError:
        _unavailable("there is no C++ compiler: neither g++, clang++ nor the package ziglang")
    return Simt(once("simt", build_runtime))


def _unavailable(reason: str) -> None:
    """Skip; or fail, where MXFORGE_REQUIRE_SIMT says that everything is installed."""
    if os.environ.get("MXFORGE_REQUIRE_SIMT") == "1":
        pytest.fail(f"MXFORGE_REQUIRE_SIMT=1, but {reason}")
    pytest.skip(f"CUDA and Metal text cannot run here: {reason}")
