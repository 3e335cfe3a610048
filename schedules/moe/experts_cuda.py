"""What both halves of an expert share on CUDA: their schedule, and which experts have tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from ..cuda.instructions import LANES
from ..cuda.mxfp4 import INPUTS, Rows, layouts, load_word
from ..cuda.mxfp8 import SCALED
from ..cuda.warps import count_below, lanes_where, largest, shared_with, smallest
from ..formats.activations import ActivationFormat
from ..kernel import Schedule, T, Tensor, TileConfig, gpu


def schedule(
    name: str,
    activations: ActivationFormat,
    build: Callable[..., Any],
    tile: TileConfig,
    rows: Rows,
    fits: Callable[..., bool],
    scratch: Callable[..., tuple[Tensor, ...]],
) -> tuple[Schedule, ...]:
    """Of one half, which makes its own plan: on sm_120a, where it multiplies the format as it is,
    on Hopper, and elsewhere. `rows` says which two of a tile's are a lane's. build, fits and
    scratch are told `inputs` too, build and scratch whether it is for `hopper`."""
    inputs = INPUTS[activations.product]
    kinds = [("sm_90a", "mma.sync, wgmma", inputs), ("sm_80", "mma.sync", inputs)]
    if activations.name in SCALED:
        kinds.insert(0, ("sm_120a", "mma.sync, scaled", SCALED[activations.name]))
    return tuple(
        Schedule(
            name.format(instruction),
            gpu("cuda", arch),
            partial(build, inputs=inputs, hopper=arch == "sm_90a"),
            tile,
            layouts=layouts(rows, inputs.packed),
            fits=partial(fits, inputs=inputs, tile=tile),
            unused=frozenset({"offsets", "order"}),
            scratch=partial(scratch, inputs=inputs, hopper=arch == "sm_90a"),
        )
        for arch, instruction, inputs in kinds
    )


def whole(buffer: Any) -> Any:
    """All of a buffer, as a region that a block reads or writes."""
    return buffer[tuple(slice(0, extent) for extent in buffer.shape)]


@T.inline
def read_id(ids, top_k, slots, slot, id_):
    """id_[0] i32 = the expert of a slot of ids [n, top_k]; -1 behind the last one."""
    word = T.sblock_alloc_buffer((1,), "uint32", scope="local")
    id_[0] = -1
    if slot < slots:
        load_word(word, 0, T.address_of(ids[slot // top_k, slot % top_k]))
        id_[0] = T.reinterpret("int32", word[0])


@T.inline
def find_expert(ids, top_k, slots, experts, rank, lane, hit, id_, found):
    """found[0] = the expert of number `rank` among those that have tokens, -1 where there are
    fewer. hit u32 [experts/32], id_ i32 [1] and found i32 [2] are a thread's own; each warp finds
    it by itself.
    """
    for w in T.unroll(-(-experts // LANES)):
        hit[w] = T.uint32(0)
    for chunk in T.serial(T.ceildiv(slots, LANES)):
        read_id(ids, top_k, slots, chunk * LANES + lane, id_)
        for w in T.unroll(-(-experts // LANES)):
            if T.And(id_[0] >= w * LANES, id_[0] < (w + 1) * LANES):
                bit: T.let = T.shift_left(T.uint32(1), T.Cast("uint32", id_[0] % LANES))
                hit[w] = T.bitwise_or(hit[w], bit)
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
def list_slots(ids, top_k, slots, expert, most, lane, writes, found, begin, count, id_):
    """found[0 …] = the next slots of an expert, from begin[0] on: count[0] of them, which is `most`
    or what is left.

    found i32 is shared, and only a warp that `writes` does so. begin i32 [1] is a thread's own, as
    count and id_ are; it moves on for the next call.
    """
    count[0] = 0
    while T.And(begin[0] < slots, count[0] < most):
        read_id(ids, top_k, slots, begin[0] + lane, id_)
        lanes: T.let = lanes_where(id_[0] == expert)
        rank: T.let = count[0] + count_below(lanes, lane)
        if T.And(writes, T.And(id_[0] == expert, rank < most)):
            found[rank] = begin[0] + lane
        last: T.let = T.And(id_[0] == expert, rank == most - 1)
        begin[0] = begin[0] + smallest(T.Select(last, lane + 1, LANES))
        count[0] = T.min(count[0] + T.Cast("int32", T.popcount(lanes)), most)
