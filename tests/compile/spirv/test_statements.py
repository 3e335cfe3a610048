"""Control flow, buffers, barriers, subgroups and atomics, run on a device."""

from __future__ import annotations

import numpy as np
import pytest
from support.lanes import SHAPES, arrays, check, sums_and_largest
from support.spirv_programs import (
    bound,
    checked,
    device,
    disassembled,
    generate,
    lowered,
    run,
    unpack,
)
from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx import stmt

from mxforge.errors import VulkanCodegenError

N = 64


def threads(body, *buffers: tirx.Var, blocks: int = 1, size: int = N) -> tirx.PrimFunc:
    """body(i) for threads i of `blocks` blocks of `size` threads; the buffers are parameters."""
    block, thread = tirx.Var("block", "int32"), tirx.Var("thread", "int32")
    inner = bound(thread, "threadIdx.x", size, body(block * size + thread))
    function = tirx.PrimFunc(list(buffers), bound(block, "blockIdx.x", blocks, inner))
    return function.with_attr("s_tir", True)


def buffer(name: str, dtype: str = "int32", n: int = N) -> tirx.Var:
    return tirx.decl_buffer((n,), dtype, name)


def load(array, index):
    return tirx.BufferLoad(array, [index])


def add_to(array, index, value):
    return tirx.BufferStore(array, load(array, index) + value, [index])


def loop(variable, extent, *body, start=0, step=None):
    return stmt.For(variable, start, extent, stmt.ForKind.SERIAL, stmt.stmt_seq(*body), step=step)


def test_break_and_continue_in_nested_loops():
    out = buffer("out")
    j, k = tirx.Var("j", "int32"), tirx.Var("k", "int32")

    def body(i):
        inner = loop(
            k,
            10,
            stmt.IfThenElse(tirx.EQ(k, i % 7), stmt.Break(), None),
            stmt.IfThenElse(tirx.EQ(k % 2, 1), stmt.Continue(), None),
            add_to(out, i, k + 1),
        )
        return loop(j, i, inner, stmt.IfThenElse(j > 5, stmt.Break(), stmt.Evaluate(0)))

    def expected(i):
        total = 0
        for j in range(i):
            for k in range(10):
                if k == i % 7:
                    break
                if k % 2 == 1:
                    continue
                total += k + 1
            if j > 5:
                break
        return total

    (ours,) = run(threads(body, out), np.zeros(N, np.int32))
    np.testing.assert_array_equal(ours, [expected(i) for i in range(N)])


def test_while_with_a_condition_that_branches():
    """Collatz steps: the condition reads memory only where its left side is true."""
    x, out = buffer("x"), buffer("out")

    def body(i):
        value = load(x, i)
        step = tirx.BufferStore(
            x,
            tirx.if_then_else(tirx.EQ(value % 2, 0), T.truncdiv(value, 2), 3 * value + 1),
            [i],
        )
        condition = tirx.And(load(out, i) < 200, load(x, i) != 1)
        return stmt.While(condition, stmt.stmt_seq(step, add_to(out, i, 1)))

    def steps(value):
        count = 0
        while value != 1:
            value = value // 2 if value % 2 == 0 else 3 * value + 1
            count += 1
        return count

    ours = run(threads(body, x, out), np.arange(1, N + 1, dtype=np.int32), np.zeros(N, np.int32))
    np.testing.assert_array_equal(ours[1], [steps(i) for i in range(1, N + 1)])


def test_return_in_the_middle():
    out = buffer("out")

    def body(i):
        leave = stmt.Evaluate(tirx.call_intrin("", "tirx.thread_return"))
        early = stmt.IfThenElse(i >= 40, leave, None)
        return stmt.stmt_seq(add_to(out, i, 1), early, add_to(out, i, 1))

    (ours,) = run(threads(body, out), np.zeros(N, np.int32))
    np.testing.assert_array_equal(ours, np.where(np.arange(N) < 40, 2, 1))


@pytest.mark.parametrize("lanes", [1, 2, 3])
def test_lazy_condition_does_not_touch_memory(lanes):
    """The branch not taken would read an address far outside of the buffer."""
    x, out = buffer("x", "float32"), buffer("out", "float32")

    def body(i):
        far = tirx.Select(i < N, i, i)  # hides the index from simplification
        guarded = tirx.if_then_else(i < 8, load(x, far), tirx.const(-1.0, "float32"))
        return tirx.BufferStore(out, guarded * lanes, [i])

    x_data = np.arange(N, dtype=np.float32)
    ours = run(threads(body, x, out), x_data, np.zeros(N, np.float32))
    np.testing.assert_array_equal(ours[1], np.where(np.arange(N) < 8, x_data, -1) * lanes)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int64", "bool"])
