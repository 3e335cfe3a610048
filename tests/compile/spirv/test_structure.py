"""What the generated code looks like: addresses, alignment, barriers, capabilities, layout."""

from __future__ import annotations

import ctypes
import re

import ml_dtypes
import numpy as np
import pytest
import tvm
import tvm_ffi
from support.spirv_programs import (
    bound,
    checked,
    device,
    disassembled,
    elementwise,
    generate,
    kernels,
    lowered,
    run,
    unpack,
)
from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx import stmt

from mxforge.compile.spirv import KernelCode, build, pack, register


def only(function: tirx.PrimFunc) -> tuple[KernelCode, str]:
    (kernel,) = kernels(function)
    return kernel, disassembled(kernel)


def vector_copy(shift: int, lanes: int, dtype: str = "float32", n: int = 1024) -> tirx.PrimFunc:
    """out[4i…] = x[4i + shift…]."""
    i = tirx.Var("i", "int32")
    x, out = tirx.decl_buffer((n,), dtype, "x"), tirx.decl_buffer((n,), dtype, "out")
    value = tirx.BufferLoad(x, [tirx.Ramp(i * lanes + shift, 1, lanes)])
    store = tirx.BufferStore(out, value, [tirx.Ramp(i * lanes, 1, lanes)])
    body = bound(i, "blockIdx.x", 16, store)
    return tirx.PrimFunc([x, out], body).with_attr("s_tir", True)


@pytest.mark.parametrize(
    ("shift", "lanes", "dtype", "loads"),
    [
        (0, 4, "float32", ["v4float 16"]),
        (4, 4, "float32", ["v4float 16"]),
        (1, 4, "float32", ["float 4"] * 4),  # aligned to 4 bytes only
        (2, 4, "float32", ["float 4"] * 4),
        (2, 2, "float32", ["v2float 8"]),
        (0, 3, "float32", ["float 4"] * 3),  # 12 bytes are no power of two
        (0, 8, "float16", ["v4half 8", "v4half 8"]),
        (4, 8, "float16", ["v4half 8", "v4half 8"]),
        (2, 8, "float16", ["half 2"] * 8),
        (0, 8, "uint8", ["v4uchar 4", "v4uchar 4"]),
    ],
)
def test_vector_loads_only_where_alignment_is_proven(shift, lanes, dtype, loads):
    kernel, text = only(vector_copy(shift, lanes, dtype))
    found = re.findall(r"OpLoad %(\w+) %\w+ Aligned (\d+)", text)
    assert found == [tuple(load.split()) for load in loads]
    # The launch is refused where an address is less aligned than the accesses through it.
    assert alignment_of(kernel, "x") == max(int(alignment) for _, alignment in found)
    stored = re.findall(r"OpStore %\w+ %\w+ Aligned (\d+)", text)
    assert alignment_of(kernel, "out") == max(map(int, stored))


def alignment_of(kernel: KernelCode, name: str) -> int:
    """What has to divide the address that is passed for a pointer."""
    entries = kernel.reflection["arguments"]
    (entry,) = (entry for entry in entries if entry["name"].removesuffix("_ptr") == name)
    return int(entry["alignment"])


def test_alignment_of_what_only_atomics_touch():
    i = tirx.Var("i", "int32")
    x = tirx.decl_buffer((64,), "int64", "x")
    place = tirx.address_of(tirx.BufferLoad(x, [i]))
    call = T.call_extern("int64", "atomicAdd", place, tirx.const(1, "int64"))
    function = tirx.PrimFunc([x], bound(i, "threadIdx.x", 64, stmt.Evaluate(call)))
    kernel, _ = only(function.with_attr("s_tir", True))
    assert alignment_of(kernel, "x") == 8


