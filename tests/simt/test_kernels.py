"""Every kernel of the registry: each case of its CUDA and Metal code against the reference."""

from __future__ import annotations

from typing import Any

import pytest
from support.kernels import compare, made_inputs, parameters
from support.simt.kernels import (
    TARGETS,
    has_blackwells,
    is_metals,
    of_blackwell,
    program_of,
    run_case,
)
from support.targets import BLACKWELL

from mxforge.compile.cuda import features
from mxforge.compile.targets import gpu_target
from mxforge.schedules.gpu.items import ONE_THREAD
from mxforge.schedules.kernel import Case, Kernel, Schedule

QUICK, QUICK_FLOPS = 1 << 20, 1e8  # of a case
# What a large case may take of memory: its passes, by the fewest for its bytes (docs/simt.md).
MOST = {"global read": 1.1, "shared read": 1.05, "shared write": 1.05}


def slow(case: Case) -> bool:
    return case.bytes > QUICK or case.flops > QUICK_FLOPS


def every_kind(**options: bool) -> list[Any]:
    return [
        run
        for kind, target in TARGETS.items()
        for run in parameters(target, kind, slow=slow, **options)
        if not has_blackwells(run.values[1])
    ] + [
        run
        for run in parameters(BLACKWELL, "cuda", slow=slow, **options)
        if of_blackwell(run.values[3])
    ]


# What GPUs before Hopper run in place of its schedules: of few tokens, code that these have too, as
# Metal has that of those without tensor cores of their own.
BEFORE_HOPPER = gpu_target("cuda", *features("sm_90"))
MANY_TOKENS = {
    "150 tokens, steps not full", "600 tokens, 128 experts", "large, 200 tokens",
    "200 tokens, partial rows, half a step", "large, 130 tokens", "140 tokens, heads of 16",
}  # fmt: skip


# Experts whose inputs have formats that only CUDA multiplies: what differs is the product of many
# tokens, and their other cases run with --full.
OF_CUDAS_FORMATS = ("mxfp4w_bf16_", "mxfp4w_mxfp8_")


def marks_before_hopper(kernel: Kernel, case: Case, schedule: Schedule) -> Any:
    """None where a schedule is not of that kind. Few of many tokens run, others with --full."""
    if schedule is kernel.choose(TARGETS["cuda"], **case.static) or of_blackwell(schedule):
        return None
    if schedule is not kernel.choose(BEFORE_HOPPER, **case.static):
        return None
    if case.name not in MANY_TOKENS:
        return [pytest.mark.full]
    return [pytest.mark.slow] if slow(case) else []


def by_turns() -> list[Any]:
    """Every run. Of a quick case in two languages, one by turns waits for --slow."""
    quick = [run for run in every_kind() if not run.marks]
    kinds: dict[tuple[str, str], list[str]] = {}
    for run in quick:
        kind, kernel, case, _ = run.values
        kinds.setdefault((kernel.name, case.name), []).append(kind)
    waiting = {(*case, of[i % 2]) for i, (case, of) in enumerate(kinds.items()) if len(of) > 1}

    def marks(kind: str, kernel: Kernel, case: Case, schedule: Schedule, given: Any) -> Any:
        before = marks_before_hopper(kernel, case, schedule) if kind == "cuda" else None
        if before is not None:
            return before
        if kernel.name.startswith(OF_CUDAS_FORMATS) and case.name not in MANY_TOKENS:
            return [pytest.mark.full]
        taken = schedule is kernel.choose(TARGETS[kind], **case.static)
        if is_metals(kind, kernel, schedule) and not taken and case.name not in MANY_TOKENS:
            return [pytest.mark.full]
        return [pytest.mark.slow] if (kernel.name, case.name, kind) in waiting else given

    return [
        pytest.param(*run.values, id=run.id, marks=marks(*run.values, run.marks))
        for run in every_kind()
    ]


@pytest.mark.parametrize(("kind", "kernel", "case", "schedule"), by_turns())
def test_agrees_with_reference(simt, kind, kernel, case, schedule):
    large = case.bytes > QUICK and schedule.name != ONE_THREAD
    program = program_of(simt, kind, kernel, case, schedule)
    results = run_case(simt, program, kernel, case, schedule, counting=large)
    compare(kernel, case, made_inputs(case), results)
    if large:
        costs = {what: simt.costs()[what] for what in MOST}
        taken = {what: cost.passes / cost.ideal for what, cost in costs.items() if cost.ideal}
        assert not [what for what, passes in taken.items() if passes > MOST[what]], taken


OTHERS = ("forward", "reverse")


def in_other_orders() -> list[Any]:
    """Each everyday run in one of the other orders by turns, and with --full in the other too."""
    return [
        pytest.param(
            order, *run.values, id=f"{order}, {run.id}",
            marks=(*run.marks, pytest.mark.slow if (i + j) % 2 else pytest.mark.full),
        )
        for i, run in enumerate(every_kind(everyday=True))
        for j, order in enumerate(OTHERS)
    ]  # fmt: skip


@pytest.mark.parametrize(("order", "kind", "kernel", "case", "schedule"), in_other_orders())
def test_agrees_with_reference_in_other_orders_of_threads(
    simt, order, kind, kernel, case, schedule
):
    program = program_of(simt, kind, kernel, case, schedule)
    results = run_case(simt, program, kernel, case, schedule, order)
    compare(kernel, case, made_inputs(case), results)
