"""Instructions that the kernels of tensor cores and of warps are made of, against NumPy."""

from __future__ import annotations

from functools import cache

import ml_dtypes
import numpy as np
import pytest
from support.simt.bodies import compile_body
from support.simt.harness import ORDERS, Fault

from mxforge.schedules.cuda.instructions import mma_scaled
from mxforge.schedules.formats.mxfp4 import VALUES
from mxforge.schedules.kernel import T

TWO_BYTES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
SHORT = {"bfloat16": "bf16", "float16": "f16"}


@cache
def product_16x8(dtype, k, keep_last=True):
    """c = a · b by one warp: cp.async to shared memory, ldmatrix, mma.sync.

    Without `keep_last` as one would write it first: TVM makes shared memory as large as the
    indices that it sees, and the address of an element is one element to it.
    """
    mma = f"mma.sync.aligned.m16n8k{k}.row.col.f32.{SHORT[dtype]}.{SHORT[dtype]}.f32"

    @T.prim_func(s_tir=True, private=True)
    def main(
        a: T.Buffer((16, k), dtype), b: T.Buffer((k, 8), dtype), c: T.Buffer((16, 8), "float32")
    ):
        for block in T.thread_binding(1, thread="blockIdx.x"):
            for lane in T.thread_binding(32, thread="threadIdx.x"):
                with T.sblock("warp"):
                    _, t = T.axis.remap("SS", [block, lane])
                    T.reads(a[0:16, 0:k], b[0:k, 0:8])
                    T.writes(c[0:16, 0:8])
                    left = T.sblock_alloc_buffer((16 * k,), dtype, scope="shared")
                    right = T.sblock_alloc_buffer((k * 8,), dtype, scope="shared")
                    ra = T.sblock_alloc_buffer((4,), "uint32", scope="local")
                    rb = T.sblock_alloc_buffer((2,), "uint32", scope="local")
                    acc = T.sblock_alloc_buffer((4,), "float32", scope="local")
                    if keep_last and t == 0:
                        left[16 * k - 1] = T.Cast(dtype, 0.0)
                        right[k * 8 - 1] = T.Cast(dtype, 0.0)
                    T.cuda.cta_sync()
                    if t < 2 * k:
                        T.ptx["cp.async.cg.shared.global"](
                            T.address_of(left[t * 8]),
                            T.address_of(a[t // (k // 8), t % (k // 8) * 8]),
                            16,
                            T.uint32(16),
                        )
                    if t < k:
                        T.ptx["cp.async.cg.shared.global"](
                            T.address_of(right[t * 8]), T.address_of(b[t, 0]), 16, T.uint32(16)
                        )
                    T.ptx["cp.async.commit_group"]()
                    T.ptx["cp.async.wait_group"](0)
                    T.cuda.cta_sync()
                    for i in T.unroll(4):
                        acc[i] = T.float32(0)
                    if k == 16:
                        T.ptx["ldmatrix.sync.aligned.m8n8.x4.shared.b16"](
                            ra[0], ra[1], ra[2], ra[3],
                            T.address_of(left[t % 16 * k + t // 16 * 8]),
                        )  # fmt: skip
                        T.ptx["ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16"](
                            rb[0], rb[1], T.address_of(right[t % 16 * 8])
                        )
                        T.ptx[mma](
                            acc[0], acc[1], acc[2], acc[3], ra[0], ra[1], ra[2], ra[3],
                            rb[0], rb[1], acc[0], acc[1], acc[2], acc[3],
                        )  # fmt: skip
                    else:
                        T.ptx["ldmatrix.sync.aligned.m8n8.x2.shared.b16"](
                            ra[0], ra[1], T.address_of(left[t % 16 * k])
                        )
                        T.ptx["ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16"](
                            rb[0], T.address_of(right[t % 8 * 8])
                        )
                        T.ptx[mma](
                            acc[0], acc[1], acc[2], acc[3], ra[0], ra[1], rb[0],
                            acc[0], acc[1], acc[2], acc[3],
                        )  # fmt: skip
                    for i in T.unroll(4):
                        c[t // 4 + i // 2 * 8, t % 4 * 2 + i % 2] = acc[i]

    return main.with_attr("tirx.is_scheduled", True)


@pytest.mark.parametrize("k", [8, 16])
@pytest.mark.parametrize("dtype", list(TWO_BYTES))
def test_product_by_mma_sync(simt, dtype, k):
    program = simt.compile(product_16x8(dtype, k), "cuda")
    rng = np.random.default_rng(k)
    a = rng.standard_normal((16, k)).astype(TWO_BYTES[dtype])
    b = rng.standard_normal((k, 8)).astype(TWO_BYTES[dtype])
    for order in ORDERS:
        *_, c = simt.run(program, [a, b, np.full((16, 8), np.nan, np.float32)], {2}, order)
        np.testing.assert_array_equal(c, (a.astype(np.float64) @ b.astype(np.float64)).astype("f4"))


def test_shared_memory_that_tvm_made_too_small_is_found(simt):
    program = simt.compile(product_16x8("float16", 16, keep_last=False), "cuda")
    zeros = np.zeros((16, 16), np.float16)
    with pytest.raises(
        Fault, match=r"write of 16 bytes at (left|right)\[\d+\], which has (249|121) elements"
    ):
        simt.run(program, [zeros, zeros[:, :8], np.zeros((16, 8), np.float32)], {2})


@cache
def int8_product_16x8(k):
    """c = a · bᵀ by one warp; a register holds four elements that follow each other in k."""
    words = k // 4

    @T.prim_func(s_tir=True, private=True)
    def main(
        a: T.Buffer((16, words), "uint32"),
        b: T.Buffer((8, words), "uint32"),
        c: T.Buffer((16, 8), "uint32"),
    ):
        for block in T.thread_binding(1, thread="blockIdx.x"):
            for lane in T.thread_binding(32, thread="threadIdx.x"):
                with T.sblock("warp"):
                    _, t = T.axis.remap("SS", [block, lane])
                    T.reads(a[0:16, 0:words], b[0:8, 0:words])
                    T.writes(c[0:16, 0:8])
                    acc = T.sblock_alloc_buffer((4,), "uint32", scope="local")  # as TVM asks
                    for i in T.unroll(4):
                        acc[i] = T.uint32(0)
                    if k == 32:
                        T.ptx["mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32"](
                            acc[0], acc[1], acc[2], acc[3],
                            a[t // 4, t % 4], a[t // 4 + 8, t % 4],
                            a[t // 4, t % 4 + 4], a[t // 4 + 8, t % 4 + 4],
                            b[t // 4, t % 4], b[t // 4, t % 4 + 4],
                            acc[0], acc[1], acc[2], acc[3],
                        )  # fmt: skip
                    else:
                        T.ptx["mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32"](
                            acc[0], acc[1], acc[2], acc[3],
                            a[t // 4, t % 4], a[t // 4 + 8, t % 4], b[t // 4, t % 4],
                            acc[0], acc[1], acc[2], acc[3],
                        )  # fmt: skip
                    for i in T.unroll(4):
                        c[t // 4 + i // 2 * 8, t % 4 * 2 + i % 2] = acc[i]

    return main.with_attr("tirx.is_scheduled", True)


@pytest.mark.parametrize("k", [16, 32])
def test_int8_product_by_mma_sync(simt, k):
    program = simt.compile(int8_product_16x8(k), "cuda")
    rng = np.random.default_rng(k)
    a, b = (rng.integers(-128, 128, (rows, k), dtype=np.int8) for rows in (16, 8))
    arrays = [a.view(np.uint32), b.view(np.uint32), np.zeros((16, 8), np.uint32)]
    *_, c = simt.run(program, arrays, {2})
    np.testing.assert_array_equal(c.view(np.int32), a.astype(np.int32) @ b.astype(np.int32).T)


@cache
def scaled_product_16x8(byte_a, byte_b, lane_b):
    """c = a · bᵀ by one warp, of e2m1 and e4m3 with a scale a row and column: `scales_a` are what
    lanes hold for rows, `scales_b` for columns."""

    @T.prim_func(s_tir=True, private=True)
    def main(
        a: T.Buffer((16, 8), "uint32"),
        b: T.Buffer((8, 8), "uint32"),
        scales_a: T.Buffer((32,), "uint32"),
        scales_b: T.Buffer((32,), "uint32"),
        c: T.Buffer((16, 8), "float32"),
    ):
        for block in T.thread_binding(1, thread="blockIdx.x"):
            for lane in T.thread_binding(32, thread="threadIdx.x"):
                with T.sblock("warp"):
                    _, t = T.axis.remap("SS", [block, lane])
                    T.reads(a[0:16, 0:8], b[0:8, 0:8], scales_a[0:32], scales_b[0:32])
                    T.writes(c[0:16, 0:8])
                    ra = T.sblock_alloc_buffer((4,), "uint32", scope="local")
                    rb = T.sblock_alloc_buffer((2,), "uint32", scope="local")
                    acc = T.sblock_alloc_buffer((4,), "float32", scope="local")
                    for i in T.unroll(4):
                        acc[i] = T.float32(0)
                        ra[i] = a[t // 4 + i % 2 * 8, t % 4 + i // 2 * 4]
                    for i in T.unroll(2):
                        rb[i] = b[t // 4, t % 4 + i * 4]
                    mma_scaled(
                        acc, 0, ra, 0, rb, 0, scales_a[t], byte_a, scales_b[t], byte_b, lane_b
                    )
                    for i in T.unroll(4):
                        c[t // 4 + i // 2 * 8, t % 4 * 2 + i % 2] = acc[i]

    return main.with_attr("tirx.is_scheduled", True)


@pytest.mark.parametrize(("byte_a", "byte_b", "lane_b"), [(0, 0, 0), (2, 3, 1), (3, 1, 3)])
def test_scaled_product_by_mma_sync(simt, byte_a, byte_b, lane_b):
    program = simt.compile(scaled_product_16x8(byte_a, byte_b, lane_b), "cuda")
    rng = np.random.default_rng(byte_a)
    nibbles, b = rng.integers(0, 16, (16, 32), dtype=np.uint8), rng.integers(0, 255, (8, 32))
    b = np.where(b & 0x7F == 0x7F, 0, b).astype(np.uint8)  # no NaN
    scales_a, scales_b = rng.integers(117, 137, (2, 32, 4), dtype=np.uint8)
    words = [array.view(np.uint32) for array in (nibbles << 2, b, scales_a, scales_b)]
    words[2:] = [word.ravel() for word in words[2:]]
    *_, c = simt.run(program, [*words, np.full((16, 8), np.nan, np.float32)], {4})
    lanes = np.arange(8) * 4
    of_rows = scales_a[np.concatenate([lanes, lanes + 1]), byte_a] - 127.0
    of_columns = scales_b[lanes + lane_b, byte_b] - 127.0
    values = VALUES[nibbles].astype(np.float64) @ b.view(ml_dtypes.float8_e4m3fn).astype("f8").T
    expected = values * 2 ** (of_rows[:, None] + of_columns)
    np.testing.assert_array_equal(c, expected.astype(np.float32))


@cache
def product_8x8(dtype, transposed):
    """c = a · b, or a · bᵀ, by one simdgroup; b goes through threadgroup memory."""

    @T.prim_func(s_tir=True, private=True)
    def main(
        a: T.Buffer((8, 8), dtype), b: T.Buffer((8, 8), dtype), c: T.Buffer((8, 8), "float32")
    ):
        for block in T.thread_binding(1, thread="blockIdx.x"):
            for lane in T.thread_binding(32, thread="threadIdx.x"):
                with T.sblock("simdgroup"):
                    _, t = T.axis.remap("SS", [block, lane])
                    T.reads(a[0:8, 0:8], b[0:8, 0:8])
                    T.writes(c[0:8, 0:8])
                    right = T.sblock_alloc_buffer((64,), dtype, scope="shared")
                    ma = T.sblock_alloc_buffer((64,), dtype, scope="metal.simdgroup")
                    mb = T.sblock_alloc_buffer((64,), dtype, scope="metal.simdgroup")
                    mc = T.sblock_alloc_buffer((64,), "float32", scope="metal.simdgroup")
                    for i in T.unroll(2):
                        right[i * 32 + t] = b[i * 4 + t // 8, t % 8]
                    T.tvm_storage_sync("shared")
                    T.metal.make_filled_simdgroup_matrix(mc.data, 0, T.float32(0), 8, 8)
                    T.metal.simdgroup_load(ma.data, 0, T.address_of(a[0, 0]), 8, 8, 8, False)
                    T.metal.simdgroup_load(mb.data, 0, T.address_of(right[0]), 8, 8, 8, transposed)
                    T.metal.simdgroup_multiply_accumulate(
                        mc.data, 0, ma.data, 0, mb.data, 0, mc.data, 0
                    )
                    T.metal.simdgroup_store(mc.data, 0, T.address_of(c[0, 0]), 8, 8, 8, False)

    return main.with_attr("tirx.is_scheduled", True)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_product_by_simdgroup_matrices(simt, dtype, transposed):
    program = simt.compile(product_8x8(dtype, transposed), "metal")
    rng = np.random.default_rng(8)
    a, b = (rng.standard_normal((8, 8)).astype(dtype) for _ in range(2))
    for order in ORDERS:
        *_, c = simt.run(program, [a, b, np.full((8, 8), np.nan, np.float32)], {2}, order)
        right = (b.T if transposed else b).astype(np.float64)
        np.testing.assert_array_equal(c, (a.astype(np.float64) @ right).astype(np.float32))


WARP = np.arange(32)
# An expression of v, the lane's number -> what each of 32 lanes gets.
CUDA_WARP = {
    "__shfl_sync(~0u, v, 5)": np.full(32, 5),
    "__shfl_sync(~0u, v, 5, 8)": WARP // 8 * 8 + 5,
    "__shfl_xor_sync(~0u, v, 16)": WARP ^ 16,
    "__shfl_down_sync(~0u, v, 3)": np.where(WARP < 29, WARP + 3, WARP),
    "__shfl_up_sync(~0u, v, 3)": np.where(WARP >= 3, WARP - 3, WARP),
    "__shfl_down_sync(~0u, v, 3, 8)": np.where(WARP % 8 < 5, WARP + 3, WARP),
    "__ballot_sync(~0u, v < 5)": np.full(32, 31),
    "__any_sync(~0u, v == 7)": np.full(32, 1),
    "__all_sync(~0u, v == 7)": np.full(32, 0),
    "__all_sync(~0u, v < 32)": np.full(32, 1),
    "__reduce_add_sync(~0u, v)": np.full(32, 496),
    "__reduce_min_sync(~0u, v - 9)": np.full(32, -9),
    "__reduce_max_sync(~0u, v)": np.full(32, 31),
}
METAL_WARP = {
    "simd_sum(v)": np.full(32, 496),
    "simd_max(v)": np.full(32, 31),
    "simd_min(v - 9)": np.full(32, -9),
    "simd_shuffle(v, 5)": np.full(32, 5),
    "simd_broadcast(v, 5)": np.full(32, 5),
    "simd_shuffle_xor(v, 16)": WARP ^ 16,
    "simd_shuffle_down(v, 3)": np.where(WARP < 29, WARP + 3, WARP),
    "simd_shuffle_up(v, 3)": np.where(WARP >= 3, WARP - 3, WARP),
}
WARPS = [
    pytest.param(kind, expression, expected, id=f"{kind}, {expression}")
    for kind, table in (("cuda", CUDA_WARP), ("metal", METAL_WARP))
    for expression, expected in table.items()
]


@pytest.mark.parametrize(("kind", "expression", "expected"), WARPS)
def test_operation_of_a_warp(simt, kind, expression, expected):
    body = f"int v = x[tx] - tx / 32 * 100; y[tx] = {expression};"
    program = compile_body(simt, kind, body, "int32")
    x = np.concatenate([WARP, WARP + 100]).astype(np.int32)
    for order in ORDERS:
        _, y = simt.run(program, [x, np.zeros_like(x)], {1}, order)
        np.testing.assert_array_equal(y, np.concatenate([expected, expected]))


WORDS = {  # of uint32 a = x[tx], b = x[63 - tx]
    "__byte_perm(a, b, 0x7531)": lambda a, b: (
        (a >> 8 & 0xFF) | (a >> 24) << 8 | (b >> 8 & 0xFF) << 16 | (b >> 24) << 24
    ),
    "__byte_perm(a, b, 0x000f)": lambda a, b: (
        np.where(b >> 31, 0xFF, 0) | (a & 0xFF) * np.uint32(0x1010100)
    ),
    "__dp4a(int(a), int(b), 5)": lambda a, b: (
        (a[:, None].view(np.int8).astype(np.int32) * b[:, None].view(np.int8)).sum(1) + 5
    ),
    "lop3(a, b)": lambda a, b: (a & b) ^ 0xFF,
}


@pytest.mark.parametrize("expression", list(WORDS))
def test_operation_on_words(simt, expression):
    body = (
        "uint32_t a = x[tx], b = x[63 - tx], c = 0xFF;\n"
        "  auto lop3 = [&](uint32_t a, uint32_t b) { uint32_t d;"
        ' asm volatile("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(d) : "r"(a), "r"(b), "r"(c));'
        f" return d; }};\n  y[tx] = {expression};"
    )
    program = compile_body(simt, "cuda", f"{body}", "uint32")
    x = np.random.default_rng(3).integers(0, 2**32, 64, dtype=np.uint32)
    _, y = simt.run(program, [x, np.zeros_like(x)], {1})
    np.testing.assert_array_equal(y, WORDS[expression](x, x[::-1].copy()).astype(np.uint32))


@pytest.mark.parametrize("dtype", list(TWO_BYTES))
def test_two_numbers_rounded_to_a_pair(simt, dtype):
    body = f"""uint32_t d;
  asm volatile("cvt.rn.{SHORT[dtype]}x2.f32 %0, %1, %2;" : "=r"(d) : "f"(x[tx]), "f"(x[63 - tx]));
  y[tx] = simt::bits<float>(d);"""
    x = np.random.default_rng(5).standard_normal(64, dtype=np.float32)
    _, y = simt.run(compile_body(simt, "cuda", body), [x, np.zeros_like(x)], {1})
    low, high = y.view(TWO_BYTES[dtype]).reshape(64, 2).T
    np.testing.assert_array_equal(high, x.astype(TWO_BYTES[dtype]))
    np.testing.assert_array_equal(low, x[::-1].astype(TWO_BYTES[dtype]))


def test_power_of_two(simt):
    body = 'asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y[tx]) : "f"(x[tx]));'
    x = np.linspace(-140, 60, 64, dtype=np.float32)
    x[0] = -1e30
    _, y = simt.run(compile_body(simt, "cuda", body), [x, np.zeros_like(x)], {1})
    np.testing.assert_allclose(y, np.where(x < -126, 0, np.exp2(x)), rtol=1e-6)


def test_load_of_16_bytes(simt):
    body = """uint32_t a, b, c, d;
  if (tx < 16) {
    asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "l"(x + tx * 4));
    y[tx * 4] = a; y[tx * 4 + 1] = b; y[tx * 4 + 2] = c; y[tx * 4 + 3] = d;
  }"""
    program = compile_body(simt, "cuda", body, "uint32")
    x = np.random.default_rng(4).integers(0, 2**32, 64, dtype=np.uint32)
    _, y = simt.run(program, [x, np.zeros_like(x)], {1})
    np.testing.assert_array_equal(y, x)