def test_promised_alignment_of_a_buffer_bounds_the_accesses():
    i = tirx.Var("i", "int32")
    x = tirx.decl_buffer((64,), "float32", "x", data_alignment=4)
    out = tirx.decl_buffer((64,), "float32", "out")
    ramp = tirx.Ramp(i * 4, 1, 4)
    body = bound(i, "blockIdx.x", 16, tirx.BufferStore(out, tirx.BufferLoad(x, [ramp]), [ramp]))
    kernel, text = only(tirx.PrimFunc([x, out], body).with_attr("s_tir", True))
    assert (alignment_of(kernel, "x"), alignment_of(kernel, "out")) == (4, 16)
    assert text.count("Aligned 4") == 4
    assert text.count("Aligned 16") == 1


def test_offsets_have_64_bits_where_a_buffer_may_exceed_4_gib():
    def copy(n):
        @T.prim_func(s_tir=True)
        def main(a: T.handle, b: T.handle):
            x = T.match_buffer(a, (n,), "float32")
            y = T.match_buffer(b, (n,), "float32")
            for i in T.thread_binding(n, thread="blockIdx.x"):
                with T.sblock("item"):
                    v = T.axis.spatial(n, i)
                    y[v] = x[v] + T.float32(1)

        return main

    _, small = only(copy(2**20))
    assert re.search(r"OpIMul %uint ", small)
    assert not re.search(r"OpIMul %ulong ", small)
    # Its index still fits 32 bits, its offset in bytes does not.
    _, large = only(copy(2**30 + 64))
    assert re.search(r"OpIMul %ulong ", large)
    assert not re.search(r"OpIMul %uint ", large)
    symbolic = tirx.Var("n", "int64")
    _, unknown = only(copy_of(symbolic))
    assert re.search(r"OpIMul %ulong ", unknown)


def copy_of(n: tirx.Var) -> tirx.PrimFunc:
    @T.prim_func(s_tir=True)
    def main(a: T.handle, b: T.handle):
        n = T.int64()
        x = T.match_buffer(a, (n,), "float32")
        y = T.match_buffer(b, (n,), "float32")
        for i in T.thread_binding(n, thread="blockIdx.x"):
            with T.sblock("item"):
                v = T.axis.spatial(n, i)
                y[v] = x[v] + T.float32(1)

    return main


def barrier(in_place: bool) -> tirx.PrimFunc:
    i = tirx.Var("i", "int32")
    x, out = tirx.decl_buffer((64,), "int32", "x"), tirx.decl_buffer((64,), "int32", "out")
    source = out if in_place else x
    staging = tirx.decl_buffer((64,), "int32", "staging", scope="shared")
    body = stmt.stmt_seq(
        stmt.AllocBuffer(staging),
        tirx.BufferStore(staging, tirx.BufferLoad(source, [i]), [i]),
        stmt.Evaluate(T.tvm_storage_sync("shared")),
        tirx.BufferStore(out, tirx.BufferLoad(staging, [63 - i]), [i]),
    )
    function = tirx.PrimFunc([x, out], bound(i, "threadIdx.x", 64, body))
    return function.with_attr("s_tir", True)


@pytest.mark.parametrize("in_place", [False, True])
def test_barriers_order_shared_memory_and_global(in_place):
    kernel, text = only(barrier(in_place))
    (operands,) = re.findall(r"OpControlBarrier %(\w+) %(\w+) %(\w+)", text)
    assert operands == (
        "uint_2",
        "uint_2",
        "uint_328",
    )  # acquire, release, workgroup and uniform memory
    reads = {e["name"]: (e["read"], e["write"]) for e in kernel.reflection["arguments"]}
    assert reads["out_ptr"] == (in_place, True)
    # What is read and written may go from thread to thread.
    assert ("Coherent" in text) == in_place


