"""What the lanes of a warp tell each other; all of them take part."""

from __future__ import annotations

from typing import Any

from ..kernel import T
from .instructions import LANES

ALL = 0xFFFFFFFF  # lanes of a warp


def shared_with(value: Any, distance: int) -> Any:
    """The u32 of the lane whose number differs by `distance` alone."""
    return T.cuda.__shfl_xor_sync(T.uint32(ALL), value, distance, LANES)


def largest(value: Any) -> Any:
    """The largest i32 of a warp, for all its lanes."""
    return T.call_extern("int32", "__reduce_max_sync", T.uint32(ALL), value)


def smallest(value: Any) -> Any:
    """The smallest i32 of a warp, for all its lanes."""
    return T.call_extern("int32", "__reduce_min_sync", T.uint32(ALL), value)


def value_before(value: Any, distance: int) -> Any:
    """The value of the lane whose number is less by `distance`; its own where there is none."""
    return T.cuda.__shfl_up_sync(T.uint32(ALL), value, distance, LANES)


def added(value: Any) -> Any:
    """The sum of a warp's i32, for all its lanes."""
    return T.call_extern("int32", "__reduce_add_sync", T.uint32(ALL), value)


def lane_value(value: Any, lane: Any) -> Any:
    """The value of another lane of the warp."""
    return T.cuda.__shfl_sync(T.uint32(ALL), value, lane, LANES)


def lanes_where(condition: Any) -> Any:
    """u32 of the lanes of a warp where it is true."""
    return T.call_extern("uint32", "__ballot_sync", T.uint32(ALL), T.Cast("int32", condition))


def count_below(bits: Any, lane: Any) -> Any:
    """How many of the lanes in `bits` come before `lane`."""
    below = T.shift_left(T.uint32(1), T.Cast("uint32", lane)) - T.uint32(1)
    return T.Cast("int32", T.popcount(T.bitwise_and(bits, below)))
