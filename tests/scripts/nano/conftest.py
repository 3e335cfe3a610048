from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from nano import compact, dialogue
from support.nano import SMALL, USED, small_tensors

from mxforge.tokenizer import O200kHarmony


@pytest.fixture(scope="session")
def tokenizer() -> O200kHarmony:
    return O200kHarmony()


@pytest.fixture(scope="session")
def renderer(tokenizer: O200kHarmony) -> Any:
    return dialogue.Renderer(tokenizer)


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("nano") / "small"
    compact.write_compact(folder, SMALL, USED, small_tensors())
    return folder


@pytest.fixture(scope="session")
def small_expanded(small: Path) -> Path:
    expanded: Path = compact.expand(small, small.with_name("expanded"))
    return expanded
