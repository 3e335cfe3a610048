"""What can be compiled for: presets as data, resolved by name into one frozen `CompileTarget`.

The names:

    cpu                 the best level that this machine has
    cpu:<level>         one of CPU_LEVELS, also for another machine
    cpu:portable        a library for each level of this architecture, chosen at load
    cuda                NVIDIA GPUs of sm_80 and later; needs nvcc to build
    cuda:sm_XX          one architecture, and later ones unless it ends in `a`
    vulkan              GPUs with Vulkan 1.2: the first of VULKAN_PROFILES
    vulkan:<profile>    one of VULKAN_PROFILES
    metal               Apple GPUs; the shaders are compiled when the artifact is loaded

Code for a CPU is for a system too, one of `linker.HOSTS`: this machine's, or Linux where a level is
of another architecture, unless another one is asked for. Code for a GPU runs on any system.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mxforge.errors import TargetError
from mxforge.machine import architecture, host_system, missing_cpu_features
from mxforge.schedules.kernel import Target

from . import cuda, linker
from .config import ModelConfig
from .formats import Formats, Precision

Numerics = Literal["exact", "fast"]
NUMERICS: tuple[Numerics, ...] = ("exact", "fast")


@dataclass(frozen=True)
class CpuLevel:
    """A set of instructions that schedules may count on, and how LLVM is told about them."""

    name: str
    machine: str  # `architecture` of the CPUs that have it
    mcpu: str
    features: tuple[str, ...]  # beyond those of `mcpu`; all are checked when an artifact is loaded
    implied: tuple[str, ...]  # of `mcpu`, checked too

    @property
    def required(self) -> tuple[str, ...]:
        return tuple(sorted({*self.features, *self.implied}))


_AVX2 = ("avx2", "fma", "f16c", "bmi", "bmi2", "lzcnt", "movbe")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
# Best first within an architecture: `cpu` takes the first that this machine has.
CPU_LEVELS: tuple[CpuLevel, ...] = (
    CpuLevel("avx512bf16", "x86_64", "x86-64-v4", ("avx512vnni", "avx512bf16"), _AVX512),
    CpuLevel("avx512vnni", "x86_64", "x86-64-v4", ("avx512vnni",), _AVX512),
    CpuLevel("avx512", "x86_64", "x86-64-v4", (), _AVX512),
    CpuLevel("avx2", "x86_64", "x86-64-v3", (), _AVX2),
    CpuLevel("x86-64-v2", "x86_64", "x86-64-v2", (), ("popcnt", "sse4.2", "ssse3")),
    CpuLevel("x86-64", "x86_64", "x86-64", (), ()),
    CpuLevel("neon-i8mm", "aarch64", "generic", ("neon", "dotprod", "i8mm"), ()),
    CpuLevel("neon-dotprod", "aarch64", "generic", ("neon", "dotprod"), ()),
    CpuLevel("neon", "aarch64", "generic", ("neon",), ()),
)


PORTABLE = "cpu:portable"


@dataclass(frozen=True)
class VulkanProfile:
    """What Vulkan code may count on, beyond Vulkan 1.2 with buffer device addresses, 8- and 16-bit
    storage and integers, and 64-bit integers.

    `features` are those of its `Target`: "float16" is arithmetic; "threads256" are blocks of 256
    threads with 32 KB of shared memory, where others have 128 and 16 KB.
    """

    name: str
    threads: int  # of a block
    shared_bytes: int  # of a block
    features: tuple[str, ...] = ()


# The first is what `vulkan` means.
VULKAN_PROFILES: tuple[VulkanProfile, ...] = (
    VulkanProfile("desktop", 256, 32 << 10, ("float16", "threads256")),
    VulkanProfile("mobile", 128, 16 << 10, ("float16",)),
    VulkanProfile("minimum", 128, 16 << 10),  # the limits that every device has
)


@dataclass(frozen=True)
class CompileTarget:
    """A resolved target: what the schedules see, what TVM sees, what the artifact requires."""

    name: str
    kernels: Target
    tvm: dict[str, Any]
    host: str | None  # what loads a CPU's library, as `host_system` calls it
    required_features: tuple[str, ...] = ()
    fast: Precision = field(default_factory=lambda: Precision(kv="float16", dense="i8xf32"))
    archs: tuple[str, ...] = ()  # what CUDA text is compiled for

    def precision(
        self, numerics: Numerics, config: ModelConfig, formats: Formats | None = None
    ) -> Precision:
        """What a model of these sizes is compiled with; TargetError where it cannot be."""
        if numerics == "exact":
            return Precision()
        best = self.fast
        # One expert is nearly the whole layer: rounding its inputs to 8 bits costs more than the
        # 1e-2 that fast numerics promise (1.1e-2), and speed is no matter at such a size. Nor is it
        # at sizes that the target's best kernels do not take.
        if config.num_local_experts == 1 or best.unscheduled(self.kernels, **config.expert_sizes):
            best = replace(best, activations="f32")
        precision = best.with_asked(formats or Formats(), self.kernels)
        lacking = precision.unscheduled(self.kernels, **config.expert_sizes)
        if lacking:
            sizes = ", ".join(f"{name}={size}" for name, size in config.expert_sizes.items())
            where = "" if precision.unscheduled(self.kernels) else f" where {sizes}"
            raise TargetError(
                f"{self.name} has no kernel for {' and '.join(lacking)}{where}; leave it out, or "
                "compile for another target, such as a CPU."
            )
        return precision


# What all GPUs of a family have. "device_barrier": a block's barrier orders device memory too.
FAMILIES = {
    "cuda": ("device_barrier",),
    "vulkan": ("device_barrier",),
    "metal": ("simdgroup_matrix",),  # Apple7 (A14, M1) and later
}


def gpu_target(family: str, *features: str) -> Target:
    """What schedules for a GPU of this family may count on."""
    return Target(family, frozenset({"gpu", family, *FAMILIES[family], *features}))


def resolve(name: str, host: str | None = None) -> CompileTarget:
    """The target called `name`, on the system `host`; TargetError where either is unknown, or the
    target cannot be built here or does not exist there."""
    if host is not None:
        linker.known_host(host)
    kind, _, variant = name.partition(":")
    if kind == "cpu":
        return _cpu(variant, host)
    if kind in _GPUS:
        if host is not None:
            raise TargetError(f"A model for {name} runs on any system; leave --host out.")
        return _GPUS[kind](variant)
    raise TargetError(f"Unknown target {name!r}; the known ones are {', '.join(known_targets())}.")


def resolve_all(name: str, host: str | None = None) -> tuple[CompileTarget, ...]:
    """What an artifact for `name` has a library for, best first: one unless it is PORTABLE.

    TargetError as of `resolve`.
    """
    if name != PORTABLE:
        return (resolve(name, host),)
    machine = _machine(host)
    levels = [level.name for level in CPU_LEVELS if level.machine == machine]
    # Without levels `cpu` is refused.
    return tuple(resolve(f"cpu:{level}" if level else "cpu", host) for level in levels or [""])


def known_targets() -> list[str]:
    """What `resolve_all` takes, for help texts and errors."""
    levels = [f"cpu:{level.name}" for level in CPU_LEVELS]
    profiles = [f"vulkan:{profile.name}" for profile in VULKAN_PROFILES]
    return ["cpu", *levels, PORTABLE, "cuda", "cuda:sm_XX", "vulkan", *profiles, "metal"]


def _machine(host: str | None) -> str:
    """The CPU architecture of a system, or of this machine."""
    return architecture() if host is None else host.partition("-")[2]


def _cpu(variant: str, host: str | None) -> CompileTarget:
    if not variant and host not in (None, host_system()):
        raise TargetError(
            f"cpu is the best level that this machine has; for {host} name one of "
            f"{_levels(_machine(host))}, or {PORTABLE}."
        )
    if variant:
        levels = [level for level in CPU_LEVELS if level.name == variant]
    else:
        levels = [lv for lv in CPU_LEVELS if lv.machine == architecture() and _host_has(lv)]
    if not levels:
        raise TargetError(
            f"Unknown CPU level {variant!r}; the known ones are {_levels()}."
            if variant
            else f"There is no CPU level for this machine, {architecture()}; name one of "
            f"{_levels()}."
        )
    level = levels[0]
    if host is not None and level.machine != _machine(host):
        raise TargetError(
            f"cpu:{level.name} is of {level.machine}, and {host} is not; name one of "
            f"{_levels(_machine(host))}."
        )
    system = host or (
        host_system() if level.machine == architecture() else f"linux-{level.machine}"
    )
    return CompileTarget(
        name=f"cpu:{level.name}",
        kernels=Target("cpu", frozenset({"cpu", *level.required})),
        tvm=_llvm(level, system),
        required_features=level.required,
        host=system,
        fast=Precision(kv="bfloat16", activations="i8", dense="i8"),
    )


def _levels(machine: str | None = None) -> str:
    """The names of all levels, or of those of an architecture, for errors."""
    return ", ".join(
        f"cpu:{level.name}" if machine else f"cpu:{level.name} ({level.machine})"
        for level in CPU_LEVELS
        if machine in (None, level.machine)
    )


def _llvm(level: CpuLevel, host: str) -> dict[str, Any]:
    target: dict[str, Any] = {
        "kind": "llvm",
        "mcpu": level.mcpu,
        "mtriple": linker.known_host(host).triple,
    }
    attributes = [f"+{name}" for name in level.features]
    if "avx512f" in level.required:
        # x86-64-v4 is tuned for 256-bit registers; the schedules are written for 512.
        attributes.append("-prefer-256-bit")
    if attributes:
        target["mattr"] = attributes
    return target


def _host_has(level: CpuLevel) -> bool:
    return not missing_cpu_features(level.required)


_HOST = {"kind": "c"}  # TVM wants one; what it would do there, the launch plan says


def _cuda(variant: str) -> CompileTarget:
    if variant and variant not in cuda.ARCHS:
        known = ", ".join(cuda.ARCHS)
        raise TargetError(f"Unknown CUDA target {variant!r}; the known ones are {known}.")
    cuda.find_nvcc()  # missed now rather than after minutes
    arch = variant or cuda.OLDEST
    return CompileTarget(
        name=f"cuda:{variant}" if variant else "cuda",
        kernels=gpu_target("cuda", *cuda.features(arch)),
        host=None,
        fast=Precision(kv="float16", activations="bf16", dense="i8xf32"),
        tvm={"kind": "cuda", "arch": arch, "host": _HOST},
        archs=(variant,) if variant else cuda.PORTABLE_ARCHS,
    )


def _vulkan(variant: str) -> CompileTarget:
    name = variant or VULKAN_PROFILES[0].name
    profile = next((profile for profile in VULKAN_PROFILES if profile.name == name), None)
    if profile is None:
        known = ", ".join(profile.name for profile in VULKAN_PROFILES)
        raise TargetError(f"Unknown Vulkan profile {name!r}; the known ones are {known}.")
    return CompileTarget(
        name=f"vulkan:{name}",
        kernels=gpu_target("vulkan", *profile.features),
        host=None,
        tvm={
            "kind": "vulkan",
            # More would make TVM count on threads that run in lockstep, whatever the device has.
            "thread_warp_size": 1,
            "max_num_threads": profile.threads,
            "max_threads_per_block": profile.threads,
            "max_shared_memory_per_block": profile.shared_bytes,
            "supports_float16": "float16" in profile.features,
            "host": _HOST,
        },
        fast=Precision(
            kv="float16" if "float16" in profile.features else "float32", dense="i8xf32"
        ),
    )


def _metal(variant: str) -> CompileTarget:
    if variant:
        raise TargetError(f"The target metal has no variants, found 'metal:{variant}'; use metal.")
    return CompileTarget(
        name="metal",
        kernels=gpu_target("metal"),
        host=None,
        tvm={"kind": "metal", "host": _HOST},
    )


_GPUS = {"cuda": _cuda, "vulkan": _vulkan, "metal": _metal}
