from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tiny models of these tests are made, once."""
    return tmp_path_factory.mktemp("work")
