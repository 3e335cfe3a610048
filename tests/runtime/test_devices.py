"""What this machine can run on: every kind is listed, usable or with the reason why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mxforge import core, devices, machine, vulkan
from mxforge.cli import main
from mxforge.devices import Device
from mxforge.errors import ArtifactTargetError, VulkanError


def of_kind(kind: str) -> list[Device]:
    return [device for device in devices.devices() if device.kind == kind]


def test_every_kind_is_listed():
    found = devices.devices()
    assert [device.kind for device in found] == sorted(
        (device.kind for device in found), key=["cpu", "cuda", "vulkan", "metal"].index
    )
    assert {device.kind for device in found} == {"cpu", "cuda", "vulkan", "metal"}
    for device in found:
        assert device.problem or device.name != "none"


def test_the_cpu_has_its_features_and_memory():
    (cpu,) = of_kind("cpu")
    assert cpu.problem == ""
    assert cpu.features == machine.cpu_features()
    assert cpu.memory_bytes is None or cpu.memory_bytes > 0
    assert "core" in cpu.name


def test_cpu_features_have_llvms_names(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "_cpu_flags", lambda: frozenset({"avx2", "avx512_vnni", "fpu"}))
    monkeypatch.setattr(machine, "host_system", lambda: "linux-x86_64")
    assert machine.cpu_features() == ("avx2", "avx512vnni")
    monkeypatch.setattr(machine, "_cpu_flags", frozenset)  # the system does not tell
    assert machine.cpu_features() == ()


def test_a_missing_cuda_driver_is_the_reason(monkeypatch: pytest.MonkeyPatch):
    def absent(kind: str) -> None:
        raise ArtifactTargetError("NVIDIA's driver (libcuda.so.1) is not installed.")

    monkeypatch.setattr(core, "devices", absent)
    (cuda,) = devices._cuda()
    assert (cuda.name, "libcuda" in cuda.problem) == ("none", True)
    monkeypatch.setattr(core, "devices", lambda kind: [])
    (cuda,) = devices._cuda()
    assert (cuda.name, cuda.problem) == ("none", "NVIDIA's driver finds no device")


def test_cuda_devices_by_the_drivers_word(monkeypatch: pytest.MonkeyPatch):
    told = [{"name": "NVIDIA H200", "memory_bytes": 139 << 30, "arch": "sm_90"}]
    monkeypatch.setattr(core, "devices", lambda kind: told)
    assert devices._cuda() == [Device("cuda", 0, "NVIDIA H200", 139 << 30, ("sm_90",))]


def test_vulkan_that_cannot_be_asked_is_listed_with_the_reason(monkeypatch: pytest.MonkeyPatch):
    def fail() -> None:
        raise VulkanError("there is no loader")

    monkeypatch.setattr(vulkan, "devices", fail)
    assert of_kind("vulkan") == [Device("vulkan", 0, "none", problem="there is no loader")]


def test_vulkan_devices(vulkan):
    (device, *_) = of_kind("vulkan")
    assert device.problem == ""
    assert device.memory_bytes is not None
    assert device.memory_bytes > 0
    assert "bufferDeviceAddress" in device.features


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_the_command(options: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path):
    assert main(["devices", *options]) == 0
    out = capsys.readouterr().out
    if options:
        assert {entry["kind"] for entry in json.loads(out)} == {"cpu", "cuda", "vulkan", "metal"}
    else:
        for kind in ("cpu", "cuda", "vulkan", "metal"):
            assert any(line.startswith(kind) for line in out.splitlines())
