"""Loading an artifact: options, memory, and damage that is refused."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.small import edit_manifest
from support.vulkan_device import VulkanDevice

from mxforge import Engine
from mxforge.artifact import open_artifact, verify
from mxforge.core import device_memory, devices
from mxforge.errors import (
    ArtifactCorruptError,
    ArtifactError,
    ArtifactTargetError,
    ArtifactVersionError,
    KVMemoryError,
    UsageError,
)
from mxforge.memory import fit

Load = Callable[..., Engine]


def copied(artifact: Path, folder: Path) -> Path:
    return Path(shutil.copytree(artifact, folder / "copy"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "threads must be from 1 to"),
        ({"threads": 100_000}, "found 100000"),
        ({"threads": True}, "found True"),
        ({"threads": "two"}, "found 'two'"),
        ({"context_length": 0}, "context_length must be a whole number of at least 1, found 0"),
        ({"context_length": 1.5}, "found 1.5"),
        ({"max_batch": 0}, "max_batch must be a whole number"),
        ({"context_length": 131_073}, "context_length must be at most 131072, as compiled"),
        ({"max_batch": 5}, "max_batch must be at most 4, as compiled; found 5"),
        ({"prefill_chunk": 33}, "prefill_chunk must be at most 32"),
    ],
)
def test_absurd_options_are_refused(odd_artifact: Path, options: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Engine.load(odd_artifact, **options)


def test_the_default_context_fits_itself_to_the_model(odd_artifact: Path, tmp_path: Path) -> None:
    artifact = copied(odd_artifact, tmp_path)
    edit_manifest(artifact, lambda manifest: manifest["limits"].update(context=4096))
    with Engine.load(artifact) as engine:
        assert engine.context_length == 4096


def test_weights_that_vanish_before_they_are_loaded(odd_artifact: Path, tmp_path: Path) -> None:
    artifact = open_artifact(copied(odd_artifact, tmp_path))
    _weights(artifact.path).unlink()
    with pytest.raises(ArtifactCorruptError, match=r"weights-00001\.safetensors"):
        Engine(artifact)


class NothingIsBuilt:
    def __init__(self, *_: object, **__: object) -> None:
        raise AssertionError("something was allocated")


def test_a_kv_pool_that_does_not_fit_is_refused_with_the_numbers(
    odd_artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mxforge.memory.available_memory", lambda: 600 << 20)
    monkeypatch.setattr("mxforge.engine.Worker", NothingIsBuilt)
    with pytest.raises(KVMemoryError) as caught:
        Engine.load(odd_artifact, context_length=131_072, max_batch=4)
    found = str(caught.value)
    assert found.startswith("0.75 GiB are needed for 4 x 131072 tokens (")
    assert "0.25 GiB for the cache of keys and values" in found
    assert "but 0.59 GiB of memory are available; " in found
    assert "weights" not in found, "they are mapped files"
    assert "a max_batch of 1 or a smaller cache, compiled with --kv int8 would fit" in found


def test_without_a_wish_as_many_sequences_run_as_fit(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load(context_length=131_072).max_batch == 4
    # A sequence of 131,072 tokens takes 64 MiB beside the 512 MiB that are always set aside.
    monkeypatch.setattr("mxforge.memory.available_memory", lambda: (512 + 2 * 64 + 40) << 20)
    assert load(context_length=131_072).max_batch == 2
    monkeypatch.setattr("mxforge.memory.available_memory", lambda: None)
    assert load(context_length=131_072).max_batch == 4


def test_random_weights_count_as_memory(
    odd_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = copied(odd_artifact, tmp_path)

    def random_and_huge(manifest: dict) -> None:
        manifest["random_seed"] = 0
        manifest["memory"]["weights_bytes"] = 1 << 34

    edit_manifest(artifact, random_and_huge)
    monkeypatch.setattr("mxforge.memory.available_memory", lambda: 1 << 34)
    monkeypatch.setattr("mxforge.engine.Worker", NothingIsBuilt)
    with pytest.raises(KVMemoryError, match=r"16.00 GiB for weights, .* but 16.00 GiB"):
        Engine.load(artifact)


@pytest.mark.parametrize(
    ("kind", "type_", "device", "host", "available"),
    [
        ("vulkan", "discrete", 600, 100_000, "0.59"),
        ("vulkan", "discrete", 600, 300, "0.59"),
        ("vulkan", "integrated", 600, 300, "0.29"),  # which has the host's memory
        ("cuda", "", 600, 300, "0.59"),
        ("metal", "", None, 300, "0.29"),
    ],
)
def test_on_a_gpu_the_pool_has_to_fit_its_memory(
    odd_artifact: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    type_: str,
    device: int,
    host: int,
    available: str,
) -> None:
    manifest = open_artifact(odd_artifact).manifest
    manifest = replace(
        manifest,
        target=replace(manifest.target, kind=kind, name=kind),
        memory=replace(manifest.memory, weights_bytes=100 << 20, workspace_bytes=0),
    )
    monkeypatch.setattr("mxforge.memory.available_memory", lambda: host << 20)
    monkeypatch.setattr("mxforge.core.device_memory", lambda _: device << 20)
    monkeypatch.setattr(
        "mxforge.vulkan.check", lambda: SimpleNamespace(type=type_, max_allocation_bytes=1 << 40)
    )
    message = (
        rf"0.85 GiB are needed on {kind}:0 for 4 x 131072 tokens \(0.10 GiB for weights, 0.25 GiB "
        rf"for the cache of keys and values, 0.50 GiB for the rest\), but {available} GiB of "
        "memory are available; "
    )
    with pytest.raises(KVMemoryError, match=message):
        fit(manifest, 131_072, 4, 32)


def test_the_device_says_how_much_memory_it_has_left(vulkan: VulkanDevice) -> None:
    described = devices("vulkan")[0]
    left = device_memory("vulkan")
    assert left is not None
    assert 0 < left <= sum(heap["bytes"] for heap in described["heaps"])


def test_a_plan_of_less_memory_than_is_needed_is_refused(
    odd_artifact: Path, tmp_path: Path
) -> None:
    artifact = copied(odd_artifact, tmp_path)

    def less(content: dict) -> None:
        content["random_seed"] = 0
        content["weights"][0].update(file=None, fill={"normal": 1.0})
        content["memory"].update(weights_bytes=8)

    edit_manifest(artifact, less)
    with pytest.raises(
        ArtifactCorruptError, match=r"weights_bytes should be at least \d+, but is 8"
    ):
        Engine.load(artifact)


def _weights(artifact: Path) -> Path:
    (path,) = artifact.glob("weights-*.safetensors")
    return path


def _library(artifact: Path) -> Path:
    (path,) = artifact.glob("model.so")
    return path


def _flip_last_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], object], type[ArtifactError], str]] = {
    "nothing there": (lambda a: shutil.rmtree(a), ArtifactError, "nothing at that path"),
    "no manifest": (
        lambda a: (a / "manifest.json").unlink(),
        ArtifactError,
        "manifest.json cannot be read",
    ),
    "a checkpoint": (
        lambda a: (a / "manifest.json").rename(a / "config.json"),
        ArtifactError,
        "looks like a checkpoint",
    ),
    "garbled manifest": (
        lambda a: (a / "manifest.json").write_text("{"),
        ArtifactCorruptError,
        "not readable JSON",
    ),
    "another format": (
        lambda a: edit_manifest(a, lambda m: m.update(format_version=99)),
        ArtifactVersionError,
        "format_version 99",
    ),
    "another ABI": (
        lambda a: edit_manifest(a, lambda m: m.update(abi_version=0)),
        ArtifactVersionError,
        "abi_version 0",
    ),
    "another CPU": (
        lambda a: edit_manifest(a, lambda m: m["libraries"][0]["features"].append("quantum")),
        ArtifactTargetError,
        "needs quantum",
    ),
    "another system": (
        lambda a: edit_manifest(a, lambda m: m["target"].update(host="plan9-mips")),
        ArtifactTargetError,
        "compiled for 'plan9-mips'",
    ),
    "changed library": (
        lambda a: _flip_last_byte(_library(a)),
        ArtifactCorruptError,
        "has another content than was written",
    ),
    "changed plan": (
        lambda a: _flip_last_byte(a / "model.plan"),
        ArtifactCorruptError,
        "has another content than was written",
    ),
    "missing library": (lambda a: _library(a).unlink(), ArtifactCorruptError, "is missing"),
    "truncated weights": (
        lambda a: os.truncate(_weights(a), 4096),
        ArtifactCorruptError,
        "but has 4096",
    ),
    "missing weights": (lambda a: _weights(a).unlink(), ArtifactCorruptError, "is missing"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_artifact_is_refused(odd_artifact: Path, tmp_path: Path, damage: str) -> None:
    artifact = copied(odd_artifact, tmp_path)
    inflict, error, message = DAMAGE[damage]
    inflict(artifact)
    with pytest.raises(error, match=message):
        Engine.load(artifact)


def test_changed_weights_are_left_to_verify(odd_artifact: Path, tmp_path: Path) -> None:
    artifact = copied(odd_artifact, tmp_path)
    _flip_last_byte(_weights(artifact))
    Engine.load(artifact, context_length=64).close()
    with pytest.raises(ArtifactCorruptError, match=r"changed: 'weights-00001.safetensors'"):
        verify(artifact, progress=False).check()
