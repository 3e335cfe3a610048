"""What both halves of an expert share on CUDA: which experts have tokens, and which."""

from __future__ import annotations

from typing import Any

from ..cuda.instructions import LANES
from ..kernel import T

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


def value_of(value: Any, lane: Any) -> Any:
    """The f32 of another lane of the warp."""
    return T.cuda.__shfl_sync(T.uint32(ALL), value, lane, LANES)


def total(value: Any) -> Any:
    """The sum of a warp's i32, for all its lanes."""
    return T.call_extern("int32", "__reduce_add_sync", T.uint32(ALL), value)


def lanes_where(condition: Any) -> Any:
    """u32 of the lanes of a warp where it is true."""
    return T.call_extern("uint32", "__ballot_sync", T.uint32(ALL), T.Cast("int32", condition))


def count_below(bits: Any, lane: Any) -> Any:
    """How many of the lanes in `bits` come before `lane`."""
    below = T.shift_left(T.uint32(1), T.Cast("uint32", lane)) - T.uint32(1)
    return T.Cast("int32", T.popcount(T.bitwise_and(bits, below)))


@T.inline
def find_expert(ids, top_k, slots, experts, rank, lane, hit, found):
    """found[0] = the expert of number `rank` among those that have tokens, -1 where there are
    fewer. hit u32 [experts/32] and found i32 [2] are a thread's own; each warp finds it by itself.
    """
    for w in T.unroll(-(-experts // LANES)):
        hit[w] = T.uint32(0)
    for chunk in T.serial(T.ceildiv(slots, LANES)):
        slot: T.let = chunk * LANES + lane
        if slot < slots:
            expert: T.let = ids[slot // top_k, slot % top_k]
            for w in T.unroll(-(-experts // LANES)):
                hit[w] = T.bitwise_or(
                    hit[w],
                    T.Select(
                        expert // LANES == w,
                        T.shift_left(T.uint32(1), T.Cast("uint32", expert % LANES)),
                        T.uint32(0),
                    ),
                )
    found[0] = -1
    found[1] = 0  # how many experts with tokens come before word w
    for w in T.unroll(-(-experts // LANES)):
        for i in T.unroll(5):
            hit[w] = T.bitwise_or(hit[w], shared_with(hit[w], 1 << i))
        bit: T.let = T.bitwise_and(T.shift_right(hit[w], T.Cast("uint32", lane)), T.uint32(1))
        mine: T.let = T.And(bit == T.uint32(1), found[1] + count_below(hit[w], lane) == rank)
        found[0] = T.max(found[0], largest(T.Select(mine, w * LANES + lane, -1)))
        found[1] = found[1] + T.Cast("int32", T.popcount(hit[w]))


@T.inline
def count_tokens(ids, top_k, slots, expert, lane, count):
    """count[0] = how many of the slots are the expert's."""
    count[0] = 0
    for chunk in T.serial(T.ceildiv(slots, LANES)):
        slot: T.let = chunk * LANES + lane
        known: T.let = T.min(slot, slots - 1)
        if T.And(slot < slots, ids[known // top_k, known % top_k] == expert):
            count[0] = count[0] + 1
    count[0] = total(count[0])


@T.inline
def list_slots(ids, top_k, slots, expert, first, most, lane, writes, found, place, last):
    """found[0 …] = the expert's slots from its `first` on, `most` of them; found i32 is shared,
    and only a warp that `writes` does so.

    place i32 [2] is a thread's own. It begins as zeros, and moves on for the next `first`: the
    chunk of slots to begin with, and how many of the expert's come before it. last i32 [1] is
    scratch.
    """
    last[0] = 0
    end: T.let = first + most
    while T.And(place[0] * LANES < slots, place[1] < end):
        slot: T.let = place[0] * LANES + lane
        known: T.let = T.min(slot, slots - 1)
        own: T.let = T.And(slot < slots, ids[known // top_k, known % top_k] == expert)
        lanes: T.let = lanes_where(own)
        rank: T.let = place[1] + count_below(lanes, lane)
        if T.And(writes, T.And(own, T.And(rank >= first, rank < end))):
            found[rank - first] = slot
        last[0] = T.Cast("int32", T.popcount(lanes))
        place[1] = place[1] + last[0]
        place[0] = place[0] + 1
    if place[1] > end:  # the last chunk has some of the next call's, too
        place[0] = place[0] - 1
        place[1] = place[1] - last[0]
