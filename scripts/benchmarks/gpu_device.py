"""A device as the runner of a kit sees it: bytes in, bytes out, and how fast it copies.

Needs the runtime alone, as everything of the runner does.
"""

from __future__ import annotations

import ctypes
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mxforge import library as runtime
from mxforge.library import Library, aligned_empty

PROBE_BYTES = 256 << 20  # of each of two tensors: beyond the caches of the GPUs that we know
PROBE_S = 0.02  # what one sample takes at least


class Device:
    """The device of a loaded library."""

    def __init__(self, library: Library) -> None:
        ffi: Any = vars(runtime)["tvm_ffi"]  # imported there without what it would pull in
        self.library = library
        self._sync = ffi.get_global_func("runtime.Device_StreamSync")
        self._copy = ffi.get_global_func("runtime.TVMTensorCopyFromTo")
        self._to_bytes = ffi.get_global_func("runtime.TVMTensorCopyToBytes")

    def sync(self) -> None:
        """Wait until the device has done everything."""
        self._sync(self.library.device, 0)

    def tensor(self, content: np.ndarray, shape: Sequence[int], dtype: str) -> Any:
        """A tensor of these bytes (u8), which may be reused afterwards."""
        kept = aligned_empty(content.shape, np.uint8)  # what a tensor of the CPU keeps mapped
        kept[...] = content
        return self.library.weight(kept, shape, dtype)

    def bytes(self, tensor: Any, count: int) -> np.ndarray:
        """The first bytes of a tensor, u8; waits for the device."""
        found = np.empty(count, np.uint8)
        self._to_bytes(tensor, found.ctypes.data_as(ctypes.c_void_p), count)
        return found

    def nbytes(self, tensor: Any) -> int:
        return math.prod(tensor.shape) * int(tensor.dtype.itemsize)

    def copy_of(self, tensor: Any) -> Any:
        """Another tensor with the same content."""
        other = self.library.empty(tuple(tensor.shape), str(tensor.dtype))
        self._copy(tensor, other)
        return other

    def copy(self, source: Any, destination: Any) -> None:
        self._copy(source, destination)


class Probe:
    """How fast the device copies its own memory: GB/s, bytes read and bytes written together."""

    def __init__(self, device: Device, size: int = PROBE_BYTES) -> None:
        self._device, self._size = device, size
        zeros = np.zeros(size, np.uint8)
        self._pair = [device.tensor(zeros, (size,), "uint8") for _ in range(2)]
        self._repeats = 1
        timed(device, self._once)
        seconds = timed(device, self._once)[0]
        self._repeats = max(1, round(PROBE_S / seconds))

    def _once(self) -> None:
        for _ in range(self._repeats):
            self._device.copy(*self._pair)

    def gb_s(self) -> float:
        """The median of three samples."""
        seconds = statistics.median(timed(self._device, self._once)[0] for _ in range(3))
        return 2 * self._size * self._repeats / seconds / 1e9


def timed(device: Device, work: Callable[[], None]) -> tuple[float, float]:
    """Seconds of `work` between two synchronizations, and those until all of it was issued."""
    device.sync()
    started = time.perf_counter()
    work()
    issued = time.perf_counter() - started
    device.sync()
    return time.perf_counter() - started, issued
