"""Attention of many tokens by matrix units that take fragments from shared memory, flash style.

A block takes some tokens that follow each other and eight heads of one KV head: each read of the
cache serves them all. A token and a head are a row (chunk_rows_gpu.py), and a warp has some of the
rows, whose queries are fragments in its registers. Keys go by in turns of two pages
(chunk_pages_gpu.py). Of a turn,

1. all threads put the keys into shared memory, in the units' type;
2. the warps multiply queries and keys, and store the scores;
3. two threads a row make weights of them, while the values take the place of the keys;
4. the warps multiply weights and values; these sums leave through shared memory too, some columns
   at a time, to the two threads of each row, which add them to those of older turns.

So nothing depends on which lane has an element of a fragment, and a fragment of sums is never
corrected. What comes next from the cache is on its way to registers meanwhile.

Tokens of several sequences in one block are taken one sequence after the other, and a token that is
the only one of its sequence is left to another launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from mxforge.kv_layout import PAGE_TOKENS

from ..formats.kv import F32, KV
from ..gpu.barriers import barrier
from ..gpu.lanes import LANES
from ..gpu.matrices import Matrices
from ..kernel import T, TileConfig
from .attend import HEADS, WORDS, Words, by_chunk
from .chunk_pages_gpu import FOUR, PAGES, TURN, chunk_pages
from .chunk_rows_gpu import OF_ROW, chunk_rows

HEAD_DIMS = (TURN, 2 * TURN)  # of which queries and sums have room in registers


@dataclass(frozen=True)
class ChunkTile(TileConfig):
    """Of every family: 128 threads. Not measured."""

    rows: int = 64  # of a block
    least: int = 64  # tokens beyond one each sequence, from which on it is taken

    @property
    def tokens(self) -> int:
        return self.rows // HEADS

    @property
    def threads(self) -> int:
        return self.rows * OF_ROW


CHUNK = ChunkTile()


def chunks_fit(units: Matrices, *, head_dim: int, kv_dtype: str) -> bool:
    """Whether there is room for a head, and float16 does for the cache: not for one in float32."""
    shapes = (units, *units.others())
    whole = head_dim in HEAD_DIMS
    exact = all(one.dtype == "float32" or kv_dtype != F32.name for one in shapes)
    return whole and exact


class State(NamedTuple):
    """Of a block, in shared memory; then those that each thread has of its own."""

    # Of the units' type: keys [D, pitch] or values [TURN, pitch] of a turn; once, part of q.
    tile: Any
    # Of the units' type [parts, rows, pitch]: weights; once, the first TURN columns of q.
    kept: Any
    score: Any  # f32 [rows, pitch]: a turn's scores, then TURN columns of its sums
    key_scale: Any  # f32 [TURN and more]
    value_scale: Any  # f32 [TURN and more]
    exchange: Any  # f32 [threads]
    query: Any  # fragments of W [parts, of rows, of a head]
    w: Any  # fragments of W [of rows]
    x: Any  # a fragment of X
    sums: Any  # fragments of sums [of rows, panels, of a turn's keys or a panel's columns]
    raw: Any  # u32 [pieces, 4]: of the cache, on their way
    raw_scale: Any  # u32
    read: Any  # u32 [2]
    acc: Any  # f32 [D/2]: a row's queries, then sums of values
    four: Any  # f32
    rounded: Any  # of the units' type [4]
    weight: Any  # f32 [TURN/2]: scores, then weights
    power: Any  # f32 [2]
    unit: Any  # f32: of scores, in units of log 2
    undo: Any  # f32: a turn's power of two, of scales of values, over that of weights
    top: Any  # f32: largest score so far
    total: Any  # f32: of this thread's weights so far
    running: Any  # f32
    last: Any  # i32: key that the row sees; -1 of rows that are not of the run, or are no head
    run: Any  # i32 [2]: tokens of the tile that are of one sequence
    seen: Any  # i32 [4]: first and last key that any of them sees, first and last that all see
    answer: Any  # i32: to a question
    page: Any  # i64 [PAGES]: physical
    turn: Any  # i32


def chunks(
    units: Matrices,
    tile: ChunkTile,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    kv_dtype: str,
    window: int,
) -> Any:
    """by_chunk's launch of all tokens but those that are alone in their sequence, by the first of
    `units` and its others that the device has, which has one."""
    sizes: dict[str, Any] = {
        "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "kv_dtype": kv_dtype,
        "window": window,
    }  # fmt: skip
    own = _chunks(units, tile, **sizes)
    if units.otherwise is None:
        return own
    rest = chunks(units.otherwise, tile, **sizes)

    @T.inline
    def launch(n, b, p, pages, q, kv, positions, token_seq, table, first_page, sinks, out):
        if units.there():
            own(n, b, p, pages, q, kv, positions, token_seq, table, first_page, sinks, out)
        else:
            rest(n, b, p, pages, q, kv, positions, token_seq, table, first_page, sinks, out)

    return launch


def _chunks(
    units: Matrices,
    tile: ChunkTile,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    kv_dtype: str,
    window: int,
) -> Any:
    group = heads // kv_heads
    per_kv_head = -(-group // HEADS)
    rows, tokens, threads = tile.rows, tile.tokens, tile.threads
    pages = chunk_pages(units, threads, head_dim=head_dim, kv_dtype=kv_dtype)
    own_rows = chunk_rows(units, rows, head_dim=head_dim, kv_dtype=kv_dtype, window=window)
    scaled, halves = KV[kv_dtype].scaled, units.dtype == "float16"
    parts, pitch, (_, value_pitch) = own_rows.parts, own_rows.pitch, pages.pitches
    part_size = rows * pitch
    # Warps share the rows, and those that are left over each row's columns.
    warps = threads // units.lanes
    row_warps = min(warps, rows // units.rows)
    column_warps = warps // row_warps
    of_rows = rows // (row_warps * units.rows)
    of_columns = TURN // (column_warps * units.columns)
    of_turn, of_head = TURN // units.depth, head_dim // units.depth
    panels = head_dim // TURN
    all_columns = panels * of_columns
    assert row_warps * column_warps * units.lanes == threads
    assert of_rows * row_warps * units.rows == rows
    assert of_columns * column_warps * units.columns == TURN
    assert halves or column_warps == 1  # a warp's sums take the place of weights that it alone had

    def allocated():
        def shared(size, dtype="float32"):
            return T.sblock_alloc_buffer((size,), dtype, scope="shared")

        def local(size, dtype="float32", scope="local"):
            return T.sblock_alloc_buffer((size,), dtype, scope=scope)

        kept = shared(parts * part_size, units.dtype)
        size_w, size_x, size_sums = units.sizes
        return State(
            tile=shared(max(pages.size, (panels - 1) * part_size), units.dtype),
            kept=kept,
            score=shared(part_size) if halves else kept,
            key_scale=shared(threads if scaled else 1),
            value_scale=shared(threads if scaled else 1),
            exchange=shared(threads),
            query=local(parts * of_rows * of_head * size_w, units.dtype, units.scopes[0]),
            w=local(of_rows * size_w, units.dtype, units.scopes[0]),
            x=local(size_x, units.dtype, units.scopes[1]),
            sums=local(of_rows * all_columns * size_sums, "float32", units.scopes[2]),
            raw=local(pages.reads * WORDS, "uint32"),
            raw_scale=local(1, "uint32"),
            read=local(2, "uint32"),
            acc=local(head_dim // OF_ROW),
            four=local(FOUR),
            rounded=local(FOUR, units.dtype),
            weight=local(TURN // OF_ROW),
            power=local(2),
            unit=local(1),
            undo=local(1),
            top=local(1),
            total=local(1),
            running=local(1),
            last=local(1, "int32"),
            run=local(2, "int32"),
            seen=local(4, "int32"),
            answer=local(1, "int32"),
            page=local(PAGES, "int64"),
            turn=local(1, "int32"),
        )

    @T.inline
    def load_query(own, source, panel, part, row0):
        for i in T.unroll(of_rows):
            for d in T.unroll(of_turn):
                units.load_w(
                    own.query, (part * of_rows + i) * of_head + panel * of_turn + d,
                    source[(row0 + i * units.rows) * pitch + d * units.depth], pitch,
                )  # fmt: skip

    @T.inline
    def take_query(own, q, token0, n, head0, heads_left, row0, tx):
        """Fragments of q; of float16 in units of a power of two for each row."""
        own_rows.read_query(own, q, token0, n, head0, heads_left, tx)
        for part in T.unroll(parts):
            own_rows.put_query(own, own.kept, 0, tx)
            if panels > 1:
                own_rows.put_query(own, own.tile, 1, tx)
            barrier()
            load_query(own, own.kept, 0, part, row0)
            if panels > 1:
                load_query(own, own.tile, 1, part, row0)
            barrier()

    @T.inline
    def put_sums(own, first, each, row0, column0):
        """To `score`, sums number i · each + first + j."""
        for i in T.unroll(of_rows):
            for j in T.unroll(of_columns):
                units.store_rows(
                    own.sums, i * each + first + j,
                    own.score[(row0 + i * units.rows) * pitch + column0 + j * units.columns], pitch,
                )  # fmt: skip

    @T.inline
    def score_keys(own, row0, column0):
        """score = q · k of a turn, in units of the row."""
        for i in T.unroll(of_rows * of_columns):
            units.fill(own.sums, i)
        for d in T.unroll(of_head):
            for j in T.unroll(of_columns):
                units.load_x_rows(
                    own.x, 0,
                    own.tile[d * units.depth * pitch + column0 + j * units.columns],
                    pitch,
                )  # fmt: skip
                for part in T.unroll(parts):
                    for i in T.unroll(of_rows):
                        units.multiply(
                            own.sums, i * of_columns + j,
                            own.query, (part * of_rows + i) * of_head + d, own.x, 0,
                        )  # fmt: skip
        put_sums(own, 0, of_columns, row0, column0)

    def column_of(j: Any, column0: Any) -> Any:
        """The first of a warp's columns number j of all panels."""
        return j // of_columns * TURN + column0 + j % of_columns * units.columns

    @T.inline
    def sum_values(own, row0, column0):
        """sums = weights · values of a turn, of the warp's columns of all panels."""
        for i in T.unroll(of_rows * all_columns):
            units.fill(own.sums, i)
        for k in T.serial(of_turn):
            for part in T.unroll(parts):
                for i in T.unroll(of_rows):
                    units.load_w(
                        own.w, i,
                        own.kept[
                            part * part_size + (row0 + i * units.rows) * pitch + k * units.depth
                        ],
                        pitch,
                    )  # fmt: skip
                for j in T.unroll(all_columns):
                    units.load_x_rows(
                        own.x, 0,
                        own.tile[k * units.depth * value_pitch + column_of(j, column0)],
                        value_pitch,
                    )  # fmt: skip
                    for i in T.unroll(of_rows):
                        units.multiply(own.sums, i * all_columns + j, own.w, i, own.x, 0)

    @T.inline
    def add_sums(own, row0, column0, tx):
        """acc += sums, by way of `score`."""
        for panel in T.unroll(panels):
            if panel > 0:
                barrier()  # nobody reads older columns
            put_sums(own, panel * of_columns, all_columns, row0, column0)
            barrier()
            own_rows.add(own, panel, tx)

    @T.inline
    def take_keys(
        own, cache, kv_head, table, first_page, sequence, q, token0, n, head0, heads_left, row0,
        column0, tx,
    ):  # fmt: skip
        """acc, total and top of a run."""
        first_key: T.let = own.seen[0] // PAGE_TOKENS * PAGE_TOKENS
        pages.find(own, table, first_page, sequence, 0)
        pages.fetch(own, cache, 0, kv_head, tx)
        take_query(own, q, token0, n, head0, heads_left, row0, tx)
        own_rows.begin(own)
        own.turn[0] = 0
        while first_key + own.turn[0] * TURN <= own.seen[1]:
            key0: T.let = first_key + own.turn[0] * TURN
            pages.put(own, 0, key0, tx)
            barrier()
            pages.fetch(own, cache, 1, kv_head, tx)
            pages.find(own, table, first_page, sequence, own.turn[0] + 1)
            score_keys(own, row0, column0)
            barrier()  # the keys are no longer read
            own_rows.take_scores(own, key0, tx)
            own_rows.ask(own, T.Or(key0 < own.seen[0], key0 + TURN - 1 > own.seen[1]))
            if own.answer[0] > 0:
                pages.hide(own, key0, tx)
            pages.put(own, 1, key0, tx)
            barrier()
            own_rows.weigh(own, tx)
            barrier()
            if key0 + TURN <= own.seen[1]:
                pages.fetch(own, cache, 0, kv_head, tx)
            sum_values(own, row0, column0)
            add_sums(own, row0, column0, tx)
            own.turn[0] = own.turn[0] + 1

    @T.inline
    def work(tx, token0, hb, n, cache, q, positions, token_seq, table, first_page, sinks, out):
        own = allocated()
        kv_head: T.let = hb // per_kv_head
        head0: T.let = kv_head * group + hb % per_kv_head * HEADS
        heads_left: T.let = T.min(group - hb % per_kv_head * HEADS, HEADS)
        count: T.let = T.min(n - token0, tokens)
        warp: T.let = LANES[units.family].number(tx)
        row0: T.let = warp // column_warps * (of_rows * units.rows)
        column0: T.let = warp % column_warps * (of_columns * units.columns)
        own.run[0] = 0
        while own.run[0] < count:
            own_rows.find_run(own, token0, count, n, heads_left, positions, token_seq, tx)
            if own.answer[0] > 0:
                take_keys(
                    own, cache, kv_head, table, first_page, token_seq[token0 + own.run[0]], q,
                    token0, n, head0, heads_left, row0, column0, tx,
                )  # fmt: skip
                own.exchange[tx] = own.total[0]
                barrier()
                own_rows.put_result(own, sinks, out, token0, head0, tx)
            own.run[0] = own.run[1]

    words = Words(kv_dtype, head_dim)
    return by_chunk(work, words, tokens=tokens, threads=threads, heads=heads, kv_heads=kv_heads)
