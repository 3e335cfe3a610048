from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

from mxforge import prefault
from mxforge.prefault import Prefault

PAGES = 64


@pytest.fixture
def mapped(tmp_path: Path) -> np.ndarray:
    """A mapped file of some pages, none of which was read."""
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * (PAGES * mmap.PAGESIZE // 256))
    return np.memmap(path, np.uint8, mode="c")


def resident(array: np.ndarray) -> int:
    """Bytes of the array in this process's page tables."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            begin, end = (int(part, 16) for part in line.split(" ")[0].split("-"))
            inside = begin <= array.ctypes.data < end
        elif inside and line.startswith("Rss:"):
            found = int(line.split()[1]) * 1024
    return found


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefault, "DELAY_S", 0)


def finished(started: Prefault) -> None:
    started._thread.join()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_maps_everything_and_changes_nothing(mapped: np.ndarray):
    before = resident(mapped)
    finished(Prefault([mapped[: mapped.size // 2], mapped[mapped.size // 2 :]]))
    assert before < resident(mapped) == mapped.nbytes
    assert mapped[:256].tolist() == list(range(256))


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_arrays_need_not_begin_or_end_with_a_page(mapped: np.ndarray):
    finished(Prefault([mapped[64:100], mapped[100 : 3 * mmap.PAGESIZE + 1]]))
    assert resident(mapped) >= 4 * mmap.PAGESIZE


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_closing_stops_it(mapped: np.ndarray, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(prefault, "PIECE_BYTES", mmap.PAGESIZE)
    started = Prefault([mapped] * 1000)
    started.close()
    assert not started._thread.is_alive()
    assert mapped[-1] == 255


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_it_leaves_the_first_token_alone_and_can_be_stopped_meanwhile(
    mapped: np.ndarray, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(prefault, "DELAY_S", 3600)
    before = resident(mapped)
    started = Prefault([mapped])
    started._thread.join(0.2)  # far more than mapping a few pages takes
    assert started._thread.is_alive()
    assert resident(mapped) == before
    started.close()
    assert not started._thread.is_alive()


def test_nothing_to_do():
    Prefault([]).close()
