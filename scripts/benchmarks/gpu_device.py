"""A library's device as the runner of a kit sees it: opened, and how fast it copies.

Needs the runtime alone, as everything of the runner does.
"""

from __future__ import annotations

import statistics
from pathlib import Path

from mxforge.artifact import open_artifact
from mxforge.core import CoreLibrary

PROBE_BYTES = 256 << 20  # from one buffer to another: beyond the caches of the GPUs that we know
PROBE_S = 0.02  # what one sample takes at least
ALL_CORES = 0


def open_library(target: str, plan: Path, kernels: Path) -> CoreLibrary:
    """A library on the first device; a CPU's on all cores."""
    return CoreLibrary(target, plan, kernels, ALL_CORES)


def library_of(artifact: Path) -> CoreLibrary:
    """The library of an artifact, without its weights."""
    opened = open_artifact(artifact)
    assert opened.variant.plan is not None
    return open_library(opened.variant.target, opened.path / opened.variant.plan, opened.library)


class Probe:
    """How fast the device copies its own memory: GB/s, bytes read and bytes written together."""

    def __init__(self, library: CoreLibrary) -> None:
        self._library = library
        self._runs = max(1, round(PROBE_S / library.time_copies(PROBE_BYTES, 1)))

    def gb_s(self) -> float:
        """The median of three samples."""
        seconds = statistics.median(
            self._library.time_copies(PROBE_BYTES, self._runs) for _ in range(3)
        )
        return 2 * PROBE_BYTES * self._runs / seconds / 1e9
