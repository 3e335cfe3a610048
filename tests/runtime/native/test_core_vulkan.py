"""Launch plans on Vulkan: the bits of the virtual machine, and a device that fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tvm
from support.calls import CALLS, arguments
from support.machine import executable
from support.small import SMALL_SHAPE, small_checkpoint
from support.vulkan_device import WATCHED, VulkanDevice, run_apart, unavailable
from support.vulkan_loader import build_loader
from tvm import relax

from mxforge import Engine, SamplingParams, compile_model
from mxforge.compile import pipeline, spirv, targets
from mxforge.compile.checkpoint import open_checkpoint
from mxforge.compile.models.emit import Limits
from mxforge.compile.models.gpt_oss import GPT_OSS
from mxforge.compile.weights import packed_weights
from mxforge.core import CoreLibrary
from mxforge.errors import ArtifactCorruptError, ArtifactTargetError
from mxforge.native.build import BuildError
from mxforge.plan import Role

TIMES = 3  # launched, recorded, submitted again
LIMITS = Limits(4, 64)
SYNCHRONIZATION = "VK_VALIDATION_FEATURE_ENABLE_SYNCHRONIZATION_VALIDATION_EXT"

# In a process of its own: an engine on the core, and the calls of Vulkan that it makes.
APART = """
from support.vulkan_loader import *
from mxforge import Engine, SamplingParams
from mxforge.errors import DeviceLostError, DeviceMemoryError
def load():
    return Engine.load(ARTIFACT, context_length=64)
def answer(engine, tokens=8):
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    return engine.generate([1, 2, 3], params).token_ids
"""


@pytest.fixture(scope="module")
def small(once: Callable[..., Path], vulkan: VulkanDevice) -> Path:
    """A small artifact for Vulkan; its checkpoint lies beside it."""

    def made(folder: Path) -> None:
        compile_model(
            small_checkpoint(folder), output=folder / "artifact", target="vulkan",
            max_batch=LIMITS.max_batch, prefill_chunk=LIMITS.prefill_chunk,
        )  # fmt: skip

    return once("core-vulkan", made) / "artifact"


@pytest.fixture(scope="module")
def machine(small: Path) -> relax.VirtualMachine:
    """The same model on TVM's virtual machine."""
    spirv.register()
    checkpoint = open_checkpoint(small.parent / "small")
    target = targets.resolve("vulkan")
    precision = target.precision("fast", checkpoint.config)
    weights = packed_weights(GPT_OSS.weights(checkpoint.config), target.kernels, precision)
    module = GPT_OSS.module(checkpoint.config, target.kernels, precision, LIMITS, weights)
    built = executable(pipeline.lower(module, target), target)
    return relax.VirtualMachine(built, tvm.vulkan(0))


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process whose Vulkan fails when it is told to."""
    try:
        loader = build_loader(tmp_path_factory.mktemp("loader"))
        return {"MXFORGE_VULKAN_LOADER": str(loader)}
    except BuildError as error:
        return unavailable(str(error))  # type: ignore[no-any-return]


def opened(artifact: Path, **files: Path) -> CoreLibrary:
    plan, kernels = artifact / "model.plan", artifact / "model.spirv"
    return CoreLibrary("vulkan", files.get("plan", plan), files.get("kernels", kernels), threads=0)


def said(artifact: Path, code: str, **environment: str) -> list[str]:
    """What a process of its own prints."""
    start = APART.replace("ARTIFACT", repr(str(artifact)))
    result = run_apart(start + code, **environment)
    assert result.returncode == 0, result.stderr + result.stdout
    return result.stdout.strip().splitlines()


def test_plan_and_virtual_machine_give_the_same_bits(
    small: Path, machine: relax.VirtualMachine
) -> None:
    core = opened(small)
    device = tvm.vulkan(0)
    assert {name for name, _ in CALLS} == {function.name for function in core.plan.functions}
    for name, sizes in CALLS:
        function = core[name]
        given = arguments(function, sizes, SMALL_SHAPE["vocab_size"])
        caches = [i for i, each in enumerate(function.arguments) if each.role is Role.KV]
        theirs = [tvm.runtime.tensor(array, device) for array in given]
        found = machine[name](*theirs)
        expected = [found] if isinstance(found, tvm.runtime.Tensor) else list(found)
        expected = [array.numpy() for array in (*expected, *(theirs[i] for i in caches))]
        for time in range(TIMES):
            own = [array.copy() for array in given]
            ours = [*core.call(name, own), *(own[i] for i in caches)]
            for mine, their in zip(ours, expected, strict=True):
                assert np.isfinite(mine.astype(np.float64)).all(), (name, sizes)
                assert mine.tobytes() == their.tobytes(), (name, sizes, time)
    core.close()


def test_what_does_not_fit_is_refused(small: Path, tmp_path: Path) -> None:
    damaged, other = tmp_path / "model.spirv", tmp_path / "model.plan"
    code, plan = (small / path.name for path in (damaged, other))
    damaged.write_bytes(code.read_bytes()[:-4])
    with pytest.raises(ArtifactCorruptError, match="no module of Vulkan kernels"):
        opened(small, kernels=damaged)
    # A kernel of another name, of the same length.
    (name,) = {step.kernel for step in opened(small)["embed"].steps}
    other.write_bytes(plan.read_bytes().replace(name.encode(), name.encode().upper()))
    core = opened(small, plan=other)
    with pytest.raises(ArtifactCorruptError, match=f"lacks the kernel {name.upper()}"):
        core.call("embed", arguments(core["embed"], {"n": 2}, 100))
    core.close()
    # A feature that no device has, as long as one that every kernel asks for.
    lacking = code.read_bytes().replace(b"bufferDeviceAddress", b"bufferDeviceAddresX")
    damaged.write_bytes(lacking)
    with pytest.raises(ArtifactTargetError, match=r"cannot run on vulkan:0 .*bufferDeviceAddresX"):
        opened(small, kernels=damaged)


def test_a_device_that_is_not_there_is_named(small: Path) -> None:
    code = "try:\n    load()\nexcept Exception as error:\n    print(type(error).__name__, error)"
    lines = said(small, code, MXFORGE_VULKAN_DEVICE="no such GPU")
    assert "no such GPU" in lines[-1]


@pytest.mark.parametrize("call", ["SUBMIT", "WAIT"])
def test_a_lost_device_is_opened_anew(small: Path, faulty: dict[str, str], call: str) -> None:
    lines = said(small, f"""
