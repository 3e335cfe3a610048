"""NVIDIA's driver where there is none."""

from __future__ import annotations


class CudaDriver:
    """What libcuda says of one H200; of another architecture where it is told so."""

    def __init__(self, major: int = 9, minor: int = 0) -> None:
        self._capability = {75: major, 76: minor}

    def __getattr__(self, name: str) -> object:
        return lambda *args: getattr(self, f"do_{name}")(*args) or 0

    def do_cuInit(self, flags: int) -> None: ...

    def do_cuDeviceGetCount(self, count: object) -> None:
        count._obj.value = 1  # type: ignore[attr-defined]

    def do_cuDeviceGetName(self, name: object, size: int, device: int) -> None:
        name.value = b"NVIDIA H200"  # type: ignore[attr-defined]

    def do_cuDeviceTotalMem_v2(self, memory: object, device: int) -> None:
        memory._obj.value = 139 << 30  # type: ignore[attr-defined]

    def do_cuDeviceGetAttribute(self, value: object, attribute: int, device: int) -> None:
        value._obj.value = self._capability[attribute]  # type: ignore[attr-defined]
