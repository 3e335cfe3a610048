"""The compiled library in this process: TVM's small runtime, one virtual machine, its tensors.

Only `libtvm_runtime` is mapped (3 MB); the compiler never is, and `import tvm` never happens.
A virtual machine is not thread-safe: one thread owns a `Library` after it was made.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from . import cuda
from .artifact import device_code_name
from .errors import ArtifactTargetError, MxforgeError
from .failures import named
from .manifest import short


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

ALIGNMENT = 64  # what the kernels' vector loads assume of every tensor

_POOLED_ALLOCATOR = 2
_CPU = 1


@dataclass(frozen=True)
class _DeviceKind:
    """DLPack's device number, and what brings TVM's device API for it into the process.

    load(target, index)         raises ArtifactTargetError where the device cannot run the target's
                                code
    prepare(module, index)      what of it the first call would do; raises where kernels need what
                                the device has not
    frees_after_loss            memory of a lost device can be freed, and then the device be used
                                again. CUDA's cannot: TVM ends the process where freeing fails
    """

    number: int
    load: Callable[[str, int], None]
    prepare: Callable[[Any, int], None] = lambda module, index: None
    frees_after_loss: bool = True


_SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
_SHARE_CORES = -3  # TVM's thread affinity mode "all threads on all of these cores"


@lru_cache(maxsize=1)
def load_runtime() -> Path:
    """Map libtvm_runtime into the process once; returns the folder it lies in."""
    # Pinned workers would share cores with whatever else the machine runs.
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    found = importlib.util.find_spec("tvm")
    if found is None or not found.origin:
        raise MxforgeError("mxforge needs the package apache-tvm, which is not installed here.")
    folder = Path(found.origin).parent / "lib"
    _map(folder / f"libtvm_runtime{_SUFFIX}")
    return folder


def _map(path: Path) -> None:
    try:
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise MxforgeError(
            f"TVM's runtime {path.name} should load but does not ({error}); "
            "reinstall apache-tvm, and for a GPU its driver."
        ) from error


def _load_device(target: str, index: int) -> _DeviceKind:
    load_runtime()
    kind = target.partition(":")[0]
    device = _DEVICES.get(kind)
    if device is None:
        raise ArtifactTargetError(
            f"This runtime has the devices {', '.join(_DEVICES)}, but the artifact is for "
            f"{short(kind)}."
        )
    device.load(target, index)
    return device


_TOTAL_GLOBAL_MEMORY, _AVAILABLE_GLOBAL_MEMORY = 14, 15  # TVM's DeviceAttrKind


def device_memory(target: str, index: int = 0) -> int | None:
    """Bytes that tensors may still take on a GPU; all that it has where TVM knows no better.

    ArtifactTargetError where it cannot run code for the target.

    Vulkan's drivers know with VK_EXT_memory_budget. None: not even the whole is known.
    """
    device = _load_device(target, index)
    ask = tvm_ffi.get_global_func("runtime.GetDeviceAttr")
    try:
        answers = (
            ask(device.number, index, attribute)
            for attribute in (_AVAILABLE_GLOBAL_MEMORY, _TOTAL_GLOBAL_MEMORY)
        )
        return next((int(answer) for answer in answers if answer is not None), None)
    except RuntimeError as error:
        raise named(error, target) from error


def _load_nothing(_target: str, _index: int) -> None:
    """The CPU is in TVM's runtime itself."""


def _load_from_wheel(target: str, _index: int) -> None:
    """A library of the apache-tvm wheel."""
    kind = target.partition(":")[0]
    name = f"device_api.{kind}"
    if tvm_ffi.get_global_func(name, allow_missing=True) is not None:
        return
    sidecar = load_runtime() / f"libtvm_runtime_{kind}{_SUFFIX}"
    if not sidecar.exists():
        raise ArtifactTargetError(
            f"The artifact is for {kind}, but this platform's apache-tvm has no "
            f"{sidecar.name}; compile for another target."
        )
    _map(sidecar)
    if tvm_ffi.get_global_func(name, allow_missing=True) is None:
        raise ArtifactTargetError(
            f"{sidecar.name} was loaded but brings no {kind} device; is its driver installed?"
        )


