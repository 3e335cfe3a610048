"""Brings mapped weights into this process's page tables before they are asked for."""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
from collections.abc import Sequence

import numpy as np

PIECE_BYTES = 16 << 20
DELAY_S = 1.0  # begun at once, it would delay the first token
_MADV_POPULATE_READ = 22  # Linux 5.14: reads the file and maps its pages, as a first read would


def _madvise(array: np.ndarray, advice: int) -> bool:
    """Whether the system took the advice about the pages that the array touches."""
    begin = array.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE
    size = array.ctypes.data + array.nbytes - begin
    # Through ctypes, which lets go of the interpreter; mmap.madvise holds it.
    call = ctypes.CDLL(None).madvise
    call.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return bool(call(begin, size, advice) == 0)


class Prefault:
    """A thread that touches mapped arrays in order, until it is done or closed.

    What computes meanwhile faults only where it is ahead. Does nothing where the system cannot.
    """

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self._arrays = list(arrays)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mxforge-prefault", daemon=True)
        if sys.platform == "linux":
            self._thread.start()

    def close(self) -> None:
        """Stop, before the arrays are unmapped."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        if self._stopped.wait(DELAY_S):
            return
        for array in self._arrays:
            for start in range(0, array.nbytes, PIECE_BYTES):
                if self._stopped.is_set():
                    return
                if not _madvise(array[start : start + PIECE_BYTES], _MADV_POPULATE_READ):
                    return  # an older system, or no memory left: pages come as they are read
