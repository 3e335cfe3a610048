"""Matrix-vector kernels: what their memory accesses cost, and how they read their weights."""

from __future__ import annotations

import re

import pytest
from support.simt.kernels import TARGETS, program_of, run_case

from mxforge.schedules import KERNELS

# Sectors, and passes over the banks, divided by the fewest.
SECTORS, BANKS = 1.1, 1.05


def one_token(name, kind):
    """The kernel, a case of several steps, and its schedule for the family."""
    kernel = KERNELS[name]
    case = next(case for case in kernel.cases if "20b" in case.name)
    fitting = kernel.schedules_for(TARGETS[kind], **case.static)
    (schedule,) = (s for s in fitting if s.name.startswith("rows a block"))
    return kernel, case, schedule


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("name", ["bf16w_norm_qkv_insert", "i8w_norm_qkv_insert"])
def test_sectors_and_banks(simt, kind, name):
    kernel, case, schedule = one_token(name, kind)
    program = program_of(simt, kind, kernel, case, schedule)
    run_case(simt, program, kernel, case, schedule, counting=True)
    costs = simt.costs()
    assert costs["global read"].passes <= SECTORS * costs["global read"].ideal
    for what in ("shared read", "shared write"):
        assert costs[what].passes <= BANKS * costs[what].ideal


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("name", ["bf16w_linear", "i8w_linear", "bf16w_norm_qkv_insert"])
def test_weights_are_loaded_16_bytes_at_once(simt, kind, name):
    text = program_of(simt, kind, *one_token(name, kind)).text
    loads = re.findall(r"\*\((?:device )?(\w+)\*\)\(\(\((?:device )?\w+\*\)weight_ptr\)", text)
    assert set(loads) == {"uint4"}
    assert len(loads) == text.count("weight_ptr)")  # and there are no others