def test_shared_memory_reverses_a_block(dtype):
    n, size = 4 * N, N

    @T.prim_func(s_tir=True)
    def main(x: T.Buffer((n,), dtype), out: T.Buffer((n,), dtype)):
        for b in T.thread_binding(n // size, thread="blockIdx.x"):
            for t in T.thread_binding(size, thread="threadIdx.x"):
                with T.sblock("item"):
                    vb, vt = T.axis.remap("SS", [b, t])
                    T.reads(x[0:n])
                    T.writes(out[0:n])
                    staging = T.sblock_alloc_buffer((size,), dtype, scope="shared")
                    staging[vt] = x[vb * size + vt]
                    T.evaluate(T.tvm_storage_sync("shared"))
                    out[vb * size + vt] = staging[size - 1 - vt]

    rng = np.random.default_rng(0)
    x = rng.integers(0, 2 if dtype == "bool" else 100, n).astype(dtype)
    ours = run(main, x, np.zeros(n, dtype))
    np.testing.assert_array_equal(ours[1], x.reshape(-1, size)[:, ::-1].ravel())
    (kernel,) = unpack(generate(lowered(main)))
    size_of = 4 if dtype == "bool" else np.dtype(dtype).itemsize
    assert kernel.reflection["shared_bytes"] == size * size_of


@pytest.mark.parametrize(("n", "stride"), [(16, 3), (8, -2), (4, 0)])
def test_strided_vectors_are_gathered_and_scattered(n, stride):
    lanes = 8
    x, out = buffer("x", "int32", 512), buffer("out", "int32", 512)

    def body(i):
        base = i * 24 + 20
        ramp = tirx.Ramp(base, stride, lanes)
        target = tirx.Ramp(i * 24, 3, lanes)
        return tirx.BufferStore(out, tirx.BufferLoad(x, [ramp]), [target])

    data = np.arange(512, dtype=np.int32)
    ours = run(threads(body, x, out, size=n), data, np.zeros(512, np.int32))[1]
    expected = np.zeros(512, np.int32)
    for i in range(n):
        for lane in range(lanes):
            expected[i * 24 + 3 * lane] = data[i * 24 + 20 + stride * lane]
    np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64", "float32"])
def test_atomics_of_all_threads(dtype):
    names = ("atomicAdd", "atomicMax", "atomicMin")
    out = buffer("out", dtype, 3)

    def body(i):
        return stmt.stmt_seq(
            *[
                stmt.Evaluate(
                    tirx.call_extern(
                        dtype, name, T.address_of(load(out, number)), T.Cast(dtype, i % 50)
                    )
                )
                for number, name in enumerate(names)
            ]
        )

    start = np.array([0, 0, 90], dtype)
    (ours,) = run(threads(body, out, blocks=4), start)
    every = np.arange(4 * N) % 50
    np.testing.assert_array_equal(ours, np.array([every.sum(), 49, 0], dtype))


def test_atomics_in_shared_memory_and_compare_exchange():
    out, winner = buffer("out"), buffer("winner", "int32", 1)
    counter = tirx.decl_buffer((1,), "int32", "counter", scope="shared")

    def body(i):
        first = tirx.BufferStore(counter, tirx.const(0, "int32"), [0])
        sync = stmt.Evaluate(T.tvm_storage_sync("shared"))
        ticket = tirx.call_extern("int32", "atomicAdd", T.address_of(load(counter, 0)), 1)
        swap = tirx.call_extern("int32", "atomicCAS", T.address_of(load(winner, 0)), -1, i + 100)
        return stmt.stmt_seq(
            stmt.AllocBuffer(counter),
            stmt.IfThenElse(tirx.EQ(i, 0), first, None),
            sync,
            tirx.BufferStore(out, ticket, [i]),
            stmt.Evaluate(swap),
        )

    ours = run(threads(body, out, winner), np.zeros(N, np.int32), np.array([-1], np.int32))
    np.testing.assert_array_equal(np.sort(ours[0]), np.arange(N))
    assert 100 <= ours[1][0] < 100 + N


@pytest.mark.parametrize("lanes", [1, 4])
def test_threads_exchange_values_in_global_memory(lanes):
    """Each thread writes a run and reads the one of its opposite."""
    scratch, out = buffer("scratch", "int32", N * lanes), buffer("out", "int32", N * lanes)

    def run_of(place):
        return tirx.Ramp(place * lanes, 1, lanes) if lanes > 1 else place

    def body(i):
        value = tirx.Broadcast(i * 7, lanes) if lanes > 1 else i * 7
        return stmt.stmt_seq(
            tirx.BufferStore(scratch, value, [run_of(i)]),
            stmt.Evaluate(T.tvm_storage_sync("shared")),
            tirx.BufferStore(out, tirx.BufferLoad(scratch, [run_of(N - 1 - i)]), [run_of(i)]),
        )

    empty = np.zeros(N * lanes, np.int32)
    _, ours = run(threads(body, scratch, out), empty, empty)
    np.testing.assert_array_equal(ours, np.repeat(np.arange(N)[::-1] * 7, lanes))


def subgroup_size() -> int:
    from mxforge import vulkan

    return int(vulkan.check(0).subgroup_size[0])


@pytest.mark.parametrize("kind", ["index", "up", "down", "xor"])
def test_warp_shuffles(kind):
    device()
    size = subgroup_size()
    width = size // 2
    call = {
        "index": T.tvm_warp_shuffle,
        "up": T.tvm_warp_shuffle_up,
        "down": T.tvm_warp_shuffle_down,
        "xor": T.tvm_warp_shuffle_xor,
    }[kind]
    x, out = buffer("x", "float32"), buffer("out", "float32")

    def body(i):
        value = call(tirx.const(2**32 - 1, "uint32"), load(x, i), 1, width, size)
        return tirx.BufferStore(out, value, [i])

    data = np.random.default_rng(0).normal(size=N).astype(np.float32)
    function = threads(body, x, out)
    groups = data.reshape(-1, width)
    lane = np.arange(width)
    source = {
        "index": np.full(width, 1),
        "up": np.maximum(lane - 1, 0),
        "down": np.minimum(lane + 1, width - 1),
        "xor": lane ^ 1,
    }[kind]
    ours = run(function, data, np.zeros(N, np.float32))[1]
    np.testing.assert_array_equal(ours, groups[:, source].ravel())
    (kernel,) = unpack(generate(lowered(function)))
    assert kernel.reflection["requirements"]["subgroup_size"] == size
    assert "shuffle" in kernel.reflection["requirements"]["subgroup_operations"]
    assert "computeFullSubgroups" in kernel.reflection["requirements"]["features"]


@pytest.mark.parametrize(
    ("threads_in_x", "fits"), [(32, True), (64, True), (16, False), (48, False)]
)
def test_warp_shuffles_need_full_subgroups(threads_in_x, fits):
    x = buffer("x", "float32")

    def body(i):
        mask = tirx.const(2**32 - 1, "uint32")
        return tirx.BufferStore(x, T.tvm_warp_shuffle(mask, load(x, i), 1, 32, 32), [i])

    module = lowered(threads(body, x, size=threads_in_x))
    if fits:
        assert generate(module)
        return
    message = (
        f"subgroups of 32 lanes in blocks of {threads_in_x} threads in x; expected a multiple of 32"
    )
    with pytest.raises(VulkanCodegenError, match=message):
        generate(module)


@pytest.mark.parametrize(
    ("name", "dtype", "reference"),
    [
        ("subgroupAdd", "float32", lambda g: np.broadcast_to(g.sum(1, keepdims=True), g.shape)),
        ("subgroupMax", "int32", lambda g: np.broadcast_to(g.max(1, keepdims=True), g.shape)),
        ("subgroupMin", "uint32", lambda g: np.broadcast_to(g.min(1, keepdims=True), g.shape)),
        ("subgroupInclusiveAdd", "int32", lambda g: g.cumsum(1)),
        ("subgroupExclusiveAdd", "int32", lambda g: g.cumsum(1) - g),
        ("subgroupBroadcastFirst", "float32", lambda g: np.broadcast_to(g[:, :1], g.shape)),
    ],
)
def test_subgroup_operations(name, dtype, reference):
    device()
    x, out = buffer("x", dtype), buffer("out", dtype)

    def body(i):
        return tirx.BufferStore(out, tirx.call_extern(dtype, name, load(x, i)), [i])

    data = np.random.default_rng(0).integers(0, 100, N).astype(dtype)
    ours = run(threads(body, x, out), data, np.zeros(N, dtype))[1]
    expected = reference(data.reshape(-1, subgroup_size())).ravel()
    np.testing.assert_array_equal(ours, expected.astype(dtype))


def test_subgroups_are_numbered_and_elect_one_lane_each():
    device()
    out = buffer("out", n=3 * N)

    def body(i):
        elected = tirx.call_extern("bool", "subgroupElect")
        return stmt.stmt_seq(
            tirx.BufferStore(out, tirx.call_extern("int32", "subgroupNumber"), [i]),
            tirx.BufferStore(out, tirx.call_extern("int32", "subgroupCount"), [i + N]),
            tirx.BufferStore(out, tirx.Cast("int32", elected), [i + 2 * N]),
        )

    number, count, elected = run(threads(body, out), np.zeros(3 * N, np.int32))[0].reshape(3, N)
    size = subgroup_size()
    np.testing.assert_array_equal(number, np.arange(N) // size)
    np.testing.assert_array_equal(count, N // size)
    np.testing.assert_array_equal(elected, np.arange(N) % size == 0)


@pytest.mark.parametrize(("n_threads", "count"), SHAPES)
def test_sums_of_a_block_and_the_largest_of_a_subgroup(n_threads, count):
    after = run(sums_and_largest("vulkan", n_threads, count), *arrays(n_threads, count))
    check(after, subgroup_size())


@pytest.mark.parametrize(("first", "second"), [("int8", "int8"), ("uint8", "uint8")])
def test_dot_product_of_four_bytes(first, second):
    x, y, out = buffer("x", "int32"), buffer("y", "int32"), buffer("out")

    def body(i):
        a = T.reinterpret(f"{first}x4", load(x, i))
        b = T.reinterpret(f"{second}x4", load(y, i))
        return tirx.BufferStore(out, T.dp4a(a, b, load(out, i)), [i])

    rng = np.random.default_rng(0)
    data = [rng.integers(-(2**31), 2**31, N).astype(np.int32) for _ in "xyo"]
    data[2] >>= 8
    ours = run(threads(body, x, y, out), *data)[2]
    products = data[0].view(first).astype(int) * data[1].view(second).astype(int)
    np.testing.assert_array_equal(ours, data[2] + products.reshape(-1, 4).sum(1))


def test_many_arguments_go_through_a_buffer():
    count = 20
    inputs = [buffer(f"x{number:02}") for number in range(count)]
    out = buffer("out")

    def body(i):
        total = load(inputs[0], i)
        for array in inputs[1:]:
            total = total + load(array, i)
        return tirx.BufferStore(out, total, [i])

    function = threads(body, *inputs, out)
    (kernel,) = checked(generate(lowered(function)))
    assert kernel.reflection["argument_buffer"]
    text = disassembled(kernel)
    for member in range(count + 1):  # no kernel writes its arguments
        assert f"OpMemberDecorate %arguments {member} NonWritable" in text
    data = [np.arange(N, dtype=np.int32) * number for number in range(count)]
    ours = run(function, *data, np.zeros(N, np.int32))[-1]
    np.testing.assert_array_equal(ours, sum(data))


@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int16", "int32", "int64", "float16", "float32", "float64", "bool"]
)
def test_scalar_arguments(dtype):
    out = buffer("out", "float64")
    flag = tirx.Var("aa", "int8")  # moves what follows off its natural place
    scalar = tirx.Var("b", dtype)

    def body(i):
        value = T.Cast("float64", scalar) + T.Cast("float64", flag) * T.Cast("float64", i)
        return tirx.BufferStore(out, value, [i])

    function = threads(body, flag, scalar, out)
    (kernel,) = unpack(generate(lowered(function)))
    sizes = {"bool": 4}
    entry = next(e for e in kernel.reflection["arguments"] if e["name"] == "b")
    size = sizes.get(dtype) or np.dtype(dtype).itemsize
    assert entry["offset"] % size == 0
    assert entry["dtype"] == dtype
    value = 1 if dtype == "bool" else 37
    ours = run(function, 5, value, np.zeros(N))[-1]
    np.testing.assert_array_equal(ours, value + 5.0 * np.arange(N))