def _load_cuda(target: str, index: int) -> None:
    _load_from_wheel(target, index)
    cuda.check(target, index)


def _load_vulkan(_target: str, index: int) -> None:
    """A library of mxforge's."""
    from . import vulkan

    vulkan.load()
    vulkan.check(index)


def _check_vulkan(module: Any, index: int) -> None:
    from . import vulkan

    vulkan.function("check")(module, index)


_DEVICES = {
    "cpu": _DeviceKind(_CPU, _load_nothing),
    "cuda": _DeviceKind(2, _load_cuda, frees_after_loss=False),
    "vulkan": _DeviceKind(7, _load_vulkan, _check_vulkan),
    "metal": _DeviceKind(8, _load_from_wheel),
}


def frees_after_loss(target: str) -> bool:
    """Whether a device that was lost can be used again by this process, once all is freed."""
    return _DEVICES[target.partition(":")[0]].frees_after_loss


_RECENT = 64  # at least the tensors made in one step
_device_code: dict[str, Path] = {}


def _offer_device_code(files: Mapping[str, Path]) -> None:
    """Answer TVM's request to compile CUDA source with what the artifact holds compiled."""
    if not files:
        return
    _device_code.update(files)

    def compiled(source: str) -> bytes:
        name = device_code_name(source)
        if name not in _device_code:
            raise ArtifactTargetError(f"The artifact lacks {name}; compile it again.")
        return _device_code[name].read_bytes()

    tvm_ffi.register_global_func("tvm_callback_cuda_compile", compiled, override=True)


