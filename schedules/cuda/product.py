"""W·X of many columns on CUDA, sm_80 and later: mma.sync, a pipeline of cp.async.

A column is a token's inputs as bfloat16, or one of the two parts of its f32 inputs. A block takes
some rows of W and some columns of X. Rows go from memory to registers, and each is unpacked once
for all columns of the block; columns come to shared memory in steps of 64 inputs, some steps ahead.
No sum is added to by two blocks: results repeat.

On sm_120a columns may be MXFP8 (mxfp8.py): a step then has 128 inputs in as many bytes, and behind
a step's columns in shared memory stand their scales.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..gpu.barriers import barrier
from ..kernel import T, TileConfig
from .instructions import (
    LANES,
    MMA_COLUMNS,
    MMA_ROWS,
    magnitude,
    mma_bf16,
    mma_scaled,
    shared_words,
    store_shared_words,
)
from .warps import shared_with

STEP = 64  # inputs
BLOCK = 32  # inputs that two mma take: half of a step
PIECES = STEP // 8  # 16 bytes each, of a column's inputs of a step
COLUMN = STEP // 2  # u32 of them
TOGETHER = 4  # groups of columns that are left out together
SCALED_STEP = 2 * STEP
SCALE_WORDS = 4  # of a column and step
WHOLE = 4  # tiles side by side: 64 rows
WORDS = 4  # u32 in 16 bytes


@dataclass(frozen=True)
class ProductTile(TileConfig):
    """A block's part of a product."""

    warps: int = 8
    tiles: int = 2  # of 16 rows, a warp's
    groups: int = 16  # of eight columns
    stages: int = 3  # steps of columns in shared memory

    @property
    def rows(self) -> int:
        return self.warps * self.tiles * MMA_ROWS

    @property
    def columns(self) -> int:
        return self.groups * MMA_COLUMNS


def _nothing_known(_scale: Any, _first: Any, _count: int) -> Any:
    return T.bool(False)


@dataclass(frozen=True)
class ProductRows:
    """How a tile of 16 rows becomes fragments: what depends on W's format. T.inline functions.

    blocks: halves of a step, that a lane loads at once
    ahead: such loads, of a tile
    words, scales: u32 of such a load
    load(weights, expert, number, at, lane, words, scale, slot): number `at` of them, of tile
        `number`, to place `slot`
    fragments(words, scale, slot, block, known, a, to): a[to …] u32 [8], of two mma, of one of its
        blocks
    look(scale, first, count) -> `known`: of the scales in so many places
    sums(scale, slot, block, part, acc, to): adds part f32 [4], the sums of a block; None where
        fragments are the values, scales and all
    row_scales(scale, slot, lane) -> u32: of columns with scales, those of the lane's row g + 8 · (t
        % 2) of a half step, of its blocks in the bytes 0 and 2
    """

    blocks: int
    ahead: int
    words: int
    scales: int
    load: Callable[..., Any]
    fragments: Callable[..., Any]
    look: Callable[..., Any] = _nothing_known
    sums: Callable[..., Any] | None = None
    row_scales: Callable[..., Any] | None = None


@dataclass(frozen=True)
class ProductColumns:
    """Which columns a block takes. T.inline functions; `given` are the launch's arguments.

    parts: columns of a token
    width: elements of X in 16 bytes
    choose(given, by, tokens, lane, span): span i32 [3] = the expert of block `by`, -1 where it has
        none, the number of its first token, and how many it has, `tokens` at most
    source(given, number) -> the first row of X that is token `number`'s
    store(given, expert, number, tile, g, sums): sums f32 [4], the first two of a token and of the
        rows of a tile that are of the lanes 4g … 4g+3; two are scratch
    scaled: whether they are MXFP8
    complete(given, expert, number, tile, g, sums): where store needs the largest magnitude of WHOLE
        tiles, sums[2]: what has to be done to sums[0] and [1] before
    """

    parts: int
    width: int
    choose: Callable[..., Any]
    source: Callable[..., Any]
    store: Callable[..., Any]
    scaled: bool = False
    complete: Callable[..., Any] | None = None


