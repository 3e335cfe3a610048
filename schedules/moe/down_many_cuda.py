"""`down` on CUDA for more tokens than a few: expert by expert, each for all tokens of a block.

A block takes some tiles of 16 rows for up to `tokens` tokens. It sorts their slots by expert and
visits these, eight slots a visit: the weights of an expert are read once, and again only from
registers. Its warps divide K. Every lane brings its inputs straight to its fragments, so that warps
meet once a visit, to add their sums to those of the tokens, which are in shared memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..cuda.instructions import LANES, MMA_ROWS, shared_words
from ..cuda.mxfp4 import LOWER, Inputs, load_inputs, load_step, load_word, multiply_step, steps
from ..cuda.warps import lanes_where
from ..gpu.barriers import barrier
from ..kernel import T, TileConfig
from .experts_cuda import whole

VISIT = 8  # slots
LAST = 0x7FFFFFFF  # behind all keys


@dataclass(frozen=True)
class ManyTile(TileConfig):
    """Counted for an H200, none was at hand: with 20b's 180 tiles each of 90 SMs has a block of 15
    warps, 57 KB of weights on their way, and reads the inputs half as often as with one tile."""

    splits: int = 15  # warps of a block, between which K is divided; at least VISIT
    tiles: int = 2  # of a block
    slots: int = 256  # of a block's tokens, at most
    tokens: int = 64  # of a block, at most

    def __post_init__(self) -> None:
        assert self.splits >= VISIT


def many_tokens(
    inputs: Inputs, tile: ManyTile, *, experts: int, top_k: int, hidden: int, intermediate: int
) -> Callable[..., Any]:
    """The T.inline launch(n, h, ids, weights, blocks, scales, bias, residual, y)."""
    splits, tiles = tile.splits, tile.tiles
    all_tiles, all_steps = hidden // MMA_ROWS, steps(intermediate)
    depth = -(-all_steps // splits)  # steps of a warp
    threads = LANES * splits
    tokens = min(tile.tokens, tile.slots // top_k)
    most = -(-tokens * top_k // 4) * 4  # slots, and places of their keys
    places = most + LANES  # some that are LAST behind them
    rows = tiles * MMA_ROWS
    groups = VISIT // inputs.group
    own = inputs.own
    visit_sums = splits * VISIT * rows

    def sum_at(parity: Any, warp: Any, slot: Any, row: Any) -> Any:
        """Where the sum of a warp is for others to read; a warp's lanes write to all banks."""
        swapped = T.bitwise_xor(row, slot // own % 4 * 8) if rows % 32 == 0 else row
        return parity * visit_sums + (warp * VISIT + slot) * rows + swapped

    @T.inline
    def work(vi, token0, here, tx, h, ids, weights, blocks, scales, bias, residual, y):
        # Of a slot: its expert · most + its number among the block's. Sorted, they are the visits.
        keys = T.sblock_alloc_buffer((most,), "int32", scope="shared")
        order = T.sblock_alloc_buffer((places,), "int32", scope="shared")
        factor = T.sblock_alloc_buffer((most,), "float32", scope="shared")  # of a slot
        total = T.sblock_alloc_buffer((tokens * rows,), "float32", scope="shared")
        sums = T.sblock_alloc_buffer((2 * visit_sums,), "uint32", scope="shared")
        words = T.sblock_alloc_buffer((4 * depth * tiles,), "uint32", scope="local")
        scale = T.sblock_alloc_buffer((depth * tiles,), "uint32", scope="local")
        a = T.sblock_alloc_buffer((8,), "uint32", scope="local")
        b = T.sblock_alloc_buffer((8 * groups,), "uint32", scope="local")
        part = T.sblock_alloc_buffer((4,), "float32", scope="local")
        acc = T.sblock_alloc_buffer((2 * own * groups * tiles,), "float32", scope="local")
        raw = T.sblock_alloc_buffer((8 * groups,), "uint32", scope="local")
        pairs = T.sblock_alloc_buffer((4,), "uint32", scope="local")
        word = T.sblock_alloc_buffer((2,), "uint32", scope="local")
        rank = T.sblock_alloc_buffer((1,), "int32", scope="local")
        out = T.sblock_alloc_buffer((1,), "float32", scope="local")
        parity = T.sblock_alloc_buffer((1,), "int32", scope="local")
        # A visit: its first place in `order`, how many slots it has, its expert.
        now = T.sblock_alloc_buffer((3,), "int32", scope="local")
        later = T.sblock_alloc_buffer((3,), "int32", scope="local")
        warp: T.let = tx // LANES
        lane: T.let = tx % LANES
        count: T.let = here * top_k

        @T.inline
        def look(place, visit):
            """The visit that begins at a place; without slots at the end."""
            visit[0] = place
            visit[2] = order[place] // most
            key: T.let = order[place + lane]
            same: T.let = T.And(lane < VISIT, T.And(key // most == visit[2], key != LAST))
            visit[1] = T.Cast("int32", T.popcount(lanes_where(same)))

        @T.inline
        def fetch(visit, d):
            """A lane's inputs of a step."""
            for g in T.unroll(groups):
                if visit[1] > g * inputs.group:
                    slot: T.let = T.min(g * inputs.group + inputs.token(lane), visit[1] - 1)
                    load_inputs(
                        inputs, intermediate, h, token0 * top_k + order[visit[0] + slot] % most,
                        warp * depth + d, lane, raw, 8 * g,
                    )  # fmt: skip

        @T.inline
        def load(expert, d, m):
            if depth * splits == all_steps or warp * depth + d < all_steps:
                number: T.let = T.min(vi * tiles + m, all_tiles - 1)
                load_step(
                    blocks, scales, expert, number * all_steps + warp * depth, d, lane, words,
                    scale, d * tiles + m,
                )  # fmt: skip

        @T.inline
        def multiply(used):
            """A warp's sums of a visit, and the loads of the next one."""
            fresh: T.let = T.And(later[1] > 0, later[2] != now[2])
            for i in T.unroll(2 * own * used * tiles):
                acc[i] = T.float32(0)
            for d in T.unroll(depth):
                for g in T.unroll(used):
                    inputs.fragments(raw, 8 * g, lane, pairs, b, 8 * g)
                if d + 1 < depth:
                    fetch(now, d + 1)
                else:
                    fetch(later, 0)
                for m in T.unroll(tiles):
                    if depth * splits == all_steps or warp * depth + d < all_steps:
                        multiply_step(
                            inputs, words, scale, d * tiles + m, used, None, b, a, part, acc,
                            2 * own * used * m,
                        )  # fmt: skip
                    if fresh:
                        load(later[2], d, m)
            for m, g, r, j in T.grid(tiles, used, 2, own):
                slot: T.let = g * inputs.group + lane % 4 * own + j
                sums[sum_at(parity[0], warp, slot, m * MMA_ROWS + r * 8 + lane // 4)] = (
                    T.reinterpret("uint32", acc[(2 * (used * m + g) + r) * own + j])
                )

        for i in T.serial(-(-most // threads)):
            slot: T.let = i * threads + tx
            if slot < most:
                keys[slot] = LAST
                if slot < count:
                    token: T.let = token0 + slot // top_k
                    load_word(word, 0, T.address_of(ids[token, slot % top_k]))
                    load_word(word, 1, T.address_of(weights[token, slot % top_k]))
                    keys[slot] = T.reinterpret("int32", word[0]) * most + slot
                    factor[slot] = T.reinterpret("float32", word[1])
        barrier()
        for i in T.serial(-(-places // threads)):
            slot: T.let = i * threads + tx
            if slot < count:
                rank[0] = 0
                for j in T.serial(T.ceildiv(count, 4)):
                    for k in T.unroll(4):
                        rank[0] = rank[0] + T.Cast("int32", keys[4 * j + k] < keys[slot])
                order[rank[0]] = keys[slot]
            else:
                if slot < places:
                    order[slot] = LAST
        # What does not wait for the products: residual and bias.
        for i in T.serial(-(-tokens * rows // threads)):
            token: T.let = (i * threads + tx) // rows
            row: T.let = vi * rows + (i * threads + tx) % rows
            if T.And(token < here, row < hidden):
                load_word(word, 0, T.address_of(residual[token0 + token, row]))
                out[0] = T.reinterpret("float32", word[0])
                for j in T.serial(top_k):
                    expert: T.let = keys[token * top_k + j] // most
                    out[0] = out[0] + factor[token * top_k + j] * bias[expert, row]
                total[i * threads + tx] = out[0]
        barrier()
        parity[0] = 0
        look(0, now)
        fetch(now, 0)
        for d, m in T.grid(depth, tiles):
            load(now[2], d, m)
        while now[1] > 0:
            look(now[0] + now[1], later)
            if now[1] <= inputs.group:
                multiply(1)
            else:
                multiply(groups)
            barrier()
            if warp < now[1]:
                out[0] = T.float32(0)
                for m in T.unroll(-(-rows // LANES)):
                    row: T.let = m * LANES + lane
                    slot: T.let = order[now[0] + warp] % most
                    out[0] = T.float32(0)
                    for w in T.unroll(splits):
                        # Not so that TVM sees it: the next visit writes to the other half.
                        shared_words([word[0]], sums[sum_at(parity[0], w, warp, row)])
                        out[0] = out[0] + T.reinterpret("float32", word[0])
                    at: T.let = slot // top_k * rows + row
                    total[at] = total[at] + factor[slot] * (out[0] * T.float32(LOWER))
            parity[0] = 1 - parity[0]
            for i in T.unroll(3):
                now[i] = later[i]
        barrier()
        for i in T.serial(-(-tokens * rows // threads)):
            token: T.let = (i * threads + tx) // rows
            row: T.let = vi * rows + (i * threads + tx) % rows
            if T.And(token < here, row < hidden):
                y[token0 + token, row] = total[i * threads + tx]

    @T.inline
    def launch(n, h, ids, weights, blocks, scales, bias, residual, y):
        for rows_ in T.thread_binding(-(-all_tiles // tiles), thread="blockIdx.x"):
            for group in T.thread_binding(T.ceildiv(n, tokens), thread="blockIdx.y"):
                for thread in T.thread_binding(threads, thread="threadIdx.x"):
                    with T.sblock("many_tokens"):
                        vi, vg, tx = T.axis.remap("SSS", [rows_, group, thread])
                        T.reads(
                            whole(h), whole(ids), whole(weights), whole(blocks), whole(scales),
                            whole(bias), whole(residual),
                        )  # fmt: skip
                        T.writes(whole(y))
                        work(
                            vi, T.Cast("int32", vg) * tokens,
                            T.min(T.Cast("int32", n) - T.Cast("int32", vg) * tokens, tokens), tx, h,
                            ids, weights, blocks, scales, bias, residual, y,
                        )  # fmt: skip

    return launch
