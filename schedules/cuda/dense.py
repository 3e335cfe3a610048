"""What CUDA schedules of dense layers share, fused ones too: y = x·Wᵀ by mma.sync, sm_80 and later.

A tile is 16 rows of W, the rows of an mma; tokens are its columns. Each token has several, for an
input becomes a sum of parts that tensor cores take; products are thus as good as those of float32.

- A step is 32 inputs. W is packed so that a lane's fragments of a step are one or two times 16
  bytes: loads of 128 bits, past L1, and no unpacking.
- The warps of a block share out the steps, each a run of its own. A warp brings the parts of its
  inputs to its own shared memory, a few steps at a time. Warps thus meet once: to add up.
- Every lane has `loads` loads of weights in flight, the first of them before it reads x: they
  begin while the launch before ends.

Many tokens are multiplied otherwise (dense_many.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tvm import tirx

from ..kernel import Layout, T, TileConfig
from .dense_many import products
from .instructions import (
    ALL_LANES,
    LANES,
    MMA_COLUMNS,
    MMA_ROWS,
    load_floats,
    magnitude,
    wait_for_launch_before,
)
from .product import WHOLE, ProductRows, ProductTile

STEP = 32  # inputs: what two mma of bfloat16 take, and a block of 8-bit weights
PAIRS = MMA_ROWS // 2  # of rows in a tile: a lane, later a thread, has both rows of a pair
QUADS = STEP // 4  # lanes that read a step of a token, four inputs each
AT_ONCE = LANES // QUADS  # steps that a warp reads by one load
ITEMS = 16  # in a warp's shared memory: steps of tokens
READS = ITEMS // AT_ONCE
AHEAD = 2  # reads that are in flight together
MOST_UNROLLED = 4  # rounds
MOST_TILES = 65_535  # blocks of an axis of a grid that is not the first


@dataclass(frozen=True)
class DenseTile(TileConfig):
    """A block's sizes. It has few tokens where there are no more than it can, and `many` otherwise.

    row_tiles: of a block where there are `enough` tiles of rows: their inputs are staged once
    warps: of a block, at most, and half of that at least; with few tokens, and one tile of rows,
        `warps_of_one`
    loads: of 16 bytes of W that a lane has in flight; with few tokens, and several tiles of rows,
        `loads_of_several`
    least: so many tokens are multiplied by tiles of them, `large` ones where those are `enough`;
        on Hopper these are alone on their SM
    """

    many: int = 16
    warps: int = 8
    warps_of_one: int = 16
    enough: int = 264  # two for each SM of an H200
    row_tiles: int = 2
    loads: int = 8
    loads_of_several: int = 8
    least: int = 128
    small: ProductTile = field(default_factory=lambda: ProductTile(warps=4, tiles=1))
    large: ProductTile = field(default_factory=ProductTile)
    hopper_large: ProductTile = field(default_factory=lambda: ProductTile(stages=6))


# -- layouts --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiling:
    """Which rows make a tile: of every `group` rows, tile i has the pairs (8i + p, 8i + p +
    group/2) for p < 8. The last rows are filled up with zeros to a whole group."""

    group: int = MMA_ROWS

    def tiles(self, rows: int) -> int:
        return -(-rows // self.group) * (self.group // MMA_ROWS)

    def row(self, tile: Any, p: Any, second: Any) -> Any:
        """The first or second row of pair p; an expression."""
        in_group = self.group // MMA_ROWS
        first = tile // in_group * self.group + tile % in_group * PAIRS + p
        return first + second * (self.group // 2)

    def by_tile(self, rows: np.ndarray) -> np.ndarray:
        """[rows, …] -> [tiles, 2, 8, …]: the first rows of a tile's pairs, then the second."""
        tiles = self.tiles(len(rows))
        full = np.zeros((tiles * MMA_ROWS, *rows.shape[1:]), rows.dtype)
        full[: len(rows)] = rows
        grouped = full.reshape(-1, 2, self.group // MMA_ROWS, PAIRS, *rows.shape[1:])
        return grouped.swapaxes(1, 2).reshape(tiles, 2, PAIRS, *rows.shape[1:])

    def fragments(self, mmas: int) -> Layout:
        """The layout of W [rows, k], of which a step takes so many mma.

        It is u32 [tiles·k/32, 128·mmas].

        Lane 4g + t has four words of each mma: of inputs 8t … 8t + 7 the first half of those that
        the mma takes, of row g and of row g + 8, then the other half.
        """

        def shape(stored: tuple[Any, ...]) -> tuple[Any, ...]:
            rows, k = stored
            return (self.tiles(rows) * (k // STEP), mmas * LANES * 4)

        def pack(weight: np.ndarray) -> np.ndarray:
            words = np.ascontiguousarray(weight).view(np.uint32)
            words = words.reshape(len(weight), -1, 4, mmas, 2)  # row, step, t, mma, half
            tiles = self.by_tile(words)  # tile, second, g, step, t, mma, half
            return tiles.transpose(0, 3, 5, 2, 4, 6, 1).reshape(shape(weight.shape))

        return Layout(shape, pack, rows=self.group, dtype="uint32")


# -- code -----------------------------------------------------------------------------------------


@T.inline
def load_words(to, at, start):
    """Four words from `start` on, an element of a buffer, to registers; not kept in L1.

    It stays on its side of wait_for_launch_before(): ptxas moves loads with .nc, and those that
    nvcc takes for constant, to the other.
    """
    T.ptx["ld.global.L1::no_allocate.v4.b32"](
        to[at], to[at + 1], to[at + 2], to[at + 3], T.address_of(start)
    )


@dataclass(frozen=True)
class Arithmetic:
    """How inputs become columns of an mma, and its products sums: what depends on W's format.

    An item is a step of a token. All lanes of a warp call these T.inline functions at once.

    columns: of a token, side by side
    mmas: of a tile and a step
    words: of shared memory, for an item
    sums: f32 accumulators of a lane, for each row of a pair
    load(weights, m, step, lane, w, scale): a step of a tile to registers m·mmas·4 and on of w, and
        to m of scale; `step` counts those of all tiles
    stage(shared, at, item, q, together, stored, x, i, parts): parts of x[i … i+3], inputs
        4q … 4q+3 of an item, to the warp's shared memory, which begins at `at`; eight lanes have
        an item, and so many items beside each other are of one token, the first a multiple of that
    fetch(shared, at, item, column, own, together, d, t, b): this lane's part of B to b: of a column
        of an item, and what belongs to `own`, the item of its sums; both a token's d-th
    multiply(b, t, w, scale, m, together, d, acc, acc_at): adds the products of a tile and a step
    total(acc, acc_at, t) -> f32: a lane's sum of a row, of token 2t // columns
    rows(k): the same W, for many tokens
    """

    columns: int
    mmas: int
    words: int
    sums: int
    load: Callable[..., Any]
    stage: Callable[..., Any]
    fetch: Callable[..., Any]
    multiply: Callable[..., Any]
    total: Callable[..., Any]
    rows: Callable[[int], ProductRows]


@dataclass(frozen=True)
class Block:
    """The sizes of a launch's blocks: groups of so many warps, each with tiles of its own. `steps`
    are in flight; `staged` of each token are in a warp's shared memory. Rounds of `steps` that are
    `unrolled` take up to half the instructions, since addresses become numbers.
    """

    tokens: int
    groups: int
    row_tiles: int
    warps: int
    loads: int
    steps: int
    staged: int
    unrolled: bool

    @property
    def together(self) -> int:
        """Steps of a token that a warp reads by one load."""
        return min(self.staged, AT_ONCE)

    @property
    def reads_of_token(self) -> int:
        """Reads that bring the items of one token, of which there may be several in a read."""
        return max(1, self.staged // AT_ONCE)


def blocks_of(
    tile: DenseTile, mmas: int, tiles: int, steps: int, whole: int
) -> tuple[Block, Block]:
    """The blocks for few tokens and for many, of W with so many tiles of rows and steps. A block
    has as many tiles as are `whole`, or any number."""
    row_tiles = tile.row_tiles if tiles >= tile.enough or whole > 1 else 1
    groups = max(1, whole // row_tiles)

    def sizes(warps: int, loads: int, many: int | None = None) -> Block:
        in_flight = loads // (mmas * row_tiles)
        warps = _fullest(min(warps, steps), steps, in_flight)
        tokens = many or ITEMS // in_flight
        unrolled = many is None and steps <= MOST_UNROLLED * warps * in_flight
        staged = ITEMS // tokens
        return Block(tokens, groups, row_tiles, warps, loads, in_flight, staged, unrolled)

    return (
        sizes(tile.warps, tile.loads_of_several)
        if row_tiles > 1
        else sizes(tile.warps_of_one, tile.loads),
        sizes(tile.warps, tile.loads, tile.many),
    )


def _fullest(most: int, steps: int, in_flight: int) -> int:
    """The warps, of `most` down to half as many, whose rounds have the fewest places in all, for
    they work on those without a step too."""

    def places(warps: int) -> int:
        return warps * -(-steps // (warps * in_flight))

    return min(range(most, (most - 1) // 2, -1), key=places)


def dense(
    arithmetic: Arithmetic, tile: DenseTile, tiling: Tiling, *, rows: int, k: int,
    eps: float | None = None, complete: Callable[..., Any] | None = None, hopper: bool = False,
) -> Callable[..., Any]:  # fmt: skip
    """The T.inline launch(n, x, norm_weight, weights, finish, given, parts) of x·Wᵀ, x f32 [n, k].

    finish(given, token, tile, p, pair): what one thread does with pair f32 [4], of which the first
        two are a token's sums of the rows of pair p, and two are its own
    eps: where it is given, of rms_norm(x, norm_weight, eps) in place of x
    complete(given, token, tile, p, pair): where `finish` needs the largest magnitude of WHOLE tiles
        of a token, pair[2]: what has to be done to the sums before
    parts: what dense_many.scratch says
    hopper: for that architecture alone
    """
    tiles, steps = tiling.tiles(rows), k // STEP
    blocks = blocks_of(tile, arithmetic.mmas, tiles, steps, 1 if complete is None else WHOLE)
    few, some = (_launch(arithmetic, b, tiles, k, eps, complete) for b in blocks)
    many = products(
        arithmetic.rows(k), tile.small, tile.hopper_large if hopper else tile.large, tile.enough,
        tiles=tiles, k=k, eps=eps, complete=complete, hopper=hopper,
    )  # fmt: skip

    @T.inline
    def launch(n, x, norm_weight, weights, finish, given, parts):
        if n <= blocks[0].tokens:
            few(n, x, norm_weight, weights, finish, given)
        elif n < tile.least:
            some(n, x, norm_weight, weights, finish, given)
        else:
            many(n, x, norm_weight, weights, finish, given, parts)

    return launch


def _launch(
    arithmetic: Arithmetic, b: Block, tiles: int, k: int, eps: float | None,
    complete: Callable[..., Any] | None,
) -> Callable[..., Any]:  # fmt: skip
    """One launch of `dense`. Where tiles are whole, a warp's threads have one token of them at the
    end, pairs tile by tile."""
    whole = complete is not None
    assert not whole or WHOLE * PAIRS == LANES
    columns, sums = arithmetic.columns, 2 * arithmetic.sums
    mma_tokens = MMA_COLUMNS // columns
    mma_tiles = b.tokens // mma_tokens
    warps, all_tiles = b.groups * b.warps, b.groups * b.row_tiles
    threads = warps * LANES
    steps = k // STEP
    most = -(-steps // b.warps)  # of a warp
    rounds = -(-most // b.steps)
    stages = rounds * (b.steps // b.staged)
    partials = b.row_tiles * 2 * b.tokens * PAIRS  # of a warp
    sums_at = warps * ITEMS * arithmetic.words  # in shared memory
    squares_at = sums_at + warps * partials

    def sum_at(warp: Any, m: Any, second: Any, token: Any) -> Any:
        """Where a warp leaves a sum. Several whole tiles are read side by side: from all banks."""
        if whole:
            token = (token + warp // b.warps * b.row_tiles + m) % b.tokens
        return sums_at + warp * partials + ((m * 2 + second) * b.tokens + token) * PAIRS

    def item_of(item: Any) -> tuple[Any, Any]:
        """Of a thread at the end: its token and tile."""
        if whole:
            return item // PAIRS // all_tiles, item // PAIRS % all_tiles
        return item // PAIRS % b.tokens, item // PAIRS // b.tokens

    token_lanes = QUADS * b.together
    loop = T.unroll if b.unrolled else T.serial

    own_steps = b.warps * b.steps * rounds == steps  # each place of a warp has a step
    first_tokens = max(1, AT_ONCE // b.staged)  # of the reads that there always are

    # Of a read, by its number: whether it brings anything; and what it brings for a lane: the
    # token, whether there is one, and the step, from that of the first read on.

    def is_read(i: Any, count: Any) -> Any:
        of_first = i < b.reads_of_token
        return tirx.any(of_first, tirx.all(i < READS, i * AT_ONCE // b.staged < count))

    def token_of(i: Any, lane: Any) -> Any:
        return (i * AT_ONCE + lane // QUADS) // b.staged

    def is_token(i: Any, lane: Any, count: Any) -> Any:
        return tirx.any((i + 1) * AT_ONCE <= b.staged, token_of(i, lane) < count)

    def needs_room(r: Any, s: Any) -> Any:
        """Whether a stage's items are in the way of the next one's."""
        following = r * (b.steps // b.staged) + s + 1
        return tirx.all(stages > 1, tirx.any(not b.unrolled, following < stages))

    def further(s: Any, i: Any) -> Any:
        return s * b.staged + i * AT_ONCE % b.staged

    @T.inline
    def work(vy, vx, tx, n, x, norm_weight, weights, finish, given):
        # In one, for TVM gives the place of an array that it takes for done with to another one,
        # without a barrier.
        shared = T.sblock_alloc_buffer((squares_at + warps * b.tokens,), "uint32", scope="shared")
        w = T.sblock_alloc_buffer((b.loads * 4,), "uint32", scope="local")
        scale = T.sblock_alloc_buffer((b.loads,), "uint32", scope="local")
        four = T.sblock_alloc_buffer((AHEAD * 4,), "float32", scope="local")
        weight = T.sblock_alloc_buffer((b.reads_of_token * 4,), "float32", scope="local")
        square = T.sblock_alloc_buffer((READS,), "float32", scope="local")
        bits = T.sblock_alloc_buffer((8,), "uint32", scope="local")
        acc = T.sblock_alloc_buffer((b.row_tiles * mma_tiles * sums,), "float32", scope="local")
        pair = T.sblock_alloc_buffer((4,), "float32", scope="local")
        warp: T.let = tx // LANES
        lane: T.let = tx % LANES
        first: T.let = vx * b.tokens
        count: T.let = T.Cast("int32", T.min(n - first, T.int64(b.tokens)))
        first_tile: T.let = (vy * b.groups + warp // b.warps) * b.row_tiles
        begin: T.let = warp % b.warps * steps // b.warps
        # Where the warp is: kept, for nvcc would compute them anew from the number of the round.
        left = T.sblock_alloc_buffer((1,), "int32", scope="local")
        quad = T.sblock_alloc_buffer((1,), "int32", scope="local")
        step_of_tile = T.sblock_alloc_buffer((b.row_tiles,), "int32", scope="local")
        end: T.let = (warp % b.warps + 1) * steps // b.warps
        own_items: T.let = warp * (ITEMS * arithmetic.words)

        @T.inline
        def load(slot, further):
            """The step that is so many after the next one to multiply."""
            for m in T.unroll(b.row_tiles):
                arithmetic.load(
                    weights, slot * b.row_tiles + m, step_of_tile[m] + further, lane, w, scale
                )

        @T.inline
        def read(i, j, further):
            """Four inputs to `four`. What lies behind the warp's steps is zero, so that no product
            has to be left out."""
            place: T.let = quad[0] + further * QUADS
            if is_token(i, lane, count) and tirx.any(own_steps, place < end * QUADS):
                load_floats(four, j * 4, x[first + token_of(i, lane), place * 4])
            else:
                four[T.ramp(j * 4, 1, 4)] = T.broadcast(T.float32(0), 4)

        @T.inline
        def read_norm(s):
            """The norm's weights of all tokens."""
            for i in T.unroll(b.reads_of_token):
                place: T.let = T.min(quad[0] + further(s, i) * QUADS, k // 4 - 1)
                load_floats(weight, i * 4, norm_weight[place * 4])

        @T.inline
        def normalize(i, j):
            """All but the factor of the token, which is known at the end."""
            for e in T.unroll(4):
                square[i // b.reads_of_token] = (
                    square[i // b.reads_of_token] + four[j * 4 + e] * four[j * 4 + e]
                )
                four[j * 4 + e] = four[j * 4 + e] * weight[i % b.reads_of_token * 4 + e]

        @T.inline
        def stage_reads(s, begin, reads):
            for j in T.unroll(reads):
                if is_read(begin + j, count):
                    read(begin + j, j, further(s, begin + j))
            # Not in one loop with the above: TVM would make `four` anew each time.
            for j in T.unroll(reads):
                if is_read(begin + j, count):
                    if eps is not None:
                        normalize(begin + j, j)
                    arithmetic.stage(
                        shared, own_items, (begin + j) * AT_ONCE + lane // QUADS, lane % QUADS,
                        b.together, is_token(begin + j, lane, count), four, j * 4, bits,
                    )  # fmt: skip

        @T.inline
        def stage(s):
            if (eps is not None) and (stages > 1):
                read_norm(s)
            stage_reads(s, 0, b.reads_of_token)
            if count > first_tokens:  # apart: one token does not even come by
                for i in T.unroll(-(-(READS - b.reads_of_token) // AHEAD)):
                    stage_reads(s, b.reads_of_token + i * AHEAD, AHEAD)

        @T.inline
        def multiply(slot, d, c):
            # Columns without a token are of whatever lies there, for nobody.
            token: T.let = c * mma_tokens + lane // 4 // columns
            own: T.let = c * mma_tokens + lane % 4 * 2 // columns
            arithmetic.fetch(
                shared, own_items, token * b.staged + d, lane // 4 % columns, own * b.staged + d,
                b.together, d, lane % 4, bits,
            )  # fmt: skip
            for m in T.unroll(b.row_tiles):
                arithmetic.multiply(
                    bits, lane % 4, w, scale, slot * b.row_tiles + m, b.together, d, acc,
                    (m * mma_tiles + c) * sums,
                )  # fmt: skip

        @T.inline
        def multiply_more(s):
            """Staged steps by the columns of all tokens but the first few."""
            for c in T.unroll(mma_tiles - 1):
                if (c == 0) or ((c + 1) * mma_tokens < count):
                    for d in T.unroll(b.staged):
                        multiply(s * b.staged + d, d, c + 1)

        @T.inline
        def leave_sums():
            """A warp's sums, for its block."""
            for m in T.unroll(b.row_tiles):
                for c in T.unroll(mma_tiles):
                    for second in T.unroll(2):
                        total: T.let = arithmetic.total(
                            acc, (m * mma_tiles + c) * sums + second * (sums // 2), lane % 4
                        )
                        if lane % 4 * 2 % columns == 0:
                            token: T.let = c * mma_tokens + lane % 4 * 2 // columns
                            shared[sum_at(warp, m, second, token) + lane // 4] = T.reinterpret(
                                "uint32", total
                            )

        @T.inline
        def leave_squares():
            for i in T.unroll(READS // b.reads_of_token):
                if (i == 0) or (i * (LANES // token_lanes) < count):
                    for distance in T.unroll(token_lanes.bit_length() - 1):
                        square[i] = square[i] + T.cuda.__shfl_xor_sync(
                            T.uint32(ALL_LANES), square[i], T.shift_left(1, distance), LANES
                        )
                    if lane % token_lanes == 0:
                        token: T.let = i * (LANES // token_lanes) + lane // token_lanes
                        shared[squares_at + warp * b.tokens + token] = T.reinterpret(
                            "uint32", square[i]
                        )

        @T.inline
        def add_up(token, m, p):
            """What the warps left, in their order."""
            for second in T.unroll(2):
                pair[second] = T.float32(0)
            weight[0] = T.float32(0)
            for other in T.serial(b.warps):
                for second in T.unroll(2):
                    of_group: T.let = m // b.row_tiles * b.warps + other
                    pair[second] = pair[second] + T.reinterpret(
                        "float32", shared[sum_at(of_group, m % b.row_tiles, second, token) + p]
                    )
                if eps is not None:
                    weight[0] = weight[0] + T.reinterpret(
                        "float32", shared[squares_at + other * b.tokens + token]
                    )
            if eps is not None:
                for second in T.unroll(2):
                    pair[second] = pair[second] / T.sqrt(weight[0] / T.float32(k) + T.float32(eps))

        left[0] = end - begin
        quad[0] = (begin + lane // QUADS % b.together) * QUADS + lane % QUADS
        for m in T.unroll(b.row_tiles):
            step_of_tile[m] = T.min(first_tile + m, tiles - 1) * steps + begin
        for slot in T.unroll(b.steps):
            if tirx.any(slot < steps // b.warps, slot < left[0]):
                load(slot, slot)
            else:
                for i in T.unroll(4 * b.loads // b.steps):
                    w[slot * (4 * b.loads // b.steps) + i] = T.uint32(0)
                for m in T.unroll(b.row_tiles):
                    scale[slot * b.row_tiles + m] = T.uint32(0)
        for i in T.unroll(b.row_tiles * mma_tiles * sums):
            acc[i] = T.float32(0)
        if eps is not None:
            for i in T.unroll(READS // b.reads_of_token):
                square[i] = T.float32(0)
        if (eps is not None) and (stages == 1):
            read_norm(0)
        wait_for_launch_before()
        for r in loop(rounds):
            for s in T.unroll(b.steps // b.staged):
                stage(s)
                T.cuda.warp_sync()
                if (mma_tiles > 1) and (count > mma_tokens):  # apart, as above
                    multiply_more(s)
                for d in T.unroll(b.staged):
                    multiply(s * b.staged + d, d, 0)
                    if (rounds > 1) and (s * b.staged + d + b.steps < left[0]):
                        load(s * b.staged + d, s * b.staged + d + b.steps)
                if needs_room(r, s):
                    T.cuda.warp_sync()
            if rounds > 1:
                left[0] = left[0] - b.steps
                quad[0] = quad[0] + b.steps * QUADS
                for m in T.unroll(b.row_tiles):
                    step_of_tile[m] = step_of_tile[m] + b.steps
        leave_sums()
        if eps is not None:
            leave_squares()
        T.tvm_storage_sync("shared")
        for i in T.serial(-(-all_tiles * b.tokens * PAIRS // threads)):
            item: T.let = i * threads + tx
            token: T.let = item_of(item)[0]
            m: T.let = item_of(item)[1]
            if (token < count) and (vy * all_tiles + m < T.min(tiles, (vy + 1) * all_tiles)):
                add_up(token, m, item % PAIRS)
                if whole:
                    complete(given, first + token, vy * all_tiles + m, item % PAIRS, pair)
                    pair[2] = T.reinterpret(
                        "float32",
                        T.call_extern(
                            "uint32", "__reduce_max_sync", T.uint32(ALL_LANES), magnitude(pair)
                        ),
                    )
                finish(given, first + token, vy * all_tiles + m, item % PAIRS, pair)

    @T.inline
    def launch(n, x, norm_weight, weights, finish, given):
        for tile_block in T.thread_binding(-(-tiles // all_tiles), thread="blockIdx.y"):
            for token_block in T.thread_binding(T.ceildiv(n, b.tokens), thread="blockIdx.x"):
                for thread in T.thread_binding(threads, thread="threadIdx.x"):
                    with T.sblock("block"):
                        vy, vx, tx = T.axis.remap("SSS", [tile_block, token_block, thread])
                        work(vy, vx, tx, n, x, norm_weight, weights, finish, given)

    return launch