def accesses(text: str) -> dict[str, list[bool]]:
    """Loads and stores of global memory, in order: whether its member is said not to be written."""
    promised = set(re.findall(r"OpMemberDecorate (%\w+) 0 NonWritable", text))
    blocks = dict(re.findall(r"(%\w+) = OpTypePointer PhysicalStorageBuffer (%\w+)", text))
    converted = dict(re.findall(r"(%\w+) = OpConvertUToPtr (%\w+)", text))
    members = dict(re.findall(r"(%\w+) = OpAccessChain %\w+ (%\w+) ", text))
    found: dict[str, list[bool]] = {"load": [], "store": [], "atomic": []}
    for line in text.splitlines():
        if access := re.search(r"Op(Load|Store|Atomic)\w*(?: %uint| %float)? (%\w+)", line):
            kind, pointer = access.groups()
            if members.get(pointer) in converted:  # and not a thread's index
                found[kind.lower()].append(blocks[converted[members[pointer]]] in promised)
    return found


@pytest.mark.parametrize("in_place", [False, True])
def test_memory_is_said_not_to_be_written_where_nothing_writes_it(in_place):
    _, text = only(barrier(in_place))
    assert accesses(text) == {"load": [not in_place], "store": [False], "atomic": []}


def test_memory_of_one_type_is_told_apart_by_parameter():
    """out = x + y + out: of the three loads of one type only those of x and y cannot change."""
    i = tirx.Var("i", "int32")
    x, y, out = (tirx.decl_buffer((64,), "float32", name) for name in ("x", "y", "out"))
    total = tirx.BufferLoad(x, [i]) + tirx.BufferLoad(y, [i]) + tirx.BufferLoad(out, [i])
    body = bound(i, "threadIdx.x", 64, tirx.BufferStore(out, total, [i]))
    _, text = only(tirx.PrimFunc([x, y, out], body).with_attr("s_tir", True))
    assert accesses(text) == {"load": [True, True, False], "store": [False], "atomic": []}


def test_memory_is_not_said_to_be_unwritten_where_parameters_may_share_it():
    """Without `tirx.noalias` the store through one parameter may be what another then reads."""
    module = lowered(barrier(False))
    for promised in (True, False):
        functions = {
            name: function.with_attr("tirx.noalias", promised)
            for name, function in module.functions.items()
        }
        (kernel,) = checked(generate(tvm.IRModule(functions)))
        assert accesses(disassembled(kernel))["load"] == [promised]


def test_memory_that_atomic_operations_write_is_not_said_to_be_unwritten():
    i = tirx.Var("i", "int32")
    x, out = tirx.decl_buffer((64,), "int32", "x"), tirx.decl_buffer((64,), "int32", "out")
    address = T.address_of(tirx.BufferLoad(x, [i]))
    added = T.call_extern("int32", "atomicAdd", address, tirx.const(1, "int32"))
    body = stmt.stmt_seq(
        stmt.Evaluate(added), tirx.BufferStore(out, tirx.BufferLoad(x, [63 - i]), [i])
    )
    function = tirx.PrimFunc([x, out], bound(i, "threadIdx.x", 64, body)).with_attr("s_tir", True)
    _, text = only(function)
    assert accesses(text) == {"load": [False], "store": [False], "atomic": [False]}


def test_capabilities_and_features_only_when_used():
    kernel, text = only(elementwise([lambda x: x + x], ["float32"], "float32", 32))
    assert re.findall(r"OpCapability (\w+)", text) == [
        "Shader",
        "Int64",
        "PhysicalStorageBufferAddresses",
    ]
    assert "OpExtension" not in text
    assert kernel.reflection["requirements"] == {
        "features": ["bufferDeviceAddress", "shaderInt64"],
        "extensions": [],
        "subgroup_operations": [],
        "subgroup_size": None,
        "matrices": [],
    }
    kernel, text = only(elementwise([lambda x: x + x], ["float16"], "float16", 32))
    assert kernel.reflection["requirements"]["features"] == [
        "bufferDeviceAddress",
        "shaderFloat16",
        "shaderInt64",
        "storageBuffer16BitAccess",
    ]


