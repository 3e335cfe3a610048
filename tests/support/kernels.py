"""One case of a kernel on one target: what is passed to it, and what must come back.

Tests of all targets compare by these: of CPU levels, of aarch64 under qemu, of Vulkan devices, and
of CUDA and Metal text that runs on the CPU.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from mxforge.schedules import KERNELS
from mxforge.schedules.kernel import Case, Kernel, Schedule, Target

from .agreement import check


@dataclass(frozen=True)
class Call:
    """Arguments in the PrimFunc's order, and which of them it writes: the fresh outputs, then the
    inputs that it updates, then its scratch. Outputs and scratch hold nothing that could pass for a
    result."""

    arrays: list[np.ndarray]
    outputs: tuple[int, ...]
    updated: tuple[int, ...]
    scratch: tuple[int, ...]

    @property
    def written(self) -> tuple[int, ...]:
        return (*self.outputs, *self.updated, *self.scratch)

    def results(self, arrays: Sequence[Any]) -> list[Any]:
        """What the reference returns too, out of all arguments after the call."""
        return [arrays[index] for index in (*self.outputs, *self.updated)]


def runs(target: Target) -> list[tuple[Kernel, Case, Schedule]]:
    """Every kernel and case with every schedule that fits the target, best first."""
    return [
        (kernel, case, schedule)
        for kernel in KERNELS.values()
        for case in kernel.cases
        for schedule in kernel.schedules_for(target, **case.static)
    ]


def parameters(
    target: Target,
    *first: str,
    slow: Callable[[Case], bool] = lambda _case: False,
    everyday: bool = False,
) -> list[Any]:
    """`runs` as parameters of a test, behind the `first`.

    Every day run the best schedule of each case, and cases that are not `slow`. What is neither
    runs with --full, what is one of both where slow tests run; or never where only those of
    `everyday` are wanted.
    """
    taken: set[tuple[str, str]] = set()
    found = []
    for kernel, case, schedule in runs(target):
        reasons = ((kernel.name, case.name) in taken) + slow(case)
        taken.add((kernel.name, case.name))
        if not reasons or not everyday:
            name = ", ".join([*first, run_name(kernel, case, schedule)])
            marks = ((), (pytest.mark.slow,), (pytest.mark.full,))[reasons]
            found.append(pytest.param(*first, kernel, case, schedule, id=name, marks=marks))
    return found


def run_name(kernel: Kernel, case: Case, schedule: Schedule) -> str:
    """What a test of a run is called."""
    return f"{kernel.name}: {case.name} ({schedule.name})"


def call_of(
    kernel: Kernel,
    target: Target,
    inputs: Mapping[str, np.ndarray],
    static: Mapping[str, Any],
    schedule: Schedule | None = None,
) -> Call:
    """A call, of the best schedule or of the one given, on inputs as stored, which stay so."""
    copied = {name: array.copy() for name, array in inputs.items()}
    schedule = schedule or kernel.choose(target, **static)
    packed = kernel.pack(target, copied, schedule, **static)
    outputs = [_unset(shape, dtype) for shape, dtype in kernel.outputs(inputs, **static)]
    scratch = [_unset(shape, dtype) for shape, dtype in kernel.scratch(inputs, schedule, **static)]
    names, updated = list(packed), kernel.signature(**static).updated
    end = len(packed) + len(outputs)
    return Call(
        [*packed.values(), *outputs, *scratch],
        outputs=tuple(range(len(packed), end)),
        updated=tuple(map(names.index, updated)),
        scratch=tuple(range(end, end + len(scratch))),
    )


def made_inputs(case: Case) -> dict[str, np.ndarray]:
    """The same inputs whichever test asks, and in whatever order."""
    return case.inputs(np.random.default_rng(zlib.crc32(case.name.encode())))


def compare(
    kernel: Kernel, case: Case, inputs: Mapping[str, np.ndarray], results: Sequence[np.ndarray]
) -> None:
    """AssertionError where results differ from the reference's by more than the case tolerates."""
    expected = kernel.reference(
        **{name: value.copy() for name, value in inputs.items()}, **case.static
    )
    assert len(results) == len(expected)
    for index, (ours, reference) in enumerate(zip(results, expected, strict=True)):
        check(ours, reference, case.tolerance, f"output {index}")


def _unset(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    array = np.empty(shape, dtype)
    array.view(np.uint8)[...] = 0xFF  # NaN, or -1
    return array
