"""Kernels of the registry in the harness."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import tvm
from support.kernels import call_of, made_inputs

from mxforge.schedules import KERNELS
from mxforge.schedules.kernel import Case, Kernel, Target

from .harness import Order, Program, Simt

KINDS = ("cuda", "metal")


def scheduled_for(kind: str) -> list[Kernel]:
    """The kernels that have a schedule for cuda or metal."""
    return [kernel for kernel in KERNELS.values() if kind in kernel.targets]


def program_of(
    simt: Simt, kernel: Kernel, kind: str, case: Case, edit: Callable[[str], str] | None = None
) -> Program:
    """The kernel compiled for a case; `edit` changes the device's text."""
    func = kernel.build(Target(kind), **case.static)
    return simt.compile(func, kind, edit) if edit else _unedited(simt, func, kind)


@cache  # cases share most functions
def _unedited(simt: Simt, func: tvm.tirx.PrimFunc, kind: str) -> Program:
    return simt.compile(func, kind)


def run_case(
    simt: Simt,
    program: Program,
    kernel: Kernel,
    case: Case,
    order: Order = "random",
    *,
    counting: bool = False,
) -> list[np.ndarray]:
    """What `support.kernels.compare` takes; Fault where the kernel breaks a rule."""
    call = call_of(kernel, Target(program.kind), made_inputs(case), case.static)
    arrays = simt.run(program, call.arrays, call.written, order, counting=counting)
    return call.results(arrays)
