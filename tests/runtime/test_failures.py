"""Devices that fail: what TVM's device APIs say, by name; lost devices; memory that runs out."""

from __future__ import annotations

import gc
import hashlib
import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.prompts import CONTEXT
from support.small import edit_manifest
from support.vulkan_device import VulkanDevice, run_apart

from mxforge import Engine, SamplingParams
from mxforge.errors import (
    ArtifactTargetError,
    DeviceLostError,
    DeviceMemoryError,
    KVMemoryError,
)
from mxforge.failures import named
from mxforge.library import Library

CUDA = [
    ("CUDA Runtime Error: cudaErrorIllegalAddress (700): an illegal memory access was encountered",
     DeviceLostError),
    ("CUDA Runtime Error: cudaErrorLaunchFailure (719): unspecified launch failure",
     DeviceLostError),
    ("CUDA Runtime Error: cudaErrorECCUncorrectable (214): uncorrectable ECC error encountered",
     DeviceLostError),
    ("CUDALaunch Error: CUDA_ERROR_LAUNCH_FAILED\n grid=(8,1,1),  block=(256,1,1)\n"
     "// func_name=gate_up_kernel\n// CUDA Source\n// -----------\n", DeviceLostError),
    ("CUDAError: cuModuleLoadData(&(module_[device_id]), data_.c_str()) failed with error: "
     "CUDA_ERROR_ECC_UNCORRECTABLE", DeviceLostError),
    ("CUDALaunch Error: CUDA_ERROR_LAUNCH_TIMEOUT\n grid=(1,1,1),  block=(1,1,1)", DeviceLostError),
    ("CUDA Runtime Error: cudaErrorMemoryAllocation (2): out of memory", DeviceMemoryError),
    ("CUDAError: cuModuleLoadData failed with error: CUDA_ERROR_OUT_OF_MEMORY", DeviceMemoryError),
    ("CUDA Runtime Error: cudaErrorInvalidValue (1): invalid argument", RuntimeError),
    ("CUDALaunch Error: CUDA_ERROR_INVALID_VALUE\n grid=(1,1,1)", RuntimeError),
    ("CUDA Runtime Error: cudaErrorUnknownLaunch", RuntimeError),
]  # fmt: skip


@pytest.mark.parametrize(("text", "cls"), CUDA, ids=[text[:60] for text, _ in CUDA])
def test_cudas_errors_have_names(text: str, cls: type[Exception]) -> None:
    found = RuntimeError(text)
    error = named(found, "cuda:sm_90a")
    assert type(error) is cls
    if cls is RuntimeError:
        assert error is found
    else:
        assert error.__cause__ is found
        assert str(error).startswith(text.splitlines()[0])
        assert "CUDA Source" not in str(error)
    assert ("start it again" in str(error)) == (cls is DeviceLostError)


def test_other_devices_errors_are_not_mistaken() -> None:
    for target in ("cpu:avx2", "metal"):
        found = RuntimeError("cudaErrorIllegalAddress was lost in is out of memory")
        assert named(found, target) is found
    refused = KVMemoryError("vulkan:0 is out of memory")
    assert named(refused, "vulkan:desktop") is refused


def test_an_error_that_is_kept_keeps_no_memory() -> None:
    class Tensor:
        pass

    def fail() -> None:
        tensor = Tensor()
        kept.append(weakref.ref(tensor))
        try:
            raise ValueError("first")
        except ValueError:
            raise RuntimeError("vulkan:0 was lost in vkQueueSubmit") from None

    kept: list[weakref.ref[Tensor]] = []
    try:
        fail()
    except RuntimeError as error:
        again = named(error, "vulkan:desktop")
    gc.collect()
    assert isinstance(again, DeviceLostError)
    assert kept[0]() is None


@pytest.fixture(scope="module")
def vulkan_artifact(vulkan: VulkanDevice, compiled: Callable[..., Path]) -> Path:
    return compiled("odd-1", "exact", target="vulkan")


