"""Tensors that lie in the host's memory and say that they are a GPU's."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import tvm_ffi

DEVICE_TYPES = {"cuda": 2, "metal": 8}  # of DLPack
_CODES = {"i": 0, "u": 1, "f": 2, "b": 6}
_BFLOAT = 4


class _DLDevice(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int32), ("id", ctypes.c_int32)]


class _DLTensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", _DLDevice),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _DLManagedTensor(ctypes.Structure):
    _fields_ = [
        ("tensor", _DLTensor),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.CFUNCTYPE(None, ctypes.c_void_p)),
    ]


@ctypes.CFUNCTYPE(None, ctypes.c_void_p)
def _keep(_: int) -> None:
    """The memory is the runtime's; what describes it lives as long as its DeviceArray."""


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class DeviceArray:
    """`array`, contiguous, as a tensor of a device of this kind; keep it while `tensor` is used."""

    def __init__(self, array: np.ndarray, kind: str) -> None:
        self._device = DEVICE_TYPES[kind], 0
        self._shape = (ctypes.c_int64 * max(array.ndim, 1))(*array.shape)
        strides = [stride // array.itemsize for stride in array.strides]
        self._strides = (ctypes.c_int64 * max(array.ndim, 1))(*strides)
        code = _BFLOAT if str(array.dtype) == "bfloat16" else _CODES[array.dtype.kind]
        described = _DLTensor(
            array.ctypes.data, _DLDevice(*self._device), array.ndim, code, 8 * array.itemsize, 1,
            self._shape, self._strides, 0,
        )  # fmt: skip
        self._managed = _DLManagedTensor(described, None, _keep)
        self.tensor = tvm_ffi.from_dlpack(self)

    def __dlpack__(self, **_: Any) -> Any:
        return _new_capsule(ctypes.addressof(self._managed), b"dltensor", None)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device
