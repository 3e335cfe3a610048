"""Vulkan devices of this machine, as libmxforge sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import core
from .errors import ArtifactTargetError, VulkanError


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


def devices() -> tuple[Device, ...]:
    """Every Vulkan device of this machine, best first; VulkanError without a loader or driver."""
    try:
        return tuple(map(_device, core.devices("vulkan")))
    except ArtifactTargetError as error:
        raise VulkanError(str(error)) from None


def check(device_id: int = 0) -> Device:
    """The device vulkan:n; VulkanError, saying why, if there is none that can be used."""
    for device in devices():
        if device.device_id == device_id:
            return device
    try:
        core.device_memory("vulkan", device_id)  # the library knows why
    except ArtifactTargetError as error:
        raise VulkanError(str(error)) from None
    raise VulkanError(f"vulkan:{device_id} does not exist here.")


def _device(fields: dict[str, Any]) -> Device:
    fields = dict(fields)
    fields["heaps"] = tuple(Heap(**heap) for heap in fields["heaps"])
    for name in ("subgroup_size", "subgroup_operations", "features", "matrices"):
        fields[name] = tuple(fields[name])
    return Device(**fields)
