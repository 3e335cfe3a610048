"""Cooperative matrices: what the code looks like, what it asks for, what is refused, and that it is
right. What needs newer tools, or a device that has them, runs with scripts/test --mesa."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tvm
from support.matrix_programs import LAVAPIPE, needs_matrices, needs_tools, product
from support.spirv_programs import disassembled, generate, kernels, lowered, results, run, unpack
from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx import stmt

from mxforge.errors import VulkanCodegenError

DTYPES = [("float16", "float32"), ("float16", "float16"), ("int8", "int32"), ("uint8", "uint32")]


def requirements(function: tirx.PrimFunc) -> dict:
    (kernel,) = unpack(generate(lowered(function)))
    return kernel.reflection["requirements"]


def test_products_and_the_subgroups_size_are_required():
    needs = requirements(product(32, 32, 32, matrix=((16, 8, 16), 32)))
    assert needs["matrices"] == [
        {"m": 16, "n": 8, "k": 16, "a": "float16", "b": "float16", "c": "float32",
         "result": "float32"}
    ]  # fmt: skip
    assert needs["subgroup_size"] == 32
    features = {"cooperativeMatrix", "vulkanMemoryModel", "computeFullSubgroups", "shaderFloat16"}
    assert features <= set(needs["features"])
    assert needs["extensions"] == ["VK_KHR_cooperative_matrix"]


@pytest.mark.parametrize("through", ["shared", "global"])
@pytest.mark.parametrize(("factor", "total"), DTYPES)
def test_code_is_valid(factor, total, through):
    needs_tools()
    (kernel,) = kernels(product(32, 32, 32, factor, total, through=through))
    text = disassembled(kernel)
    signed = "MatrixASigned" in text
    assert signed == (factor == "int8")


def test_shared_memory_is_exchanged_under_vulkans_memory_model():
    needs_tools()
    (kernel,) = kernels(product(32, 32, 32))
    text = disassembled(kernel)
    assert "OpMemoryModel PhysicalStorageBuffer64 Vulkan" in text
    shared = set(re.findall(r"(%\w+) = OpAccessChain %_ptr_Workgroup\w+ ", text))
    touched = [
        line for line in text.splitlines()
        if re.search(r"Op(Load|Store|CooperativeMatrix(Load|Store)KHR) ", line)
        and shared & set(re.findall(r"%\w+", line))
    ]  # fmt: skip
    assert len(touched) == 4  # two copied into, two loaded from
    assert all("NonPrivatePointer" in line for line in touched)
    # Acquire, release, uniform and workgroup memory, make available, make visible.
    semantics = {0x8 | 0x40 | 0x100 | 0x2000 | 0x4000}
    assert {int(n) for n in re.findall(r"OpControlBarrier .*%uint_(\d+)\n", text)} == semantics


def test_exchanged_global_memory_needs_no_decoration():
    """Which Vulkan's memory model forbids."""
    needs_tools()
    (m, n, k), lanes = LAVAPIPE

    @T.inline
    def load(fragments, source):
        T.evaluate(
            T.tvm_load_matrix_sync(
                fragments.data, m, n, k, 0, T.address_of(source[0]), k, "row_major"
            )
        )

    @T.prim_func(s_tir=True)
    def main(a: T.Buffer((m * k,), "float16"), c: T.Buffer((m * n,), "float32")):
        for tx in T.thread_binding(lanes, thread="threadIdx.x"):
            with T.sblock("block"):
                vt = T.axis.spatial(lanes, tx)
                T.reads(a[0 : m * k], c[0 : m * n])
                T.writes(c[0 : m * n])
                of_a = T.sblock_alloc_buffer((m * k,), "float16", scope="wmma.matrix_a")
                of_b = T.sblock_alloc_buffer((k * n,), "float16", scope="wmma.matrix_b")
                sums = T.sblock_alloc_buffer((m * n,), "float32", scope="wmma.accumulator")
                T.evaluate(T.call_extern("int32", "subgroupRequireSize", lanes))
                c[vt] = c[vt] + T.float32(1)
                T.tvm_storage_sync("shared")
                load(of_a, a)
                load(of_b, a)
                load(sums, c)
                T.evaluate(T.tvm_mma_sync(sums.data, 0, of_a.data, 0, of_b.data, 0, sums.data, 0))
                T.evaluate(
                    T.tvm_store_matrix_sync(
                        sums.data, m, n, k, 0, T.address_of(c[0]), n, "row_major"
                    )
                )

    (kernel,) = kernels(main)
    text = disassembled(kernel)
    assert "Coherent" not in text
    assert text.count("Aligned|NonPrivatePointer 4") == 4  # c, twice by threads


