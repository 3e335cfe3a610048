"""Every barrier of every kernel is needed, and every wait of Hopper's: without it, some case
fails."""

from __future__ import annotations

import itertools
import re
from functools import partial

import pytest
from support.kernels import compare, made_inputs
from support.simt.harness import Fault, Program
from support.simt.kernels import (
    TARGETS,
    has_blackwells,
    is_metals,
    of_blackwell,
    program_of,
    run_case,
)

from mxforge.schedules import KERNELS
from mxforge.schedules.kernel import Case, Kernel, Schedule

BARRIER = {
    "cuda": re.compile(
        r"(?<=[;{}]\n)\s*(__sync(threads|warp)|tvm_builtin_cuda_(cta|warp)_sync"
        r"|mx_(wait_for_arrival|begin_products|end_group|wait_groups_\d))\([^;]*\);"
    ),
    "metal": re.compile(r"(?<=[;{}]\n)\s*(threadgroup|simdgroup)_barrier\([^;]*\);"),
}
# Barriers that nobody misses and that stay: (a feature that the schedule needs, kernel, device
# function, which of its barriers) -> why.
ACCEPTED = {
    (arch, kernel, "main_kernel_4", number): "only cases of many rows and tokens take this "
    "product; they are large, and main_kernel_3 is the same with smaller tiles"
    for arch in ("sm_80", "sm_90a")
    for kernel in ("bf16w_linear", "i8w_linear", "bf16w_norm_qkv_insert", "i8w_norm_qkv_insert")
    for number in range(15)  # those of Hopper's, of which others have the first
} | {
    ("sm_90a", kernel, "main_kernel_4", number): "the product is gate_up's, whose cases have more "
    "steps of inputs and miss it"
    for kernel in ("mxfp4w_moe_down", "mxfp4w_bf16_moe_down")
    for number in (6, 7)
}  # fmt: skip
# Kernels that the code of another one builds, for inputs in another format: they have its barriers
# (`test_the_same_barriers`), and miss them again with --full only.
LIKE = {
    "mxfp4w_bf16_moe_gate_up_swiglu": "mxfp4w_moe_gate_up_swiglu",
    "mxfp4w_bf16_moe_down": "mxfp4w_moe_down",
}
LARGE = 1 << 22  # bytes of a case that the others make unnecessary
FEW = 3  # cases by which barriers are counted: other sizes seldom have others

SCHEDULES = [
    pytest.param(kind, kernel, schedule, id=f"{kind}, {kernel.name} ({schedule.name})")
    for kind, target in TARGETS.items()
    for kernel in KERNELS.values()
    for schedule in kernel.schedules
    if schedule.needs <= target.features and not has_blackwells(kernel)
] + [
    pytest.param("cuda", kernel, schedule, id=f"cuda, {kernel.name} ({schedule.name})")
    for kernel in KERNELS.values()
    for schedule in kernel.schedules
    if of_blackwell(schedule)
]

OF_THEIR_OWN = [
    one for one in SCHEDULES if one.values[1].name not in LIKE and not is_metals(*one.values)
]
ALIKE = [one for one in SCHEDULES if one.values[1].name in LIKE]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "kernel", "schedule"), ALIKE)
def test_the_same_barriers(simt, kind, kernel, schedule):
    other = KERNELS[LIKE[kernel.name]]
    (its,) = (one for one in other.schedules if one.name == schedule.name)
    case = _cases(kernel, schedule)[0]
    names, others = (
        _names(program_of(simt, kind, one, case, by, NUMBERED[kind]).text)
        for one, by in ((kernel, schedule), (other, its))
    )
    assert names
    assert names == others


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "kernel", "schedule"), OF_THEIR_OWN)
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


def _from_both_ends(cases: list[Case]) -> list[Case]:
    """The first, the last, the second and so on: some functions are for few tokens alone."""
    order = [case for pair in zip(cases, reversed(cases), strict=True) for case in pair]
    return order[: len(cases)]


def _numbered(kind: str, text: str) -> str:
    """The text whose barriers can be left out one by one."""
    begin = text.index("main_kernel")  # or several
    numbers = itertools.count()

    def number(barrier: re.Match[str]) -> str:
        return f"if (simt::stays({next(numbers)})) {barrier[0]}"

    return text[:begin] + BARRIER[kind].sub(number, text[begin:])


# One object each, by which programs are kept.
NUMBERED = {kind: partial(_numbered, kind) for kind in BARRIER}


_NAMED = re.compile(r"\b(main_kernel\w*)\(|simt::stays\((\d+)\)")


def _names(text: str) -> dict[tuple[str, int], int]:
    """(device function, which of its barriers) -> the barrier's number."""
    names: dict[tuple[str, int], int] = {}
    function, count = "", 0
    for begins, number in _NAMED.findall(text):
        if begins:
            function, count = begins, 0
        else:
            names[function, count] = int(number)
            count += 1
    return names


_BEGIN = re.compile(r"^(?=extern \"C\" __global__ [^;{]*\{|// Function: )", re.M)


def _functions(text: str) -> set[str]:
    """The texts of device functions, without numbers of barriers."""
    _, *functions = _BEGIN.split(re.sub(r"stays\(\d+\)", "stays", text))
    return set(functions)


def _names_of_its_own(
    text: str, others: str = "", instruction: str = ""
) -> dict[tuple[str, int], int]:
    """`_names`, but those of functions that another text has too, or that lack an instruction."""
    own = "".join(one for one in _functions(text) - _functions(others) if instruction in one)
    return {name: number for name, number in _names(text).items() if f" {name[0]}(" in own}


def _check(simt, kind: str, kernel: Kernel, schedule: Schedule, counted: list[Case]) -> None:
    def numbered(case: Case) -> Program:
        return program_of(simt, kind, kernel, case, schedule, NUMBERED[kind])

    cases = _from_both_ends(_cases(kernel, schedule))
    useful: dict[str, list[Case]] = {}  # by device function: those that missed one of its barriers

    def is_missed(name: tuple[str, int]) -> bool:
        """Whether some case fails without the barrier."""
        known = useful.setdefault(name[0], [])
        for case in (*known, *(case for case in cases if case not in known)):
            number = _names(numbered(case).text).get(name)
            if number is not None and fails_without(number, case):
                if case not in known:
                    known.append(case)
                return True
        return False

    def fails_without(number: int, case: Case) -> bool:
        try:
            results = run_case(simt, numbered(case), kernel, case, schedule, without=number)
            compare(kernel, case, made_inputs(case), results)
        except (Fault, AssertionError):
            return True
        return False

    def names_of(case: Case) -> dict[tuple[str, int], int]:
        if of_blackwell(schedule):  # its other functions are another format's
            return _names_of_its_own(numbered(case).text, instruction="mx_mma_scaled")
        best = kernel.choose(TARGETS[kind], **case.static)
        if best is schedule:
            return _names(numbered(case).text)
        others = program_of(simt, kind, kernel, case, best, NUMBERED[kind])
        return _names_of_its_own(numbered(case).text, others.text)

    names = {name for case in counted for name in names_of(case)}
    unneeded = {name for name in names if not is_missed(name)}
    accepted = {
        name
        for name in names
        if any((feature, kernel.name, *name) in ACCEPTED for feature in schedule.needs)
    }
    assert unneeded == accepted, "take the barrier away, or accept it and say why"
