"""Kernels compiled by Mesa's drivers for GPUs that are not here, through its drm shims."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from support.folders import SetupError, made, run
from support.mesa import Mesa, open_mesa, version

from mxforge.compile.spirv import KernelCode

from . import results, shipped
from .shipped import ROOT

TITLE = "SPIR-V on GPUs that are not here"
ABOUT = (
    "Mesa's drivers compile every kernel for each GPU, and tell of it through "
    "VK_KHR_pipeline_executable_properties. Nothing has run."
)
SOURCE = Path(__file__).with_name("pipeline_statistics.cc")
HEADER = ROOT / "runtime" / "native" / "vulkan" / "matrices.h"
PROGRAM = ROOT / "build" / "pipeline_statistics"


@dataclass(frozen=True)
class Driver:
    """One of Mesa's: its manifest and shim, and what we call its statistics.

    names: ours -> theirs, added up where there are several.
    matrix: what is in the name of an instruction that multiplies matrices, and in no other's
    """

    manifest: str
    shim: str
    names: Mapping[str, tuple[str, ...]]
    matrix: str = "(none)"


RADV = Driver("radeon", "amdgpu", {
    "registers": ("VGPRs",),
    "spills": ("Spilled VGPRs", "Spilled SGPRs"),
    "scratch_bytes": ("Scratch size",),
    "shared_bytes": ("LDS size",),
    "waves": ("Subgroups per SIMD",),
    "instructions": ("Instructions",),
    "code_bytes": ("Code size",),
    "cycles": ("Latency",),
}, "v_wmma")  # fmt: skip
NVK = Driver("nouveau", "nouveau", {
    "registers": ("Number of GPRs",),
    "spills": ("Spills to memory", "Fills from memory", "Spills to reg", "Fills from reg"),
    "scratch_bytes": ("SLM size",),
    "waves": ("Max warps/SM",),
    "instructions": ("Instruction count",),
    "code_bytes": ("Code size",),
    "cycles": ("Static cycle count",),
}, "hmma")  # fmt: skip
TURNIP = Driver("freedreno", "freedreno", {
    "registers": ("Registers used",),
    "spills": ("STP Count", "LDP Count"),  # stores to and loads from a thread's own memory
    "waves": ("Max Waves Per Core",),
    "instructions": ("Instruction Count",),
    "code_bytes": ("Code size",),
    "cycles": ("Estimated cycles stalled on SS", "Estimated cycles stalled on SY"),
})  # fmt: skip
HONEYKRISP = Driver("asahi", "asahi", {
    "registers": ("GPRs",),
    "spills": ("Spills", "Fills"),
    "scratch_bytes": ("Scratch",),
    "waves": ("Threads",),
    "instructions": ("Instructions",),
    "code_bytes": ("Code size",),
    "cycles": ("ALU",),
})  # fmt: skip


@dataclass(frozen=True)
class Gpu:
    """setting: the environment variable with which a shim claims to be this one.

    matrices: the shapes that it multiplies, m, n and k, with subgroups of LANES. It gets to see no
        kernel of others, as the runtime has it: NVK would end the process.
    """

    name: str
    driver: Driver
    setting: Mapping[str, str]
    matrices: tuple[tuple[int, int, int], ...] = ()
    target: str = "vulkan:desktop"


SQUARE, LANES = ((16, 16, 16),), 32
GPUS = (
    Gpu("AMD navi31", RADV, {"AMDGPU_GPU_ID": "navi31"}, SQUARE),
    Gpu("AMD navi21", RADV, {"AMDGPU_GPU_ID": "navi21"}),
    Gpu("AMD vega10", RADV, {"AMDGPU_GPU_ID": "vega10"}),
    Gpu("AMD gfx1201", RADV, {"AMDGPU_GPU_ID": "gfx1201"}, SQUARE),
    Gpu("NVIDIA 160", NVK, {"NOUVEAU_CHIPSET": "160"}, SQUARE),
    Gpu("NVIDIA 170", NVK, {"NOUVEAU_CHIPSET": "170"}, SQUARE),
    Gpu("Adreno 740", TURNIP, {"FD_GPU_ID": "740"}, target="vulkan:mobile"),
    Gpu("Apple M1", HONEYKRISP, {}),
)

SPREAD: dict[str, float] = {}
TO_REGISTERS = {
    "sample_token_1": "some predicates of its search move to registers, none to memory",
    **dict.fromkeys(
        (
            "bf16w_linear1_2", "bf16w_linear_2", "i8w_linear1_2", "i8w_linear_2",
            "mxfp4w_moe_down_3", "mxfp4w_moe_gate_up_swiglu_3",
        ),
        "some numbers of its blocks move to other registers, none to memory",
    ),
}  # fmt: skip
EXCEPTIONS = {
    (gpu.name, kernel): why
    for gpu in GPUS
    if gpu.driver is NVK
    for kernel, why in TO_REGISTERS.items()
}

# A step of a block's warp: two by two accumulators by the two parts of the inputs.
FEWEST_MATRIX_INSTRUCTIONS = 8


def gates(found: results.Results) -> list[str]:
    """A sentence for each kernel that should not be as it is."""
    return results.broken_gates(found, EXCEPTIONS) + [
        f"{kernel} on {gpu} should multiply matrices: {statistics['matrix_instructions']} times"
        for gpu, kernel, statistics in results.each(found)
        if statistics.get("matrix_instructions", FEWEST_MATRIX_INSTRUCTIONS)
        < FEWEST_MATRIX_INSTRUCTIONS
    ]


page = partial(results.page, TITLE, ABOUT, exceptions=EXCEPTIONS)


def measure(scratch: Path) -> results.Results:
    """The statistics of every kernel on every GPU. SetupError where Mesa or a compiler of C++ is
    missing here, mesa.Gone where the pinned Mesa is no longer to be had."""
    mesa, program = open_mesa(), _program()
    kernels = {target: _kernels(target, scratch) for target in sorted({g.target for g in GPUS})}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = pool.map(
            lambda gpu: _statistics(mesa, program, gpu, _list(gpu, kernels[gpu.target])), GPUS
        )
        gpus = dict(zip((gpu.name for gpu in GPUS), found, strict=True))
    return results.results(f"Mesa {version()}", shipped.MODEL, shipped.NUMERICS, gpus)


def _program() -> Path:
    """PROGRAM's executable, compiled where it is missing or old."""

    def make(new: Path) -> None:
        options = ("-std=c++17", "-O1", "-DVK_NO_PROTOTYPES", "-iquote", HEADER.parent)
        run("g++", *options, SOURCE, "-ldl", "-o", new / SOURCE.stem)

    return made(PROGRAM, SOURCE.read_text() + HEADER.read_text(), make) / SOURCE.stem