def widened(x):
    return tirx.Cast("float32", x)


@pytest.mark.parametrize(
    ("operation", "inputs", "output", "arithmetic"),
    [
        (lambda x: widened(x) * widened(x), ["float16"], "float32", False),
        (lambda x: tirx.Cast("float16", x + x), ["float32"], "float16", False),
        (lambda x: tirx.Cast("float16", T.exp(widened(x))), ["float16"], "float16", False),
        (lambda x: x, ["float16"], "float16", False),
        (lambda x: widened(T.reinterpret("float16", x)), ["uint16"], "float32", False),
        (lambda x: T.reinterpret("float16", x), ["uint16"], "float16", True),
        (lambda x: x + x, ["float16"], "float16", True),
        (lambda x: T.max(x, tirx.const(0, "float16")), ["float16"], "float16", True),
        (lambda x: tirx.Cast("int32", x < x), ["float16"], "int32", True),
        (lambda x: T.reinterpret("uint16", x), ["float16"], "uint16", True),
        (lambda x: tirx.const(1, "float16"), ["float32"], "float16", True),
    ],
)
@pytest.mark.parametrize("lanes", [1, 4, 8])
def test_float16_that_is_only_stored_needs_no_arithmetic(
    operation, inputs, output, arithmetic, lanes
):
    kernel, text = only(elementwise([operation], inputs, output, 256, lanes))
    features = kernel.reflection["requirements"]["features"]
    assert "storageBuffer16BitAccess" in features
    assert ("shaderFloat16" in features) == ("OpCapability Float16" in text) == arithmetic


def test_float16_in_shared_memory_needs_arithmetic():
    i = tirx.Var("i", "int32")
    x = tirx.decl_buffer((64,), "float16", "x")
    staging = tirx.decl_buffer((64,), "float16", "staging", scope="shared")
    body = stmt.stmt_seq(
        stmt.AllocBuffer(staging),
        tirx.BufferStore(staging, tirx.BufferLoad(x, [i]), [i]),
        stmt.Evaluate(T.tvm_storage_sync("shared")),
        tirx.BufferStore(x, tirx.BufferLoad(staging, [63 - i]), [i]),
    )
    function = tirx.PrimFunc([x], bound(i, "threadIdx.x", 64, body)).with_attr("s_tir", True)
    kernel, _ = only(function)
    assert "shaderFloat16" in kernel.reflection["requirements"]["features"]


def test_dead_bindings_leave_no_trace():
    i, dead = tirx.Var("i", "int32"), tirx.Var("dead", "float16")
    half, out = tirx.decl_buffer((8,), "float16", "half"), tirx.decl_buffer((8,), "int32", "out")
    body = stmt.stmt_seq(stmt.Bind(dead, tirx.BufferLoad(half, [i])), tirx.BufferStore(out, i, [i]))
    function = tirx.PrimFunc([half, out], bound(i, "threadIdx.x", 8, body))
    kernel, text = only(function.with_attr("s_tir", True))
    assert "Float16" not in text
    assert not any(entry["read"] for entry in kernel.reflection["arguments"])


def test_block_size_known_at_launch_only():
    @T.prim_func(s_tir=True)
    def main(a: T.handle):
        n = T.int64()
        x = T.match_buffer(a, (n,), "int32")
        for i in T.thread_binding(1, thread="blockIdx.x"):
            for t in T.thread_binding(n, thread="threadIdx.x"):
                with T.sblock("item"):
                    v = T.axis.spatial(n, i * n + t)
                    x[v] = T.Cast("int32", v) * 3

    kernel, text = only(main)
    assert kernel.reflection["local_size"] == [0, 1, 1]
    assert "OpExecutionMode" not in text
    assert re.search(r"SpecId 0", text)
    assert re.search(r"BuiltIn WorkgroupSize", text)
    for n in (3, 17):
        np.testing.assert_array_equal(run(main, np.zeros(n, np.int32))[0], np.arange(n) * 3)


