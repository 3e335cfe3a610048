"""Every kernel of the registry: each case of its CUDA and Metal code against the reference."""

from __future__ import annotations

import pytest
from support.kernels import compare, made_inputs
from support.simt.kernels import KINDS, program_of, run_case, scheduled_for

CASES = [
    pytest.param(kind, kernel, case, id=f"{kind}, {kernel.name}: {case.name}")
    for kind in KINDS
    for kernel in scheduled_for(kind)
    for case in kernel.cases
]


@pytest.mark.parametrize(("kind", "kernel", "case"), CASES)
def test_agrees_with_reference(simt, kind, kernel, case):
    results = run_case(simt, program_of(simt, kernel, kind, case), kernel, case)
    compare(kernel, case, made_inputs(case), results)


@pytest.mark.full
@pytest.mark.parametrize("order", ["forward", "reverse"])
@pytest.mark.parametrize(("kind", "kernel", "case"), CASES)
def test_agrees_with_reference_in_other_orders_of_threads(simt, kind, kernel, case, order):
    results = run_case(simt, program_of(simt, kernel, kind, case), kernel, case, order)
    compare(kernel, case, made_inputs(case), results)
