"""The compiler: one ordered list of named phases from the model's module to machine code.

Every phase is a list of passes. After each phase the IR is checked for well-formedness and, on
request, written to `<dump>/<number>-<phase>.py`. No primitive function reaches code generation
without a schedule: `check_scheduled` names the one that would.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm
from tvm import relax

from mxforge.errors import OutputError, UnscheduledError
from mxforge.manifest import KernelInfo

from . import cuda
from .targets import CompileTarget


@dataclass(frozen=True)
class Phase:
    """A named step; `passes` makes the TVM passes that it runs for a target, in order."""

    name: str
    passes: Callable[[CompileTarget], list[Any]]


@tvm.transform.module_pass(opt_level=0, name="OverlapLaunches")
def overlap_launches(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    """Have every kernel launched before the one before it has ended; see `cuda.with_overlap`."""
    for var, function in dict(module.functions).items():
        if "mxforge.kernel" in (function.attrs or {}):
            module.update_func(var, function.with_attr(cuda.LAUNCH, [cuda.OVERLAP]))
    return module


PHASES: tuple[Phase, ...] = (
    # The model as written: calls of scheduled kernels on tensors with symbolic shapes.
    Phase("model", lambda _target: []),
    # Kernels that no function calls, and values that nobody reads.
    Phase("dead-code", lambda _target: [relax.transform.DeadCodeElimination()]),
    # Calls in destination-passing style: every output becomes an allocation and an argument.
    Phase(
        "destination-passing",
        lambda _target: [
            relax.transform.ToNonDataflow(),
            relax.transform.RemovePurityChecking(),
            relax.transform.CallTIRRewrite(),
        ],
    ),
    # One plan for all intermediate tensors, from the upper bounds of the symbolic sizes.
    Phase("memory-plan", lambda _target: [relax.transform.StaticPlanBlockMemory()]),
    # How kernels are launched.
    Phase("launches", lambda target: [overlap_launches] if cuda.all_overlap(target.archs) else []),
)


def lower(
    module: tvm.IRModule,
    target: CompileTarget,
    dump: Path | None = None,
    announce: Callable[[str], None] = lambda phase: None,
) -> tvm.IRModule:
    """Run every phase on `module`; UnscheduledError where a kernel lacks a schedule."""
    with tvm.target.Target(target.tvm):
        for number, phase in enumerate(PHASES):
            announce(phase.name)
            for step in phase.passes(target):
                module = step(module)
            relax.analysis.well_formed(module)  # raises, naming the function
            if dump is not None:
                write_dump(dump / f"{number}-{phase.name}.py", module.script())
            check_scheduled(module)
    return module


def check_scheduled(module: tvm.IRModule) -> None:
    """Raise UnscheduledError naming every primitive function without a schedule."""
    names = [
        var.name_hint
        for var, function in module.functions.items()
        if isinstance(function, tvm.tirx.PrimFunc) and not _has_schedule(function)
    ]
    if names:
        raise UnscheduledError(
            f"Every primitive function needs a schedule, but {', '.join(sorted(names))} "
            "has none; add one to the kernel's module in schedules/."
        )


def _has_schedule(function: tvm.tirx.PrimFunc) -> bool:
    attributes = function.attrs or {}
    return bool(attributes.get("tirx.is_scheduled", False)) and "mxforge.kernel" in attributes


def kernel_table(module: tvm.IRModule, target: CompileTarget) -> tuple[KernelInfo, ...]:
    """How every kernel was scheduled, by kernel name, and which functions of the library it is."""
    table: dict[tuple[str, str, str], list[str]] = {}
    for var, function in module.functions.items():
        attributes = function.attrs or {}
        if "mxforge.kernel" in attributes:
            name, schedule, tile = (
                str(attributes[f"mxforge.{key}"]) for key in ("kernel", "schedule", "tile")
            )
            entry = (name, schedule, tile)
            table.setdefault(entry, []).append(var.name_hint)
    return tuple(
        KernelInfo(name, target.name, schedule, tile, tuple(sorted(functions)))
        for (name, schedule, tile), functions in sorted(table.items())
    )


def write_dump(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        # Without its cause: ArtifactWriter would take a full disk for that of the artifact.
        raise OutputError(
            f"--debug-dump needs a folder to write into, but {error.filename or path} cannot be "
            f"written ({error.strerror or error}); name another folder, or leave --debug-dump out."
        ) from None
