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
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mxforge import vulkan
from mxforge.cuda import OLDEST
from mxforge.errors import TargetError
from mxforge.machine import architecture, host_system, missing_cpu_features
from mxforge.schedules.kernel import Target

from . import cuda, spirv
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
    required_features: tuple[str, ...] = ()
    host: str = field(default_factory=host_system)  # what loads the library, in its words
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


def resolve(name: str) -> CompileTarget:
    """The target called `name`; TargetError where it is unknown or cannot be built here."""
    kind, _, variant = name.partition(":")
    if kind in _RESOLVERS:
        return _RESOLVERS[kind](variant)
    raise TargetError(f"Unknown target {name!r}; the known ones are {', '.join(known_targets())}.")


def resolve_all(name: str) -> tuple[CompileTarget, ...]:
    """What an artifact for `name` has a library for, best first: one unless it is PORTABLE.

    TargetError as of `resolve`.
    """
    if name != PORTABLE:
        return (resolve(name),)
    machine = architecture()
    levels = [level.name for level in CPU_LEVELS if level.machine == machine]
    return tuple(_cpu(level) for level in levels or [""])  # which is refused where there is none


def known_targets() -> list[str]:
    """What `resolve_all` takes, for help texts and errors."""
    levels = [f"cpu:{level.name}" for level in CPU_LEVELS]
    profiles = [f"vulkan:{profile.name}" for profile in VULKAN_PROFILES]
    return ["cpu", *levels, PORTABLE, "cuda", "cuda:sm_XX", "vulkan", *profiles, "metal"]


def _cpu(variant: str) -> CompileTarget:
    if variant:
        levels = [level for level in CPU_LEVELS if level.name == variant]
    else:
        levels = [lv for lv in CPU_LEVELS if lv.machine == architecture() and _host_has(lv)]
    if not levels:
        known = ", ".join(f"cpu:{level.name} ({level.machine})" for level in CPU_LEVELS)
        raise TargetError(
            f"Unknown CPU level {variant!r}; the known ones are {known}."
            if variant
            else f"There is no CPU level for this machine, {architecture()}; name one of {known}."
        )
    level = levels[0]
    return CompileTarget(
        name=f"cpu:{level.name}",
        kernels=Target("cpu", frozenset({"cpu", *level.required})),
        tvm=_llvm(level),
        required_features=level.required,
        host=_system(level.machine),
        fast=Precision(kv="bfloat16", activations="i8", dense="i8"),
    )


def _llvm(level: CpuLevel) -> dict[str, Any]:
    target: dict[str, Any] = {"kind": "llvm", "mcpu": level.mcpu, "mtriple": _triple(level.machine)}
    attributes = [f"+{name}" for name in level.features]
    if "avx512f" in level.required:
        # x86-64-v4 is tuned for 256-bit registers; the schedules are written for 512.
        attributes.append("-prefer-256-bit")
    if attributes:
        target["mattr"] = attributes
    return target


def _system(machine: str) -> str:
    """This machine's system; Linux for CPUs of another architecture."""
    return host_system() if machine == architecture() else f"linux-{machine}"


def _triple(machine: str) -> str:
    if _system(machine) == f"darwin-{machine}":
        return f"{'arm64' if machine == 'aarch64' else machine}-apple-darwin"
    return f"{machine}-unknown-linux-gnu"


def _host_has(level: CpuLevel) -> bool:
    return not missing_cpu_features(level.required)


def _host() -> dict[str, Any]:
    """The CPU side of a GPU target: plain code, any machine of this architecture."""
    baseline = [level for level in CPU_LEVELS if level.machine == architecture()][-1]
    return _llvm(baseline)


def _cuda(variant: str) -> CompileTarget:
    if variant and variant not in cuda.ARCHS:
        known = ", ".join(cuda.ARCHS)
        raise TargetError(f"Unknown CUDA target {variant!r}; the known ones are {known}.")
    cuda.find_nvcc()  # missed now rather than after minutes
    arch = variant or OLDEST
    return CompileTarget(
        name=f"cuda:{variant}" if variant else "cuda",
        kernels=gpu_target("cuda", *cuda.features(arch)),
        fast=Precision(kv="float16", activations="bf16", dense="i8xf32"),
        tvm={"kind": "cuda", "arch": arch, "host": _host()},
        archs=(variant,) if variant else cuda.PORTABLE_ARCHS,
    )


def _vulkan(variant: str) -> CompileTarget:
    name = variant or VULKAN_PROFILES[0].name
    profile = next((profile for profile in VULKAN_PROFILES if profile.name == name), None)
    if profile is None:
        known = ", ".join(profile.name for profile in VULKAN_PROFILES)
        raise TargetError(f"Unknown Vulkan profile {name!r}; the known ones are {known}.")
    vulkan.load()
    spirv.register()  # `import tvm` has done so already, unless it was told not to
    return CompileTarget(
        name=f"vulkan:{name}",
        kernels=gpu_target("vulkan", *profile.features),
        tvm={
            "kind": "vulkan",
            # More would make TVM count on threads that run in lockstep, whatever the device has.
            "thread_warp_size": 1,
            "max_num_threads": profile.threads,
            "max_threads_per_block": profile.threads,
            "max_shared_memory_per_block": profile.shared_bytes,
            "supports_float16": "float16" in profile.features,
            "host": _host(),
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
        tvm={"kind": "metal", "host": _host()},
    )


_RESOLVERS = {"cpu": _cpu, "cuda": _cuda, "vulkan": _vulkan, "metal": _metal}
