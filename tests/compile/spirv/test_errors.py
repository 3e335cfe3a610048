"""What the generator refuses, and that it says where and what to do."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from support.spirv_programs import bound, device, elementwise, generate, lowered, run
from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx import stmt

from mxforge.compile.spirv import unpack
from mxforge.errors import VulkanCodegenError


def refused(function: tirx.PrimFunc, *words: str) -> None:
    """The error names the kernel and holds every one of `words`."""
    with pytest.raises(VulkanCodegenError) as caught:
        generate(lowered(function))
    for word in ("main_kernel", *words):
        assert word in str(caught.value)


def test_error_keeps_its_class_on_the_way_through_tvm():
    device()
    with pytest.raises(VulkanCodegenError, match="printf"):
        run(
            one(lambda x: tirx.call_pure_extern("float32", "printf", x)), np.zeros(32), np.zeros(32)
        )


def one(operation, dtype: str = "float32", output: str = "float32") -> tirx.PrimFunc:
    return elementwise([operation], [dtype], output, 32)


def device_function(body, *params) -> tvm.IRModule:
    """A function as lowering leaves it, for what TVM's lowering would refuse first."""
    function = tirx.PrimFunc(list(params), body).with_attr("global_symbol", "main_kernel")
    return tvm.IRModule({"main_kernel": function})


def test_unknown_external_function():
    refused(one(lambda x: tirx.call_pure_extern("float32", "printf", x)), "printf", "math function")


def test_math_function_of_a_dtype_it_is_not_there_for():
    refused(one(T.exp, "float64", "float64"), "exp", "float64", "Cast to float32")


def test_operator_of_another_backend():
    call = tirx.call_intrin("float32", "tirx.cuda.func_call", "f")
    with pytest.raises(VulkanCodegenError, match=r"tirx\.cuda\.func_call"):
        generate(device_function(tirx.Evaluate(call)))


def test_intrinsic_of_llvm():
    refused(
        one(lambda x: T.call_llvm_pure_intrin("float32", "llvm.sqrt.f32", x)), "intrinsic of LLVM"
    )


def test_parameter_that_is_not_global_memory():
    pointer = tirx.Var("staging", tvm.ir.PointerType(tvm.ir.PrimType("float32"), "shared"))
    with pytest.raises(VulkanCodegenError) as caught:
        generate(device_function(tirx.Evaluate(0), pointer))
    for word in ("main_kernel", "staging", "shared", "T.sblock_alloc_buffer"):
        assert word in str(caught.value)


def test_dynamic_shared_memory():
    @T.prim_func(s_tir=True)
    def main(x: T.Buffer((64,), "float32")):
        for b in T.thread_binding(1, thread="blockIdx.x"):
            for t in T.thread_binding(64, thread="threadIdx.x"):
                with T.sblock("item"):
                    v = T.axis.spatial(64, b * 64 + t)
                    staging = T.sblock_alloc_buffer((64,), "float32", scope="shared.dyn")
                    staging[v] = x[v]
                    x[v] = staging[63 - v]

    refused(main, "dyn", "scope='shared'")


def test_thread_index_that_vulkan_lacks():
    index = tirx.Var("i", "int32")
    with pytest.raises(VulkanCodegenError, match="clusterCtaIdx"):
        generate(device_function(bound(index, "clusterCtaIdx.x", 4, tirx.Evaluate(index + 1))))


def test_two_extents_of_one_thread_index():
    i, j = tirx.Var("i", "int32"), tirx.Var("j", "int32")
    inner = bound(j, "threadIdx.x", 16, tirx.Evaluate(j + i))
    with pytest.raises(VulkanCodegenError, match="extents 32 and 16"):
        generate(device_function(bound(i, "threadIdx.x", 32, inner)))


def test_barrier_between_blocks():
    sync = tirx.Evaluate(T.tvm_storage_sync("global"))
    with pytest.raises(VulkanCodegenError, match="'global'"):
        generate(device_function(sync))


def test_break_outside_of_loops():
    with pytest.raises(VulkanCodegenError, match="break"):
        generate(device_function(stmt.Break()))


def test_variable_without_a_definition():
    buffer = tirx.decl_buffer((4,), "int32", "out")
    body = tirx.BufferStore(buffer, tirx.Var("ghost", "int32"), [0])
    with pytest.raises(VulkanCodegenError, match="out|ghost"):
        generate(device_function(body))


def test_type_that_vulkan_lacks():
    value = tirx.Cast("float8_e4m3fn", tirx.const(1.0, "float32"))
    with pytest.raises(VulkanCodegenError, match="float8_e4m3fn"):
        generate(device_function(tirx.Evaluate(value)))


@pytest.mark.parametrize(
    "data", [b"", b"MXFSPIRV", b"not a module of kernels", b"MXFSPIRV" + bytes([1, 0, 0, 0] * 2)]
)
def test_bytes_of_another_format(data):
    with pytest.raises(ValueError, match=r"expected|at least"):
        unpack(data)


def test_assertions_write_nothing():
    # TVM 0.27's constructor takes the two in this order, whatever it calls them.
    check = stmt.AssertStmt(tirx.const(False, "bool"), tvm.ir.StringImm("ValueError"), [])
    (kernel,) = unpack(generate(device_function(check)))
    (empty,) = unpack(generate(device_function(tirx.Evaluate(0))))
    assert kernel.spirv == empty.spirv
    assert np.frombuffer(kernel.spirv, "<u4")[0] == 0x07230203
