"""Kernels of the registry in the harness."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import tvm
from support.kernels import call_of, made_inputs
from support.targets import CUDA, METAL

from mxforge.schedules.kernel import Case, Kernel, Schedule

from .harness import Order, Program, Simt

TARGETS = {"cuda": CUDA, "metal": METAL}


def is_metals(kind: str, kernel: Kernel, schedule: Schedule) -> bool:
    """Whether Metal has the same code, in its own words."""
    twin = schedule.name.removesuffix(", cuda") + ", metal"
    return kind == "cuda" and any(each.name == twin for each in kernel.schedules)


def of_blackwell(schedule: Schedule) -> bool:
    """Whether only sm_120a runs it."""
    return "sm_120a" in schedule.needs


def has_blackwells(kernel: Kernel) -> bool:
    """Whether a kernel has such schedules. The others are those of another format, whose kernels
    run in their place."""
    return any(map(of_blackwell, kernel.schedules))


def program_of(
    simt: Simt,
    kind: str,
    kernel: Kernel,
    case: Case,
    schedule: Schedule,
    edit: Callable[[str], str] | None = None,
) -> Program:
    """The kernel compiled for a case; `edit` changes the device's text."""
    return _compiled(simt, kernel.build(TARGETS[kind], schedule, **case.static), kind, edit)


@cache  # cases share most functions
def _compiled(
    simt: Simt, func: tvm.tirx.PrimFunc, kind: str, edit: Callable[[str], str] | None
) -> Program:
    return simt.compile(func, kind, edit)


def run_case(
    simt: Simt,
    program: Program,
    kernel: Kernel,
    case: Case,
    schedule: Schedule,
    order: Order = "random",
    *,
    counting: bool = False,
    without: int | None = None,
) -> list[np.ndarray]:
    """What `support.kernels.compare` takes; Fault where the kernel breaks a rule."""
    target = TARGETS[program.kind]
    call = call_of(kernel, target, made_inputs(case), case.static, schedule)
    arrays = simt.run(program, call.arrays, call.written, order, counting=counting, without=without)
    return call.results(arrays)
