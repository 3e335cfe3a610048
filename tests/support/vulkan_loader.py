"""A Vulkan loader whose calls are counted, and fail when a test says so."""

from __future__ import annotations

import ctypes
import os
import subprocess
from enum import IntEnum
from pathlib import Path

from mxforge.native import build

DEVICE_LOST, OUT_OF_DEVICE_MEMORY = -4, -2  # of VkResult


class Call(IntEnum):
    """The functions that are watched, in the order of vulkan_loader.c."""

    SUBMIT, WAIT, ALLOCATE, DISPATCH = range(4)


def build_loader(scratch: Path) -> Path:
    """Compile it; BuildError where there is no compiler, or no headers of Vulkan."""
    compiler = build.find_compiler()
    output = scratch / "libvulkan_faults.so"
    headers = [f"-isystem{folder}" for folder in build.vulkan_headers(compiler)]
    source = Path(__file__).with_suffix(".c")
    subprocess.run(
        [*compiler, "-x", "c", "-fPIC", "-shared", "-fvisibility=hidden", *headers, str(source),
         "-o", str(output), "-ldl"],
        check=True,
    )  # fmt: skip
    return output


class Loader:
    """The one that MXFORGE_VULKAN_LOADER names in this process."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(os.environ["MXFORGE_VULKAN_LOADER"])

    def fail(self, call: Call, result: int, count: int = 1) -> None:
        """Have the next calls of a function answer `result`."""
        self._library.fail(int(call), result, count)

    def calls(self, call: Call) -> int:
        return int(self._library.calls(int(call)))
