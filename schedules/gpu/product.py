"""W·X of many columns on GPUs whose matrix units take their factors from shared memory.

A block takes some rows of W and the inputs of some tokens, in steps of 32 inputs: its threads
unpack the rows into shared memory and copy the inputs beside them, its warps load fragments of both
and multiply. What the next step needs is on its way to registers meanwhile. Shared memory holds one
step, for the less of it a block takes the more blocks there are to fill each other's gaps. The sums
go through shared memory too: which lane has an element of a fragment is nobody's business.

Matrix units that take float32 multiply W and X as they are. For those that take float16, each row
and each token is multiplied by a power of two first, which takes its largest element to about 2^14,
and an input is a sum of two parts. The largest element times 2^-38 is then the most that another
one loses, but for weights of more than 11 bits and inputs of more than 22.

No sum is added to by two blocks: results repeat.
"""

# ruff: noqa: B023 (T.inline functions are expanded where they are called, not closures)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..kernel import T, TileConfig
from .barriers import barrier
from .gemv import QUAD
from .lanes import LANES
from .matrices import Matrices

STEP = 32  # inputs: a block of MXFP4 and of 8-bit weights
QUADS = STEP // QUAD  # of a token
WORDS = 4  # u32 that a thread loads of a row at once
BIAS = 127  # of float32's exponent
HALF_RANGE = 14  # numbers up to 2^15 are far enough from float16's largest


@dataclass(frozen=True)
class ProductTile(TileConfig):
    """A block's part of a product."""

    rows: int = 64
    tokens: int = 64
    warps: tuple[int, int] = (2, 2)  # of a block, along rows and along tokens


@dataclass(frozen=True)
class ManyTiles(TileConfig):
    """Of products of many tokens. Numbers are of tokens, of experts on average.

    Counted for an M1, none was at hand.
    """

    least: int = 16
    wide: int = 48  # from so many on the large tiles
    small: ProductTile = ProductTile(tokens=32)
    large: ProductTile = ProductTile()


