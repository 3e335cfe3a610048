"""Vulkan as a device of TVM's, in this process: find the native library, load it once, ask it.

TVM's wheels have no Vulkan; `libmxforge_vulkan` brings it (runtime/native/vulkan). Compiled models
need none of it: it is for who runs kernels from TVM, as the generator's tests do.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import os
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from mxforge import native
from mxforge.errors import VulkanError


@contextlib.contextmanager
def _without_torch() -> Iterator[None]:
    """tvm_ffi imports torch wherever it is installed: seconds, for nothing that is used here."""
    modules: dict[str, Any] = sys.modules
    hidden = "torch" not in modules
    if hidden:
        modules["torch"] = None
    try:
        yield
    finally:
        if hidden:
            del modules["torch"]


with _without_torch():
    import tvm_ffi

_SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
_BUILT = Path(native.__file__).parent / f"libmxforge_vulkan{_SUFFIX}"
_loaded: list[Path] = []  # at most one
_BUILD = (
    "install a C++17 compiler and the Vulkan headers (Debian and Ubuntu: apt-get install g++ "
    "libvulkan-dev), then run: python -m mxforge.native.build --tvm"
)


@lru_cache(maxsize=1)
def load_runtime() -> None:
    """Map libtvm_runtime into the process; `import tvm`, which does so too, takes a second."""
    found = importlib.util.find_spec("tvm")
    assert found is not None and found.origin is not None  # the compiler needs it
    library = Path(found.origin).parent / "lib" / f"libtvm_runtime{_SUFFIX}"
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


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
    load_runtime()
    try:
        ctypes.CDLL(str(path), ctypes.RTLD_LOCAL)
    except OSError as error:
        raise VulkanError(
            f"{path} should load but does not ({error}); it may have been built against another "
            "apache-tvm: run python -m mxforge.native.build --tvm"
        ) from error
    if tvm_ffi.get_global_func("mxforge.vulkan.devices", allow_missing=True) is None:
        raise VulkanError(f"{path} was loaded but is no mxforge Vulkan library; {_BUILD}")
    _loaded.append(path)
    if path == _BUILT:  # any other is of somebody's choice
        _check_build(path)


def _check_build(path: Path) -> None:
    """VulkanError if the library beside the sources was built from others than those."""
    from mxforge.native.build import VULKAN  # what it needs to compile takes time to import

    expected = VULKAN.build_id()
    ask = tvm_ffi.get_global_func("mxforge.vulkan.build_id", allow_missing=True)
    found = str(ask()) if ask is not None else ""
    if expected and found != expected:
        raise VulkanError(
            f"{path} was built from other sources ({found or 'unknown'}) than those beside it "
            f"({expected}); run: python -m mxforge.native.build --tvm"
        )


def function(name: str) -> Any:
    """`mxforge.vulkan.<name>`; runtime/native/vulkan/README.md lists them."""
    load()
    return tvm_ffi.get_global_func(f"mxforge.vulkan.{name}")
