from __future__ import annotations

import gc
import mmap
import sys
from pathlib import Path

import numpy as np
import pytest

from mxforge.sparse_map import map_sparse

HUGE = 2 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of 16 large pieces and a bit, its bytes all told apart, read once and so cached."""
    path = tmp_path / "weights"
    np.arange((16 * HUGE + 4096) // 4, dtype=np.uint32).tofile(path)
    path.read_bytes()
    return path


def mappings(path: Path) -> dict[int, int]:
    """Resident bytes of this process's mappings of a file, by address."""
    found, address = {}, None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(" ")[0]
        if "-" in first:
            address = int(first.split("-")[0], 16) if line.endswith(str(path)) else None
        elif first == "Rss:" and address is not None:
            found[address] = int(line.split()[1]) * 1024
    return found


@pytest.mark.parametrize(
    ("begin", "end"),
    [(0, None), (0, 1), (64, 100), (4096, 8192), (HUGE - 64, 3 * HUGE + 64), (16 * HUGE + 1, None)],
)
def test_holds_the_files_bytes(path: Path, begin: int, end: int | None):
    content = path.read_bytes()
    end = len(content) if end is None else end
    mapped = map_sparse(path, begin, end)
    assert mapped.dtype == np.uint8
    assert mapped.tobytes() == content[begin:end]
    assert mapped.ctypes.data % mmap.PAGESIZE == begin % mmap.PAGESIZE


def test_writes_do_not_reach_the_file(path: Path):
    before = path.read_bytes()
    mapped = map_sparse(path, 5, len(before))
    mapped[:] = 7
    assert path.read_bytes() == before


@linux
def test_what_is_not_read_is_not_resident(path: Path):
    mapped = map_sparse(path, 0, 16 * HUGE)
    assert [int(mapped[piece * HUGE]) for piece in range(16)] == [0] * 16
    (resident,) = mappings(path).values()
    assert resident <= 8 * HUGE


@linux
def test_nothing_stays_mapped(path: Path):
    mapped = map_sparse(path, 64, HUGE)
    part = mapped[100:200]
    del mapped
    gc.collect()
    assert len(mappings(path)) == 1  # a part keeps the whole
    assert part.tobytes() == path.read_bytes()[164:264]
    del part
    gc.collect()
    assert not mappings(path)


@pytest.mark.parametrize(
    ("name", "begin", "end"),
    [("missing", 0, 10), ("/dev/null", 0, 10), ("weights", 0, 1 << 40), ("weights", 64, 64)],
)
def test_says_which_file_does_not_hold_these_bytes(path: Path, name: str, begin: int, end: int):
    with pytest.raises(OSError, match=name):
        map_sparse(path.parent / name, begin, end)
