"""Maps a table of which few rows are read, so that the others do not become resident."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import sys
from pathlib import Path

import numpy as np

_HUGE_BYTES = 2 << 20
_MAP_FIXED = 0x10  # on x86, Arm and RISC-V


def map_sparse(path: Path, begin: int, end: int) -> np.ndarray:
    """Bytes [begin, end) of a file, copy-on-write: u8 [end - begin].

    Linux keeps a cached file in chunks of up to 2 MB, and maps all of a chunk for one byte of it
    where the file's offset and the address agree within 2 MB. Here they do not, and a read brings
    64 KB. Raises OSError where the file cannot be mapped, or does not hold these bytes.
    """
    if not 0 <= begin < end <= path.stat().st_size:
        raise OSError(errno.EINVAL, f"expected a file with bytes {begin} to {end}", str(path))
    if sys.platform != "linux":
        return np.memmap(path, np.uint8, "c", begin, (end - begin,))
    lead = begin % mmap.ALLOCATIONGRANULARITY
    offset, size = begin - lead, lead + end - begin
    # Python's mmap takes no address, but unmaps whatever lies in its range when nobody needs it.
    room = np.frombuffer(mmap.mmap(-1, size + _HUGE_BYTES, flags=mmap.MAP_PRIVATE), np.uint8)
    skip = (offset - room.ctypes.data + _HUGE_BYTES // 2) % _HUGE_BYTES
    system = ctypes.CDLL(None, use_errno=True)
    system.mmap.restype = ctypes.c_void_p
    system.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
    with path.open("rb") as file:
        address = room.ctypes.data + skip
        access, kind = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | _MAP_FIXED
        if system.mmap(address, size, access, kind, file.fileno(), offset) != address:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(path))
    return room[skip + lead : skip + size]
