"""Hopper's instructions (sm_90a): bulk copies that arrive at an mbarrier, and wgmma of bfloat16.

wgmma m64nNk16 (PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate"): a warp of four
has 16 rows. Its registers of A are those of an mma m16n8k16, and of D those of N/8 of them beside
each other. B [N, 16] is in shared memory: of a column 64 inputs, its 128 bytes, side by side;
eight columns from a multiple of 1024 bytes on. Of column c, the 16 bytes number p are in the place
p ^ c % 8 of eight.

A group of wgmma is under way from `begin_products` and `end_group` until `wait_groups`. Meanwhile
registers of A stay as they are, and sums are not touched.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from ..kernel import T

WARPGROUP = 4  # warps
COLUMN_BYTES, TOGETHER = 128, 8  # of B in shared memory; columns whose places repeat

_HEAD = "__forceinline__ __device__"
_PREPARE = f"""{_HEAD} void mx_prepare_arrivals(uint64_t* barriers, int count) {{
  for (int i = 0; i < count; i++)
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :
                 : "r"((uint32_t)__cvta_generic_to_shared(barriers + i)) : "memory");
  asm volatile("fence.proxy.async.shared::cta;" : : : "memory");  // bulk copies see them too
}}
"""
_COPY = f"""{_HEAD} void mx_bulk_copy(void* to, const void* from, int bytes, uint64_t* barrier) {{
  uint32_t at = (uint32_t)__cvta_generic_to_shared(barrier);
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :
               : "r"(at), "r"(bytes) : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" :
      : "r"((uint32_t)__cvta_generic_to_shared(to)), "l"(from), "r"(bytes), "r"(at) : "memory");
}}
"""
_ARRIVAL = f"""{_HEAD} void mx_wait_for_arrival(uint64_t* barrier, int phase) {{
  uint32_t at = (uint32_t)__cvta_generic_to_shared(barrier), done = 0;
  while (!done)
    asm volatile("{{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }}"
                 : "=r"(done) : "r"(at), "r"(phase & 1) : "memory");
}}
"""  # noqa: E501
_DESCRIPTOR = f"""{_HEAD} uint64_t mx_descriptor(const void* columns) {{
  uint64_t at = (uint32_t)__cvta_generic_to_shared(columns) >> 4;
  // Eight columns on are {TOGETHER * COLUMN_BYTES} bytes; the swizzle of 128 bytes.
  return at | 1 << 16 | (uint64_t){TOGETHER * COLUMN_BYTES >> 4} << 32 | (uint64_t)1 << 62;
}}
"""


@cache
def _multiply(columns: int) -> str:
    sums = columns // 2
    listed = ", ".join(f"%{i}" for i in range(sums))
    a = ", ".join(f"%{sums + i}" for i in range(4))
    out = ", ".join(f'"+f"(d[{i}])' for i in range(sums))
    given = ", ".join(f'"r"(a[{i}])' for i in range(4))
    return f"""{_HEAD} void mx_wgmma_{columns}(float* d, const uint32_t* a, uint64_t b) {{
  asm volatile("{{ .reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16 {{{listed}}}, {{{a}}}, %{sums + 4}, p, 1, 1, 0; }}"
               : {out} : {given}, "l"(b));
}}
"""  # noqa: E501


def _order(name: str, instruction: str) -> Any:
    source = f'{_HEAD} void {name}() {{ asm volatile("wgmma.{instruction};" : : : "memory"); }}\n'
    return T.evaluate(T.cuda.func_call(name, source_code=source))


def prepare_arrivals(barriers: Any, count: int) -> Any:
    """mbarriers u64, from an element of shared memory on, for a copy a phase. One thread does it;
    a barrier of the block has to follow."""
    return T.evaluate(
        T.cuda.func_call("mx_prepare_arrivals", T.address_of(barriers), count, source_code=_PREPARE)
    )


def bulk_copy(to: Any, start: Any, size: Any, barrier: Any) -> Any:
    """So many bytes from `start` on, an element of a buffer, to `to` on, in shared memory: all are
    multiples of 16. One thread does it; they arrive at `barrier`, of which they end a phase."""
    return T.evaluate(
        T.cuda.func_call(
            "mx_bulk_copy", T.address_of(to), T.address_of(start), size, T.address_of(barrier),
            source_code=_COPY,
        )
    )  # fmt: skip


def wait_for_arrival(barrier: Any, phase: Any) -> Any:
    """What arrived in a phase of `barrier`, by its number, can be read from here on."""
    return T.evaluate(
        T.cuda.func_call("mx_wait_for_arrival", T.address_of(barrier), phase, source_code=_ARRIVAL)
    )


def descriptor(columns: Any) -> Any:
    """u64 that says where columns begin: an element of shared memory. 16 inputs on is 2 more."""
    return T.cuda.func_call(
        "mx_descriptor", T.address_of(columns), source_code=_DESCRIPTOR, return_type="uint64"
    )


def multiply(columns: int, d: Any, a: Any, b: Any) -> Any:
    """d f32 [columns/2] += a u32 [4] · the columns that the descriptor b says; d and a are elements
    from which on they are."""
    return T.evaluate(
        T.cuda.func_call(
            f"mx_wgmma_{columns}", T.address_of(d), T.address_of(a), b,
            source_code=_multiply(columns),
        )
    )  # fmt: skip


def begin_products() -> Any:
    """Before the first wgmma of a group: registers are as they were written."""
    return _order("mx_begin_products", "fence.sync.aligned")


def end_group() -> Any:
    return _order("mx_end_group", "commit_group.sync.aligned")


def wait_groups(left: int) -> Any:
    """Until all groups have ended but so many of the newest."""
    return _order(f"mx_wait_groups_{left}", f"wait_group.sync.aligned {left}")
