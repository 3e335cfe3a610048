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

FEWEST_LANES = 4  # lavapipe's on a CPU without AVX
WARP = 32


@dataclass(frozen=True)
class Lanes:
    """A family's words; each takes and gives TensorIR expressions.

    total(value), largest(value)  f32 of all lanes, for all lanes
    number(tx)                    i32: which of its block's warps a thread belongs to
    first(tx)                     one lane of each warp, true for that one alone
    count(threads)                i32: how many warps a block of so many threads has
    most(threads)                 int: at most so many
    """

    total: Callable[[Any], Any]
    largest: Callable[[Any], Any]
    number: Callable[[Any], Any]
    first: Callable[[Any], Any]
    count: Callable[[int], Any]
    most: Callable[[int], int]


def _warp(total: Callable[[Any], Any], largest: Callable[[Any], Any]) -> Lanes:
    return Lanes(
        total,
        largest,
        number=lambda tx: tx // WARP,
        first=lambda tx: tx % WARP == 0,
        count=lambda threads: -(-threads // WARP),
        most=lambda threads: -(-threads // WARP),
    )


def _shuffled(combine: Callable[[Any, Any], Any]) -> Callable[[Any], Any]:
    """The butterfly over a warp's lanes."""

    def over_lanes(value: Any) -> Any:
        for distance in (16, 8, 4, 2, 1):
            other = T.cuda.__shfl_xor_sync(T.uint32(0xFFFFFFFF), value, distance, WARP)
            value = combine(value, other)
        return value

    return over_lanes


def _called(name: str) -> Callable[[Any], Any]:
    return lambda value: T.call_extern("float32", name, value)


LANES = {
    "cuda": _warp(_shuffled(lambda a, b: a + b), _shuffled(T.max)),
    "metal": _warp(_called("simd_sum"), _called("simd_max")),
    "vulkan": Lanes(
        _called("subgroupAdd"),
        _called("subgroupMax"),
        number=lambda _tx: T.call_extern("int32", "subgroupNumber"),
        first=lambda _tx: T.call_extern("bool", "subgroupElect"),
        count=lambda _threads: T.call_extern("int32", "subgroupCount"),
        most=lambda threads: -(-threads // FEWEST_LANES),
    ),
}
