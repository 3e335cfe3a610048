"""Every barrier of every kernel is needed: without it, some case fails."""

from __future__ import annotations

import re

import pytest
from support.kernels import compare, made_inputs
from support.simt.harness import Fault
from support.simt.kernels import TARGETS, program_of, run_case

from mxforge.schedules import KERNELS
from mxforge.schedules.kernel import Case, Kernel, Schedule

BARRIER = {
    "cuda": re.compile(r"(?<=[;{}]\n)\s*(__syncthreads|tvm_builtin_cuda_cta_sync)\(\);"),
    "metal": re.compile(r"(?<=[;{}]\n)\s*threadgroup_barrier\([^;]*\);"),
}
# Barriers that nobody misses and that stay: (kernel, schedule, number in the text) -> why.
ACCEPTED: dict[tuple[str, str, int], str] = {}
LARGE = 1 << 22  # bytes of a case that the others make unnecessary

SCHEDULES = [
    pytest.param(kind, kernel, schedule, id=f"{kind}, {kernel.name} ({schedule.name})")
    for kind, target in TARGETS.items()
    for kernel in KERNELS.values()
    for schedule in kernel.schedules
    if schedule.needs <= target.features
]


@pytest.mark.parametrize(("kind", "kernel", "schedule"), SCHEDULES)
def test_every_barrier_is_missed(simt, kind, kernel, schedule):
    cases = sorted(
        (c for c in kernel.cases if c.bytes < LARGE and schedule.fits(**c.static)),
        key=lambda case: case.bytes,
    )

    def is_missed(number: int) -> bool:
        """Whether a case fails without the barrier of this number."""
        for case in cases:
            found = _barriers(program_of(simt, kind, kernel, case, schedule).text, kind)
            if number < len(found) and not _holds(
                simt, kernel, kind, case, schedule, found[number]
            ):
                return True
        return False

    count = max(
        len(_barriers(program_of(simt, kind, kernel, case, schedule).text, kind)) for case in cases
    )
    unneeded = {number for number in range(count) if not is_missed(number)}
    accepted = {n for *of, n in ACCEPTED if of == [kernel.name, schedule.name]}
    assert unneeded == accepted, "take the barrier away, or accept it and say why"


def _barriers(text: str, kind: str) -> list[re.Match[str]]:
    return list(BARRIER[kind].finditer(text, text.rindex("main_kernel(")))


def _holds(
    simt, kernel: Kernel, kind: str, case: Case, schedule: Schedule, barrier: re.Match[str]
) -> bool:
    """Whether a case stays right without a barrier."""

    def without(text: str) -> str:
        return f"{text[: barrier.start()]};{text[barrier.end() :]}"

    try:
        program = program_of(simt, kind, kernel, case, schedule, without)
        results = run_case(simt, program, kernel, case, schedule)
        compare(kernel, case, made_inputs(case), results)
    except (Fault, AssertionError):
        return False
    return True