def _kernels(target: str, scratch: Path) -> list[tuple[KernelCode, Path]]:
    """The kernels of the model for `target` by name, and their SPIR-V, written below `scratch`."""
    found: dict[str, tuple[KernelCode, Path]] = {}
    for artifact in shipped.artifacts(target, scratch):
        for kernel in shipped.spirv_kernels(artifact):
            path = artifact / f"{kernel.name}.spv"
            path.write_bytes(kernel.spirv)
            found.setdefault(kernel.name, (kernel, path))
    return [found[name] for name in sorted(found)]


def _list(gpu: Gpu, kernels: Iterable[tuple[KernelCode, Path]]) -> str:
    """The program's input: those kernels of which the GPU has the matrices."""
    return "\n".join(
        f"{kernel.name} {' '.join(map(str, _launch(kernel)))} {path}"
        for kernel, path in kernels
        if _multiplies(gpu, kernel.reflection["requirements"])
    )


def _multiplies(gpu: Gpu, needs: Mapping[str, Any]) -> bool:
    shapes = {(product["m"], product["n"], product["k"]) for product in needs["matrices"]}
    return not shapes or (shapes <= set(gpu.matrices) and needs["subgroup_size"] == LANES)


def _launch(kernel: KernelCode) -> tuple[int, int, int, int]:
    """Bytes of push constants, the subgroup size (0: any), whether subgroups have to be full, and
    whether matrices are multiplied."""
    about, needs = kernel.reflection, kernel.reflection["requirements"]
    pushed = 8 if about["argument_buffer"] else about["argument_bytes"]
    full = "computeFullSubgroups" in needs["features"]
    return pushed, needs["subgroup_size"] or 0, int(full), int(bool(needs["matrices"]))


def _statistics(mesa: Mesa, program: Path, gpu: Gpu, kernels: str) -> dict[str, Any]:
    driver = gpu.driver
    environment = {**mesa.environment(driver.manifest), **gpu.setting}
    environment["MESA_SHADER_CACHE_DISABLE"] = "true"  # what lies there has no statistics
    command = mesa.command(program, driver.matrix, preload=f"lib{driver.shim}_noop_drm_shim.so")
    result = subprocess.run(
        command, env=environment, input=kernels, capture_output=True, text=True, check=False
    )
    if not result.stdout.startswith("device\t"):
        raise SetupError(f"Mesa shows no {gpu.name}: {result.stderr.strip()[-400:]}")
    names = [line.split()[0] for line in kernels.splitlines()]
    return parse(result.stdout, names, driver)


def parse(output: str, names: Iterable[str], driver: Driver) -> dict[str, Any]:
    """Kernel -> statistics, of what the program printed; of all these device functions."""
    told: dict[str, dict[str, int]] = {}
    failed: dict[str, str] = {}
    for line in output.splitlines():
        kind, *fields = line.split("\t")
        if kind == "begin":
            failed[fields[0]] = "the driver crashed"
        elif kind == "failed":
            failed[fields[0]] = fields[1]
        elif kind == "statistic":
            name, _executable, what, value = fields
            failed.pop(name, None)
            statistics = told.setdefault(name, {})
            statistics[what] = statistics.get(what, 0) + int(value)
    found = {}
    for name in names:
        if name in told:
            found[shipped.short(name)] = _ours(told[name], driver)
        else:
            why = failed.get(name, "the driver crashed before")
            found[shipped.short(name)] = {"failed": why}
    return found


def _ours(told: Mapping[str, int], driver: Driver) -> dict[str, int]:
    """KeyError where a driver has given a statistic another name: a gate would then see nothing."""
    own = {ours: sum(told[name] for name in theirs) for ours, theirs in driver.names.items()}
    if driver.matrix in told:
        own["matrix_instructions"] = told[driver.matrix]
    return own
