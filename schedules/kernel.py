"""What a kernel is: one mathematical operation, its reference, its cases, a schedule per target.

Every module of this package reads in the same order: the math, the NumPy reference (float64
accumulation), the TensorIR, the schedule of each target, the cases. It ends in one `Kernel`
per operation; `mxforge.schedules.KERNELS` collects them, and one test walks every kernel on
every target, so a missing reference, case or schedule fails there.

Kernel names carry types: f32_ is the activation, bf16w_ or mxfp4w_ the weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import tvm
from tvm.script import tirx as T

TargetKind = Literal["cpu", "cuda", "vulkan", "metal"]
TARGET_KINDS: tuple[TargetKind, ...] = ("cpu", "cuda", "vulkan", "metal")


@dataclass(frozen=True)
class Target:
    """The machine a schedule is chosen for.

    `features` names instruction-set extensions in LLVM's spelling (``avx512vnni``); it is empty
    on GPUs until a schedule asks for one.
    """

    kind: TargetKind
    features: frozenset[str] = frozenset()

    @property
    def is_gpu(self) -> bool:
        return self.kind != "cpu"

    def has(self, *features: str) -> bool:
        """Whether every named instruction-set feature is there."""
        return self.features.issuperset(features)


@dataclass(frozen=True)
class Case:
    """One input on which a kernel is tested and timed.

    `name` says which boundary it stands on. `static` holds the keyword arguments of the
    kernel's `build`; `inputs` makes the arguments, by name, in the reference's layout.
    `tolerance` bounds ‖ours − reference‖ / ‖reference‖. `flops` and `bytes` are what the
    operation cannot do without: the roofline a timing is held against.
    """

    name: str
    static: Mapping[str, Any]
    inputs: Callable[[np.random.Generator], dict[str, np.ndarray]]
    tolerance: float = 1e-5
    flops: int = 0
    bytes: int = 0


def _as_stored(_target: Target, inputs: dict[str, np.ndarray], **_static: Any) -> list[np.ndarray]:
    return list(inputs.values())


@dataclass(frozen=True)
class Kernel:
    """One operation.

    build(target, **static) -> PrimFunc   scheduled; parameters are the packed inputs, then outputs
    items(**static) -> PrimFunc   serial code for the same, which the tests run on the CPU, where a
        GPU's code cannot run: an item per output, which the simple GPU schedules bind to threads;
        or a block schedule with its threads one after the other
    reference(**inputs, **static) -> tuple of outputs, in float64 where the output is real
    pack(target, inputs, **static) -> the PrimFunc's input arrays in order, in this target's layout
    inplace: names of the inputs that the kernel updates; the reference returns their new value
        after the fresh outputs
    outputs(inputs, **static) -> [(shape, dtype)] of the fresh outputs, in the PrimFunc's order
    """

    name: str
    build: Callable[..., tvm.tirx.PrimFunc]
    items: Callable[..., tvm.tirx.PrimFunc]
    reference: Callable[..., tuple[np.ndarray, ...]]
    outputs: Callable[..., list[tuple[tuple[int, ...], str]]]
    cases: tuple[Case, ...]
    pack: Callable[..., list[np.ndarray]] = _as_stored
    inplace: tuple[str, ...] = ()
    targets: tuple[TargetKind, ...] = TARGET_KINDS


@dataclass(frozen=True)
class TileConfig:
    """Base of the frozen tile tables. A subclass holds the numbers of one kernel."""

    def describe(self) -> str:
        return ",".join(f"{name}={value}" for name, value in asdict(self).items())


def parameter(name: str, shape: Sequence[Any], dtype: str) -> Any:
    """The next parameter of the PrimFunc in whose body this stands.

    For parameters that only some variants of a PrimFunc have: an `if` over Python values decides.
    Where all are always there, the signature lists them.
    """
    return T.arg(name, T.Buffer(shape, dtype))


def scheduled(
    func: tvm.tirx.PrimFunc, kernel: str, schedule: str, tile: TileConfig | None = None
) -> tvm.tirx.PrimFunc:
    """Mark a function as scheduled and say how; the pipeline refuses functions without the mark."""
    return func.with_attrs(
        {
            "tirx.noalias": True,
            "tirx.is_scheduled": True,
            "mxforge.kernel": kernel,
            "mxforge.schedule": schedule,
            "mxforge.tile": tile.describe() if tile else "",
        }
    )


@dataclass(frozen=True)
class GpuTile(TileConfig):
    """Threads of one block in the simple GPU schedule."""

    threads: int = 128


def bind_items(
    func: tvm.tirx.PrimFunc, kernel: str, block: str = "item", tile: GpuTile | None = None
) -> tvm.tirx.PrimFunc:
    """The simple GPU schedule: one thread computes one work item.

    Spreads the loops around the block named `block` (whose body is serial code) over blocks of
    `tile.threads` threads. Correct for every kernel and tuned for none. Devices take 65,535 blocks
    an axis and no more: the first loop, over tokens or pages, is an axis of its own wherever the
    others fill a block.
    """
    tile = tile or GpuTile()
    sch = tvm.s_tir.Schedule(func)
    first, *others = sch.get_loops(sch.get_sblock(block))
    sizes = [sch.get(loop).extent for loop in others]
    constant = all(isinstance(size, tvm.tirx.IntImm) for size in sizes)
    if others and constant and math.prod(int(size) for size in sizes) >= tile.threads:
        sch.bind(first, "blockIdx.y")
    else:
        others = [first, *others]
    outer, inner = sch.split(sch.fuse(*others), factors=[None, tile.threads])
    sch.bind(outer, "blockIdx.x")
    sch.bind(inner, "threadIdx.x")
    return scheduled(sch.mod["main"], kernel, "one thread an item", tile)


def parallel_items(
    func: tvm.tirx.PrimFunc, kernel: str, block: str = "item", tile: TileConfig | None = None
) -> tvm.tirx.PrimFunc:
    """The simple CPU schedule: work items in parallel, each item's own loops vectorized by hand.

    Work is split statically, so results do not depend on the number of threads.
    """
    sch = tvm.s_tir.Schedule(func)
    sch.parallel(sch.fuse(*sch.get_loops(sch.get_sblock(block))))
    return scheduled(sch.mod["main"], kernel, "parallel items", tile)


__all__ = [
    "TARGET_KINDS",
    "Case",
    "GpuTile",
    "Kernel",
    "T",
    "Target",
    "TargetKind",
    "TileConfig",
    "bind_items",
    "parallel_items",
    "parameter",
    "scheduled",
]
