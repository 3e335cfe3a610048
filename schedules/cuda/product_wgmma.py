"""W·X of many columns on Hopper (sm_90a): wgmma, columns by bulk copies.

As product.py, of whose rows and columns it takes what they say, with these differences:

- A warp's tile is 16 of the 64 rows of a wgmma, which multiplies all columns of the block, or half
  of them where it has no more: rows are unpacked while the block of inputs before is multiplied,
  and no columns come to registers.
- A launch before it has made the columns as shared memory is to hold them: u32 [steps · columns of
  all, 32], of a step the columns side by side. One thread copies a step of a block's columns.
- Eight columns belong together (wgmma.py). A block begins with the first of eight, be that a column
  of another expert: its sums are nobody's.

In a step, which is 128 bytes of a column, the inputs are in the order of the fragments: of a block
of 32 the 16 bytes number c < 4 are the inputs 8t + 2c and 8t + 2c + 1, for t < 4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..gpu.barriers import barrier
from ..kernel import Size, T, Tensor
from .instructions import LANES
from .product import BLOCK, COLUMN, PIECES, STEP, ProductColumns, ProductRows, ProductTile, ending
from .wgmma import (
    COLUMN_BYTES,
    TOGETHER,
    WARPGROUP,
    begin_products,
    bulk_copy,
    descriptor,
    end_group,
    multiply,
    prepare_arrivals,
    wait_for_arrival,
    wait_groups,
)

BLOCKS = STEP // BLOCK
WORD = 8  # bytes of an element of shared memory
NEXT = 2  # of a descriptor: 16 inputs further


def columns_of(name: str, number: Size, k: int) -> Tensor:
    """So many columns of k inputs, as they come to shared memory."""
    steps = -(-k // STEP)
    return Tensor(name, (Size(number.name, number.factor * steps), COLUMN), "uint32")


def pieces(k: int) -> int:
    """16 bytes each, of a column with what fills its last step."""
    return -(-k // STEP) * PIECES


def piece_inputs(piece: Any, t: Any) -> Any:
    """The first of two inputs of a piece that are side by side, which are its pair t < 4."""
    return piece // 4 * BLOCK + 8 * t + piece % 4 * 2


def is_filled(piece: Any, k: int) -> Any:
    """Whether a piece has inputs, and not what fills the last step."""
    return k % STEP == 0 or piece // 4 < k // BLOCK


@T.inline
def store_piece(columns, number, column, piece, words, at):
    """The words [at … at + 3] of a piece of a column, of `number` columns in all."""
    place: T.let = T.bitwise_xor(piece % PIECES, column % TOGETHER)
    columns[piece // PIECES * number + column, T.ramp(place * 4, 1, 4)] = words[T.ramp(at, 1, 4)]


def product(
    rows: ProductRows, columns: ProductColumns, tile: ProductTile, *, all_tiles: int, k: int,
    blocks: Any,
) -> Callable[..., Any]:  # fmt: skip
    """The T.inline launch(n, number, x, weights, given) of blocks(n, tokens of a block) · tiles of
    rows; x: the columns, `number` of them."""
    warps, tiles, groups, stages = tile.warps, tile.tiles, tile.groups, tile.stages
    parts = columns.parts
    tokens = tile.columns // parts  # of a block
    sums = 4 * groups  # of a lane and tile
    all_steps = -(-k // STEP)
    threads = LANES * warps
    stage_words = tile.columns * COLUMN_BYTES // WORD
    loads = BLOCKS // rows.blocks  # of a tile and step
    turn = -(-rows.ahead // loads)  # steps after which places repeat
    all_loads = -(-k // (BLOCK * rows.blocks))
    assert warps % WARPGROUP == 0
    assert rows.ahead % loads == 0
    assert rows.sums is None
    store_sums = ending(columns, tile, all_tiles=all_tiles, words=16 // WORD)

    @T.inline
    def work(bx, by, tx, number, x, weights, given):
        # The columns of some steps; then the barrier of each.
        xs = T.sblock_alloc_buffer(
            (stages * stage_words + stages,), "uint64", scope="shared.dyn", align=1024
        )
        words = T.sblock_alloc_buffer((rows.ahead * tiles * rows.words,), "uint32", scope="local")
        scales = T.meta_var(max(1, rows.ahead * tiles * rows.scales))
        scale = T.sblock_alloc_buffer((scales,), "uint32", scope="local")
        a = T.sblock_alloc_buffer((BLOCKS * 8 * tiles,), "uint32", scope="local")
        part = T.sblock_alloc_buffer((4,), "float32", scope="local")
        acc = T.sblock_alloc_buffer((sums * tiles,), "float32", scope="local")
        span = T.sblock_alloc_buffer((3,), "int32", scope="local")
        stage = T.sblock_alloc_buffer((3,), "int32", scope="local")
        T.attr(0, "pragma_unroll_explicit", False)  # nvcc unrolls: the text stays short
        warp: T.let = tx // LANES
        lane: T.let = tx % LANES
        columns.choose(given, by, tokens, lane, span)
        if span[0] < 0:  # of all threads of the block
            T.evaluate(T.thread_return())
        # A warp beyond the last tile works on that one, for nothing.
        first: T.let = (bx * warps + warp) * tiles
        others: T.let = span[1] * parts % TOGETHER  # columns before the block's own
        begin: T.let = span[1] * parts - others

        @T.inline
        def copy(step, to):
            bulk_copy(
                xs[to * stage_words],
                x[step * T.Cast("int32", number) + begin, 0],
                (others + span[2] * parts) * COLUMN_BYTES,
                xs[stages * stage_words + to],
            )

        @T.inline
        def load(at, slot):
            for m in T.unroll(tiles):
                tile_: T.let = T.min(first + m, all_tiles - 1)
                rows.load(weights, span[0], tile_, at, lane, words, scale, slot * tiles + m)

        @T.inline
        def unpack(step, i, block):
            """Fragments of a block of a step, number i of a turn; then the place is loaded anew."""
            slot = T.meta_var(i * loads + block // rows.blocks)
            known: T.let = rows.look(scale, slot * tiles, tiles)
            for m in T.unroll(tiles):
                rows.fragments(
                    words, scale, slot * tiles + m, block % rows.blocks, known, a,
                    (block * tiles + m) * 8,
                )  # fmt: skip
            if block % rows.blocks == rows.blocks - 1:
                at: T.let = step * loads + block // rows.blocks + rows.ahead
                if at < all_loads:
                    load(at, slot)

        # A group begins and ends in the branch: else ptxas adds an empty one for its end, and what
        # is to wait for all but the newest waits for this one too.
        @T.inline
        def multiply_columns(block, count):
            begin_products()
            for m in T.unroll(tiles):
                for half in T.unroll(2):
                    multiply(
                        count, acc[m * sums], a[(block * tiles + m) * 8 + 4 * half],
                        descriptor(xs[stage[0] * stage_words])
                        + T.uint64(NEXT * (2 * block + half)),
                    )  # fmt: skip
            end_group()

        @T.inline
        def multiply_block(block):
            if others + span[2] * parts > tile.columns // 2:
                multiply_columns(block, tile.columns)
            else:
                multiply_columns(block, tile.columns // 2)
            wait_groups(1)

        for i in T.unroll(rows.ahead):
            if i < all_loads:
                load(i, i)
            else:  # its columns are zeros: no NaN may lie here
                for j in T.unroll(tiles * rows.words):
                    words[i * tiles * rows.words + j] = T.uint32(0)
                for j in T.unroll(tiles * rows.scales):
                    scale[i * tiles * rows.scales + j] = T.uint32(0)
        if tx == 0:
            prepare_arrivals(xs[stages * stage_words], stages)
            for i in T.unroll(stages):
                if i < all_steps:
                    copy(i, i)
        barrier()
        for i in T.unroll(sums * tiles):
            acc[i] = T.float32(0)
        stage[0] = 0  # that is multiplied
        stage[1] = stages - 1  # that was before it
        stage[2] = 0  # how often a stage was copied to, before this time
        unpack(0, 0, 0)
        for some_steps in T.serial(-(-all_steps // turn)):
            for i in T.unroll(turn):
                step: T.let = some_steps * turn + i
                if all_steps % turn == 0 or step < all_steps:
                    wait_for_arrival(xs[stages * stage_words + stage[0]], stage[2])
                    multiply_block(0)
                    # The products of the step before have ended; in all warps, after this.
                    barrier()
                    is_copied: T.let = T.And(step > 0, step + stages - 1 < all_steps)
                    if T.And(tx == 0, is_copied):
                        copy(step + stages - 1, stage[1])
                    unpack(step, i, 1)
                    multiply_block(1)
                    unpack(step + 1, (i + 1) % turn, 0)
                    stage[1] = stage[0]
                    stage[0] = T.Select(stage[0] == stages - 1, 0, stage[0] + 1)
                    stage[2] = stage[2] + T.Select(stage[0] == 0, 1, 0)
        wait_groups(0)
        store_sums(
            given, span, first, others // parts, warp, lane, acc, part, xs,
            stage[0] * stage_words,
        )  # fmt: skip

    @T.inline
    def launch(n, number, x, weights, given):
        for some in T.thread_binding(-(-all_tiles // (warps * tiles)), thread="blockIdx.x"):
            for group in T.thread_binding(blocks(n, tokens), thread="blockIdx.y"):
                for thread in T.thread_binding(threads, thread="threadIdx.x"):
                    with T.sblock("product"):
                        vx, vy, tx = T.axis.remap("SSS", [some, group, thread])
                        work(vx, T.Cast("int32", vy), tx, number, x, weights, given)

    return launch
