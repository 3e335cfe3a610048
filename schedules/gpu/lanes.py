"""What the threads of a block do together, in the words of each GPU family.

A warp (CUDA), simdgroup (Metal) or subgroup (Vulkan) adds its lanes' values by itself; the sums
meet in shared memory. CUDA's and Apple's have 32 lanes; those of Vulkan have as many as the device
says, 4 to 128, and no schedule counts on a number.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..kernel import T
from .barriers import barrier

FEWEST_LANES = 4  # lavapipe's on a CPU without AVX
WARP = 32


@dataclass(frozen=True)
class Lanes:
    """A family's words; each takes and gives TensorIR expressions.

    total(value), largest(value)  f32 of all lanes, for all lanes
    largest_int(value)            the same of i32
    number(tx)                    i32: which of its block's warps a thread belongs to
    first(tx)                     one lane of each warp, true for that one alone
    lane(tx), size()              i32: a thread's place in its warp, and how many threads this has;
                                  to be asked where all of them are
    count(threads)                i32: how many warps a block of so many threads has
    most(threads)                 int: at most so many
    """

    total: Callable[[Any], Any]
    largest: Callable[[Any], Any]
    largest_int: Callable[[Any], Any]
    number: Callable[[Any], Any]
    first: Callable[[Any], Any]
    lane: Callable[[Any], Any]
    size: Callable[[], Any]
    count: Callable[[int], Any]
    most: Callable[[int], int]


def _warp(
    total: Callable[[Any], Any],
    largest: Callable[[Any], Any],
    largest_int: Callable[[Any], Any],
) -> Lanes:
    return Lanes(
        total,
        largest,
        largest_int,
        number=lambda tx: tx // WARP,
        first=lambda tx: tx % WARP == 0,
        lane=lambda tx: tx % WARP,
        size=lambda: WARP,
        count=lambda threads: -(-threads // WARP),
        most=lambda threads: -(-threads // WARP),
    )


def _shuffled(name: str, combined: str, type_: str = "float") -> Callable[[Any], Any]:
    """The butterfly over a warp's lanes: five shuffles, which an expression would write 31 times.

    `combined` is C for a and b, one of which came from the other lane.
    """
    source = f"""
__forceinline__ __device__ {type_} {name}({type_} a) {{
#pragma unroll
  for (int distance = {WARP // 2}; distance > 0; distance /= 2) {{
    {type_} b = __shfl_xor_sync(0xFFFFFFFFu, a, distance, {WARP});
    a = {combined};
  }}
  return a;
}}
"""
    dtype = {"float": "float32", "int": "int32"}[type_]
    return lambda value: T.cuda.func_call(name, value, source_code=source, return_type=dtype)


def _called(name: str, dtype: str = "float32") -> Callable[[Any], Any]:
    return lambda value: T.call_extern(dtype, name, value)


LANES = {
    "cuda": _warp(
        _shuffled("warp_total", "a + b"),
        _shuffled("warp_largest", "fmaxf(a, b)"),
        _shuffled("warp_largest_int", "max(a, b)", "int"),
    ),
    "metal": _warp(_called("simd_sum"), _called("simd_max"), _called("simd_max", "int32")),
    "vulkan": Lanes(
        _called("subgroupAdd"),
        _called("subgroupMax"),
        _called("subgroupMax", "int32"),
        number=lambda _tx: T.call_extern("int32", "subgroupNumber"),
        first=lambda _tx: T.call_extern("bool", "subgroupElect"),
        # Counted: a subgroup need not be full.
        lane=lambda _tx: T.call_extern("int32", "subgroupExclusiveAdd", T.int32(1)),
        size=lambda: T.call_extern("int32", "subgroupAdd", T.int32(1)),
        count=lambda _threads: T.call_extern("int32", "subgroupCount"),
        most=lambda threads: -(-threads // FEWEST_LANES),
    ),
}


@dataclass(frozen=True)
class BlockSums:
    """`count` sums, each over all threads of a block, which take a barrier in all.

    share(values, parts, tx)   every thread of the block, in uniform control flow: values f32
        [count], a thread's own, which become its warp's, and parts f32 [elements] in shared
        memory, which nothing else uses before the next barrier
    put(values, parts, tx, count)   the same of the first `count` sums alone, without its barrier
    total(parts, i, sum)       after it, any thread: sum[0] = the sum with number i

        parts = T.sblock_alloc_buffer((sums.elements,), "float32", scope="shared")
        sums.share(acc, parts, tx)
        if tx < sums.count:
            sums.total(parts, tx, acc)
    """

    family: str
    threads: int
    count: int

    @property
    def elements(self) -> int:
        """Of shared memory: parts[w * count + i] is warp w's part of sum i."""
        return LANES[self.family].most(self.threads) * self.count

    @property
    def put(self) -> Any:
        lanes, all_ = LANES[self.family], self.count

        @T.inline
        def put(values, parts, tx, count):
            for i in T.unroll(count):
                values[i] = lanes.total(values[i])
            if lanes.first(tx):
                for i in T.unroll(count):
                    parts[lanes.number(tx) * all_ + i] = values[i]

        return put

    @property
    def share(self) -> Any:
        put, count = self.put, self.count

        @T.inline
        def share(values, parts, tx):
            put(values, parts, tx, count)
            barrier()

        return share

    @property
    def total(self) -> Any:
        warps, count = LANES[self.family].count(self.threads), self.count

        @T.inline
        def total(parts, i, sum):
            sum[0] = T.float32(0)
            for warp in T.serial(warps):
                sum[0] = sum[0] + parts[warp * count + i]

        return total
