"""Every rule that the harness watches, broken once; beside it what is allowed and looks alike."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass

import numpy as np
import pytest
from support.simt.bodies import compile_body
from support.simt.harness import ORDERS, Fault
from support.simt.kernels import TARGETS, program_of, run_case
from support.simt.toolchain import CompileError

from mxforge.schedules import KERNELS

SHARED = "  __shared__ alignas(64) float a_ptr[64];\n  __shared__ alignas(64) float b_ptr[64];\n"
COMMIT = 'asm volatile("cp.async.commit_group;");'
COPY = f"""{SHARED}  unsigned to = __cvta_generic_to_shared(a_ptr + tx);
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" : : "r"(to), "l"(x + tx) : "memory");
  {COMMIT}
"""
WAIT = 'asm volatile("cp.async.wait_group 0;" : : : "memory");'
METAL = """
  threadgroup float a[64];
  {1} = x[tx];
  threadgroup_barrier(mem_flags::mem_{0});
  thread float got[1];
  got[0] = {2};
  if (got[0] < 0) y[tx] = 0;
"""
SCALED = """float d[4] = {{}};
  uint32_t a = {0}, zero = 0;
  uint16_t byte_a = {1}, lane_b = {2};
  asm volatile("mma.sync.aligned.m16n8k32.row.col.kind::mxf8f6f4.block_scale.scale_vec::1X\
.f32.e2m1.e4m3.f32.ue8m0 {{%0, %1, %2, %3}}, {{%4, %4, %4, %4}}, {{%5, %5}}, {{%0, %1, %2, %3}}, \
{{%5}}, {{%6, 0}}, {{%5}}, {{0, %7}};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a), "r"(zero), "h"(byte_a), "h"(lane_b));
  y[tx] = d[0] + d[1] + d[2] + d[3];
"""
LOCAL = "  alignas(64) float a_ptr[8];\n"


@dataclass(frozen=True)
class Body:
    name: str
    body: str
    fault: str = ""  # what the message says; "": there is none
    kind: str = "cuda"
    dtype: str = "float32"
    blocks: int = 1


BODIES = (
    # ---- scaled products
    Body("e2m1 in the middle of bytes", SCALED.format("0x3C3C3C3C", 0, 0)),
    Body("e2m1 at the end of bytes", SCALED.format("0x0F0F0F0F", 0, 0), "e2m1 .* in bits 2 to 5"),
    Body("selectors that differ", SCALED.format(0, "tx & 1", 0), "selectors .* same in all lanes"),
    Body("a lane of more than four", SCALED.format(0, 0, 4), "a lane of four"),
    # ---- bounds
    Body("in bounds", "y[tx] = x[63 - tx];"),
    Body(
        "read one past the end",
        "y[tx] = x[tx + 1];",
        r"read of 4 bytes at x\[64\], which has 64",
    ),
    Body("read before the begin", "y[tx] = x[tx - 1];", r"read of 4 bytes at x\[-1\]"),
    Body("write one past the end", "y[tx + 1] = x[tx];", r"write of 4 bytes at y\[64\]"),
    Body(
        "missing guard",
        "y[bx * 64 + tx + 1] = x[tx];",
        r"write of 4 bytes at y\[128\]",
        blocks=2,
    ),
    Body("far outside", "y[tx] = x[tx << 22];", r"read of 4 bytes at x\[\d+\], which has 64"),
    Body(
        "vector over the end",
        "if (tx < 16) *(float4*)(y + tx * 4) = *(float4*)(x + tx * 4 + 4);",
        r"read of 16 bytes at x\[64\]",
    ),
    Body(
        "shared, into its neighbour",
        f"{SHARED}  b_ptr[tx] = a_ptr[tx] = x[tx];\n  __syncthreads();\n  y[tx] = a_ptr[tx + 1];",
        r"read of 4 bytes at a\[64\], which has 64",
    ),
    Body("local", f"{LOCAL}  a_ptr[tx & 7] = x[tx];\n  y[tx] = a_ptr[tx & 7];"),
    Body(
        "local, one past the end",
        f"{LOCAL}  a_ptr[tx & 8] = x[tx];",
        "local array of 8 .*element 8",
    ),
    Body(
        "local vector over the end",
        f"{LOCAL}  *(float4*)(a_ptr + (tx & 3) * 4) = *(float4*)(x + 0);",
        "local array of 8 elements: 16 bytes at element (8|12)",
    ),
    # ---- alignment
    Body("aligned vector", "if (tx < 16) *(float4*)(y + tx * 4) = *(float4*)(x + tx * 4);"),
    Body(
        "misaligned vector",
        "if (tx < 8) *(float4*)(y + tx * 4) = *(float4*)(x + tx * 4 + 2);",
        r"misaligned read of 16 bytes at x\[\d+\]",
    ),
    # ---- inputs
    Body("write to an input", "x[tx] = 1;", "write to the input x"),
    # ---- races
    Body(
        "barrier between",
        f"{SHARED}  a_ptr[tx] = x[tx];\n  __syncthreads();\n  y[tx] = a_ptr[63 - tx];",
    ),
    Body(
        "no barrier between",
        f"{SHARED}  a_ptr[tx] = x[tx];\n  y[tx] = a_ptr[63 - tx];",
        r"race: .* a\[",
    ),
    Body(
        "written again without a barrier",
        f"{SHARED}  a_ptr[tx] = x[tx];\n  __syncthreads();\n"
        "  y[tx] = a_ptr[63 - tx];\n  a_ptr[tx] = 0;",
        r"race: .* a\[",
    ),
    Body("two threads write an element", "y[tx / 2] = tx;", r"race: .* writes y\[\d+\], .* wrote"),
    Body(
        "two blocks write an element",
        "y[tx] = bx;",
        "which a thread of another block wrote",
        blocks=2,
    ),
    Body(
        "two readers, one of which writes",
        f"{SHARED}  a_ptr[tx] = x[tx];\n  __syncthreads();\n"
        "  if (tx < 2) y[tx] = a_ptr[0];\n  if (tx == 0) a_ptr[0] = 0;",
        r"race: .* a\[0\]",
    ),
    Body("bytes beside each other", "y[tx] = x[tx];", dtype="uint8"),
    Body("two threads write a byte", "y[tx / 2] = x[tx];", r"race: .* y\[\d+\]", dtype="uint8"),
    Body("two threads write 16 bits", "y[tx / 2] = x[tx];", r"race: .* y\[\d+\]", dtype="int16"),
    Body("bytes of a word, each by a thread", "((unsigned char*)y)[tx] = 1;"),
    Body(
        "a byte of another thread's word",
        "y[tx] = 1; ((unsigned char*)y)[tx * 4 + 4 & 255] = 1;",
        "race",
    ),
    Body(
        "__syncwarp orders a warp",
        f"{SHARED}  a_ptr[tx] = x[tx];\n  __syncwarp();\n  y[tx] = a_ptr[tx ^ 31];",
    ),
    Body(
        "__syncwarp orders no other warp",
        f"{SHARED}  a_ptr[tx] = x[tx];\n  __syncwarp();\n  y[tx] = a_ptr[tx ^ 32];",
        r"race: .* a\[",
    ),
    Body(
        "a shuffle orders nothing",
        f"{SHARED}  a_ptr[tx] = x[tx];\n"
        "  __shfl_xor_sync(0xffffffff, tx, 1);\n  y[tx] = a_ptr[tx ^ 31];",
        r"race: .* a\[",
    ),
    # ---- meeting
    Body(
        "barrier in a branch",
        "if (tx < 32) __syncthreads();",
        "ended while others wait at a barrier",
    ),
    Body(
        "two barriers",
        "if (tx < 32) {\n    __syncthreads();\n  } else {\n    __syncthreads();\n  }",
        "wait at different barriers",
    ),
    Body(
        "half a warp",
        "if (tx % 32 < 16) y[tx] = __shfl_xor_sync(0xffff, x[tx], 1);\n"
        "  y[tx] = __shfl_xor_sync(0xffffffff, x[tx], 1);",
    ),
    Body(
        "a lane that does not come",
        "if (tx % 32 < 16) y[tx] = __shfl_xor_sync(0xffffffff, x[tx], 1);",
        "waits in __shfl_xor_sync for lanes that do not come",
    ),
    Body(
        "a lane outside of its mask",
        "y[tx] = __shfl_xor_sync(0xffff, x[tx], 1);",
        r"lane \d+ is not in its own mask",
    ),
    # ---- cp.async
    Body("copied, waited for", f"{COPY}  {WAIT}\n  __syncthreads();\n  y[tx] = a_ptr[63 - tx];"),
    Body("copied, not waited for", f"{COPY}  y[tx] = a_ptr[tx];", "before the cp.async of thread"),
    Body(
        "copied, not waited for, with a barrier",
        f"{COPY}  __syncthreads();\n  y[tx] = a_ptr[63 - tx];",
        "before the cp.async of thread",
    ),
    Body("copied, no barrier", f"{COPY}  {WAIT}\n  y[tx] = a_ptr[63 - tx];", r"race: .* a\["),
    Body(
        "waited for all but an empty group",
        f"{COPY}  {COMMIT}\n  {WAIT.replace('0', '1')}\n  y[tx] = a_ptr[tx];\n",
    ),
    Body(
        "waited for all but the newest",
        f"{COPY}  {WAIT.replace('0', '1')}\n  y[tx] = a_ptr[tx];\n",
        "before the cp.async of thread",
    ),
    Body(
        "copied over what others read",
        f"{SHARED}  a_ptr[tx] = 0;\n  __syncthreads();\n  y[tx] = a_ptr[63 - tx];\n"
        + COPY.removeprefix(SHARED),
        r"race: .* writes a\[|reads a\[\d+\] before the cp.async",
    ),
    # ---- Metal: a barrier orders the memories that it names
    Body("Metal, shared", METAL.format("threadgroup", "a[tx]", "a[63 - tx]"), kind="metal"),
    Body("Metal, no memory", METAL.format("none", "a[tx]", "a[63 - tx]"), r"race: .* a\[", "metal"),
    Body(
        "Metal, other memory",
        METAL.format("device", "a[tx]", "a[63 - tx]"),
        r"race: .* a\[",
        "metal",
    ),
    Body("Metal, device", METAL.format("device", "y[tx]", "y[63 - tx]"), kind="metal"),
    Body(
        "Metal, device by shared",
        METAL.format("threadgroup", "y[tx]", "y[63 - tx]"),
        "race",
        "metal",
    ),
)  # fmt: skip


@pytest.mark.parametrize("body", BODIES, ids=lambda body: body.name)
def test_fault_is_found_and_nothing_else(simt, body):
    program = compile_body(simt, body.kind, body.body, body.dtype, body.blocks)
    x = np.arange(64 * body.blocks).astype(body.dtype)
    for order in ORDERS:
        if body.fault:
            with pytest.raises(Fault, match=body.fault):
                simt.run(program, [x, np.zeros_like(x)], {1}, order)
        else:
            simt.run(program, [x, np.zeros_like(x)], {1}, order)


@pytest.mark.parametrize("kind", TARGETS)
def test_guard_of_a_kernel_that_lets_one_thread_too_many_in(simt, kind):
    kernel = KERNELS["f32_rms_norm"]
    case = kernel.cases[0]

    def edit(text: str) -> str:
        text, edits = re.subn(r"(if \(.*) < ((arg\.)?n)\) \{", r"\1 < \2 + 1) {", text)
        assert edits == 1
        return text

    schedule = kernel.schedules[-1]  # a thread a token
    program = program_of(simt, kind, kernel, case, schedule, edit)
    with pytest.raises(Fault, match=r"read of 4 bytes at x\[\d+\], which has"):
        run_case(simt, program, kernel, case, schedule)


@pytest.mark.parametrize("declared", [SHARED, LOCAL])
def test_what_nobody_wrote_is_no_number(simt, declared):
    program = compile_body(simt, "cuda", f"{declared}  y[tx] = x[tx] + a_ptr[tx & 7];")
    x = np.ones(64, np.float32)
    _, y = simt.run(program, [x, x], {1})
    assert not (np.abs(y) < 1e30).any()


def test_shared_memory_of_a_block_is_not_the_last_ones(simt):
    body = SHARED + "  if (bx == 0) a_ptr[tx] = 1;\n  y[bx * 64 + tx] = a_ptr[tx];"
    program = compile_body(simt, "cuda", body, blocks=2)
    x = np.zeros(128, np.float32)
    _, y = simt.run(program, [x, x], {1}, "forward")
    assert (y[:64] == 1).all()
    assert np.isnan(y[64:]).all()


def test_unknown_instruction_says_its_name(simt):
    with pytest.raises(CompileError, match="barrier_cluster_wait"):
        compile_body(simt, "cuda", 'asm volatile("barrier.cluster.wait;");')


@pytest.mark.skipif(shutil.which("addr2line") is None, reason="addr2line is missing")
def test_report_shows_the_statement(simt):
    program = compile_body(simt, "cuda", "y[tx] = x[tx];\n  y[tx] = x[tx + 9];")
    x = np.zeros(64, np.float32)
    with pytest.raises(Fault, match=r"\n    y\[tx\] = x\[tx \+ 9\];$"):
        simt.run(program, [x, x], {1})


def test_run_after_a_fault_is_as_any_other(simt):
    bad = compile_body(simt, "cuda", "y[tx + 1] = x[tx];")
    good = compile_body(simt, "cuda", "y[tx] = x[63 - tx];")
    x = np.arange(64, dtype=np.float32)
    with pytest.raises(Fault, match="write of 4 bytes"):
        simt.run(bad, [x, x], {1})
    _, y = simt.run(good, [x, x], {1})
    np.testing.assert_array_equal(y, x[::-1])
