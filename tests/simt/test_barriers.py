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
    "cuda": re.compile(
        r"(?<=[;{}]\n)\s*(__sync(threads|warp)|tvm_builtin_cuda_(cta|warp)_sync)\([^;]*\);"
    ),
    "metal": re.compile(r"(?<=[;{}]\n)\s*(threadgroup|simdgroup)_barrier\([^;]*\);"),
}
# Barriers that nobody misses and that stay: (cuda or metal, kernel, schedule, number in the text)
# -> why.
ACCEPTED: dict[tuple[str, str, str, int], str] = {
    (
        "cuda", kernel, f"rows of heads of {head} as a matrix, tokens as its columns", number,
    ): "of the launch for many tokens, in a case of one; in cases of many it has another number"
    for kernel, head, numbers in (
        ("bf16w_norm_qkv_insert", 32, (14, 15)),
        ("i8w_norm_qkv_insert", 16, (11, 12, 13)),
        ("i8w_norm_qkv_insert", 32, (11, 12, 13)),
    )
    for number in numbers
}  # fmt: skip
LARGE = 1 << 22  # bytes of a case that the others make unnecessary
FEW = 3  # cases by which barriers are counted: other sizes seldom have others

SCHEDULES = [
    pytest.param(kind, kernel, schedule, id=f"{kind}, {kernel.name} ({schedule.name})")
    for kind, target in TARGETS.items()
    for kernel in KERNELS.values()
    for schedule in kernel.schedules
    if schedule.needs <= target.features
]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "kernel", "schedule"), SCHEDULES)
def test_every_barrier_is_missed(simt, kind, kernel, schedule):
    _check(simt, kind, kernel, schedule, _cases(kernel, schedule)[:FEW])


@pytest.mark.full
@pytest.mark.parametrize(("kind", "kernel", "schedule"), SCHEDULES)
def test_every_barrier_of_every_size_is_missed(simt, kind, kernel, schedule):
    _check(simt, kind, kernel, schedule, _cases(kernel, schedule))


def _cases(kernel: Kernel, schedule: Schedule) -> list[Case]:
    """Small ones first."""
    fitting = [c for c in kernel.cases if c.bytes < LARGE and schedule.fits(**c.static)]
    return sorted(fitting, key=lambda case: case.bytes)


def _check(simt, kind: str, kernel: Kernel, schedule: Schedule, counted: list[Case]) -> None:
    def barriers(case: Case) -> list[re.Match[str]]:
        text = program_of(simt, kind, kernel, case, schedule).text
        return list(BARRIER[kind].finditer(text, text.index("main_kernel")))  # or several

    def is_missed(number: int) -> bool:
        """Whether some case fails without the barrier of this number."""
        for case in _cases(kernel, schedule):
            found = barriers(case)
            if number < len(found) and fails_without(found[number], case):
                return True
        return False

    def fails_without(barrier: re.Match[str], case: Case) -> bool:
        def without(text: str) -> str:
            return f"{text[: barrier.start()]};{text[barrier.end() :]}"

        try:
            program = program_of(simt, kind, kernel, case, schedule, without)
            results = run_case(simt, program, kernel, case, schedule)
            compare(kernel, case, made_inputs(case), results)
        except (Fault, AssertionError):
            return True
        return False

    count = max(len(barriers(case)) for case in counted)
    unneeded = {number for number in range(count) if not is_missed(number)}
    accepted = {n for *of, n in ACCEPTED if of == [kind, kernel.name, schedule.name]}
    assert unneeded == accepted, "take the barrier away, or accept it and say why"
