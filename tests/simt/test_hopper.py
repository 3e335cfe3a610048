"""wgmma, mbarriers and bulk copies, as Hopper's kernels use them: a product against NumPy, and
every rule that the harness watches, broken once."""

from __future__ import annotations

import re
from functools import cache

import ml_dtypes
import numpy as np
import pytest
from support.simt.harness import ORDERS, Fault

from mxforge.schedules.cuda import wgmma
from mxforge.schedules.kernel import T

ROWS, K = 64, 64  # of one warpgroup; of 128 bytes


@cache
def product_64(columns):
    """c = a · bᵀ by one warpgroup. a as pairs; b as a bulk copy wants it."""
    words = columns * 16  # of eight bytes

    @T.prim_func(s_tir=True, private=True)
    def main(
        a: T.Buffer((ROWS, K // 2), "uint32"),
        b: T.Buffer((words,), "uint64"),
        c: T.Buffer((ROWS, columns), "float32"),
    ):
        for block in T.thread_binding(1, thread="blockIdx.x"):
            for thread in T.thread_binding(128, thread="threadIdx.x"):
                with T.sblock("warpgroup"):
                    _, tx = T.axis.remap("SS", [block, thread])
                    T.reads(a[0:ROWS, 0 : K // 2], b[0:words])
                    T.writes(c[0:ROWS, 0:columns])
                    xs = T.sblock_alloc_buffer(
                        (words + 1,), "uint64", scope="shared.dyn", align=1024
                    )
                    ra = T.sblock_alloc_buffer((16,), "uint32", scope="local")
                    acc = T.sblock_alloc_buffer((columns // 2,), "float32", scope="local")
                    row: T.let = tx // 32 * 16 + tx % 32 // 4
                    if tx == 0:
                        wgmma.prepare_arrivals(xs[words], 1)
                        wgmma.bulk_copy(xs[0], b[0], words * 8, xs[words])
                    T.cuda.cta_sync()
                    for i in T.unroll(columns // 2):
                        acc[i] = T.float32(0)
                    for i in T.unroll(16):
                        ra[i] = a[row + i % 2 * 8, i // 4 * 8 + i // 2 % 2 * 4 + tx % 4]
                    wgmma.wait_for_arrival(xs[words], 0)
                    wgmma.begin_products()
                    for i in T.unroll(4):
                        wgmma.multiply(
                            columns, acc[0], ra[4 * i], wgmma.descriptor(xs[0]) + T.uint64(2 * i)
                        )
                    wgmma.end_group()
                    wgmma.wait_groups(0)
                    for i in T.unroll(columns // 2):
                        c[row + i // 2 % 2 * 8, i // 4 * 8 + tx % 4 * 2 + i % 2] = acc[i]

    return main.with_attr("tirx.is_scheduled", True)


def arrays(columns):
    """a, b, b in shared memory, and no c."""
    rng = np.random.default_rng(columns)
    a, b = (rng.standard_normal((n, K)).astype(ml_dtypes.bfloat16) for n in (ROWS, columns))
    pieces = b.reshape(columns, 8, 8)
    order = np.arange(8) ^ np.arange(columns)[:, None] % 8
    swizzled = np.take_along_axis(pieces, order[:, :, None], 1)
    c = np.full((ROWS, columns), np.nan, np.float32)
    return a, b, [a.view(np.uint32), np.ascontiguousarray(swizzled).view(np.uint64).ravel(), c]


@pytest.mark.parametrize("columns", [8, 128])
def test_product_by_wgmma(simt, columns):
    program = simt.compile(product_64(columns), "cuda")
    a, b, given = arrays(columns)
    expected = a.astype(np.float64) @ b.astype(np.float64).T
    for order in ORDERS:
        *_, c = simt.run(program, given, {2}, order)
        np.testing.assert_allclose(c, expected, rtol=0, atol=1e-5)


FIRST = r"mx_descriptor\(\(&\(xs_ptr\[0\]\)\)\)"  # that is followed by nothing: of the first inputs
WRITE = "xs_ptr[0] = (uint64_t)0; "
# What is done to the text -> what is found then.
BROKEN = {
    "no fence of registers": (r"mx_begin_products\(\);", "", r"a wgmma\.fence has to come"),
    "not committed": (r"mx_end_group\(\);", "", "ended before a wgmma was waited for"),
    "not waited for": (r"mx_wait_groups_0\(\);", "", "ended before a wgmma was waited for"),
    "sums written meanwhile": (
        r"(?=mx_end_group)", "acc_ptr[0] = 0; ", "accumulator of wgmma was written",
    ),
    "A written meanwhile": (r"(?=mx_end_group)", "ra_ptr[5] += 1; ", "a register of A was written"),
    "a copy not waited for": (
        r"mx_wait_for_arrival\([^;]*;", "", r"before the cp\.async of thread 0 to it was waited",
    ),
    "the other phase waited for": (
        r"(mx_wait_for_arrival\(.*), 0\);", r"\1, 1);", r"before the cp\.async of thread 0",
    ),
    "a phase that does not end": (
        r"(mx_wait_for_arrival\(.*), 0\);", r"\1, 0); \1, 1);", "a phase that does not end",
    ),
    "columns written without a fence": (
        r"(?=mx_begin_products)",
        f"__syncthreads(); if (threadIdx.x == 0) {WRITE} __syncthreads(); ",
        r"no fence\.proxy\.async between thread 0, which writes",
    ),
    "columns written meanwhile": (
        r"(?=mx_wait_groups_0)", f"__syncthreads(); if (threadIdx.x == 0) {WRITE}", "fence|race",
    ),
    "copied to meanwhile": (
        r"(?=mx_wait_groups_0)",
        "__syncthreads(); if (threadIdx.x == 0) mx_bulk_copy(&xs_ptr[0], &b_ptr[0], 16, "
        "&xs_ptr[128]); ",
        r"race|before the cp\.async of thread 0",
    ),
    "no barrier behind an mbarrier": (
        r"(__syncthreads|tvm_builtin_cuda_cta_sync)\(\);", "", r"there is no mbarrier|race",
    ),
    "a size that is no multiple of 16": (r"\b1024, ", "1016, ", "multiples of 16"),
    "columns at no multiple of 1024 bytes": (
        rf"{FIRST}\);", "mx_descriptor(&xs_ptr[16]));", "not at 1024 bytes",
    ),
    "warps that go other ways": (
        rf"({FIRST})\);", r"\1 + (threadIdx.x < 32 ? 2 : 0));",
        "warps of a warpgroup multiplied different",
    ),
    "no fence behind the mbarrier's begin": (
        r'asm volatile\("fence\.proxy\.async\.shared::cta;"[^;]*;', "", r"no fence\.proxy\.async",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(BROKEN))
def test_fault_is_found(simt, name):
    pattern, replacement, fault = BROKEN[name]

    def edit(text: str) -> str:
        # The kernel's own text, or that of a function before it.
        begin = 0 if "asm" in pattern else text.rindex("main_kernel")
        body, edits = re.subn(pattern, replacement, text[begin:])
        assert edits == 1, text[begin:]
        return text[:begin] + body

    program = simt.compile(product_64(8), "cuda", edit)
    for order in ORDERS:
        with pytest.raises(Fault, match=fault):
            simt.run(program, arrays(8)[2], {2}, order)
