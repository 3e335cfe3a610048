"""NVIDIA's GPUs: what the driver says of them, through its C interface, and what runs on them."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

from .errors import ArtifactTargetError

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
OLDEST = "sm_80"  # what the target `cuda` has code for: this architecture and all later ones
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute


@dataclass(frozen=True)
class CudaDevice:
    """`arch` is its architecture, such as sm_90."""

    name: str
    memory_bytes: int
    arch: str


def devices() -> list[CudaDevice]:
    """The GPUs that the driver shows; ArtifactTargetError, with the reason, where it shows none."""
    try:
        driver = ctypes.CDLL(LIBRARY)
    except OSError:
        raise ArtifactTargetError(f"NVIDIA's driver ({LIBRARY}) is not installed") from None
    count = ctypes.c_int()
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or not count:
        raise ArtifactTargetError("NVIDIA's driver finds no device")
    found = []
    for index in range(count.value):
        name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
        major, minor = ctypes.c_int(), ctypes.c_int()
        driver.cuDeviceGetName(name, len(name), index)
        driver.cuDeviceTotalMem_v2(ctypes.byref(memory), index)
        driver.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, index)
        driver.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, index)
        arch = f"sm_{major.value}{minor.value}"
        found.append(CudaDevice(name.value.decode(errors="replace"), memory.value, arch))
    return found


def number(arch: str) -> int:
    """90 of sm_90 and of sm_90a."""
    return int(arch.removeprefix("sm_").rstrip("a"))


def check(target: str, index: int) -> None:
    """ArtifactTargetError where code for `target`, such as cuda:sm_90a, does not run on a device.

    Code for an `a` runs on that architecture alone, other code on later ones too.
    """
    found = devices()
    if index >= len(found):
        raise ArtifactTargetError(
            f"The artifact is to run on CUDA device {index}, but there are {len(found)} here, "
            "counted from 0; choose one of these."
        )
    needed = target.partition(":")[2] or OLDEST
    device = found[index]
    least, has = number(needed), number(device.arch)
    if has != least if needed.endswith("a") else has < least:
        others = "no others" if needed.endswith("a") else "later ones"
        raise ArtifactTargetError(
            f"The artifact's code is for GPUs of {needed} and {others}, but {device.name} is of "
            f"{device.arch}; compile the model for cuda:{device.arch}."
        )
