"""The harness that runs CUDA and Metal text on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def simt(once: Callable[..., Path]) -> Any:
    """A `support.simt.harness.Simt`; skips, saying why, where there can be none."""
    from support.simt.harness import Simt
    from support.simt.session import runtime

    return Simt(runtime(once))
