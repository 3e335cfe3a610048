"""The compiler: one ordered list of named phases from the model's module to machine code.

Every phase is a list of passes. After each phase the IR is checked for well-formedness and, on
request, written to `<dump>/<number>-<phase>.py`. No primitive function reaches code generation
without a schedule: `check_scheduled` names the one that would.
"""

from __future__ import annotations

import contextlib
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


@tvm.transform.module_pass(opt_level=0, name="SortShapeStores")
def sort_shape_stores(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    """Put the stores of VMShapeLower's shape functions in the order of their slots.

    They come out of a hash table keyed by addresses, and would give other bytes at every run.
    Each computes one slot from slots that hold sizes of arguments, so their order is free.
    """
    changed = {}
    for var, function in module.functions.items():
        if not _is_shape_function(function) or not isinstance(function.body, tvm.tirx.SeqStmt):
            continue
        stores = sorted(function.body.seq, key=lambda store: int(store.indices[0]))
        changed[var] = function.with_body(tvm.tirx.SeqStmt(stores))
    for var, function in changed.items():
        module.update_func(var, function)
    return module


def _is_shape_function(function: tvm.ir.BaseFunc) -> bool:
    return isinstance(function, tvm.tirx.PrimFunc) and "tirx.is_host_func" in (function.attrs or {})


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
    # Down to what the Relax virtual machine executes.
    Phase(
        "virtual-machine",
        lambda _target: [
            relax.transform.LowerAllocTensor(),
            relax.transform.KillAfterLastUse(),
            relax.transform.LowerRuntimeBuiltin(),
            relax.transform.ComputePrimValue(),
            relax.transform.VMShapeLower(),
            sort_shape_stores,
            relax.transform.AttachGlobalSymbol(),
        ],
    ),
    # How kernels are launched.
    Phase("launches", lambda target: [overlap_launches] if overlaps(target) else []),
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
                _dump(dump / f"{number}-{phase.name}.py", module.script())
            check_scheduled(module)
    return module


def build(
    module: tvm.IRModule, target: CompileTarget, dump: Path | None = None
) -> relax.VMExecutable:
    """Machine code of a lowered module: TVM's standard lowering, then its code generator."""
    with cuda.overlapping() if overlaps(target) else contextlib.nullcontext():
        executable = relax.build(
            module, tvm.target.Target(target.tvm), relax_pipeline=None, tir_pipeline="default"
        )
    if dump is not None:
        _dump(dump / "vm.txt", executable.as_text())
        for index, device_code in enumerate(executable.mod.imports):
            for sub in (device_code, *device_code.imports):
                text = _source(sub)
                if text:
                    _dump(dump / f"code-{index}-{sub.kind}.txt", text)
    return executable


def overlaps(target: CompileTarget) -> bool:
    """Whether launches may overlap: on GPUs of NVIDIA's, where all that code is for can do it."""
    return bool(target.archs) and all(map(cuda.overlaps, target.archs))


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
    if _is_shape_function(function):  # scalar arithmetic, nothing to schedule
        return True
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


_ALLOCATE = ("relax.memory.alloc_storage", "relax.vm.alloc_storage")


def workspace_bytes(module: tvm.IRModule) -> int:
    """Largest planned storage of any one function, in bytes; dynamic outputs come on top."""
    largest = 0
    for _, function in module.functions.items():
        if isinstance(function, relax.Function):
            largest = max(largest, _planned(function))
    return largest


def _planned(function: relax.Function) -> int:
    sizes = []

    def visit(node: relax.Expr) -> None:
        if isinstance(node, relax.Call) and getattr(node.op, "name", "") in _ALLOCATE:
            size = node.args[0]
            if isinstance(size, relax.ShapeExpr) and all(
                isinstance(extent, tvm.tirx.IntImm) for extent in size.values
            ):
                sizes.append(int(size.values[0]))

    relax.analysis.post_order_visit(function, visit)
    return sum(sizes)


def _dump(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        # Without its cause: ArtifactWriter would take a full disk for that of the artifact.
        raise OutputError(
            f"--debug-dump needs a folder to write into, but {error.filename or path} cannot be "
            f"written ({error.strerror or error}); name another folder, or leave --debug-dump out."
        ) from None


def _source(module: tvm.runtime.Module) -> str:
    try:
        return str(module.inspect_source())
    except (RuntimeError, AttributeError, tvm.TVMError):
        return ""  # modules without a textual form