def test_arguments_lie_in_order_naturally_aligned():
    kernel, _ = only(elementwise([lambda x, y: x + y], ["float32", "float32"], "float32", 32))
    reflection = kernel.reflection
    assert [e["offset"] for e in reflection["arguments"]] == [0, 8, 16]
    assert reflection["argument_bytes"] == 24
    assert not reflection["argument_buffer"]
    assert reflection["launch_params"] == ["blockIdx.x", "threadIdx.x"]
    assert reflection["local_size"] == [32, 1, 1]


def test_bfloat16_rounds_to_nearest_even_and_keeps_nan():
    """Casts of the generator's own: TVM's lowering would replace them before it sees them."""
    n = 4096
    i = tirx.Var("i", "int32")
    wide = tirx.Var("wide", tvm.ir.PointerType(tvm.ir.PrimType("float32"), "global"))
    bits = tirx.Var("bits", tvm.ir.PointerType(tvm.ir.PrimType("bfloat16"), "global"))
    x = tirx.decl_buffer((n,), "float32", "x", data=wide)
    y = tirx.decl_buffer((n,), "bfloat16", "y", data=bits)
    narrowed = tirx.BufferStore(y, tirx.Cast("bfloat16", tirx.BufferLoad(x, [i])), [i])
    widened = tirx.BufferStore(x, tirx.Cast("float32", tirx.BufferLoad(y, [i])), [i])
    body = stmt.stmt_seq(
        stmt.DeclBuffer(x, data=wide),
        stmt.DeclBuffer(y, data=bits),
        bound(i, "blockIdx.x", n, stmt.stmt_seq(narrowed, widened)),
    )
    function = tirx.PrimFunc([wide, bits], body).with_attrs(
        {"global_symbol": "main_kernel", "tirx.kernel_launch_params": ["blockIdx.x"]}
    )
    module = tvm.IRModule({"main_kernel": function})
    (kernel,) = checked(generate(module))
    assert "OpFConvert" not in disassembled(kernel)
    assert "storageBuffer16BitAccess" in kernel.reflection["requirements"]["features"]

    where = device()
    data = np.random.default_rng(0).integers(0, 2**32, n, dtype=np.uint32).view(np.float32)
    data[:5] = np.nan, np.inf, -np.inf, 3.4e38, 1 + 2.0**-8
    floats = tvm.runtime.tensor(data, where)
    narrow = tvm.runtime.tensor(np.zeros(n, np.uint16), where)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (floats, narrow)]
    build(module)["main_kernel"](*pointers, n)
    where.sync()
    expected = data.astype(ml_dtypes.bfloat16)
    number = ~np.isnan(data)
    np.testing.assert_array_equal(narrow.numpy()[number], expected.view(np.uint16)[number])
    normal = abs(data) > 2.0**-126
    np.testing.assert_array_equal(
        floats.numpy()[normal | ~number], expected.astype(np.float32)[normal | ~number]
    )


def test_module_format_round_trip():
    function = elementwise([lambda x: x * x], ["float32"], "float32", 32)
    data = generate(lowered(function))
    assert data[:8] == b"MXFSPIRV"
    assert pack(unpack(data)) == data
    length = int.from_bytes(data[12:16], "little")
    assert (16 + length) % 4 == 0


def test_registration_steps_back_unless_asked():
    name = "target.build.vulkan"
    before = tvm_ffi.get_global_func(name, allow_missing=True)
    try:
        tvm_ffi.register_global_func(name, lambda module, target: None, override=True)
        theirs = tvm_ffi.get_global_func(name)
        assert not register(prefer=False)
        assert tvm_ffi.get_global_func(name).same_as(theirs)
        assert register(prefer=True)
    finally:
        tvm_ffi.register_global_func(name, before or build, override=True)
