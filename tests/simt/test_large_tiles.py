"""CUDA's large tiles of many tokens, without the many rows that they are for."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.kernels import compare, made_inputs
from support.simt.kernels import program_of, run_case

from mxforge.compile.cuda import features
from mxforge.compile.targets import gpu_target
from mxforge.schedules import KERNELS
from mxforge.schedules.cuda.dense import DenseTile


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_a_scale_of_a_head_that_two_warps_share(simt, arch):
    kernel = KERNELS["bf16w_norm_qkv_insert"]
    (case,) = (case for case in kernel.cases if case.name == "130 tokens, scales")
    best = kernel.choose(gpu_target("cuda", *features(arch)), **case.static)
    assert isinstance(best.tile, DenseTile)
    schedule = replace(best, tile=replace(best.tile, enough=1))
    program = program_of(simt, "cuda", kernel, case, schedule)
    results = run_case(simt, program, kernel, case, schedule)
    compare(kernel, case, made_inputs(case), results)
