"""`gate_up` on CUDA, sm_80 and later: mma.sync, weights unpacked in registers.

A tile's 16 rows are 8 gates and their 8 ups, which a lane has beside each other. A block takes some
tiles of one expert. By the number of tokens:

- of a few, a block has all in shared memory; its warps divide K, and their sums meet there;
- of some, each warp has a tile, and the inputs come to shared memory in chunks of K, as fragments
  for all warps; the next chunk is on its way while one is multiplied;
- of many, the tokens are sorted by expert for a product of tiles of them (grouped_cuda.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import tvm

from ..cuda.instructions import LANES, MMA_ROWS
from ..cuda.mxfp4 import (
    LOWER,
    STEP,
    Inputs,
    alternating,
    load_inputs,
    load_step,
    multiply_step,
    read_columns,
    stage_rows,
    staged_words,
    steps,
)
from ..cuda.warps import count_below, lane_value, lanes_where
from ..formats.activations import ActivationFormat
from ..gpu.barriers import barrier
from ..kernel import Schedule, Size, T, Tensor, TileConfig, prim_func
from .experts_cuda import find_expert, list_slots, read_id, schedule, whole
from .grouped_cuda import Grouped, grouped_products, scratch
from .swiglu import swiglu

UNITS = MMA_ROWS // 2  # of the intermediate, in a tile
FRAGMENT = LANES * 4  # u32 of a group's inputs of a block


@dataclass(frozen=True)
class GateUpTile(TileConfig):
    """Counted for an H200, none was at hand: with 20b's 45 steps all loads of a warp's nine are on
    their way at once, and four blocks fit the shared memory of sm_89. With many tokens two blocks
    of an SM have 80 KB of weights on their way."""

    splits: int = 5  # warps of a block, between which K is divided
    tiles: int = 3  # of a block, one after the other
    slots: int = 7  # steps that a warp has on their way
    columns: int = 4  # of inputs in shared memory at once
    # With many tokens:
    warps: int = 8  # of a block, a tile each
    chunk: int = 4  # steps of inputs in shared memory at once; of weights, two chunks are ahead
    groups: int = 4  # of eight columns, at most, for which weights are read once
    grouped: Grouped = field(default_factory=Grouped)


def _words(inputs: Inputs, hidden: int, tile: GateUpTile) -> int:
    """u32 of shared memory that hold the inputs, then the sums of the warps."""
    staged = steps(hidden) * STEP * tile.columns // 2
    return max(staged, tile.splits * tile.tiles * MMA_ROWS * tile.columns // inputs.parts)


def _few(inputs: Inputs, top_k: int, tile: GateUpTile) -> int:
    """The most tokens of the first launch: one expert may have them all, and a warp has a lane for
    each of their slots."""
    return min(tile.columns // inputs.parts, LANES // top_k)


def _fits(*, inputs: Inputs, tile: GateUpTile, top_k: int, hidden: int, **_: float) -> bool:
    shared = 4 * (_words(inputs, hidden, tile) + tile.columns)
    return top_k <= LANES and shared <= 48 << 10


def _build(
    put: Any,
    arguments: tuple[Tensor, ...],
    *,
    inputs: Inputs,
    experts: int,
    top_k: int,
    tile: GateUpTile,
    hopper: bool,
    **shape: Any,
) -> tvm.tirx.PrimFunc:
    most = _few(inputs, top_k, tile)
    shape |= {"experts": experts, "top_k": top_k, "put": put}
    few = _few_tokens(inputs, most, tile, **shape)
    some = _some_tokens(inputs, tile, **shape)
    many = _many_tokens(inputs, tile, hopper=hopper, **shape)

    @T.inline
    def body(n, x, ids, blocks, scales, bias, h, begins, by_expert, parts=None):
        if n <= most:
            few(n, x, ids, blocks, scales, bias, h)
        elif n * top_k < tile.grouped.least * experts:
            some(n, x, ids, blocks, scales, bias, h)
        else:
            many(n, x, ids, blocks, scales, bias, h, begins, by_expert, parts)

    return prim_func(arguments, body)


def _launched(
    across: Callable[[Any], Any], groups: int, threads: int, top_k: int, work: Any
) -> Callable[..., Any]:
    """The T.inline launch of `work` by across(n) · groups blocks."""

    @T.inline
    def launch(n, x, ids, blocks, scales, bias, h):
        for first in T.thread_binding(across(n), thread="blockIdx.x"):
            for group in T.thread_binding(groups, thread="blockIdx.y"):
                for thread in T.thread_binding(threads, thread="threadIdx.x"):
                    with T.sblock("block"):
                        vf, vg, tx = T.axis.remap("SSS", [first, group, thread])
                        T.reads(whole(x), whole(ids), whole(blocks), whole(scales), whole(bias))
                        T.writes(whole(h))
                        work(
                            T.Cast("int32", vf), vg, tx, T.Cast("int32", n * top_k), x, ids,
                            blocks, scales, bias, h,
                        )  # fmt: skip

    return launch


def _few_tokens(
    inputs: Inputs,
    most: int,
    tile: GateUpTile,
    *,
    experts: int,
    top_k: int,
    hidden: int,
    intermediate: int,
    limit: float,
    put: Any,
) -> Callable[..., Any]:
    """The launch for at most so many tokens: a block for each slot and some tiles. It works where
    no slot before has the same expert."""
    splits, tiles, columns = tile.splits, tile.tiles, tile.columns
    all_tiles, all_steps = intermediate // UNITS, steps(hidden)
    depth = -(-all_steps // splits)  # steps of a warp
    threads = LANES * splits
    own = inputs.own

    # A warp's work in order: step after step, and of each all tiles.
    items = depth * tiles
    slots_ = min(items, tile.slots)

    def sum_at(warp: Any, row: Any, tile_: Any, token: Any, unit: Any) -> Any:
        """Where the sum of a warp is for others to read."""
        return (((warp * 2 + row) * most + token) * tiles + tile_) * UNITS + unit

    def start_of(group: Any, m: Any, warp: Any) -> Any:
        """The first step of a warp in tile m of a group; that of the last tile beyond it."""
        number = group * tiles + m
        if all_tiles % tiles:
            number = T.min(number, all_tiles - 1)
        return number * all_steps + warp * depth

    @T.inline
    def load(blocks, scales, expert, group, item, warp, lane, words, scale):
        if depth * splits == all_steps or warp * depth + item // tiles < all_steps:
            load_step(
                blocks, scales, expert, start_of(group, item % tiles, warp), item // tiles, lane,
                words, scale, item % slots_,
            )  # fmt: skip

    @T.inline
    def work(vs, vg, tx, slots, x, ids, blocks, scales, bias, h):
        xs = T.sblock_alloc_buffer((_words(inputs, hidden, tile),), "uint32", scope="shared")
        found = T.sblock_alloc_buffer((most,), "int32", scope="shared")
        words = T.sblock_alloc_buffer((4 * slots_,), "uint32", scope="local")
        scale = T.sblock_alloc_buffer((slots_,), "uint32", scope="local")
        a = T.sblock_alloc_buffer((8,), "uint32", scope="local")
        b = T.sblock_alloc_buffer((8,), "uint32", scope="local")
        part = T.sblock_alloc_buffer((4,), "float32", scope="local")
        acc = T.sblock_alloc_buffer((2 * own * tiles,), "float32", scope="local")
        raw = T.sblock_alloc_buffer(
            (staged_words(inputs, hidden, 1, threads),), "uint32", scope="local"
        )
        pairs = T.sblock_alloc_buffer((4,), "uint32", scope="local")
        id_ = T.sblock_alloc_buffer((1,), "int32", scope="local")
        expert = T.sblock_alloc_buffer((1,), "int32", scope="local")
        T.attr(0, "tirx.launch_bounds_min_blocks_per_sm", 4)
        warp: T.let = tx // LANES
        lane: T.let = tx % LANES
        read_id(ids, top_k, slots, lane, id_)
        expert[0] = lane_value(id_[0], vs)
        lanes: T.let = lanes_where(id_[0] == expert[0])
        if count_below(lanes, vs) > 0:  # of all threads of the block
            T.evaluate(T.thread_return())
        here: T.let = T.Cast("int32", T.popcount(lanes))
        for item in T.unroll(slots_):
            load(blocks, scales, expert[0], vg, item, warp, lane, words, scale)
        if T.And(warp == 0, id_[0] == expert[0]):
            found[count_below(lanes, lane)] = lane
        barrier()
        for c in T.serial(here, unroll=False):  # copies of it would take registers
            stage_rows(
                inputs, hidden, columns, x, found, top_k, c, 1, 1, tx, threads, xs, raw, pairs
            )
        barrier()
        # Of columns without a token the products are not used.
        column: T.let = T.min(lane // 4, here * inputs.parts - 1)
        for i in T.unroll(2 * own * tiles):
            acc[i] = T.float32(0)
        for d in T.unroll(depth):
            if depth * splits == all_steps or warp * depth + d < all_steps:
                read_columns(xs, columns, warp * depth + d, column, lane % 4, b)
                for m in T.unroll(tiles):
                    multiply_step(
                        inputs, words, scale, (d * tiles + m) % slots_, 1, None, b, a, part, acc,
                        2 * own * m,
                    )  # fmt: skip
                    if d * tiles + m + slots_ < items:
                        load(
                            blocks, scales, expert[0], vg, d * tiles + m + slots_, warp, lane,
                            words, scale,
                        )  # fmt: skip
        barrier()  # the inputs are no longer read
        for m, r, j in T.grid(tiles, 2, own):
            if lane % 4 * own + j < most:
                xs[sum_at(warp, r, m, lane % 4 * own + j, lane // 4)] = T.reinterpret(
                    "uint32", acc[(2 * m + r) * own + j]
                )
        barrier()
        for i in T.serial(-(-tiles * most * UNITS // threads)):
            e: T.let = i * threads + tx
            m: T.let = e // UNITS % tiles
            token: T.let = e // (tiles * UNITS)
            row: T.let = (vg * tiles + m) * UNITS + e % UNITS
            if T.And(token < here, row < intermediate):
                for r in T.unroll(2):
                    acc[r] = T.float32(0)
                    for w in T.unroll(splits):
                        acc[r] = acc[r] + T.reinterpret(
                            "float32", xs[sum_at(w, r, m, token, e % UNITS)]
                        )
                    acc[r] = acc[r] * T.float32(LOWER) + bias[expert[0], 2 * row + r]
                value: T.let = swiglu(acc[0], acc[1], limit)
                h[found[token], row] = put(value)

    return _launched(lambda n: n * top_k, -(-all_tiles // tiles), threads, top_k, work)


def _some_tokens(
    inputs: Inputs,
    tile: GateUpTile,
    *,
    experts: int,
    top_k: int,
    hidden: int,
    intermediate: int,
    limit: float,
    put: Any,
) -> Callable[..., Any]:
    """The launch for some tokens: a block for each expert that has any, and some tiles."""
    warps, chunk, groups = tile.warps, tile.chunk, tile.groups
    all_tiles, all_steps = intermediate // UNITS, steps(hidden)
    rounds = -(-all_steps // (2 * chunk))
    threads = LANES * warps
    tokens = groups * inputs.group  # of a pass
    own = inputs.own
    buffer = chunk * groups * 2 * FRAGMENT

    def units_of(used: int) -> int:
        """Units of a chunk that a warp brings, of so many groups."""
        return -(-chunk * used // warps)

    def fragment_at(unit: Any, block: Any, lane: Any) -> Any:
        """Where a lane's inputs of a block are: of a step and a group, which are a unit."""
        return ((unit * 2 + block) * LANES + lane) * 4

    @T.inline
    def work(vr, vg, tx, slots, x, ids, blocks, scales, bias, h):
        # Two, for TVM sees no halves of one, and wants more barriers.
        even = T.sblock_alloc_buffer((buffer,), "uint32", scope="shared")
        odd = T.sblock_alloc_buffer((buffer,), "uint32", scope="shared")
        found = T.sblock_alloc_buffer((tokens,), "int32", scope="shared")
        words = T.sblock_alloc_buffer((2 * chunk * 4,), "uint32", scope="local")
        scale = T.sblock_alloc_buffer((2 * chunk,), "uint32", scope="local")
        a = T.sblock_alloc_buffer((8,), "uint32", scope="local")
        b = T.sblock_alloc_buffer((8 * groups,), "uint32", scope="local")
        part = T.sblock_alloc_buffer((4,), "float32", scope="local")
        acc = T.sblock_alloc_buffer((2 * own * groups,), "float32", scope="local")
        raw = T.sblock_alloc_buffer((8,), "uint32", scope="local")
        pairs = T.sblock_alloc_buffer((4,), "uint32", scope="local")
        both = T.sblock_alloc_buffer((2,), "float32", scope="local")
        hit = T.sblock_alloc_buffer((-(-experts // LANES),), "uint32", scope="local")
        id_ = T.sblock_alloc_buffer((1,), "int32", scope="local")
        expert = T.sblock_alloc_buffer((2,), "int32", scope="local")
        begin = T.sblock_alloc_buffer((1,), "int32", scope="local")
        here = T.sblock_alloc_buffer((1,), "int32", scope="local")
        T.attr(0, "tirx.launch_bounds_min_blocks_per_sm", 2)
        warp: T.let = tx // LANES
        lane: T.let = tx % LANES
        find_expert(ids, top_k, slots, experts, vr, lane, hit, id_, expert)
        if expert[0] < 0:  # of all threads of the block
            T.evaluate(T.thread_return())
        # A warp beyond the last tile works on that one, for nothing.
        number: T.let = T.min(vg * warps + warp, all_tiles - 1)

        @T.inline
        def load(step, slot):
            if step < all_steps:
                load_step(
                    blocks, scales, expert[0], number * all_steps, step, lane, words, scale, slot
                )

        @T.inline
        def fetch(step, i, here, used):
            """A warp's i-th unit of the chunk from a step on, from global memory."""
            unit: T.let = i * warps + warp
            if unit < chunk * used:
                token: T.let = unit % used * inputs.group + inputs.token(lane)
                load_inputs(
                    inputs, hidden, x, found[T.min(token, here - 1)] // top_k,
                    step + unit // used, lane, raw, 0,
                )  # fmt: skip

        @T.inline
        def keep(xs, i, used):
            """It, as fragments in shared memory."""
            unit: T.let = i * warps + warp
            if unit < chunk * used:
                inputs.fragments(raw, 0, lane, pairs, b, 0)
                for block in T.unroll(2):
                    xs[T.ramp(fragment_at(unit, block, lane), 1, 4)] = b[T.ramp(4 * block, 1, 4)]

        @T.inline
        def turn(first, slot, here, used, xs, others):
            """The chunk from step `first` on, whose weights are in the slots from `slot` on. The
            next one comes to `others`."""

            @T.inline
            def read(place, group, block):
                unit: T.let = (place - slot) * used + group
                b[T.ramp(8 * group + 4 * block, 1, 4)] = xs[
                    T.ramp(fragment_at(unit, block, lane), 1, 4)
                ]

            each = T.meta_var(chunk // units_of(used))  # steps to a unit
            for d in T.unroll(chunk):
                if d % each == 0:
                    fetch(first + chunk, d // each, here, used)
                if first + d < all_steps:
                    multiply_step(inputs, words, scale, slot + d, used, read, b, a, part, acc, 0)
                    load(first + d + 2 * chunk, slot + d)
                if d % each == each - 1:
                    keep(others, d // each, used)
            barrier()

        @T.inline
        def multiply(here, used):
            """acc = the products of a pass, of so many groups."""
            for i in T.unroll(2 * own * used):
                acc[i] = T.float32(0)
            for i in T.unroll(units_of(used)):
                fetch(0, i, here, used)
                keep(even, i, used)
            barrier()
            for i in T.serial(rounds):
                turn(2 * i * chunk, 0, here, used, even, odd)
                turn((2 * i + 1) * chunk, chunk, here, used, odd, even)

        begin[0] = 0
        here[0] = tokens
        while here[0] == tokens:
            list_slots(
                ids, top_k, slots, expert[0], tokens, lane, warp == 0, found, begin, here, id_
            )
            if here[0] > 0:
                for i in T.unroll(2 * chunk):
                    load(i, i)
                used: T.let = T.ceildiv(here[0], inputs.group)
                barrier()
                if used == 1:
                    multiply(here[0], 1)
                else:
                    if used == 2:
                        multiply(here[0], 2)
                    else:
                        multiply(here[0], groups)
                unit: T.let = (vg * warps + warp) * UNITS + lane // 4
                both[T.ramp(0, 1, 2)] = bias[
                    expert[0], T.ramp(2 * T.min(unit, intermediate - 1), 1, 2)
                ]
                for g, j in T.grid(groups, own):
                    token: T.let = g * inputs.group + lane % 4 * own + j
                    if T.And(token < here[0], unit < intermediate):
                        value: T.let = swiglu(
                            acc[2 * g * own + j] * T.float32(LOWER) + both[0],
                            acc[(2 * g + 1) * own + j] * T.float32(LOWER) + both[1],
                            limit,
                        )
                        h[found[token], unit] = put(value)
                barrier()  # the slots are no longer read

    return _launched(
        lambda n: T.min(n * top_k, experts), -(-all_tiles // warps), threads, top_k, work
    )


def _many_tokens(
    inputs: Inputs,
    tile: GateUpTile,
    *,
    experts: int,
    top_k: int,
    hidden: int,
    intermediate: int,
    limit: float,
    put: Any,
    hopper: bool,
) -> Callable[..., Any]:
    """The launches for many tokens."""

    @T.inline
    def store(given, expert, slot, number, g, sums):
        bias, h = T.meta_var(given[2:])
        unit: T.let = number * UNITS + g
        both = T.sblock_alloc_buffer((2,), "float32", scope="local")
        both[T.ramp(0, 1, 2)] = bias[expert, T.ramp(2 * unit, 1, 2)]
        value: T.let = swiglu(sums[0] + both[0], sums[1] + both[1], limit)
        h[slot, unit] = put(value)

    products = grouped_products(
        inputs, tile.grouped, experts=experts, top_k=top_k, share=top_k, rows=2 * intermediate,
        k=hidden, store=store, hopper=hopper,
    )  # fmt: skip

    @T.inline
    def launch(n, x, ids, blocks, scales, bias, h, begins, by_expert, parts):
        products(n, x, ids, (blocks, scales), (begins, by_expert, bias, h), parts)

    return launch


def _scratch(
    *, inputs: Inputs, hopper: bool, experts: int, top_k: int, hidden: int, **_: float
) -> tuple[Tensor, ...]:
    return scratch(inputs, Size("n", top_k), experts, Size("n"), hidden, hopper=hopper)


def schedules(activations: ActivationFormat) -> tuple[Schedule, ...]:
    return schedule(
        "a tile of 16 rows a warp, {}",
        activations,
        partial(_build, activations.results.put),
        GateUpTile(),
        alternating,
        _fits,
        _scratch,
    )
