"""What a target says of its limits is held by the code that is generated for it."""

from __future__ import annotations

import pytest
import tvm
from support.spirv_programs import TARGET, bound, elementwise, generate, lowered
from tvm import tirx
from tvm.script import tirx as T
from tvm.tirx import stmt

from mxforge.errors import VulkanCodegenError


def generated(function: tirx.PrimFunc, **limits: int | bool) -> bytes:
    return generate(lowered(function), tvm.target.Target({**TARGET, **limits}))


def shared() -> tirx.PrimFunc:
    """Reverses 64 numbers through 256 bytes of shared memory."""
    i = tirx.Var("i", "int32")
    x = tirx.decl_buffer((64,), "int32", "x")
    staging = tirx.decl_buffer((64,), "int32", "staging", scope="shared")
    body = stmt.stmt_seq(
        stmt.AllocBuffer(staging),
        tirx.BufferStore(staging, tirx.BufferLoad(x, [i]), [i]),
        stmt.Evaluate(T.tvm_storage_sync("shared")),
        tirx.BufferStore(x, tirx.BufferLoad(staging, [63 - i]), [i]),
    )
    function = tirx.PrimFunc([x], bound(i, "threadIdx.x", 64, body))
    return function.with_attr("s_tir", True)


def test_shared_memory():
    assert generated(shared(), max_shared_memory_per_block=256)
    with pytest.raises(VulkanCodegenError, match=r"main_kernel holds 256 bytes .* 128 at most"):
        generated(shared(), max_shared_memory_per_block=128)


def test_threads():
    assert generated(shared(), max_threads_per_block=64)
    with pytest.raises(VulkanCodegenError, match="64 threads a block; expected 32 at most"):
        generated(shared(), max_threads_per_block=32)


def test_float16():
    half = elementwise([lambda x: x + x], ["float16"], "float16", 32)
    assert generated(half, supports_float16=True)
    with pytest.raises(VulkanCodegenError, match="float16"):
        generated(half, supports_float16=False)
