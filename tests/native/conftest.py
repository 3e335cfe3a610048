"""An artifact for the programs in C++."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.small import MAX_BATCH, PREFILL_CHUNK


@pytest.fixture(scope="session")
def artifact(compiled: Callable[..., Path]) -> Path:
    """Shape odd-1, as the runtime's tests have it: window 5, and a vocabulary of 1003."""
    return compiled("odd-1", max_batch=MAX_BATCH, prefill_chunk=PREFILL_CHUNK)