def keep_forever(owner: object) -> None:
    """Never free this, nor what it holds."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(owner))


def aligned_empty(shape: Sequence[int], dtype: Any) -> np.ndarray:
    """An uninitialized array whose data begins on a 64-byte boundary."""
    dtype = np.dtype(dtype)
    nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    # Not a slice of raw: NumPy lets empty ones begin at its own, unaligned, beginning.
    return np.ndarray(tuple(shape), dtype, raw, start)


def usable_cores() -> int:
    """How many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_threads() -> int:
    """A thread for each usable core, but no more than a container's share of CPU time pays for:
    TVM's threads spin while they wait for each other, and would use it up."""
    cores = usable_cores()
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(cores, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no control group, or "max": unlimited
        return cores


class Library:
    """A loaded `model.so`, compiled for `target`, such as cuda:sm_90a, on one device."""

    def __init__(
        self,
        path: Path,
        target: str,
        device_index: int = 0,
        device_code: Mapping[str, Path] | None = None,
    ) -> None:
        kind, device_kind = _load_device(target, device_index), target.partition(":")[0]
        _offer_device_code(device_code or {})
        self.on_cpu = kind.number == _CPU
        self.frees_after_loss = frees_after_loss(target)
        self.device = tvm_ffi.device(device_kind, device_index)
        try:
            self._module = tvm_ffi.load_module(str(path))
            kind.prepare(self._module, device_index)
            self._machine = self._module["vm_load_executable"]()
            where = (kind.number, device_index, _POOLED_ALLOCATOR)
            self._machine["vm_initialization"](*where, _CPU, 0, _POOLED_ALLOCATOR)
        except (RuntimeError, AttributeError, ValueError) as error:
            failure = named(error, target)
            if failure is not error:
                raise failure from error
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise ArtifactTargetError(
                f"{path.name} should load on {target} but does not: {reason}"
            ) from error
        self._allocate = tvm_ffi.get_global_func("runtime.TVMTensorAllocWithScope")
        self._view = tvm_ffi.get_global_func("runtime.TVMTensorCreateView")
        self._from_bytes = tvm_ffi.get_global_func("runtime.TVMTensorCopyFromBytes")
        self._to_bytes = tvm_ffi.get_global_func("runtime.TVMTensorCopyToBytes")
        self._synchronize = tvm_ffi.get_global_func("runtime.Device_StreamSync")
        self._functions: dict[str, Any] = {}
        self._recent: list[Any] = []

    def close(self) -> None:
        """Free what the machine has, and the memory that TVM keeps for later.

        It is of no use afterwards. tvm_ffi never unloads a module, whose code may be in use.
        """
        self._functions.clear()
        del self._machine
        # Of all devices, only what nobody uses; not that of a CUDA device that was lost.
        with contextlib.suppress(RuntimeError):
            tvm_ffi.get_global_func("vm.builtin.memory_manager.clear")()

    def synchronize(self) -> None:
        """Wait for the device; raises what went wrong on it."""
        if not self.on_cpu:
            self._synchronize(self.device, 0)

    def __getitem__(self, name: str) -> Any:
        """A function of the library."""
        if name not in self._functions:
            self._functions[name] = self._machine[name]
        return self._functions[name]

    def kernel(self, name: str) -> Any:
        """One kernel of the library by its name, as the manifest lists it: a call takes its inputs,
        then its outputs, all of them device tensors."""
        return self._module.get_function(name, query_imports=True)

    @staticmethod
    def use_threads(threads: int) -> None:
        """Let kernels called from this thread run on `threads` threads; call before the first.

        Of this thread only: TVM_NUM_THREADS would set it for all engines of the process at once.
        """
        load_runtime()
        # TVM takes the number of threads from a list of cores, which pins nothing by itself.
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        listed = [*cores, *range(threads)][:threads]
        configure = tvm_ffi.get_global_func("runtime.config_threadpool")
        configure(_SHARE_CORES, threads, list(map(str, listed)))

    def tensor(self, array: np.ndarray) -> Any:
        """A device tensor with the array's content; the array may be reused afterwards."""
        if self.on_cpu:
            copy = aligned_empty(array.shape, array.dtype)
            copy[...] = array
            return tvm_ffi.from_dlpack(copy, require_alignment=ALIGNMENT)
        tensor = self.empty(array.shape, array.dtype.name)
        if self.frees_after_loss:
            self._fill(tensor, np.ascontiguousarray(array))
            return tensor
        # An error below must not free it. Filling waits for the device: what succeeds shows that it
        # is there, and what was made earlier can be freed.
        self._recent.append(tensor)
        self._fill(tensor, np.ascontiguousarray(array))
        del self._recent[:-_RECENT]
        return tensor

    def empty(self, shape: Sequence[int], dtype: str) -> Any:
        """An uninitialized device tensor; on the CPU untouched pages take no memory."""
        return self._allocate(tvm_ffi.Shape(tuple(shape)), tvm_ffi.dtype(dtype), self.device, None)

    def view(self, base: Any, shape: Sequence[int], dtype: str) -> Any:
        """A tensor over the first bytes of `base`."""
        return self._view(base, tvm_ffi.Shape(tuple(shape)), tvm_ffi.dtype(dtype), 0)

    def weight(self, content: np.ndarray, shape: Sequence[int], dtype: str) -> Any:
        """A tensor of these bytes (u8, 64-byte aligned): the bytes themselves on the CPU, which
        must stay mapped; a copy on a GPU."""
        if self.on_cpu:
            # Kernels take no byte offset: the tensor has to begin where the weight does.
            base = tvm_ffi.from_dlpack(content, require_alignment=ALIGNMENT)
            return self.view(base, shape, dtype)
        tensor = self.empty(shape, dtype)
        self._fill(tensor, content)
        return tensor

    def numpy(self, tensor: Any) -> np.ndarray:
        """A copy of the tensor's content; waits for the device."""
        if self.on_cpu:
            return np.array(np.from_dlpack(tensor))
        array = np.empty(tuple(tensor.shape), str(tensor.dtype))
        self._to_bytes(tensor, array.ctypes.data_as(ctypes.c_void_p), array.nbytes)
        return array

    def _fill(self, tensor: Any, array: np.ndarray) -> None:
        self._from_bytes(tensor, array.ctypes.data_as(ctypes.c_void_p), array.nbytes)
