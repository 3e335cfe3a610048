"""W·X of many columns on GPUs whose matrix units take their factors from shared memory.

A block takes some rows of W and the inputs of some tokens, in steps of 32 inputs: its threads
unpack the rows into shared memory and copy the inputs beside them, its warps load fragments of both
and multiply. What the next step needs is on its way to registers meanwhile. Shared memory holds one
step, for the less of it a block takes the more blocks there are to fill each other's gaps. The sums
go through shared memory too: which lane has an element of a fragment is nobody's business.

No sum is added to by two blocks: results repeat.
"""

# ruff: noqa: B023 (T.inline functions are expanded where they are called, not closures)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..kernel import T, TileConfig
from .barriers import barrier
from .gemv import QUAD
from .lanes import LANES
from .matrices import Matrices

STEP = 32  # inputs: a block of MXFP4 and of 8-bit weights
QUADS = STEP // QUAD  # of a token
WORDS = 4  # u32 that a thread loads of a row at once


@dataclass(frozen=True)
class ProductTile(TileConfig):
    """A block's part of a product, (along rows, along tokens)."""

    warps: tuple[int, int]  # of a block
    fragments: tuple[int, int]  # of a warp, whose sums it has in registers


@dataclass(frozen=True)
class ManyTiles(TileConfig):
    """Of products of many tokens. Numbers are of tokens, of experts on average.

    Counted for an M1, none was at hand.
    """

    least: int = 16
    wide: int = 48  # from so many on the large tiles
    small: ProductTile = ProductTile((2, 2), (4, 2))
    large: ProductTile = ProductTile((2, 2), (4, 4))


