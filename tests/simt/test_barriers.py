"""Every barrier of every kernel is needed: without it, some case fails."""

from __future__ import annotations

import re

import pytest
from support.kernels import compare, made_inputs
from support.simt.harness import Fault
from support.simt.kernels import KINDS, program_of, run_case, scheduled_for

from mxforge.schedules.kernel import Case, Kernel

BARRIER = {
    "cuda": re.compile(
        r"(?<=[;{}]\n)\s*(__sync(threads|warp)|tvm_builtin_cuda_(cta|warp)_sync)\([^;]*\);"
    ),
    "metal": re.compile(r"(?<=[;{}]\n)\s*(threadgroup|simdgroup)_barrier\([^;]*\);"),
}
# Barriers that nobody misses and that stay: (kernel, number of the barrier in the text) -> why.
ACCEPTED: dict[tuple[str, int], str] = {}
LARGE = 1 << 22  # bytes of a case that the others make unnecessary
FEW = 3  # cases by which barriers are counted: other sizes seldom have others

EVERY = [
    pytest.param(kind, kernel, id=f"{kind}, {kernel.name}")
    for kind in KINDS
    for kernel in scheduled_for(kind)
]


@pytest.mark.parametrize(("kind", "kernel"), EVERY)
def test_every_barrier_is_missed(simt, kind, kernel):
    _check(simt, kernel, kind, _cases(kernel)[:FEW])


@pytest.mark.full
@pytest.mark.parametrize(("kind", "kernel"), EVERY)
def test_every_barrier_of_every_size_is_missed(simt, kind, kernel):
    _check(simt, kernel, kind, _cases(kernel))


def _cases(kernel: Kernel) -> list[Case]:
    """Small ones first."""
    return sorted((case for case in kernel.cases if case.bytes < LARGE), key=lambda c: c.bytes)


def _check(simt, kernel: Kernel, kind: str, counted: list[Case]) -> None:
    count = max(len(_barriers(simt, kernel, kind, case)) for case in counted)
    unneeded = {number for number in range(count) if not _is_missed(simt, kernel, kind, number)}
    accepted = {number for name, number in ACCEPTED if name == kernel.name}
    assert unneeded == accepted, "take the barrier away, or accept it and say why"


def _barriers(simt, kernel: Kernel, kind: str, case: Case) -> list[re.Match[str]]:
    text = program_of(simt, kernel, kind, case).text
    return list(BARRIER[kind].finditer(text, text.rindex("main_kernel(")))


def _is_missed(simt, kernel: Kernel, kind: str, number: int) -> bool:
    """Whether some case fails without the barrier of this number."""
    for case in _cases(kernel):
        found = _barriers(simt, kernel, kind, case)
        if number >= len(found):
            continue

        def without(text: str, place: re.Match[str] = found[number]) -> str:
            return f"{text[: place.start()]};{text[place.end() :]}"

        try:
            results = run_case(simt, program_of(simt, kernel, kind, case, without), kernel, case)
            compare(kernel, case, made_inputs(case), results)
        except (Fault, AssertionError):
            return True
    return False
