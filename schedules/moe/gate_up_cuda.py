"""`gate_up` on CUDA, sm_80 and later: mma.sync, weights unpacked in registers.

A tile's 16 rows are 8 gates and their 8 ups, which a lane has beside each other. A block takes some
tiles of one expert, for all its tokens: the y-th expert that has any. Its warps divide K, and their
sums meet in shared memory. No plan is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import tvm

from ..cuda.instructions import LANES, MMA_ROWS
from ..cuda.mxfp4 import (
    INPUTS,
    LOWER,
    STEP,
    Inputs,
    alternating,
    layouts,
    load_step,
    multiply_step,
    read_columns,
    stage_rows,
    staged_words,
    steps,
)
from ..kernel import Schedule, T, Tensor, TileConfig, gpu, prim_func
from ..sample.rows_gpu import barrier
from .experts_cuda import count_tokens, find_expert, list_slots
from .swiglu import swiglu

UNITS = MMA_ROWS // 2  # of the intermediate, in a tile


@dataclass(frozen=True)
class GateUpTile(TileConfig):
    """Counted for an H200, none was at hand: with 20b's 45 steps all loads of a warp's nine are on
    their way at once, and four blocks fit the shared memory of sm_89."""

    splits: int = 5  # warps of a block, between which K is divided
    tiles: int = 3  # of a block, one after the other
    slots: int = 7  # steps that a warp has on their way
    columns: int = 4  # of inputs in shared memory at once


def _words(inputs: Inputs, hidden: int, tile: GateUpTile) -> int:
    """u32 of shared memory that hold the inputs, then the sums of the warps."""
    staged = steps(hidden) * STEP * tile.columns // 2
    return max(staged, tile.splits * tile.tiles * MMA_ROWS * tile.columns // inputs.parts)


def _shared_bytes(inputs: Inputs, hidden: int, tile: GateUpTile) -> int:
    tokens = tile.columns // inputs.parts
    return 4 * (_words(inputs, hidden, tile) + tokens)


def _build(
    inputs: Inputs,
    arguments: tuple[Tensor, ...],
    *,
    experts: int,
    top_k: int,
    hidden: int,
    intermediate: int,
    limit: float,
    tile: GateUpTile,
) -> tvm.tirx.PrimFunc:
    splits, tiles, columns = tile.splits, tile.tiles, tile.columns
    all_tiles, all_steps = intermediate // UNITS, steps(hidden)
    depth = -(-all_steps // splits)  # steps of a warp
    threads = LANES * splits
    tokens = columns // inputs.parts  # of a pass
    own = 2 // inputs.parts  # tokens of a lane

    # A warp's work in order: step after step, and of each all tiles.
    items = depth * tiles
    slots_ = min(items, tile.slots)

    def sum_at(warp, row, tile_, token, unit):
        """Where the sum of a warp is for others to read."""
        return (((warp * 2 + row) * tiles + tile_) * tokens + token) * UNITS + unit

    def start_of(group, m, warp):
        """The first step of a warp in tile m of a group; that of the last tile beyond it."""
        number = T.Cast("int32", group) * tiles + m
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
    def begin(blocks, scales, expert, group, warp, lane, words, scale):
        for item in T.unroll(slots_):
            load(blocks, scales, expert, group, item, warp, lane, words, scale)

    @T.inline
    def body(n, x, ids, blocks, scales, bias, h):
        for rank in T.thread_binding(T.min(n * top_k, experts), thread="blockIdx.x"):
            for group in T.thread_binding(-(-all_tiles // tiles), thread="blockIdx.y"):
                for thread in T.thread_binding(threads, thread="threadIdx.x"):
                    with T.sblock("block"):
                        vr, vg, tx = T.axis.remap("SSS", [rank, group, thread])
                        T.reads(
                            x[0:n, 0 : x.shape[1]],
                            ids[0:n, 0:top_k],
                            blocks[0:experts, 0 : blocks.shape[1]],
                            scales[0:experts, 0 : scales.shape[1]],
                            bias[0:experts, 0 : 2 * intermediate],
                        )
                        T.writes(h[0 : n * top_k, 0:intermediate])
                        xs = T.sblock_alloc_buffer(
                            (_words(inputs, hidden, tile),), "uint32", scope="shared"
                        )
                        found = T.sblock_alloc_buffer((tokens,), "int32", scope="shared")
                        words = T.sblock_alloc_buffer((4 * slots_,), "uint32", scope="local")
                        scale = T.sblock_alloc_buffer((slots_,), "uint32", scope="local")
                        a = T.sblock_alloc_buffer((8,), "uint32", scope="local")
                        b = T.sblock_alloc_buffer((8,), "uint32", scope="local")
                        part = T.sblock_alloc_buffer((4,), "float32", scope="local")
                        acc = T.sblock_alloc_buffer((4 * tiles,), "float32", scope="local")
                        raw = T.sblock_alloc_buffer(
                            (staged_words(inputs, hidden, 1, threads),),
                            "uint32",
                            scope="local",
                        )
                        pairs = T.sblock_alloc_buffer((4,), "uint32", scope="local")
                        hit = T.sblock_alloc_buffer(
                            (-(-experts // LANES),), "uint32", scope="local"
                        )
                        expert = T.sblock_alloc_buffer((2,), "int32", scope="local")
                        count = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        last = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        place = T.sblock_alloc_buffer((2,), "int32", scope="local")
                        T.attr(0, "tirx.launch_bounds_min_blocks_per_sm", 4)
                        slots: T.let = T.Cast("int32", n * top_k)
                        warp: T.let = tx // LANES
                        lane: T.let = tx % LANES
                        find_expert(
                            ids, top_k, slots, experts, T.Cast("int32", vr), lane, hit, expert
                        )
                        if expert[0] < 0:  # of all threads of the block
                            T.evaluate(T.thread_return())
                        count_tokens(ids, top_k, slots, expert[0], lane, count)
                        for i in T.unroll(2):
                            place[i] = 0
                        for p in T.serial(T.ceildiv(count[0], tokens)):
                            here: T.let = T.min(count[0] - p * tokens, tokens)
                            begin(blocks, scales, expert[0], vg, warp, lane, words, scale)
                            barrier()  # the slots of the pass before are no longer read
                            list_slots(
                                ids, top_k, slots, expert[0], p * tokens, tokens, lane,
                                warp == 0, found, place, last,
                            )  # fmt: skip
                            barrier()
                            for c in T.serial(here):
                                stage_rows(
                                    inputs, hidden, columns, x, found, top_k, c, 1, 1, tx, threads,
                                    xs, raw, pairs,
                                )  # fmt: skip
                            barrier()
                            # Of columns without a token the products are not used.
                            column: T.let = T.min(lane // 4, here * inputs.parts - 1)
                            for i in T.unroll(4 * tiles):
                                acc[i] = T.float32(0)
                            for d in T.unroll(depth):
                                if depth * splits == all_steps or warp * depth + d < all_steps:
                                    read_columns(xs, columns, warp * depth + d, column, lane % 4, b)
                                    for m in T.unroll(tiles):
                                        multiply_step(
                                            words, scale, (d * tiles + m) % slots_, b, a, part,
                                            acc, 4 * m,
                                        )  # fmt: skip
                                        if d * tiles + m + slots_ < items:
                                            load(
                                                blocks, scales, expert[0], vg,
                                                d * tiles + m + slots_, warp, lane, words, scale,
                                            )  # fmt: skip
                            barrier()  # the inputs are no longer read
                            if lane % 4 * own < tokens:
                                for m, r, j in T.grid(tiles, 2, own):
                                    xs[sum_at(warp, r, m, lane % 4 * own + j, lane // 4)] = (
                                        T.reinterpret(
                                            "uint32",
                                            acc[4 * m + 2 * r + j]
                                            if own == 2
                                            else acc[4 * m + 2 * r] + acc[4 * m + 2 * r + 1],
                                        )
                                    )
                            barrier()
                            for i in T.serial(-(-tiles * tokens * UNITS // threads)):
                                e: T.let = i * threads + tx
                                m: T.let = e // (tokens * UNITS)
                                token: T.let = e // UNITS % tokens
                                row: T.let = (vg * tiles + m) * UNITS + e % UNITS
                                if T.And(token < here, T.And(m < tiles, row < intermediate)):
                                    for r in T.unroll(2):
                                        acc[r] = T.float32(0)
                                        for w in T.unroll(splits):
                                            acc[r] = acc[r] + T.reinterpret(
                                                "float32", xs[sum_at(w, r, m, token, e % UNITS)]
                                            )
                                        acc[r] = (
                                            acc[r] * T.float32(LOWER) + bias[expert[0], 2 * row + r]
                                        )
                                    h[found[token], row] = swiglu(acc[0], acc[1], limit)

    return prim_func(arguments, body)


def schedules(activations: str) -> tuple[Schedule, ...]:
    tile = GateUpTile()
    inputs = INPUTS[activations]
    return (
        Schedule(
            "a tile of 16 rows a warp, mma.sync",
            gpu("cuda", "sm_80"),
            partial(_build, inputs),
            tile,
            layouts=layouts(alternating),
            fits=lambda hidden, **_: _shared_bytes(inputs, hidden, tile) <= 48 << 10,
            unused=frozenset({"offsets", "order"}),
        ),
    )