LOSS = """
import gc, json, sys, threading
from mxforge import Engine, SamplingParams, vulkan
from mxforge.errors import DeviceLostError

path = sys.argv[1]
params = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
load = lambda: Engine.load(path, context_length=512, max_batch=2)
ask = lambda engine: engine.generate([1, 2, 3], params).token_ids
statistics = lambda: json.loads(vulkan.function("statistics")(0))
lose = lambda how="device_lost": vulkan.function("simulate")(0, how, 1)

def outcome(stream):
    try:
        return list(stream)[-1].finish_reason
    except DeviceLostError as error:
        kept.append(error)
        return "lost"

kept = []
engine = load()
truth = ask(engine)
"""


def lose(code: str, artifact: Path, **environment: str) -> list[str]:
    """What a process prints that loses its device."""
    setup = f"import sys; sys.argv = ['', {str(artifact)!r}]\n"
    result = run_apart(setup + LOSS + code, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()


@pytest.mark.parametrize("how", ["device_lost", "device_lost_at_wait", "out_of_memory_at_submit"])
def test_a_lost_device_fails_what_runs_and_serves_the_next(vulkan_artifact: Path, how: str) -> None:
    """Running and waiting requests fail by name, none hangs; the same engine answers the next."""
    code = f"""
streams = [engine.stream([n, 2, 3], params) for n in (1, 4, 5)]  # two run, one waits
next(streams[0])
lose({how!r})
print([outcome(stream) for stream in streams])
print(kept[0])
print(ask(engine) == truth, ask(engine) == truth)
engine.close()
gc.collect()
print(statistics()["live_allocations"])
"""
    outcomes, said, same, live = lose(code, vulkan_artifact)
    assert outcomes == "['lost', 'lost', 'lost']"
    assert said.startswith("vulkan:0 (")
    assert "the next request loads the model anew" in said
    assert same == "True True"
    assert live == "0"


def test_engines_share_a_loss_and_are_loaded_again(vulkan_artifact: Path) -> None:
    """One that has nothing to do lets go too; the errors that are kept hold no memory."""
    code = """
idle = load()
ask(idle)
stream = engine.stream([1, 2, 3], params)
next(stream)
lose()
print(outcome(stream))
third = load()
print([ask(each) == truth for each in (third, idle, engine)])
idle.close()
print([ask(each) == truth for each in (third, engine)])
"""
    assert lose(code, vulkan_artifact) == ["lost", "[True, True, True]", "[True, True]"]


def test_a_tensor_of_a_lost_device_keeps_it_lost(vulkan_artifact: Path) -> None:
    """Its address could be another tensor's on the device opened anew: nothing may be mistaken."""
    code = """
import mxforge.scheduler
mxforge.scheduler.LETTING_GO_S = 0.2
mine = VulkanDevice().empty([4])
stream = engine.stream([1, 2, 3], params)
next(stream)
lose()
print(outcome(stream), outcome(engine.stream([1], params)))
print(statistics()["live_allocations"], kept[-1])
del mine
print(ask(engine) == truth)
"""
    lost, said, same = lose(code, vulkan_artifact)
    assert lost == "lost lost"
    assert said.startswith("1 vulkan:0 (")
    assert "opened anew when all its tensors are freed" in said
    assert same == "True"


def test_a_module_lives_on_after_a_loss(vulkan: VulkanDevice) -> None:
    """Its pipelines are made again on the device opened anew, and destroyed with the lost one."""
    code = """
import numpy as np
vk = VulkanDevice()
module = vk.module(AFFINE, DYNAMIC)
def run():
    x, y = vk.tensor(np.ones(64, np.float32)), vk.empty([64])
    count = vk.tensor(np.zeros(5, np.uint32))
    module["affine"](x, y, 64, 2.0, 1.0, 1, 64)
    module["dynamic"](count, 5, 8, 4)
    return vk.numpy(y)[0], vk.numpy(count)[0]
vk.configure(staging_chunks=3)
for how in ("", "device_lost", "device_lost_at_wait", "device_lost"):
    if how:
        vk.hook("simulate")(0, how, 1)
        try:
            run()
        except RuntimeError as error:
            print("lost" in str(error))
    print(*run())
"""
    result = run_apart(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[:-1] == ["3.0 8004", *["True", "3.0 8004"] * 3]


def test_the_validation_layers_miss_nothing_of_a_lost_device(
    vulkan_artifact: Path, watched: dict[str, str]
) -> None:
    """They tell of every object that was not destroyed before its device, and of wrong orders."""
    code = """
for how in ("device_lost", "device_lost_at_wait"):
    stream = engine.stream([1, 2, 3], params)
    next(stream)
    lose(how)
    print(outcome(stream), ask(engine) == truth)
report = json.loads(vulkan.function("validation_messages")())
print(report["watching"], report["messages"])
"""
    layers = {"VK_INSTANCE_LAYERS": watched["VK_INSTANCE_LAYERS"]}  # the slow ones left out
    assert lose(code, vulkan_artifact, **layers) == ["lost True", "lost True", "True []"]


@pytest.fixture
def short_of_memory(vulkan: VulkanDevice) -> Iterator[Callable[[], None]]:
    """A function after which the device has no memory left, until the test ends."""
    vulkan.configure(block_bytes=0)
    vulkan.sync()
    yield lambda: vulkan.hook("simulate")(0, "out_of_memory", 1000)
    vulkan.hook("simulate")(0, "out_of_memory", 0)
    vulkan.configure(block_bytes=64 << 20)


def test_memory_that_runs_out_while_weights_are_loaded(
    vulkan: VulkanDevice,
    vulkan_artifact: Path,
    short_of_memory: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = vulkan.statistics()["allocated_bytes"]
    loaded = 0
    weight = Library.weight

    def counting(self: Library, *arguments: Any) -> Any:
        nonlocal loaded
        loaded += 1
        if loaded == 9:
            during.append(vulkan.statistics()["allocated_bytes"])
            short_of_memory()
        return weight(self, *arguments)

    during: list[int] = []
    monkeypatch.setattr(Library, "weight", counting)
    with pytest.raises(DeviceMemoryError, match=r"vulkan:0 .* is out of memory") as caught:
        Engine.load(vulkan_artifact, context_length=CONTEXT)
    assert during[0] > before
    assert vulkan.statistics()["allocated_bytes"] == before, "given back, though the error is kept"
    vulkan.hook("simulate")(0, "out_of_memory", 0)
    with Engine.load(vulkan_artifact, context_length=CONTEXT) as engine:
        assert len(engine.generate([1, 2], SamplingParams(max_tokens=3)).token_ids) <= 3
    assert caught.value.exit_code == 1


def test_memory_that_runs_out_in_an_answer_fails_that_one(
    vulkan: VulkanDevice, vulkan_artifact: Path, short_of_memory: Callable[[], None]
) -> None:
    params = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    with Engine.load(vulkan_artifact, context_length=CONTEXT) as engine:
        truth = engine.generate([1, 2, 3], params).token_ids
        stream = engine.stream([1, 2, 3], params)
        next(stream)
        short_of_memory()
        with pytest.raises(DeviceMemoryError, match="out of memory"):
            list(stream)
        vulkan.hook("simulate")(0, "out_of_memory", 0)
        assert engine.generate([1, 2, 3], params).token_ids == truth


@pytest.mark.parametrize(
    ("written", "instead", "message"),
    [
        (b'"shaderInt64"', b'"shaderMagic"', r"feature shaderMagic \(unknown to this runtime\)"),
        (b'"subgroup_size":null', b'"subgroup_size":1024',
         r"subgroup size 1024 \(it has \d+ to \d+\)"),
    ],
)  # fmt: skip
def test_kernels_that_the_device_cannot_run_are_refused_before_weights_are_loaded(
    vulkan_artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    written: bytes,
    instead: bytes,
    message: str,
) -> None:
    """By name: the kernel, what it requires, what the device has, what to do."""
    artifact = Path(shutil.copytree(vulkan_artifact, tmp_path / "copy"))
    (path,) = artifact.glob("model.*")
    code = path.read_bytes()
    assert written in code
    code = code.replace(written, instead)
    path.write_bytes(code)
    sha256 = hashlib.sha256(code).hexdigest()
    edit_manifest(artifact, lambda content: content["files"][path.name].update(sha256=sha256))
    monkeypatch.setattr("mxforge.model.load_weights", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(
        ArtifactTargetError,
        match=rf"should load on vulkan:desktop but does not: Kernel \w+ cannot run on vulkan:0 "
        rf"\(.*\), which lacks: {message}; .* vulkan:minimum asks for least",
    ):
        Engine.load(artifact, context_length=CONTEXT)
