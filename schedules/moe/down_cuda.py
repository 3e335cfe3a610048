"""`down` on CUDA, sm_80 and later: mma.sync, weights unpacked in registers.

Of a few tokens, a block takes a tile of 16 rows, and visits their experts by number: what several
tokens share is read once. Its warps divide K. Every lane adds an expert's share to the sums of its
own tokens and rows, so that nothing but the warps' sums has to meet, at the end. While a warp
multiplies, the weights of its next visit are on their way. The experts of a token differ from each
other. No plan is needed. Launches for one token and for many are in down_one_cuda.py and
down_many_cuda.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import tvm

from ..cuda.instructions import LANES, MMA_COLUMNS, MMA_ROWS
from ..cuda.mxfp4 import (
    LOWER,
    STEP,
    Inputs,
    load_step,
    load_word,
    multiply_step,
    neighbours,
    read_columns,
    stage_rows,
    staged_words,
    steps,
)
from ..cuda.warps import count_below, lane_value, lanes_where, smallest
from ..formats.activations import ActivationFormat
from ..gpu.barriers import barrier
from ..kernel import Schedule, Size, T, Tensor, TileConfig, f32, prim_func
from .down_many_cuda import ManyTile, many_tokens
from .down_one_cuda import one_token, one_token_fits
from .experts_cuda import schedule, whole
from .grouped_cuda import Grouped, grouped_products, mixture, scratch

AHEAD = 2  # visits whose weights are on their way


@dataclass(frozen=True)
class DownTile(TileConfig):
    """Counted for an H200, none was at hand: with 20b's 45 steps a warp has ten on their way, and
    all 180 blocks of a token are there at once, two on an SM."""

    splits: int = 9  # warps of a block, between which K is divided
    many: ManyTile = field(default_factory=ManyTile)
    grouped: Grouped = field(default_factory=Grouped)


def _tokens(inputs: Inputs, top_k: int) -> int:
    """Tokens of a block: a lane of a warp for each of their slots, and columns for all of them."""
    return min(MMA_COLUMNS // inputs.parts, LANES // top_k)


def _words(inputs: Inputs, intermediate: int, tile: DownTile) -> int:
    """u32 of shared memory that hold the inputs, then the sums of the warps."""
    staged = steps(intermediate) * STEP * MMA_COLUMNS // 2
    return max(staged, tile.splits * MMA_COLUMNS // inputs.parts * MMA_ROWS)


def _fits(*, inputs: Inputs, tile: DownTile, top_k: int, intermediate: int, **_: int) -> bool:
    shared = 4 * (_words(inputs, intermediate, tile) + MMA_COLUMNS * (1 + MMA_ROWS))
    return top_k <= LANES and shared <= 48 << 10


def _build(
    arguments: tuple[Tensor, ...],
    *,
    inputs: Inputs,
    experts: int,
    top_k: int,
    hidden: int,
    intermediate: int,
    tile: DownTile,
    hopper: bool,
) -> tvm.tirx.PrimFunc:
    splits = tile.splits
    all_steps = steps(intermediate)
    depth = -(-all_steps // splits)  # steps of a warp
    threads = LANES * splits
    tokens = _tokens(inputs, top_k)
    most = MMA_COLUMNS // inputs.parts  # slots in shared memory at once
    own = inputs.own
    none = experts  # the number of no expert

    def sum_at(warp, token, row):
        """Where the sum of a warp is for others to read; a warp's lanes write to all banks."""
        quarter = token // own  # of a warp: the lanes 4g + quarter
        place = (warp * own + token % own) * 4 + quarter
        return place * MMA_ROWS + T.bitwise_xor(row, quarter // 2 * 8)

    @T.inline
    def load(blocks, scales, expert, tile_, warp, lane, words, scale, half):
        """A warp's part of a visit."""
        if expert != none:
            for d in T.unroll(depth):
                if depth * splits == all_steps or warp * depth + d < all_steps:
                    load_step(
                        blocks, scales, expert, tile_ * all_steps + warp * depth, d, lane,
                        words, scale, half * depth + d,
                    )  # fmt: skip

    @T.inline
    def next_expert(id_, after, to, at):
        """to[at] = the least of a block's experts above `after`, none where there is none."""
        to[at] = smallest(T.Select(id_ > after, id_, none))

    @T.inline
    def list_batch(id_, expert, lane, writes, found, batch):
        """found[0 …] = the slots of the visits from `expert` on, as many as there is room for.

        batch i32 [3]: how many slots these are; an expert; how many slots are its.
        """
        batch[0] = 0
        batch[1] = expert
        batch[2] = T.Cast("int32", T.popcount(lanes_where(id_ == expert)))
        while T.And(batch[1] != none, batch[0] + batch[2] <= most):
            lanes: T.let = lanes_where(id_ == batch[1])
            if T.And(writes, id_ == batch[1]):
                found[batch[0] + count_below(lanes, lane)] = lane
            batch[0] = batch[0] + batch[2]
            next_expert(id_, batch[1], batch, 1)
            batch[2] = T.Cast("int32", T.popcount(lanes_where(id_ == batch[1])))

    @T.inline
    def multiply(
        xs, lanes, begin, half, weight, warp, lane, words, scale, b, a, part, acc, total, place
    ):
        """total += the weighted outputs of an expert, which has the slots `lanes` of a block's;
        their inputs begin at position `begin` of those in shared memory."""
        for i in T.unroll(2 * own):
            acc[i] = T.float32(0)
        # The token of this lane's column of inputs; one without this expert has any inputs.
        ahead: T.let = count_below(lanes, T.min(lane // 4 // inputs.parts * top_k, LANES - 1))
        slot: T.let = T.min(ahead, T.Cast("int32", T.popcount(lanes)) - 1)
        column: T.let = (begin + slot) * inputs.parts + lane // 4 % inputs.parts
        for d in T.unroll(depth):
            if depth * splits == all_steps or warp * depth + d < all_steps:
                read_columns(xs, MMA_COLUMNS, warp * depth + d, column, lane % 4, b)
                multiply_step(inputs, words, scale, half * depth + d, 1, None, b, a, part, acc, 0)
        for j in T.unroll(own):
            # The tokens of this lane's products.
            first: T.let = T.min((lane % 4 * own + j) * top_k, LANES - 1)
            chosen: T.let = T.bitwise_and(
                T.shift_right(lanes, T.Cast("uint32", first)), T.uint32((1 << top_k) - 1)
            )
            place[0] = first
            for i in T.unroll(top_k):
                if T.bitwise_and(chosen, T.uint32(1) << T.Cast("uint32", i)) != T.uint32(0):
                    place[0] = first + i
            factor: T.let = lane_value(weight, place[0])
            if chosen != T.uint32(0):
                for r in T.unroll(2):
                    total[2 * j + r] = total[2 * j + r] + factor * acc[r * own + j]

    @T.inline
    def work(vi, count, tx, h, ids, weights, blocks, scales, bias, residual, y):
        xs = T.sblock_alloc_buffer((_words(inputs, intermediate, tile),), "uint32", scope="shared")
        found = T.sblock_alloc_buffer((most,), "int32", scope="shared")
        words = T.sblock_alloc_buffer((AHEAD * depth * 4,), "uint32", scope="local")
        scale = T.sblock_alloc_buffer((AHEAD * depth,), "uint32", scope="local")
        a = T.sblock_alloc_buffer((8,), "uint32", scope="local")
        b = T.sblock_alloc_buffer((8,), "uint32", scope="local")
        part = T.sblock_alloc_buffer((4,), "float32", scope="local")
        acc = T.sblock_alloc_buffer((2 * own,), "float32", scope="local")
        total = T.sblock_alloc_buffer((2 * own,), "float32", scope="local")
        begun = T.sblock_alloc_buffer(
            (tokens * MMA_ROWS,), "float32", scope="shared"
        )  # a thread's own, where it takes no register
        out = T.sblock_alloc_buffer((1,), "float32", scope="local")
        raw = T.sblock_alloc_buffer(
            (staged_words(inputs, intermediate, most, threads),),
            "uint32", scope="local",
        )  # fmt: skip
        pairs = T.sblock_alloc_buffer((4,), "uint32", scope="local")
        slot = T.sblock_alloc_buffer((1,), "int32", scope="local")
        weight = T.sblock_alloc_buffer((1,), "float32", scope="local")
        expert = T.sblock_alloc_buffer((AHEAD,), "int32", scope="local")
        batch = T.sblock_alloc_buffer((3,), "int32", scope="local")
        at = T.sblock_alloc_buffer((1,), "int32", scope="local")
        place = T.sblock_alloc_buffer((1,), "int32", scope="local")
        word = T.sblock_alloc_buffer((1,), "uint32", scope="local")

        @T.inline
        def read(buffer, i, j):
            load_word(word, 0, T.address_of(buffer[i, j]))

        T.attr(0, "tirx.launch_bounds_min_blocks_per_sm", 2)
        warp: T.let = tx // LANES
        lane: T.let = tx % LANES
        row0: T.let = vi * MMA_ROWS
        # A lane knows a slot of the block's tokens.
        slot[0] = none
        weight[0] = T.float32(0)
        if lane < count * top_k:
            read(ids, lane // top_k, lane % top_k)
            slot[0] = T.reinterpret("int32", word[0])
            read(weights, lane // top_k, lane % top_k)
            weight[0] = T.reinterpret("float32", word[0])
        next_expert(slot[0], -1, expert, 0)
        # What does not wait for the products: residual and bias.
        if tx < count * MMA_ROWS:
            token: T.let = tx // MMA_ROWS
            read(residual, token, row0 + tx % MMA_ROWS)
            out[0] = T.reinterpret("float32", word[0])
            for j in T.unroll(top_k):
                read(weights, token, j)
                factor: T.let = T.reinterpret("float32", word[0])
                read(ids, token, j)
                expert_: T.let = T.reinterpret("int32", word[0])
                out[0] = out[0] + factor * bias[expert_, row0 + tx % MMA_ROWS]
            begun[tx] = out[0]
        for i in T.unroll(2 * own):
            total[i] = T.float32(0)
        list_batch(slot[0], expert[0], lane, warp == 0, found, batch)
        load(blocks, scales, expert[0], vi, warp, lane, words, scale, 0)
        barrier()
        stage_rows(
            inputs, intermediate, MMA_COLUMNS, h, found, 1, 0, batch[0], most,
            tx, threads, xs, raw, pairs,
        )  # fmt: skip
        at[0] = 0
        next_expert(slot[0], expert[0], expert, 1)
        load(blocks, scales, expert[1], vi, warp, lane, words, scale, 1)
        barrier()
        while expert[0] != none:
            for half in T.unroll(AHEAD):
                if expert[half] != none:
                    if at[0] == batch[0]:
                        list_batch(slot[0], expert[half], lane, warp == 0, found, batch)
                        barrier()  # and the inputs are no longer read
                        # One by one: the registers hold two visits' weights.
                        for i in T.serial(batch[0]):
                            stage_rows(
                                inputs, intermediate, MMA_COLUMNS, h, found, 1, i,
                                1, 1, tx, threads, xs, raw, pairs,
                            )  # fmt: skip
                        barrier()
                        at[0] = 0
                    lanes: T.let = lanes_where(slot[0] == expert[half])
                    multiply(
                        xs, lanes, at[0], half, weight[0], warp, lane, words,
                        scale, b, a, part, acc, total, place,
                    )  # fmt: skip
                    at[0] = at[0] + T.Cast("int32", T.popcount(lanes))
                    next_expert(slot[0], expert[1 - half], expert, half)
                    load(
                        blocks, scales, expert[half], vi, warp, lane, words,
                        scale, half,
                    )  # fmt: skip
        barrier()
        for j, r in T.grid(own, 2):
            if lane % 4 * own + j < tokens:
                xs[sum_at(warp, lane % 4 * own + j, lane // 4 + 8 * r)] = T.reinterpret(
                    "uint32", total[2 * j + r]
                )
        barrier()
        if tx < count * MMA_ROWS:
            out[0] = T.float32(0)
            for w in T.unroll(splits):
                out[0] = out[0] + T.reinterpret(
                    "float32", xs[sum_at(w, tx // MMA_ROWS, tx % MMA_ROWS)]
                )
            y[tx // MMA_ROWS, row0 + tx % MMA_ROWS] = begun[tx] + out[0] * T.float32(LOWER)

    @T.inline
    def few(n, h, ids, weights, blocks, scales, bias, residual, y):
        for tile_ in T.thread_binding(hidden // MMA_ROWS, thread="blockIdx.x"):
            for thread in T.thread_binding(threads, thread="threadIdx.x"):
                with T.sblock("few_tokens"):
                    vi, tx = T.axis.remap("SS", [tile_, thread])
                    T.reads(
                        whole(h), whole(ids), whole(weights), whole(blocks), whole(scales),
                        whole(bias), whole(residual),
                    )  # fmt: skip
                    T.writes(whole(y))
                    work(
                        vi, T.Cast("int32", n), tx, h, ids, weights, blocks, scales, bias,
                        residual, y,
                    )  # fmt: skip

    some = many_tokens(
        inputs, tile.many, experts=experts, top_k=top_k, hidden=hidden, intermediate=intermediate
    )
    many = _many_tokens(
        inputs, tile, experts=experts, top_k=top_k, hidden=hidden, intermediate=intermediate,
        hopper=hopper,
    )  # fmt: skip

    shape = {"top_k": top_k, "intermediate": intermediate}
    one = one_token(inputs, splits, hidden=hidden, **shape)
    has_one = one_token_fits(inputs, splits, **shape)

    @T.inline
    def body(
        n, h, ids, weights, blocks, scales, bias, residual, y, outputs, begins, by_expert,
        parts=None,
    ):  # fmt: skip
        if has_one and n == 1:
            one(h, ids, weights, blocks, scales, bias, residual, y)
        elif n <= tokens:
            few(n, h, ids, weights, blocks, scales, bias, residual, y)
        elif n * top_k < tile.grouped.least * experts:
            some(n, h, ids, weights, blocks, scales, bias, residual, y)
        else:
            many(
                n, h, ids, weights, blocks, scales, bias, residual, y, begins, by_expert, outputs,
                parts,
            )  # fmt: skip

    return prim_func(arguments, body)


def _many_tokens(
    inputs: Inputs, tile: DownTile, *, experts: int, top_k: int, hidden: int, intermediate: int,
    hopper: bool,
) -> Callable[..., Any]:  # fmt: skip
    """The launches for many tokens: the outputs of all slots, then their mixture."""

    @T.inline
    def store(given, expert, slot, number, g, sums):
        bias, outputs = T.meta_var(given[2:])
        for r in T.unroll(2):
            row: T.let = number * MMA_ROWS + 8 * r + g
            outputs[slot, row] = sums[r] + bias[expert, row]

    products = grouped_products(
        inputs, tile.grouped, experts=experts, top_k=top_k, share=1, rows=hidden, k=intermediate,
        store=store, hopper=hopper,
    )  # fmt: skip
    mix = mixture(top_k, hidden)

    @T.inline
    def launch(
        n, h, ids, weights, blocks, scales, bias, residual, y, begins, by_expert, outputs, parts
    ):
        products(n, h, ids, (blocks, scales), (begins, by_expert, bias, outputs), parts)
        mix(n, outputs, weights, residual, y)

    return launch


def _scratch(
    *, inputs: Inputs, hopper: bool, experts: int, top_k: int, hidden: int, intermediate: int
) -> tuple[Tensor, ...]:
    slots = Size("n", top_k)
    plan = scratch(inputs, slots, experts, slots, intermediate, hopper=hopper)
    return (f32("outputs", slots, hidden), *plan)


def schedules(activations: ActivationFormat) -> tuple[Schedule, ...]:
    return schedule(
        "a tile of 16 rows a block, {}",
        activations,
        _build,
        DownTile(),
        neighbours,
        _fits,
        _scratch,
    )