def test_kernels_without_matrices_keep_their_memory_model():
    (kernel,) = unpack(generate(lowered(copied())))
    assert kernel.reflection["requirements"]["matrices"] == []
    words = np.frombuffer(kernel.spirv, np.uint32)
    (at,) = np.flatnonzero(words == (3 << 16 | 14))  # OpMemoryModel
    assert words[at + 2] == 1  # GLSL450


def copied() -> tirx.PrimFunc:
    @T.prim_func(s_tir=True)
    def main(x: T.Buffer((64,), "float32"), y: T.Buffer((64,), "float32")):
        for i in T.thread_binding(64, thread="threadIdx.x"):
            with T.sblock("item"):
                v = T.axis.spatial(64, i)
                shared = T.sblock_alloc_buffer((64,), "float32", scope="shared")
                shared[v] = x[v]
                T.tvm_storage_sync("shared")
                y[v] = shared[63 - v]

    return main


# -- what is refused ------------------------------------------------------------------------------


def other(name: str, **changed):
    """A call of T's function of that name, with other arguments by position."""
    places = {int(place.removeprefix("at")): value for place, value in changed.items()}

    def call(*arguments):
        return getattr(T, name)(*(places.get(i, each) for i, each in enumerate(arguments)))

    return call


def swapped(d, i, a, j, b, k, c, l):  # noqa: E741 (TVM's names)
    return T.tvm_mma_sync(d, i, b, k, a, j, c, l)


@pytest.mark.parametrize(("changes", "words"), [
    ({"factor": "float32"}, ("wmma.matrix_", "float32", "float16")),
    ({"total": "int32"}, ("a product of matrices", "int32", "float16 into float16 or float32")),
    ({"fill": other("tvm_fill_fragment", at4=7)}, ("matrix number 7 of sums", "0 to 1")),
    ({"multiply": other("tvm_mma_sync", at3=1)}, ("matrix number 1 of of_a", "0 to 0")),
    ({"multiply": swapped}, ("in the scopes", "wmma.matrix_b, wmma.matrix_a")),
])  # fmt: skip
def test_wrong_calls_are_refused(changes, words):
    with pytest.raises(VulkanCodegenError) as caught:
        generate(lowered(product(48, 48, 48, **changes)))
    for word in ("main_kernel", *words):
        assert word in str(caught.value)


def fragments(body, elements: int = 64) -> tirx.PrimFunc:
    """A kernel of one accumulator, of as many elements."""

    @T.prim_func(s_tir=True)
    def main(c: T.Buffer((64,), "float32")):
        for tx in T.thread_binding(8, thread="threadIdx.x"):
            with T.sblock("block"):
                T.axis.spatial(8, tx)
                T.reads()
                T.writes(c[0:64])
                sums = T.sblock_alloc_buffer((elements,), "float32", scope="wmma.accumulator")
                own = T.sblock_alloc_buffer((64,), "float32", scope="local")
                own[0] = T.float32(1)
                body(sums, own, c)

    return main


def test_matrices_that_are_not_whole_are_refused():
    @T.inline
    def fill(sums, own, c):
        T.evaluate(T.tvm_fill_fragment(sums.data, 8, 8, 8, 0, T.float32(0)))

    with pytest.raises(VulkanCodegenError, match="whole matrices of 8 times 8"):
        generate(lowered(fragments(fill, 65)))