@dataclass(frozen=True)
class ProductRows:
    """How W becomes a tile: what depends on its format. T.inline functions.

    inputs: weights of the 16 bytes that a thread loads at once: chunk c of a row
    steps: that these cover, with those of the other chunks of the same inputs
    scales: u32 that belong to them
    group: rows 2p and 2p + 1 of a tile are rows i and i + group/2 of a group of W's
    load(weights, expert, row, c, words, scale, slot): chunk c, to place `slot`
    put(words, scale, slot, s, row, c, keep): the weights of such a chunk, of the s-th of its steps,
        by keep(at, four, i): inputs at … at + 3 of the step are f32 four[i … i + 3]
    bound(scale, slot, s, row) -> f32 that none of these is larger than, if scales alone say so
    parts: float16 whose sum is a weight, but for a power of two a row
    """

    inputs: int
    steps: int
    scales: int
    group: int
    load: Callable[..., Any]
    put: Callable[..., Any]
    bound: Callable[..., Any] | None = None
    parts: int = 1

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
    store(given, expert, number, pair, sums): sums f32 [2 or 3], of a token and of a pair of rows,
        of which the second may not be one of W's
    eps: of the norm that X gets first, if any
    complete(given, expert, number, pair, sums): where store needs the largest magnitude of the
        pair's group, sums[2]: what has to be done to sums[0] and [1] before
    """

    choose: Callable[..., Any]
    source: Callable[..., Any]
    store: Callable[..., Any]
    eps: float | None = None
    complete: Callable[..., Any] | None = None


@T.inline
def power_of_two(largest, factor):
    """factor f32 [2]: what takes numbers up to `largest` to about 2^14, and back."""
    exponent: T.let = T.Cast("int32", T.shift_right(T.reinterpret("uint32", largest), T.uint32(23)))
    biased: T.let = T.min(2 * BIAS + HALF_RANGE - exponent, 2 * BIAS - 1)
    factor[0] = T.reinterpret("float32", T.shift_left(biased, 23))
    factor[1] = T.reinterpret("float32", T.shift_left(2 * BIAS - biased, 23))


def product(
    units: Matrices, rows: ProductRows, columns: ProductColumns, tile: ProductTile, *,
    all_rows: int, k: int, blocks: Any,
) -> Callable[..., Any]:  # fmt: skip
    """The T.inline launch(n, x, gain, weights, given) of blocks(n, tokens of a block) · tiles of
    rows.

    x f32 [.., k]   gain f32 [k] by which the norm multiplies, None where there is none
    """
    tokens, steps, parts = tile.tokens, rows.steps, units.parts
    row_warps, token_warps = tile.warps
    threads = row_warps * token_warps * units.lanes
    of_w, of_x = tile.rows // (row_warps * units.rows), tokens // (token_warps * units.columns)
    halves = units.dtype == "float16"  # whose range needs powers of two, of a row and of a token
    w_parts = rows.parts if halves else 1
    normed = columns.eps is not None
    grouped = columns.complete is not None
    all_steps = k // STEP
    all_loads = -(-all_steps // steps)
    all_chunks, all_quads = tile.rows * rows.chunks, tokens * QUADS
    own_chunks, own_quads = -(-all_chunks // threads), -(-all_quads // threads)  # of a thread
    # Sums take the place of tiles of the same type; beside others they come a few rows at a time.
    turns = of_w if halves else 1
    warp_rows = of_w // turns * units.rows  # of a warp and turn
    pairs = row_warps * warp_rows // 2  # of a turn
    w_pitch, x_pitch = STEP + units.pads[0], STEP + units.pads[1]
    sums_pitch = 2 * pairs + units.pads[2]
    w_size, x_size = tile.rows * w_pitch, tokens * x_pitch  # of a part
    x_at = w_parts * w_size
    tiles_size = x_at + parts * x_size
    squares_at = tokens * sums_pitch
    sums_size = squares_at + normed * all_quads
    room_size = sums_size if halves else max(sums_size, tiles_size)
    whole_chunks, whole_quads = all_chunks % threads == 0, all_quads % threads == 0
    assert k % STEP == 0
    assert not grouped or (tile.rows % rows.group == 0 and turns == 1)
    assert of_w * row_warps * units.rows == tile.rows
    assert of_x * token_warps * units.columns == tokens
    assert threads % QUADS == 0
    assert threads % rows.chunks == 0
    assert not halves or all_chunks + all_quads <= sums_size  # what finds the powers

    def place(i: Any) -> Any:
        """The row or token that is number i to those who fill tiles. Of float16 rows are 80 bytes
        apart and four inputs are 8 bytes: neighbours would want the same banks."""
        return i // 8 * 8 + i % 2 * 4 + i % 8 // 2 if halves else i

    def tile_row(turn: Any, row: Any) -> Any:
        """That of a row of a turn."""
        return row // warp_rows * (of_w * units.rows) + turn * warp_rows + row % warp_rows

    def by_turn(row: Any) -> Any:
        """The number of a tile's row among those of all turns, one turn after the other."""
        of_warp = of_w * units.rows
        before = row % of_warp // warp_rows * (2 * pairs) + row // of_warp * warp_rows
        return before + row % warp_rows

    def own_or(own: bool, room: Any, size: int, dtype: str = "float32") -> Any:
        """Shared memory of its own, or `room`."""
        return T.sblock_alloc_buffer((size,), dtype, scope="shared") if own else room

    def row_of(bx: Any, chunk: Any) -> Any:
        """The row of one of a block's chunks. Behind the last chunk are the first again."""
        at = place(chunk // rows.chunks % tile.rows)
        return T.min(rows.row(bx * (tile.rows // 2) + at // 2, at % 2), all_rows - 1)

    @T.inline
    def work(bx, by, tx, x, gain, weights, given):
        room = T.sblock_alloc_buffer((room_size,), "float32", scope="shared")
        # One array may be all of these; the last of their names is its own.
        undo = own_or(
            halves, room, tile.rows + tokens
        )  # powers of two, of rows by turns and tokens
        peaks = own_or(grouped, room, tokens * pairs)  # largest magnitudes of pairs
        tiles = own_or(halves, room, tiles_size, units.dtype)
        words = T.sblock_alloc_buffer((own_chunks * WORDS,), "uint32", scope="local")
        scale = T.sblock_alloc_buffer((max(1, own_chunks * rows.scales),), "uint32", scope="local")
        four = T.sblock_alloc_buffer(((own_quads + normed) * QUAD,), "float32", scope="local")
        rest = T.sblock_alloc_buffer((QUAD,), "float32", scope="local")
        rounded = T.sblock_alloc_buffer((QUAD,), units.dtype, scope="local")
        source = T.sblock_alloc_buffer((own_quads,), "int32", scope="local")
        square = T.sblock_alloc_buffer((own_quads,), "float32", scope="local")
        # Powers of two, of a thread's rows and then of its tokens.
        power = T.sblock_alloc_buffer((own_chunks + own_quads,), "float32", scope="local")
        pair = T.sblock_alloc_buffer((2 + grouped,), "float32", scope="local")
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
                row: T.let = row_of(bx, i * threads + tx)
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
        def multiply_gain(i):
            if normed:
                for e in T.unroll(QUAD):
                    four[i * QUAD + e] = four[i * QUAD + e] * four[own_quads * QUAD + e]

        @T.inline
        def keep_parts(values, first, factor, count, at, size):
            """Four numbers as sums of so many others."""
            for e in T.unroll(QUAD):
                rest[e] = values[first + e] * factor
            for part in T.unroll(count):
                for e in T.unroll(QUAD):
                    rounded[e] = T.Cast(units.dtype, rest[e])
                    rest[e] = rest[e] - T.Cast("float32", rounded[e])
                units.put(tiles, at + part * size, rounded)

        @T.inline
        def put(number, s):
            """Both to shared memory."""
            for i in T.unroll(own_chunks):
                at: T.let = place((i * threads + tx) // rows.chunks) * w_pitch

                @T.inline
                def keep(input, values, first):
                    if halves:
                        keep_parts(values, first, power[i], w_parts, at + input, w_size)
                    else:
                        tiles[T.ramp(at + input, 1, QUAD)] = values[T.ramp(first, 1, QUAD)]

                if whole_chunks or i * threads + tx < all_chunks:
                    chunk: T.let = number * rows.chunks + tx % rows.chunks
                    rows.put(words, scale, i, s, row_of(bx, i * threads + tx), chunk, keep)
            for i in T.unroll(own_quads):
                token: T.let = place((i * threads + tx) // QUADS)
                at: T.let = x_at + token * x_pitch + tx % QUADS * QUAD
                if normed:
                    for e in T.unroll(QUAD):
                        square[i] = square[i] + four[i * QUAD + e] * four[i * QUAD + e]
                multiply_gain(i)
                if whole_quads or i * threads + tx < all_quads:
                    if halves:
                        keep_parts(four, i * QUAD, power[own_chunks + i], parts, at, x_size)
                    else:
                        tiles[T.ramp(at, 1, QUAD)] = four[T.ramp(i * QUAD, 1, QUAD)]

        @T.inline
        def multiply_parts(at, w_part, count):
            """One part of W by the first parts of X."""
            for i in T.unroll(of_w):
                row: T.let = row0 + i * units.rows
                units.load_w(w, i, tiles[w_part * w_size + row * w_pitch + at], w_pitch)
            for part in T.unroll(count):
                for j in T.unroll(of_x):
                    token: T.let = token0 + j * units.columns
                    units.load_x(xs, j, tiles[x_at + part * x_size + token * x_pitch + at], x_pitch)
                for i in T.unroll(of_w):
                    for j in T.unroll(of_x):
                        units.multiply(acc, i * of_x + j, w, i, xs, j)

        @T.inline
        def multiply():
            for d in T.serial(STEP // units.depth):
                at: T.let = d * units.depth
                multiply_parts(at, 0, parts)
                if w_parts > 1:  # two second parts would add less than is lost anyway
                    multiply_parts(at, 1, 1)

        @T.inline
        def find_powers():
            """Of each row and token, by its largest element."""
            for i in T.unroll(own_chunks + own_quads):
                power[i] = T.float32(0)
            for number in T.serial(all_loads):
                load(number)
                for i in T.unroll(own_chunks):

                    @T.inline
                    def look(input, values, first):
                        for e in T.unroll(QUAD):
                            power[i] = T.max(power[i], T.fabs(values[first + e]))

                    for s in T.unroll(steps):
                        if all_steps % steps == 0 or number * steps + s < all_steps:
                            if rows.bound is None:
                                chunk: T.let = number * rows.chunks + tx % rows.chunks
                                row: T.let = row_of(bx, i * threads + tx)
                                rows.put(words, scale, i, s, row, chunk, look)
                            else:
                                power[i] = T.max(
                                    power[i], rows.bound(scale, i, s, row_of(bx, i * threads + tx))
                                )
            for step in T.serial(all_steps):
                fetch(step)
                for i in T.unroll(own_quads):
                    multiply_gain(i)
                    for e in T.unroll(QUAD):
                        power[own_chunks + i] = T.max(
                            power[own_chunks + i], T.fabs(four[i * QUAD + e])
                        )
            for i in T.unroll(own_chunks):
                if whole_chunks or i * threads + tx < all_chunks:
                    room[i * threads + tx] = power[i]
            for i in T.unroll(own_quads):
                if whole_quads or i * threads + tx < all_quads:
                    room[all_chunks + i * threads + tx] = power[own_chunks + i]
            barrier()
            for i in T.unroll(own_chunks):
                at: T.let = (i * threads + tx) // rows.chunks % tile.rows
                power[i] = T.float32(0)
                for c in T.unroll(rows.chunks):
                    power[i] = T.max(power[i], room[at * rows.chunks + c])
                power_of_two(power[i], pair)
                power[i] = pair[0]
                if tx % rows.chunks == 0 and (whole_chunks or i * threads + tx < all_chunks):
                    undo[by_turn(place(at))] = pair[1]
            for i in T.unroll(own_quads):
                at: T.let = (i * threads + tx) // QUADS % tokens
                power[own_chunks + i] = T.float32(0)
                for q in T.unroll(QUADS):
                    power[own_chunks + i] = T.max(
                        power[own_chunks + i], room[all_chunks + at * QUADS + q]
                    )
                power_of_two(power[own_chunks + i], pair)
                power[own_chunks + i] = pair[0]
                if tx % QUADS == 0 and (whole_quads or i * threads + tx < all_quads):
                    undo[tile.rows + place(at)] = pair[1]

        @T.inline
        def take(turn, item, use):
            """A pair of rows of a token."""
            token: T.let = item // pairs
            row: T.let = item % pairs * 2  # of the turn's
            number: T.let = bx * (tile.rows // 2) + tile_row(turn, row) // 2
            if token < span[2] and rows.row(number, 0) < all_rows:
                pair[T.ramp(0, 1, 2)] = room[T.ramp(token * sums_pitch + row, 1, 2)]
                if halves:
                    for r in T.unroll(2):
                        of_row: T.let = undo[turn * (2 * pairs) + row + r]
                        pair[r] = pair[r] * of_row * undo[tile.rows + token]
                if normed:
                    square[0] = T.float32(0)
                    for q in T.unroll(QUADS):
                        square[0] = square[0] + room[squares_at + token * QUADS + q]
                    square[0] = T.float32(1) / T.sqrt(
                        square[0] / T.float32(k) + T.float32(columns.eps)
                    )
                    for r in T.unroll(2):
                        pair[r] = pair[r] * square[0]
                if grouped:
                    columns.complete(given, span[0], span[1] + token, number, pair)
                use(item, number, span[1] + token)

        @T.inline
        def store(item, number, token):
            if grouped:
                pair[2] = T.float32(0)
                first: T.let = item // (rows.group // 2) * (rows.group // 2)
                for i in T.serial(rows.group // 2):
                    pair[2] = T.max(pair[2], peaks[first + i])
            columns.store(given, span[0], token, number, pair)

        @T.inline
        def leave_peak(item, number, token):
            peaks[item] = T.max(T.fabs(pair[0]), T.fabs(pair[1]))

        columns.choose(given, by, tokens, span)
        if span[0] >= 0:  # of all threads of the block
            for i in T.unroll(own_quads):
                token: T.let = T.min(place((i * threads + tx) // QUADS), span[2] - 1)
                source[i] = columns.source(given, span[1] + token)
                square[i] = T.float32(0)
            if halves:
                find_powers()
            load(0)
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
            if normed:
                for i in T.unroll(own_quads):
                    if whole_quads or i * threads + tx < all_quads:
                        token: T.let = place((i * threads + tx) // QUADS)
                        room[squares_at + token * QUADS + tx % QUADS] = square[i]
            for turn in T.unroll(turns):
                if token0 < span[2]:
                    for i in T.unroll(of_w // turns):
                        for j in T.unroll(of_x):
                            token: T.let = token0 + j * units.columns
                            row: T.let = warp // token_warps * warp_rows + i * units.rows
                            units.store(
                                acc, (turn * (of_w // turns) + i) * of_x + j,
                                room[token * sums_pitch + row], sums_pitch,
                            )  # fmt: skip
                barrier()
                if grouped:
                    for i in T.serial(-(-tokens * pairs // threads)):
                        take(turn, i * threads + tx, leave_peak)
                    barrier()
                for i in T.serial(-(-tokens * pairs // threads)):
                    take(turn, i * threads + tx, store)
                if turn < turns - 1:
                    barrier()

    @T.inline
    def launch(n, x, gain, weights, given):
        # Blocks that read the same inputs follow each other.
        tiles_of_rows = T.meta_var(-(-rows.pairs(all_rows) // (tile.rows // 2)))
        for some in T.thread_binding(tiles_of_rows, thread="blockIdx.x"):
            for group in T.thread_binding(blocks(n, tokens), thread="blockIdx.y"):
                for thread in T.thread_binding(threads, thread="threadIdx.x"):
                    with T.sblock("product"):
                        vx, vy, tx = T.axis.remap("SSS", [some, group, thread])
                        work(vx, T.Cast("int32", vy), tx, x, gain, weights, given)

    return launch


def products(
    units: Matrices, tiles: ManyTiles, make: Callable[[Matrices, ProductTile], Any]
) -> Callable[..., Any]:
    """The T.inline launch(few, given) of make(units, tile), a T.inline that takes what is `given`:
    for the first of `units` and its others that the device has, which has one. The small tile is
    for few tokens; it is left out where there are others, each of which would have two."""
    small, large = (
        make(units, replace(tile, warps=units.warps)) for tile in (tiles.small, tiles.large)
    )
    rest = None if units.otherwise is None else products(units.otherwise, tiles, make)

    @T.inline
    def own(few, given):
        if (units.there is None) and few:
            small(*given)
        else:
            large(*given)

    if rest is None:
        return own

    @T.inline
    def launch(few, given):
        if units.there():
            own(few, given)
        else:
            rest(few, given)

    return launch