def product(
    rows: ProductRows, columns: ProductColumns, tile: ProductTile, *, all_tiles: int, k: int,
    blocks: Any,
) -> Callable[..., Any]:  # fmt: skip
    """The T.inline launch(n, number, x, weights, given) of blocks(n, tokens of a block) · tiles of
    rows.

    x: the columns, [rows of X, k in elements]; how many there are is of no matter
    """
    warps, tiles, groups, stages = tile.warps, tile.tiles, tile.groups, tile.stages
    parts = columns.parts
    tokens = tile.columns // parts  # of a block
    scaled = columns.scaled
    all_steps = -(-k // (SCALED_STEP if scaled else STEP))
    all_pieces = all_steps * PIECES if scaled else k // 8
    threads = LANES * warps
    copies = tile.columns * PIECES // threads  # of a thread and step
    scales_at = tile.columns * COLUMN  # of a stage
    stage_words = scales_at + (tile.columns * SCALE_WORDS if scaled else 0)
    loads = 2 // rows.blocks  # of a tile and step
    turn = -(-rows.ahead // loads)  # steps after which places repeat
    all_loads = -(-k // ((SCALED_STEP if scaled else STEP) // 2 * rows.blocks))
    assert copies * threads == tile.columns * PIECES
    assert groups % TOGETHER == 0
    assert rows.ahead % loads == 0
    assert tile.columns <= threads
    store_sums = ending(columns, tile, all_tiles=all_tiles, words=WORDS)

    def place(column: Any, piece: Any) -> Any:
        """Where 16 bytes of a column are. Lanes of neighbouring columns read the same piece: they
        are in other banks."""
        return column * COLUMN + T.bitwise_xor(piece, column % 2 * 4) * 4

    @T.inline
    def work(bx, by, tx, x, weights, given):
        xs = T.sblock_alloc_buffer((stages * stage_words,), "uint32", scope="shared")
        words = T.sblock_alloc_buffer((rows.ahead * tiles * rows.words,), "uint32", scope="local")
        scales = T.meta_var(max(1, rows.ahead * tiles * rows.scales))
        scale = T.sblock_alloc_buffer((scales,), "uint32", scope="local")
        a = T.sblock_alloc_buffer((8 * tiles,), "uint32", scope="local")
        b = T.sblock_alloc_buffer((4,), "uint32", scope="local")
        scales_ = T.sblock_alloc_buffer((1,), "uint32", scope="local")
        part = T.sblock_alloc_buffer((4,), "float32", scope="local")
        acc = T.sblock_alloc_buffer((4 * tiles * groups,), "float32", scope="local")
        source = T.sblock_alloc_buffer((copies + scaled,), "int32", scope="local")
        span = T.sblock_alloc_buffer((3,), "int32", scope="local")
        stage = T.sblock_alloc_buffer((2,), "int32", scope="local")
        T.attr(0, "pragma_unroll_explicit", False)  # nvcc unrolls: the text stays short
        warp: T.let = tx // LANES
        lane: T.let = tx % LANES
        columns.choose(given, by, tokens, lane, span)
        if span[0] < 0:  # of all threads of the block
            T.evaluate(T.thread_return())
        # A warp beyond the last tile works on that one, for nothing.
        first: T.let = (bx * warps + warp) * tiles

        @T.inline
        def copy(step, to):
            """The block's columns of a step; zeros where there are none."""
            for i in T.unroll(copies):
                column: T.let = (i * threads + tx) // PIECES
                piece: T.let = tx % PIECES
                inside: T.let = T.min(step * PIECES + piece, all_pieces - 1)
                there: T.let = T.And(source[i] >= 0, step * PIECES + piece < all_pieces)
                T.ptx["cp.async.cg.shared.global"](
                    T.address_of(xs[to * stage_words + place(column, piece)]),
                    T.address_of(x[T.max(source[i], 0), inside * columns.width]),
                    16,
                    T.Select(there, T.uint32(16), T.uint32(0)),
                )
            if scaled and tx < tile.columns:
                at: T.let = all_steps * COLUMN + step * SCALE_WORDS
                T.ptx["cp.async.cg.shared.global"](
                    T.address_of(xs[to * stage_words + scales_at + tx * SCALE_WORDS]),
                    T.address_of(x[T.max(source[copies], 0), at]),
                    16,
                    T.Select(source[copies] >= 0, T.uint32(16), T.uint32(0)),
                )

        @T.inline
        def load(at, slot):
            for m in T.unroll(tiles):
                number: T.let = T.min(first + m, all_tiles - 1)
                rows.load(weights, span[0], number, at, lane, words, scale, slot * tiles + m)

        @T.inline
        def multiply(slot, block, some, known, from_):
            """A block by some groups of columns; its number in the load of place `slot`, and in
            the step, which is in stage `from_`."""
            if scaled:
                own_: T.let = (some * TOGETHER + lane % 4) * MMA_COLUMNS + lane // 4
                shared_words(
                    [scales_[0]],
                    xs[from_ * stage_words + scales_at + own_ * SCALE_WORDS + lane % 4],
                )
            for i in T.unroll(TOGETHER):
                column: T.let = (some * TOGETHER + i) * MMA_COLUMNS + lane // 4
                at: T.let = from_ * stage_words + place(column, block[1] * 4 + lane % 4)
                shared_words([b[0], b[1], b[2], b[3]], xs[at])
                for m in T.unroll(tiles):
                    to: T.let = 4 * (m * groups + some * TOGETHER + i)
                    if scaled:
                        for half in T.unroll(2):
                            mma_scaled(
                                acc, to, a, 8 * m + 4 * half, b, 2 * half,
                                rows.row_scales(scale, slot * tiles + m, lane), 2 * half,
                                scales_[0], 2 * block[1] + half, i,
                            )  # fmt: skip
                    elif rows.sums is None:
                        for half in T.unroll(2):
                            mma_bf16(acc, to, a, 8 * m + 4 * half, b, 2 * half)
                    else:
                        for j in T.unroll(4):
                            part[j] = T.float32(0)
                        for half in T.unroll(2):
                            mma_bf16(part, 0, a, 8 * m + 4 * half, b, 2 * half)
                        rows.sums(scale, slot * tiles + m, block[0], part, acc, to)

        for i in T.unroll(rows.ahead):
            if i < all_loads:
                load(i, i)
            else:  # its columns are zeros: no NaN may lie here
                for j in T.unroll(tiles * rows.words):
                    words[i * tiles * rows.words + j] = T.uint32(0)
                for j in T.unroll(tiles * rows.scales):
                    scale[i * tiles * rows.scales + j] = T.uint32(0)
        for i in T.unroll(copies):
            column: T.let = (i * threads + tx) // PIECES
            source[i] = -1
            if column // parts < span[2]:
                source[i] = columns.source(given, span[1] + column // parts) + column % parts
        if scaled:
            source[copies] = -1
            if tx < span[2]:
                source[copies] = columns.source(given, span[1] + tx)
        for i in T.unroll(4 * tiles * groups):
            acc[i] = T.float32(0)
        for i in T.unroll(stages - 1):
            if i < all_steps:
                copy(i, i)
            T.ptx["cp.async.commit_group"]()
        stage[0] = 0  # that is multiplied
        stage[1] = stages - 1  # that is filled
        for some_steps in T.serial(-(-all_steps // turn)):
            for i in T.unroll(turn):
                step: T.let = some_steps * turn + i
                if all_steps % turn == 0 or step < all_steps:
                    T.ptx["cp.async.wait_group"](stages - 2)
                    barrier()
                    if step + stages - 1 < all_steps:
                        copy(step + stages - 1, stage[1])
                    T.ptx["cp.async.commit_group"]()
                    for load_ in T.unroll(loads):
                        slot: T.let = i * loads + load_
                        known: T.let = rows.look(scale, slot * tiles, tiles)
                        for block in T.unroll(rows.blocks):
                            for m in T.unroll(tiles):
                                rows.fragments(
                                    words, scale, slot * tiles + m, block, known, a, 8 * m
                                )
                            for some in T.unroll(groups // TOGETHER):
                                if some * TOGETHER * MMA_COLUMNS < span[2] * parts:
                                    multiply(
                                        slot, (block, load_ * rows.blocks + block), some, known,
                                        stage[0],
                                    )  # fmt: skip
                        if step * loads + load_ + rows.ahead < all_loads:
                            load(step * loads + load_ + rows.ahead, slot)
                    for j in T.unroll(2):
                        stage[j] = T.Select(stage[j] == stages - 1, 0, stage[j] + 1)
        store_sums(given, span, first, 0, warp, lane, acc, part, xs, stage[0] * stage_words)

    @T.inline
    def launch(n, _number, x, weights, given):
        for some in T.thread_binding(-(-all_tiles // (warps * tiles)), thread="blockIdx.x"):
            for group in T.thread_binding(blocks(n, tokens), thread="blockIdx.y"):
                for thread in T.thread_binding(threads, thread="threadIdx.x"):
                    with T.sblock("product"):
                        vx, vy, tx = T.axis.remap("SSS", [some, group, thread])
                        work(vx, T.Cast("int32", vy), tx, x, weights, given)

    return launch


def ending(
    columns: ProductColumns, tile: ProductTile, *, all_tiles: int, words: int
) -> Callable[..., Any]:
    """The T.inline store_sums(given, span, first, before, warp, lane, acc, part, xs, at): a warp's
    sums, of tiles from `first` on.

    before: tokens of the block that are nobody's, ahead of its own
    part: f32 [4], scratch
    xs: shared memory, which nobody reads from `at` on; so many of its elements are 16 bytes
    """
    tiles, groups, parts = tile.tiles, tile.groups, columns.parts
    own = 2 // parts  # tokens of a group whose sums a lane has
    sharing = WHOLE // tiles  # warps that have 64 rows
    whole = columns.complete is not None
    assert not whole or (own == 1 and sharing * tiles == WHOLE and tile.warps % sharing == 0)

    def peaks_at(warp: Any, four: Any, lane: Any) -> Any:
        """Where those of a warp's tiles and a lane's tokens of four groups are."""
        return ((warp * (groups // TOGETHER) + four) * 4 + lane % 4) * words

    @T.inline
    def store_sums(given, span, first, before, warp, lane, acc, part, xs, at):
        @T.inline
        def for_each_tile(g, j, use):
            token: T.let = g * (MMA_COLUMNS // parts) + lane % 4 * own + j - before
            if T.And(token >= 0, token < span[2]):
                for m in T.unroll(tiles):
                    if first + m < all_tiles:
                        use(4 * (m * groups + g) + j, span[1] + token, first + m, g)

        @T.inline
        def add_parts(sum_):
            for r in T.unroll(2):
                part[r] = (
                    acc[sum_ + 2 * r] if own == 2 else acc[sum_ + 2 * r] + acc[sum_ + 2 * r + 1]
                )

        @T.inline
        def store(sum_, token, number, g):
            add_parts(sum_)
            columns.store(given, span[0], token, number, lane // 4, part)

        @T.inline
        def store_whole():
            peak = T.sblock_alloc_buffer((TOGETHER,), "uint32", scope="local")
            other = T.sblock_alloc_buffer((TOGETHER,), "uint32", scope="local")

            @T.inline
            def complete(sum_, token, number, g):
                add_parts(sum_)
                columns.complete(given, span[0], token, number, lane // 4, part)
                for r in T.unroll(2):
                    acc[sum_ + 2 * r] = part[r]
                peak[g % TOGETHER] = T.max(peak[g % TOGETHER], magnitude(part))

            @T.inline
            def store_completed(sum_, token, number, g):
                for r in T.unroll(2):
                    part[r] = acc[sum_ + 2 * r]
                part[2] = T.reinterpret("float32", peak[g % TOGETHER])
                columns.store(given, span[0], token, number, lane // 4, part)

            for four in T.unroll(groups // TOGETHER):
                for i in T.unroll(TOGETHER):
                    peak[i] = T.uint32(0)
                    for_each_tile(four * TOGETHER + i, 0, complete)
                    for distance in T.unroll(3):
                        peak[i] = T.max(peak[i], shared_with(peak[i], T.shift_left(4, distance)))
                if lane < 4:
                    store_shared_words(
                        [peak[0], peak[1], peak[2], peak[3]], xs[at + peaks_at(warp, four, lane)]
                    )
            barrier()
            for four in T.unroll(groups // TOGETHER):
                for i in T.unroll(TOGETHER):
                    peak[i] = T.uint32(0)
                for w in T.unroll(sharing):
                    shared_words(
                        [other[0], other[1], other[2], other[3]],
                        xs[at + peaks_at(warp // sharing * sharing + w, four, lane)],
                    )
                    for i in T.unroll(TOGETHER):
                        peak[i] = T.max(peak[i], other[i])
                for i in T.unroll(TOGETHER):
                    for_each_tile(four * TOGETHER + i, 0, store_completed)

        if whole:
            store_whole()
        else:
            for g in T.unroll(groups):
                for j in T.unroll(own):
                    for_each_tile(g, j, store)

    return store_sums
