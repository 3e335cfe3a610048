"""What the lanes of a warp do together, as CUDA and Metal text."""

from __future__ import annotations

import pytest
from support.lanes import SHAPES, arrays, check, sums_and_largest
from support.simt.harness import ORDERS

from mxforge.schedules.gpu.lanes import WARP


@pytest.mark.parametrize(("threads", "count"), SHAPES)
@pytest.mark.parametrize("kind", ["cuda", "metal"])
def test_sums_of_a_block_and_the_largest_of_a_warp(simt, kind, threads, count):
    program = simt.compile(sums_and_largest(kind, threads, count), kind)
    for order in ORDERS:
        check(simt.run(program, arrays(threads, count), (1, 2), order), WARP)


def test_a_warp_of_cuda_shuffles_five_times(simt):
    text = simt.compile(sums_and_largest("cuda", 64, 4), "cuda").text
    assert text.count("__shfl_xor_sync") == 2  # in the loops of two functions
