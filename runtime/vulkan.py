"""The Vulkan device API in this process: find the native library, load it once, ask it.

TVM's wheels have no Vulkan; `libmxforge_vulkan` brings it (runtime/native/vulkan). As everywhere
in the thin runtime, `import tvm` never happens here.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from . import library
from .errors import VulkanError

DEVICE_TYPE = 7  # DLPack's number

tvm_ffi: Any = vars(library)["tvm_ffi"]  # imported there without what it would pull in

_SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
_BUILT = Path(__file__).parent / "native" / f"libmxforge_vulkan{_SUFFIX}"
_loaded: list[Path] = []  # at most one
_BUILD = (
    "install a C++17 compiler and the Vulkan headers (Debian and Ubuntu: apt-get install g++ "
    "libvulkan-dev), then run: python -m mxforge.native.build"
)


@dataclass(frozen=True)
class Heap:
    """One of a device's memories."""

    bytes: int
    device_local: bool


@dataclass(frozen=True)
class Device:
    """A Vulkan device of this machine."""

    index: int  # what MXFORGE_VULKAN_DEVICE may name, next to `name` and `type`
    device_id: int | None  # the n of vulkan:n; None: unusable, or not chosen
    name: str
    type: str  # discrete, integrated, virtual, cpu, other
    api_version: str
    driver: str
    heaps: tuple[Heap, ...]
    max_allocation_bytes: int  # of one tensor
    shared_memory_bytes: int
    max_threads_per_block: int
    subgroup_size: tuple[int, int]  # smallest, largest
    subgroup_operations: tuple[str, ...]
    features: tuple[str, ...]
    matrices: tuple[str, ...]  # products of cooperative matrices: "16x16x16 float16 float16 …"
    usable: bool
    reason: str  # why it is not usable


@dataclass(frozen=True)
class Variant:
    """A kernel of cooperative matrices. Its schedule has several of them and one without matrices,
    and launches the first that the device can run."""

    kernel: str
    matrices: tuple[str, ...]  # as a device's
    subgroup_size: int
    why_not: str  # why the device cannot run it


def library_path() -> Path:
    """The native library: MXFORGE_VULKAN_LIBRARY, or the one that was built into the package."""
    chosen = os.environ.get("MXFORGE_VULKAN_LIBRARY")
    path = Path(chosen) if chosen else _BUILT
    if not path.is_file():
        what = f"MXFORGE_VULKAN_LIBRARY names {path}, which is not there" if chosen else (
            f"Vulkan needs {path.name}, which was not built here"
        )  # fmt: skip
        raise VulkanError(f"{what}; {_BUILD}")
    return path


@lru_cache(maxsize=1)
def load() -> None:
    """Make `vulkan` a device of TVM's in this process; VulkanError where that cannot be."""
    # A second registration ends the process, and TVM itself may have brought a Vulkan.
    if tvm_ffi.get_global_func("mxforge.vulkan.devices", allow_missing=True) is not None:
        if _loaded == [_BUILT]:
            _check_build(_BUILT)  # which may have failed the first time
        return
    if tvm_ffi.get_global_func("device_api.vulkan", allow_missing=True) is not None:
        raise VulkanError(
            "Another library has registered a Vulkan device API in this process, and there can be "
            "only one; do not load it before mxforge's."
        )
    path = library_path()
    library.load_runtime()
    try:
        ctypes.CDLL(str(path), ctypes.RTLD_LOCAL)
    except OSError as error:
        raise VulkanError(
            f"{path} should load but does not ({error}); it may have been built against another "
            "apache-tvm: run python -m mxforge.native.build"
        ) from error
    if tvm_ffi.get_global_func("mxforge.vulkan.devices", allow_missing=True) is None:
        raise VulkanError(f"{path} was loaded but is no mxforge Vulkan library; {_BUILD}")
    _loaded.append(path)
    if path == _BUILT:  # any other is of somebody's choice
        _check_build(path)


def _check_build(path: Path) -> None:
    """VulkanError if the library beside the sources was built from others than those."""
    from .native.build import build_id  # what it needs to compile takes time to import

    expected = build_id()
    ask = tvm_ffi.get_global_func("mxforge.vulkan.build_id", allow_missing=True)
    found = str(ask()) if ask is not None else ""
    if expected and found != expected:
        raise VulkanError(
            f"{path} was built from other sources ({found or 'unknown'}) than those beside it "
            f"({expected}); run: python -m mxforge.native.build"
        )


def function(name: str) -> Any:
    """`mxforge.vulkan.<name>`; runtime/native/vulkan/README.md lists them."""
    load()
    return tvm_ffi.get_global_func(f"mxforge.vulkan.{name}")


def devices() -> tuple[Device, ...]:
    """Every Vulkan device of this machine, best first; VulkanError without a loader or driver."""
    try:
        described = json.loads(function("devices")())
    except RuntimeError as error:
        raise VulkanError(_last_line(error)) from error
    return tuple(_device(fields) for fields in described)


def check(device_id: int = 0) -> Device:
    """The device vulkan:n; VulkanError, saying why, if there is none that can be used."""
    found = devices()
    for device in found:
        if device.device_id == device_id:
            return device
    try:  # the library knows why
        function("statistics")(device_id)
    except RuntimeError as error:
        raise VulkanError(_last_line(error)) from error
    raise VulkanError(f"vulkan:{device_id} does not exist here.")


def variants(library: Path, device_id: int = 0) -> tuple[Variant, ...]:
    """The variants in an artifact's library; VulkanError where vulkan:n cannot be used."""
    check(device_id)
    module = tvm_ffi.load_module(str(library))
    described = json.loads(function("variants")(module, device_id))
    return tuple(Variant(**{**each, "matrices": tuple(each["matrices"])}) for each in described)


def _device(fields: dict[str, Any]) -> Device:
    fields = dict(fields)
    fields["heaps"] = tuple(Heap(**heap) for heap in fields["heaps"])
    for name in ("subgroup_size", "subgroup_operations", "features", "matrices"):
        fields[name] = tuple(fields[name])
    return Device(**fields)


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