@pytest.mark.parametrize(("place", "layout", "words"), [
    ("own", "row_major", "local memory"),
    ("c", "diagonal", "layout"),
])  # fmt: skip
def test_wrong_memory_is_refused(place, layout, words):
    @T.inline
    def store(sums, own, c):
        T.evaluate(T.tvm_fill_fragment(sums.data, 8, 8, 8, 0, T.float32(0)))
        target: T.let = T.address_of((own if place == "own" else c)[0])
        T.evaluate(T.tvm_store_matrix_sync(sums.data, 8, 8, 8, 0, target, 8, layout))

    with pytest.raises(VulkanCodegenError, match=words):
        generate(lowered(fragments(store)))


SCOPES = {"a": "wmma.matrix_a", "b": "wmma.matrix_b", "c": "wmma.accumulator"}
A, B, C = (
    tirx.decl_buffer((64,), "float32" if name == "c" else "float16", name, scope=scope)
    for name, scope in SCOPES.items()
)


def filled(buffer, m: int = 8):
    return T.tvm_fill_fragment(buffer.data, m, 8, 8, 0, tirx.const(0, buffer.dtype))


MULTIPLIED = T.tvm_mma_sync(C.data, 0, A.data, 0, B.data, 0, C.data, 0)


@pytest.mark.parametrize(("calls", "words"), [
    ([filled(C), filled(C, 4)], r"\(8, 8, 8\) and \(4, 8, 8\); expected one shape in a buffer"),
    ([filled(A), filled(B), filled(C, 4), MULTIPLIED], r"shapes .*expected one \(m, n, k\)"),
    ([filled(A), filled(C), MULTIPLIED], "matrices b that nothing fills"),
    ([filled(A), filled(B), filled(C), MULTIPLIED], "by subgroups of any size"),
    ([filled(C, tirx.Var("m", "int32"))], "constants m, n and k"),
])  # fmt: skip
def test_what_lowering_would_refuse_is_refused(calls, words):
    allocated = [stmt.AllocBuffer(buffer) for buffer in (A, B, C)]
    body = stmt.stmt_seq(*allocated, *map(stmt.Evaluate, calls))
    function = tirx.PrimFunc([], body).with_attr("global_symbol", "main_kernel")
    with pytest.raises(VulkanCodegenError, match=words):
        generate(tvm.IRModule({"main_kernel": function}))


# -- results --------------------------------------------------------------------------------------


@pytest.mark.parametrize("through", ["shared", "global"])
@pytest.mark.parametrize(("factor", "total"), DTYPES)
def test_products_agree_with_numpy(factor, total, through):
    needs_matrices()
    m, n, k = 64, 48, 40
    rng = np.random.default_rng(1)
    if factor == "float16":
        a, b = (rng.standard_normal((rows, k)).astype(factor) for rows in (m, n))
    else:
        low, high = np.iinfo(factor).min, np.iinfo(factor).max
        a, b = (rng.integers(low, high, (rows, k), factor, endpoint=True) for rows in (m, n))
    function = product(m, n, k, factor, total, through=through)
    got = run(function, a.ravel(), b.ravel(), np.zeros(m * n, total))[-1].reshape(m, n)
    exact = a.astype(np.float64) @ b.astype(np.float64).T
    tolerance = {"float32": 1e-6, "float16": 2e-3}.get(total, 0)
    assert np.linalg.norm(got - exact) <= tolerance * np.linalg.norm(exact)


def test_a_matrix_that_the_device_lacks_is_named_before_the_driver_sees_it():
    lanes = LAVAPIPE[1]
    function = product(64, 64, 64, matrix=((32, 32, 32), lanes))
    a = np.zeros(64 * 64, np.float16)
    with pytest.raises(
        RuntimeError,
        match=r"Kernel main_kernel cannot run on vulkan:0 .*matrices "
        r"32x32x32 float16 float16 float32 float32 \(it has ",
    ):
        run(function, a, a, np.zeros(64 * 64, np.float32))


def test_what_a_float16_leaves_of_a_number_is_not_optimized_away():
    """Of which the second part of an input is made. Mesa 26 takes the way to float16 and back for
    nothing, unless it is told that the rounding counts."""
    x = np.random.default_rng(1).standard_normal(64).astype(np.float32)
    half = results([lambda v: v - T.Cast("float32", T.Cast("float16", v))], [x], "float32")[0]
    np.testing.assert_array_equal(half, x - x.astype(np.float16).astype(np.float32))
