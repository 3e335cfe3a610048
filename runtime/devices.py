"""What this machine has to run models on: its CPU, and the GPUs that its drivers show."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from . import core, vulkan
from .errors import ArtifactTargetError, VulkanError
from .machine import (
    architecture,
    available_memory,
    cpu_features,
    cpu_name,
    usable_cores,
)


@dataclass(frozen=True)
class Device:
    """One device, or why there is none of its kind.

    kind            cpu, cuda, vulkan or metal: what an artifact's target begins with
    index           its number among those of its kind
    memory_bytes    what the device has; of the CPU, what is available now; None: unknown
    features        what code can be compiled for: instruction sets, architecture, Vulkan features
    matrices        the products of cooperative matrices of a Vulkan device, m×n×k and the dtypes of
                    a, b, c and the result; where it has none of an artifact's, kernels run without
    problem         why it cannot be used; empty where it can
    """

    kind: str
    index: int
    name: str
    memory_bytes: int | None = None
    features: tuple[str, ...] = ()
    problem: str = ""
    matrices: tuple[str, ...] = ()


def devices() -> list[Device]:
    """All devices, usable or not; a kind without any has one entry that says why."""
    return [_cpu(), *_cuda(), *_vulkan(), *_metal()]


def _cpu() -> Device:
    cores = usable_cores()
    name = f"{cpu_name()}, {cores} core{'s' * (cores != 1)}"
    return Device("cpu", 0, name, available_memory(), cpu_features())


def _vulkan() -> list[Device]:
    try:
        found = vulkan.devices()
    except VulkanError as error:
        return [Device("vulkan", 0, "none", problem=str(error))]
    return [
        Device(
            "vulkan",
            device.index if device.device_id is None else device.device_id,
            f"{device.name} ({device.type}), Vulkan {device.api_version}",
            sum(heap.bytes for heap in device.heaps if heap.device_local),
            device.features,
            "" if device.usable else device.reason,
            device.matrices,
        )
        for device in found
    ]


def _cuda() -> list[Device]:
    try:
        found = core.devices("cuda")
        if not found:
            raise ArtifactTargetError("NVIDIA's driver finds no device")
    except ArtifactTargetError as error:
        return [Device("cuda", 0, "none", problem=str(error))]
    return [
        Device("cuda", index, device["name"], device["memory_bytes"], (device["arch"],))
        for index, device in enumerate(found)
    ]


def _metal() -> list[Device]:
    if sys.platform != "darwin":
        return [Device("metal", 0, "none", problem="macOS only")]
    return [Device("metal", 0, f"the GPU of this {architecture()} Mac", available_memory())]