@dataclass(frozen=True)
class ProductRows:
    """How W becomes a tile: what depends on its format. T.inline functions.

    inputs: weights of the 16 bytes that a thread loads at once: chunk c of a row
    steps: that these cover, with those of the other chunks of the same inputs
    scales: u32 that belong to them
    group: rows 2p and 2p + 1 of a tile are rows i and i + group/2 of a group of W's
    load(weights, expert, row, c, words, scale, slot): chunk c, to place `slot`
    put(words, scale, slot, s, c, keep): the weights of chunk c, of the s-th of its steps, by
        keep(at, four, i): inputs at … at + 3 of the step are f32 four[i … i + 3]
    """

    inputs: int
    steps: int
    scales: int
    group: int
    load: Callable[..., Any]
    put: Callable[..., Any]

    @property
    def chunks(self) -> int:
        """Of a row, that are loaded together."""
        return STEP * self.steps // self.inputs

    def row(self, pair: Any, second: Any) -> Any:
        """The first or second row of a pair; an expression."""
        half = self.group // 2
        return pair // half * self.group + pair % half + second * half

    def pairs(self, rows: int) -> int:
        return -(-rows // self.group) * (self.group // 2)


@dataclass(frozen=True)
class ProductColumns:
    """Which tokens a block takes. T.inline functions; `given` are the launch's arguments.

    choose(given, by, tokens, span): span i32 [3] = the expert of block `by`, -1 where it has none,
        the number of its first token, and how many it has, `tokens` at most
    source(given, number) -> the row of X that is token `number`'s
    store(given, expert, number, pair, sums): sums f32 [2], of a token and of a pair of rows, of
        which the second may not be one of W's
    eps: of the norm that X gets first, if any
    """

    choose: Callable[..., Any]
    source: Callable[..., Any]
    store: Callable[..., Any]
    eps: float | None = None


@dataclass(frozen=True)
class Sizes:
    """Of a block."""

    units: Matrices
    tile: ProductTile

    @property
    def rows(self) -> int:
        return self.tile.warps[0] * self.tile.fragments[0] * self.units.rows

    @property
    def tokens(self) -> int:
        return self.tile.warps[1] * self.tile.fragments[1] * self.units.columns

    @property
    def threads(self) -> int:
        return self.tile.warps[0] * self.tile.warps[1] * self.units.lanes


def product(
    units: Matrices, rows: ProductRows, columns: ProductColumns, tile: ProductTile, *,
    all_rows: int, k: int, blocks: Any,
) -> Callable[..., Any]:  # fmt: skip
    """The T.inline launch(n, x, gain, weights, given) of blocks(n, tokens of a block) · tiles of
    rows.

    x f32 [.., k]   gain f32 [k] by which the norm multiplies, None where there is none
    """
    of = Sizes(units, tile)
    threads, tokens, steps = of.threads, of.tokens, rows.steps
    token_warps = tile.warps[1]
    of_w, of_x = tile.fragments
    normed = columns.eps is not None
    all_steps = k // STEP
    all_loads = -(-all_steps // steps)
    all_chunks = of.rows * rows.chunks
    all_quads = tokens * QUADS
    own_chunks, own_quads = all_chunks // threads, all_quads // threads  # of a thread
    pairs = of.rows // 2
    w_pitch, x_pitch = STEP + units.pads[0], STEP + units.pads[1]
    sums_pitch = of.rows + units.pads[2]
    x_at = of.rows * w_pitch
    squares_at = tokens * sums_pitch
    elements = max(x_at + tokens * x_pitch, squares_at + normed * all_quads)
    assert k % STEP == 0
    assert all_chunks == own_chunks * threads
    assert all_quads == own_quads * threads
    assert threads % QUADS == 0

    @T.inline
    def work(bx, by, tx, x, gain, weights, given):
        # Tiles, and later sums.
        shared = T.sblock_alloc_buffer((elements,), units.dtype, scope="shared")
        words = T.sblock_alloc_buffer((own_chunks * WORDS,), "uint32", scope="local")
        scale = T.sblock_alloc_buffer((max(1, own_chunks * rows.scales),), "uint32", scope="local")
        four = T.sblock_alloc_buffer(((own_quads + normed) * QUAD,), "float32", scope="local")
        source = T.sblock_alloc_buffer((own_quads,), "int32", scope="local")
        square = T.sblock_alloc_buffer((own_quads,), "float32", scope="local")
        sums = T.sblock_alloc_buffer((2,), "float32", scope="local")
        span = T.sblock_alloc_buffer((3,), "int32", scope="local")
        size_w, size_x, size_sums = T.meta_var(units.sizes)
        w = T.sblock_alloc_buffer((of_w * size_w,), units.dtype, scope=units.scopes[0])
        xs = T.sblock_alloc_buffer((of_x * size_x,), units.dtype, scope=units.scopes[1])
        acc = T.sblock_alloc_buffer((of_w * of_x * size_sums,), "float32", scope=units.scopes[2])
        warp: T.let = LANES[units.family].number(tx)
        # Of the warp's first fragments.
        row0: T.let = warp // token_warps * (of_w * units.rows)
        token0: T.let = warp % token_warps * (of_x * units.columns)

        @T.inline
        def load(number):
            """Weights to registers."""
            for i in T.unroll(own_chunks):
                at: T.let = (i * threads + tx) // rows.chunks
                row: T.let = T.min(rows.row(bx * pairs + at // 2, at % 2), all_rows - 1)
                chunk: T.let = number * rows.chunks + tx % rows.chunks
                rows.load(weights, span[0], row, chunk, words, scale, i)

        @T.inline
        def fetch(step):
            """Inputs to registers."""
            at: T.let = step * STEP + tx % QUADS * QUAD
            for i in T.unroll(own_quads):
                four[T.ramp(i * QUAD, 1, QUAD)] = x[source[i], T.ramp(at, 1, QUAD)]
            if normed:
                four[T.ramp(own_quads * QUAD, 1, QUAD)] = gain[T.ramp(at, 1, QUAD)]

        @T.inline
        def put(number, s):
            """Both to shared memory."""
            for i in T.unroll(own_chunks):
                at: T.let = (i * threads + tx) // rows.chunks * w_pitch

                @T.inline
                def keep(input, values, first):
                    shared[T.ramp(at + input, 1, QUAD)] = values[T.ramp(first, 1, QUAD)]

                rows.put(words, scale, i, s, number * rows.chunks + tx % rows.chunks, keep)
            for i in T.unroll(own_quads):
                if normed:
                    for e in T.unroll(QUAD):
                        square[i] = square[i] + four[i * QUAD + e] * four[i * QUAD + e]
                        four[i * QUAD + e] = four[i * QUAD + e] * four[own_quads * QUAD + e]
                token: T.let = (i * threads + tx) // QUADS
                shared[T.ramp(x_at + token * x_pitch + tx % QUADS * QUAD, 1, QUAD)] = four[
                    T.ramp(i * QUAD, 1, QUAD)
                ]

        @T.inline
        def multiply():
            for d in T.serial(STEP // units.depth):
                at: T.let = d * units.depth
                for i in T.unroll(of_w):
                    units.load_w(w, i, shared[(row0 + i * units.rows) * w_pitch + at], w_pitch)
                for j in T.unroll(of_x):
                    units.load_x(
                        xs, j, shared[x_at + (token0 + j * units.columns) * x_pitch + at], x_pitch
                    )
                for i in T.unroll(of_w):
                    for j in T.unroll(of_x):
                        units.multiply(acc, i * of_x + j, w, i, xs, j)

        @T.inline
        def finish(item):
            """A pair of rows of a token."""
            token: T.let = item // pairs
            pair: T.let = bx * pairs + item % pairs
            if token < span[2] and rows.row(pair, 0) < all_rows:
                sums[T.ramp(0, 1, 2)] = shared[T.ramp(token * sums_pitch + item % pairs * 2, 1, 2)]
                if normed:
                    square[0] = T.float32(0)
                    for q in T.unroll(QUADS):
                        square[0] = square[0] + shared[squares_at + token * QUADS + q]
                    square[0] = T.float32(1) / T.sqrt(
                        square[0] / T.float32(k) + T.float32(columns.eps)
                    )
                    for r in T.unroll(2):
                        sums[r] = sums[r] * square[0]
                columns.store(given, span[0], span[1] + token, pair, sums)

        columns.choose(given, by, tokens, span)
        if span[0] >= 0:  # of all threads of the block
            load(0)
            for i in T.unroll(own_quads):
                token: T.let = T.min((i * threads + tx) // QUADS, span[2] - 1)
                source[i] = columns.source(given, span[1] + token)
                square[i] = T.float32(0)
            fetch(0)
            for i in T.unroll(of_w * of_x):
                units.fill(acc, i)
            for number in T.serial(all_loads):
                for s in T.unroll(steps):
                    step: T.let = number * steps + s
                    if all_steps % steps == 0 or step < all_steps:
                        put(number, s)
                        barrier()
                        if s == steps - 1 and number + 1 < all_loads:
                            load(number + 1)
                        if step + 1 < all_steps:
                            fetch(step + 1)
                        if token0 < span[2]:
                            multiply()
                        barrier()  # the tiles are no longer read
            if token0 < span[2]:
                for i in T.unroll(of_w):
                    for j in T.unroll(of_x):
                        token: T.let = token0 + j * units.columns
                        units.store(
                            acc, i * of_x + j,
                            shared[token * sums_pitch + row0 + i * units.rows], sums_pitch,
                        )  # fmt: skip
            if normed:
                for i in T.unroll(own_quads):
                    shared[squares_at + i * threads + tx] = square[i]
            barrier()
            for i in T.serial(tokens * pairs // threads):
                finish(i * threads + tx)

    @T.inline
    def launch(n, x, gain, weights, given):
        # Blocks that read the same inputs follow each other.
        for some in T.thread_binding(-(-rows.pairs(all_rows) // pairs), thread="blockIdx.x"):
            for group in T.thread_binding(blocks(n, tokens), thread="blockIdx.y"):
                for thread in T.thread_binding(threads, thread="threadIdx.x"):
                    with T.sblock("product"):
                        vx, vy, tx = T.axis.remap("SSS", [some, group, thread])
                        work(vx, T.Cast("int32", vy), tx, x, gain, weights, given)

    return launch
