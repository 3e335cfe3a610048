"""A kernel made of what the lanes of a GPU family do together, for tests on each of them."""

from __future__ import annotations

import numpy as np
import tvm

from mxforge.schedules.gpu.lanes import LANES, BlockSums
from mxforge.schedules.kernel import T, f32, prim_func, scheduled

BLOCKS = 3
SHAPES = [(64, 4), (128, 7), (128, 100)]  # threads of a block, sums


def sums_and_largest(family: str, threads: int, count: int) -> tvm.tirx.PrimFunc:
    """x f32 [BLOCKS, threads, count] -> sums f32 [BLOCKS, count] over threads, and largest f32
    [BLOCKS, threads], of x[…, 0] over each thread's warp."""
    sums, lanes = BlockSums(family, threads, count), LANES[family]

    @T.inline
    def body(x, y, largest):
        for block in T.thread_binding(BLOCKS, thread="blockIdx.x"):
            for thread in T.thread_binding(threads, thread="threadIdx.x"):
                with T.sblock("block"):
                    b, tx = T.axis.remap("SS", [block, thread])
                    T.reads(x[0:BLOCKS, 0:threads, 0:count])
                    T.writes(y[0:BLOCKS, 0:count], largest[0:BLOCKS, 0:threads])
                    values = T.sblock_alloc_buffer((count,), "float32", scope="local")
                    parts = T.sblock_alloc_buffer((sums.elements,), "float32", scope="shared")
                    largest[b, tx] = lanes.largest(x[b, tx, 0])
                    for i in T.unroll(count):
                        values[i] = x[b, tx, i]
                    sums.share(values, parts, tx)
                    if tx < count:
                        sums.total(parts, tx, values)
                        y[b, tx] = values[0]

    arguments = (
        f32("x", BLOCKS, threads, count), f32("y", BLOCKS, count), f32("largest", BLOCKS, threads)
    )  # fmt: skip
    return scheduled(prim_func(arguments, body), "lanes", family)


def arrays(threads: int, count: int) -> list[np.ndarray]:
    """Arguments, outputs unset."""
    x = np.random.default_rng(0).standard_normal((BLOCKS, threads, count), dtype=np.float32)
    return [x, *(np.full((BLOCKS, n), np.nan, np.float32) for n in (count, threads))]


def check(after: list[np.ndarray], lanes: int) -> None:
    """AssertionError where the arguments after a call, in warps of `lanes`, are wrong."""
    x, sums, largest = after
    np.testing.assert_allclose(sums, x.sum(1, dtype=np.float64), atol=2e-5)
    warps = x[..., 0].reshape(BLOCKS, -1, lanes)
    expected = np.broadcast_to(warps.max(-1, keepdims=True), warps.shape)
    np.testing.assert_array_equal(largest, expected.reshape(largest.shape))
