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


def program_of(
    simt: Simt,
    kind: str,
    kernel: Kernel,
    case: Case,
    schedule: Schedule,
    edit: Callable[[str], str] | None = None,
) -> Program:
    """The kernel compiled for a case; `edit` changes the device's text."""
    func = kernel.build(TARGETS[kind], schedule, **case.static)
    return simt.compile(func, kind, edit) if edit else _unedited(simt, func, kind)


@cache  # cases share most functions
def _unedited(simt: Simt, func: tvm.tirx.PrimFunc, kind: str) -> Program:
    return simt.compile(func, kind)


def run_case(
    simt: Simt,
    program: Program,
    kernel: Kernel,
    case: Case,
    schedule: Schedule,
    order: Order = "random",
    *,
    counting: bool = False,
) -> list[np.ndarray]:
    """What `support.kernels.compare` takes; Fault where the kernel breaks a rule."""
    target = TARGETS[program.kind]
    call = call_of(kernel, target, made_inputs(case), case.static, schedule)
    arrays = simt.run(program, call.arrays, call.written, order, counting=counting)
    return call.results(arrays)
