"""The kernel of a format that the compiler does not have; the rest is in tests/compile."""

from __future__ import annotations

import pytest
from support.kernels import compare, made_inputs
from support.toy_format import KERNEL


@pytest.mark.parametrize("case", KERNEL.cases, ids=lambda case: case.name)
def test_it_agrees_with_its_reference(harness, case):
    inputs = made_inputs(case)
    compare(KERNEL, case, inputs, harness.run(KERNEL, inputs, case.static))
