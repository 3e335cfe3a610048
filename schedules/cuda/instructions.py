"""PTX instructions as T.inline, named after what they do. sm_80 and later.

Fragments of mma m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16"), lane = 4·g + t: registers
of a hold (row g | g+8 by turns, inputs 2t, 2t+1), then the same with inputs + 8; b: column g,
inputs 2t, 2t+1 and 2t+8, 2t+9; d: (row g, columns 2t, 2t+1), (row g+8, columns 2t, 2t+1). Inputs
may be numbered in any order that is the same for a and b.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ..kernel import T

LANES = 32
ALL_LANES = 0xFFFFFFFF
MMA_ROWS, MMA_COLUMNS, MMA_INPUTS = 16, 8, 16


def _mma(kind: str) -> Callable[..., Any]:
    """The T.inline of mma.sync of a shape and types."""
    instruction = f"mma.sync.aligned.{kind}"

    @T.inline
    def mma(d, d_at, a, a_at, b, b_at):
        """d [4] += a [4] · b [2], each from an index on."""
        T.ptx[instruction](
            d[d_at], d[d_at + 1], d[d_at + 2], d[d_at + 3],
            a[a_at], a[a_at + 1], a[a_at + 2], a[a_at + 3],
            b[b_at], b[b_at + 1],
            d[d_at], d[d_at + 1], d[d_at + 2], d[d_at + 3],
        )  # fmt: skip

    return mma


# Of pairs as uint32, to f32.
mma_bf16 = _mma("m16n8k16.row.col.f32.bf16.bf16.f32")
mma_f16 = _mma("m16n8k16.row.col.f32.f16.f16.f32")
# Of four int8 a uint32, to i32: as above with four inputs 4t … 4t+3, and + 16, in place of two.
mma_s8 = _mma("m16n8k32.row.col.s32.s8.s8.s32")


def magnitude(pair: Any) -> Any:
    """u32: the bits of the larger magnitude of pair[0] and [1], f32. Larger numbers have larger
    bits, and NaN has the largest."""
    first, second = (T.reinterpret("uint32", T.fabs(pair[i])) for i in range(2))
    return T.max(first, second)


_MMA_SCALED = (
    r"""
__forceinline__ __device__ void mx_mma_scaled(
    float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
    uint32_t b0, uint32_t b1, uint32_t scale_a, uint16_t byte_a, uint32_t scale_b, uint16_t byte_b,
    uint16_t lane_b) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.kind::mxf8f6f4.block_scale.scale_vec::1X"""
    r""".f32.e2m1.e4m3.f32.ue8m0 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3}, """
    r"""{%10}, {%11, 0}, {%12}, {%13, %14};"
               : "+f"(d0), "+f"(d1), "+f"(d2), "+f"(d3)
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(scale_a), "h"(byte_a),
                 "r"(scale_b), "h"(byte_b), "h"(lane_b));
}
"""
)


@T.inline
def mma_scaled(d, d_at, a, a_at, b, b_at, scale_a, byte_a, scale_b, byte_b, lane_b):
    """d [4] += (a [4] · its scales) · (b [2] · its scales), of 32 inputs; sm_120a.

    Fragments are those of mma_s8. a holds e2m1, each in the middle of a byte between two bits 0
    and two more, b e4m3. Scales are e8m0, a row's and a column's: byte byte_a of scale_a of the
    lane 4·g is row g's, that of lane 4·g + 1 row g + 8's, byte byte_b of scale_b of the lane
    4·g + lane_b column g's.
    """
    T.evaluate(
        T.cuda.func_call(
            "mx_mma_scaled",
            d[d_at], d[d_at + 1], d[d_at + 2], d[d_at + 3],
            a[a_at], a[a_at + 1], a[a_at + 2], a[a_at + 3], b[b_at], b[b_at + 1],
            scale_a, byte_a, scale_b, byte_b, lane_b,
            source_code=_MMA_SCALED,
        )
    )  # fmt: skip


@T.inline
def copy_async(to, start):
    """16 bytes from the address `start` in global memory to the address `to` in shared memory."""
    T.ptx["cp.async.cg.shared.global"](to, start, 16)


@T.inline
def load_floats(to, at, start):
    """Four float32 from `start` on, an element of a buffer, to registers."""
    T.ptx["ld.global.v4.f32"](to[at], to[at + 1], to[at + 2], to[at + 3], T.address_of(start))


@T.inline
def copies_done():
    """The thread's own copies have arrived; a barrier has to follow for others to see them."""
    T.ptx["cp.async.commit_group"]()
    T.ptx["cp.async.wait_group"](0)


# TVM takes warp_sync for no barrier: where it sees shared memory written and read, it adds barriers
# of the block, or refuses to. It does not see these reads.
SHARED_WORDS = r"""
__forceinline__ __device__ void mx_shared_words(uint32_t& a, const void* start) {
  a = *(const uint32_t*)start;
}
__forceinline__ __device__ void mx_shared_words(uint32_t& a, uint32_t& b, const void* start) {
  uint2 words = *(const uint2*)start;
  a = words.x, b = words.y;
}
__forceinline__ __device__ void mx_shared_words(uint32_t& a, uint32_t& b, uint32_t& c,
                                                uint32_t& d, const void* start) {
  uint4 words = *(const uint4*)start;
  a = words.x, b = words.y, c = words.z, d = words.w;
}
"""


def shared_words(registers: Sequence[Any], start: Any) -> Any:
    """The call that brings one, two or four words from `start` on, an element of shared memory."""
    return T.cuda.func_call(
        "mx_shared_words", *registers, T.address_of(start), source_code=SHARED_WORDS
    )


STORE_SHARED_WORDS = r"""
__forceinline__ __device__ void mx_store_shared_words(uint32_t a, uint32_t b, uint32_t c,
                                                      uint32_t d, void* start) {
  *(uint4*)start = make_uint4(a, b, c, d);
}
"""


def store_shared_words(registers: Sequence[Any], start: Any) -> Any:
    """The call that puts four words from `start` on, an element of shared memory. TVM does not see
    it either."""
    return T.cuda.func_call(
        "mx_store_shared_words", *registers, T.address_of(start), source_code=STORE_SHARED_WORDS
    )


def permuted(low: Any, high: Any, selector: Any) -> Any:
    """u32 of bytes of two words, by four digits that number them."""
    return T.call_extern("uint32", "__byte_perm", low, high, selector)


WAIT = r"""
__forceinline__ __device__ void mx_griddepcontrol_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#else
  __syncwarp();  // else ptxas may move loads from before to behind those that come later
#endif
}
"""


@T.inline
def wait_for_launch_before():
    """What the launch before wrote can be read from here on, and nothing written earlier.

    Every thread comes by. Kernels without it wait as they begin (compile/cuda.py).
    """
    T.evaluate(T.cuda.func_call("mx_griddepcontrol_wait", source_code=WAIT))