loader = Loader()
with load() as engine:
    first = answer(engine)
    loader.fail(Call.{call}, DEVICE_LOST)
    try:
        answer(engine)
    except DeviceLostError as error:
        print(error)
    print(answer(engine) == first)
with load() as engine:
    print(answer(engine) == first)
""", **faulty)  # fmt: skip
    assert "vulkan:0" in lines[0]
    assert "was lost in vk" in lines[0]
    assert lines[1:] == ["True", "True"]


def test_a_loss_fails_what_runs_and_what_waits(small: Path, faulty: dict[str, str]) -> None:
    """By name, and none hangs; other engines of the device load again as this one does."""
    lines = said(small, """
loader = Loader()
def outcome(stream):
    try:
        return list(stream)[-1].finish_reason
    except DeviceLostError:
        return "lost"
params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
with Engine.load(ARTIFACT, context_length=64, max_batch=2) as engine, load() as idle:
    first, same = answer(engine), answer(idle)
    streams = [engine.stream([n, 2, 3], params) for n in (1, 4, 5)]  # two run, one waits
    next(streams[0])
    loader.fail(Call.SUBMIT, DEVICE_LOST)
    print([outcome(stream) for stream in streams])
    print(answer(engine) == first, answer(idle) == same == first)
""".replace("ARTIFACT", repr(str(small))), **faulty)  # fmt: skip
    assert lines == ["['lost', 'lost', 'lost']", "True True"]


def test_too_little_memory_is_said(small: Path, faulty: dict[str, str]) -> None:
    lines = said(small, """
loader = Loader()
loader.fail(Call.ALLOCATE, OUT_OF_DEVICE_MEMORY, 1 << 20)
try:
    load()
except DeviceMemoryError as error:
    print(error)
loader.fail(Call.ALLOCATE, OUT_OF_DEVICE_MEMORY, 0)
with load() as engine:
    print(len(answer(engine)))
""", **faulty)  # fmt: skip
    assert "vulkan:0" in lines[0]
    assert "is out of memory" in lines[0]
    assert lines[1] == "8"


def test_a_token_like_the_last_one_records_nothing(small: Path, faulty: dict[str, str]) -> None:
    lines = said(small, """
loader = Loader()
with load() as engine:
    for tokens in (4, 4, 12, 12, 12):  # the first ones record
        before = loader.calls(Call.DISPATCH), loader.calls(Call.SUBMIT)
        answer(engine, tokens)
        print(loader.calls(Call.DISPATCH) - before[0], loader.calls(Call.SUBMIT) - before[1])
""", **faulty)  # fmt: skip
    first, *_, last = (tuple(map(int, line.split())) for line in lines)
    assert first[0] > 0
    assert last[0] == 0, lines
    assert last[1] >= 12


def test_recordings_are_of_their_own_sizes(small: Path) -> None:
    """Sequences of several lengths, one after another in an engine, and each in an own one."""
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    prompts = [[(7 * length + i) % 97 for i in range(length)] for length in (3, 20, 60, 90)]

    def answers(*prompts: list[int]) -> list[tuple[int, ...]]:
        with Engine.load(small, context_length=128) as engine:
            return [engine.generate(prompt, params).token_ids for prompt in prompts]

    assert answers(*prompts) == [answers(prompt)[0] for prompt in prompts]


@pytest.mark.parametrize(
    "enables",
    [
        SYNCHRONIZATION,
        # Addresses too, by code in every kernel: each is compiled anew.
        pytest.param(WATCHED["VK_LAYER_ENABLES"], marks=pytest.mark.slow),
    ],
    ids=["synchronization", "addresses"],
)
def test_validation_layers_find_nothing(
    small: Path, watched: dict[str, str], tmp_path: Path, enables: str
) -> None:
    report = tmp_path / "report.txt"
    settings = {
        "debug_action": "VK_DBG_LAYER_ACTION_LOG_MSG", "report_flags": "error,warn,info",
        "log_filename": str(report),
    }  # fmt: skip
    text = "".join(f"khronos_validation.{name} = {value}\n" for name, value in settings.items())
    (tmp_path / "vk_layer_settings.txt").write_text(text)
    watched = {**watched, "VK_LAYER_SETTINGS_PATH": str(tmp_path)}
    watched["VK_LAYER_ENABLES"] = enables
    code = "with load() as engine:\n    print(len(answer(engine)))"
    assert said(small, code, **watched)[-1] == "8"
    messages = [line for line in report.read_text().splitlines() if "msgNum" in line]
    assert any("Khronos Validation Layer Active" in line for line in messages)  # it watches
    assert [line for line in messages if "(INFO" not in line] == []
