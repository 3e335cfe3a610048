"""Attention of many tokens by matrix units that take fragments from shared memory, flash style.

A block takes some tokens that follow each other and eight heads of one KV head: each read of the
cache serves them all. A token and a head are a row, and a warp has some of the rows, whose queries
are fragments in its registers. Keys go by in turns of two pages. Of a turn,

1. all threads put the keys into shared memory, in the units' type;
2. the warps multiply queries and keys, and store the scores;
3. two threads a row make weights of them, while the values take the place of the keys;
4. the warps multiply weights and values; these sums leave through shared memory too, some columns
   at a time, to the two threads of each row, which add them to those of older turns.

So nothing depends on which lane has an element of a fragment, and a fragment of sums is never
corrected. What comes next from the cache is on its way to registers meanwhile.

Units that take float16 get queries and weights in two parts where a result should be as good as
those of float32: a row of queries times a power of two, weights up to 2^14. Scales of an int8 cache
are no part of the products: those of keys are multiplied with scores, those of values with weights.

Tokens of several sequences in one block are taken one sequence after the other, and a token that is
the only one of its sequence is left to another launch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from mxforge.kv_layout import PAGE_TOKENS

from ..formats.kv import F16_MAX, F32, KV
from ..gpu.barriers import barrier
from ..gpu.lanes import LANES
from ..gpu.matrices import Matrices
from ..gpu.product import power_of_two
from ..kernel import T, TileConfig
from ..math import LOG2_E, LOWEST
from .attend import HEADS, WORDS, Words, is_alone, upper
from .pages import first_visible, is_hidden, physical_page

FOUR = 4  # numbers that a thread reads or writes at once
PAGES = 2  # of a turn
TURN = PAGES * PAGE_TOKENS  # keys; and columns of sums that leave at once
OF_ROW = 2  # threads
PIECE = OF_ROW * FOUR  # columns of a row, of which each of its threads has four
EXACT = 1e-4  # formats with less tolerance have queries and weights in two parts
NOT_SEEN = -(2.0**80)  # a score
FAR = 1 << 30  # behind all positions
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

    # Of the units' type: keys [D, pitch] or values [TURN, value pitch] of a turn; once, part of q.
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
    last: Any  # i32: key that the row sees; -1 of rows that are not of the run
    run: Any  # i32 [2]: tokens of the tile that are of one sequence
    seen: Any  # i32 [4]: first and last key that any of them sees, first and last that all see
    page: Any  # i64 [PAGES]: physical
    turn: Any  # i32
    answer: Any  # i32: to a question


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
    """The T.inline launch(n, b, p, pages, q, kv, positions, token_seq, page_table, first_page,
    sinks, out) of all tokens but those that are alone in their sequence, by the first of `units`
    and its others that the device has, which has one."""
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
    words = Words(kv_dtype, head_dim)
    scaled, word, wide = KV[kv_dtype].scaled, words.word, words.wide
    group = heads // kv_heads
    per_kv_head = -(-group // HEADS)
    rows, tokens, threads = tile.rows, tile.tokens, tile.threads
    halves = units.dtype == "float16"
    parts = 2 if halves and KV[kv_dtype].attention_tolerance < EXACT else 1
    bias = 14.0 if halves else 0.0  # weights up to 2^14: float16 has its full precision from 2^-14
    scale = LOG2_E * head_dim**-0.5
    # Warps share the rows, and those that are left over each row's columns.
    warps = threads // units.lanes
    row_warps = min(warps, rows // units.rows)
    column_warps = warps // row_warps
    of_rows = rows // (row_warps * units.rows)
    of_columns = TURN // (column_warps * units.columns)
    of_turn, of_head = TURN // units.depth, head_dim // units.depth
    panels = head_dim // TURN
    own_four = head_dim // PIECE  # of a row, in each of its threads
    # Shared memory.
    pitch = TURN + units.pads[0]
    value_pitch = head_dim + units.pads[0]
    pitches = (pitch, value_pitch)  # of keys, of values
    part_size = rows * pitch  # of weights
    tile_size = max(head_dim * pitch, TURN * value_pitch, (panels - 1) * part_size)
    # Pieces of 16 bytes, of a turn's keys and of its values.
    across_keys, across_values = PAGES * words.slot_groups, head_dim // wide
    all_pieces = PAGES * PAGE_TOKENS * head_dim // words.elements
    own_pieces = -(-all_pieces // threads)
    whole = all_pieces % threads == 0
    assert row_warps * column_warps * units.lanes == threads
    assert of_rows * row_warps * units.rows == rows
    assert of_columns * column_warps * units.columns == TURN
    assert threads >= TURN

    def allocated():
        def shared(size, dtype="float32"):
            return T.sblock_alloc_buffer((size,), dtype, scope="shared")

        def local(size, dtype="float32", scope="local"):
            return T.sblock_alloc_buffer((size,), dtype, scope=scope)

        kept = shared(parts * part_size, units.dtype)
        size_w, size_x, size_sums = units.sizes
        return State(
            tile=shared(tile_size, units.dtype),
            kept=kept,
            score=shared(part_size) if halves else kept,
            key_scale=shared(threads if scaled else 1),
            value_scale=shared(threads if scaled else 1),
            exchange=shared(threads),
            query=local(parts * of_rows * of_head * size_w, units.dtype, units.scopes[0]),
            w=local(of_rows * size_w, units.dtype, units.scopes[0]),
            x=local(size_x, units.dtype, units.scopes[1]),
            sums=local(of_rows * panels * of_columns * size_sums, "float32", units.scopes[2]),
            raw=local(own_pieces * WORDS, "uint32"),
            raw_scale=local(1, "uint32"),
            read=local(2, "uint32"),
            acc=local(own_four * FOUR),
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
            page=local(PAGES, "int64"),
            turn=local(1, "int32"),
            answer=local(1, "int32"),
        )

    def own_column(i: Any, tx: Any) -> Any:
        """The first of the thread's four with number i, in a row."""
        return i * PIECE + tx % OF_ROW * FOUR

    @T.inline
    def ask(own, condition):
        """answer = 1 where it is so, or else 0: TVM looks at each of a block's accesses for every
        condition around it, which takes long if there is much in it."""
        own.answer[0] = T.Select(condition, 1, 0)

    @T.inline
    def find_run(own, token0, count, n, heads_left, positions, token_seq, tx):
        """The tokens run[0] … run[1] - 1 of the tile are those from run[0] on that are of its
        sequence, and see `seen`."""
        sequence: T.let = token_seq[token0 + own.run[0]]
        own.run[1] = own.run[0]
        own.seen[0] = FAR
        own.seen[1] = -1
        own.seen[2] = -1
        own.seen[3] = FAR
        own.last[0] = -1
        for i in T.serial(tokens):
            t: T.let = T.min(token0 + i, n - 1)
            ask(own, T.And(T.And(i == own.run[1], i < count), token_seq[t] == sequence))
            if own.answer[0] > 0:
                position: T.let = positions[t]
                first: T.let = first_visible(position, window)
                own.run[1] = i + 1
                own.seen[0] = T.min(own.seen[0], first)
                own.seen[1] = T.max(own.seen[1], position)
                own.seen[2] = T.max(own.seen[2], first)
                own.seen[3] = T.min(own.seen[3], position)
                own.last[0] = T.Select(
                    T.And(tx // (HEADS * OF_ROW) == i, tx // OF_ROW % HEADS < heads_left),
                    position, own.last[0],
                )  # fmt: skip

    @T.inline
    def find_pages(own, table, first_page, sequence, turn):
        for i in T.unroll(PAGES):
            page: T.let = own.seen[0] // PAGE_TOKENS + turn * PAGES + i
            own.page[i] = physical_page(
                table, first_page, sequence, T.min(page, own.seen[1] // PAGE_TOKENS)
            )

    # Piece number i · threads + tx of a turn's keys: groups of slots of all pages follow each
    # other, then units. Of its values: columns follow each other, then units, then pages.

    def piece_page(value: int, piece: Any) -> Any:
        of_page = across_values * (PAGE_TOKENS // word) if value else words.slot_groups
        return piece // of_page % PAGES

    def piece_word(value: int, piece: Any) -> Any:
        if not value:
            return words.key_at(piece // across_keys, piece % words.slot_groups)
        unit = piece // across_values % (PAGE_TOKENS // word)
        return words.value_at(unit, piece % across_values)

    def piece_place(value: int, piece: Any) -> Any:
        """Where its first number goes, in `tile`."""
        if not value:
            return piece // across_keys * word * pitch + piece % across_keys * wide
        line = piece // across_values * word
        return line * value_pitch + piece % across_values * wide

    def physical(own: Any, page: Any) -> Any:
        return T.Select(page == 0, own.page[0], own.page[1])

    @T.inline
    def fetch(own, cache, value, kv_head, tx):
        """Keys (0) or values (1) of a turn to registers."""
        for i in T.unroll(own_pieces):
            piece: T.let = i * threads + tx
            if whole or piece < all_pieces:
                own.raw[T.ramp(i * WORDS, 1, WORDS)] = cache[
                    value, kv_head, physical(own, piece_page(value, piece)),
                    T.ramp(piece_word(value, piece), 1, WORDS),
                ]  # fmt: skip
        if scaled:  # all threads, of which the first have what is used: TVM is slow with conditions
            own.raw_scale[0] = cache[
                value, kv_head, physical(own, tx // PAGE_TOKENS % PAGES),
                words.scales + tx % PAGE_TOKENS // 2,
            ]  # fmt: skip

    def of_slot(key: Any, own: Any) -> Any:
        """u32: the bits of a word that are of slots some token sees, of `word` from key on."""
        low, high = own.seen[0], own.seen[1]
        if word == 1:
            hidden = T.Or(key < low, key > high)
            return T.Select(hidden, T.uint32(0), T.uint32(0xFFFFFFFF))
        return T.bitwise_or(
            T.Select(T.Or(key < low, key > high), T.uint32(0), T.uint32(0xFFFF)),
            T.Select(T.Or(key + 1 < low, key + 1 > high), T.uint32(0), T.uint32(0xFFFF0000)),
        )

    @T.inline
    def hide_values(own, key0, tx):
        """0 for values that nobody sees, which may be NaN. Those of int8 have a scale of 0."""
        for i in T.unroll(own_pieces):
            key: T.let = key0 + (i * threads + tx) // across_values * word
            for w in T.unroll(WORDS):
                own.raw[i * WORDS + w] = T.bitwise_and(own.raw[i * WORDS + w], of_slot(key, own))

    def first_half(tx: Any) -> Any:
        """Of eight numbers, some lanes write the last four first: they meet different banks."""
        return tx // FOUR % 2 if wide > FOUR else 0

    @T.inline
    def swap_halves(own, at, turned):
        for w in T.unroll(WORDS // 2):
            own.read[0] = own.raw[at + w]
            own.read[1] = own.raw[at + w + WORDS // 2]
            own.raw[at + w] = T.Select(turned == 0, own.read[0], own.read[1])
            own.raw[at + w + WORDS // 2] = T.Select(turned == 0, own.read[1], own.read[0])

    @T.inline
    def put_piece(own, at, to, pitch_, turned):
        """Four words from raw[at] on: `wide` numbers at tile[to], and at the next lines'."""
        for j in T.unroll(word):
            for h in T.unroll(wide // FOUR):
                for e in T.unroll(FOUR):
                    own.four[e] = words.number(own.raw, at, h * FOUR + e, j)
                    if halves and kv_dtype == "bfloat16":
                        own.four[e] = T.max(
                            T.min(own.four[e], T.float32(F16_MAX)), T.float32(-F16_MAX)
                        )
                    own.rounded[e] = T.Cast(units.dtype, own.four[e])
                place: T.let = to + j * pitch_ + T.bitwise_xor(h, turned) * FOUR
                own.tile[T.ramp(place, 1, FOUR)] = own.rounded[T.ramp(0, 1, FOUR)]

    @T.inline
    def put_scale(own, to, key, tx):
        to[tx] = T.Select(
            T.Or(key < own.seen[0], key > own.seen[1]),
            T.float32(0),
            upper(own.raw_scale[0], T.Cast("uint32", tx % 2 * 16)),
        )

    @T.inline
    def put(own, value, key0, tx):
        """What was fetched to shared memory: keys [element, key], values [key, element]."""
        for i in T.unroll(own_pieces):
            piece: T.let = i * threads + tx
            if wide > FOUR:
                swap_halves(own, i * WORDS, first_half(tx))
            if whole or piece < all_pieces:
                put_piece(
                    own, i * WORDS, piece_place(value, piece), pitches[value],
                    first_half(tx),
                )  # fmt: skip
        if scaled:
            put_scale(own, own.value_scale if value == 1 else own.key_scale, key0 + tx % TURN, tx)

    @T.inline
    def put_query(own, to, panel, tx):
        """A part of TURN columns of acc; what is left of them stays there."""
        for i in T.unroll(TURN // PIECE):
            for e in T.unroll(FOUR):
                at: T.let = (panel * (TURN // PIECE) + i) * FOUR + e
                own.rounded[e] = T.Cast(units.dtype, own.acc[at])
                own.acc[at] = own.acc[at] - T.Cast("float32", own.rounded[e])
            to[T.ramp(tx // OF_ROW * pitch + own_column(i, tx), 1, FOUR)] = own.rounded[
                T.ramp(0, 1, FOUR)
            ]

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
        row: T.let = tx // OF_ROW
        t: T.let = T.min(token0 + row // HEADS, n - 1)
        first: T.let = (head0 + T.min(row % HEADS, heads_left - 1)) * head_dim
        own.unit[0] = T.float32(scale)
        own.power[0] = T.float32(1)
        if halves:
            own.running[0] = T.float32(0)
            for i in T.unroll(head_dim // FOUR):
                own.four[T.ramp(0, 1, FOUR)] = q[t, T.ramp(first + i * FOUR, 1, FOUR)]
                for e in T.unroll(FOUR):
                    own.running[0] = T.max(own.running[0], T.fabs(own.four[e]))
            power_of_two(own.running[0], own.power)
            own.unit[0] = own.power[1] * T.float32(scale)
        for i in T.unroll(own_four):
            own.four[T.ramp(0, 1, FOUR)] = q[t, T.ramp(first + own_column(i, tx), 1, FOUR)]
            for e in T.unroll(FOUR):
                own.acc[i * FOUR + e] = own.four[e] * own.power[0]
        for part in T.unroll(parts):
            put_query(own, own.kept, 0, tx)
            if panels > 1:
                put_query(own, own.tile, 1, tx)
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
                at: T.let = (row0 + i * units.rows) * pitch + column0 + j * units.columns
                units.store_rows(own.sums, i * each + first + j, own.score[at], pitch)

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

    @T.inline
    def take_scores(own, key0, tx):
        """weight = the thread's scores, in units of log 2, NOT_SEEN where the row does not see the
        key; the largest to `exchange`."""
        own.running[0] = T.float32(NOT_SEEN)
        for i in T.unroll(TURN // PIECE):
            own.four[T.ramp(0, 1, FOUR)] = own.score[
                T.ramp(tx // OF_ROW * pitch + own_column(i, tx), 1, FOUR)
            ]
            for e in T.unroll(FOUR):
                own.weight[i * FOUR + e] = own.four[e] * own.unit[0]
            if scaled:
                own.four[T.ramp(0, 1, FOUR)] = own.key_scale[T.ramp(own_column(i, tx), 1, FOUR)]
                for e in T.unroll(FOUR):
                    own.weight[i * FOUR + e] = own.weight[i * FOUR + e] * own.four[e]
        ask(own, T.Or(key0 < own.seen[2], key0 + TURN - 1 > own.seen[3]))
        if own.answer[0] > 0:
            for i in T.unroll(TURN // PIECE):
                for e in T.unroll(FOUR):
                    key: T.let = key0 + own_column(i, tx) + e
                    own.weight[i * FOUR + e] = T.Select(
                        is_hidden(key, own.last[0], window),
                        T.float32(NOT_SEEN),
                        own.weight[i * FOUR + e],
                    )
        for i in T.unroll(TURN // OF_ROW):
            own.running[0] = T.max(own.running[0], own.weight[i])
        own.exchange[tx] = own.running[0]

    @T.inline
    def weigh(own, tx):
        """weight = 2^(score - top + bias), to shared memory with the value's scale; older sums
        corrected."""
        other: T.let = own.exchange[T.bitwise_xor(tx, 1)]
        own.running[0] = T.max(own.top[0], T.max(own.running[0], other))
        factor: T.let = T.exp2(own.top[0] - own.running[0])
        own.total[0] = own.total[0] * factor
        for i in T.unroll(own_four * FOUR):
            own.acc[i] = own.acc[i] * factor
        own.top[0] = own.running[0]
        for i in T.unroll(TURN // OF_ROW):
            own.weight[i] = T.exp2(own.weight[i] - own.top[0] + T.float32(bias))
            own.total[0] = own.total[0] + own.weight[i]
        if scaled:
            if halves:
                own.running[0] = T.float32(0)
                for i in T.unroll(TURN // FOUR):
                    own.four[T.ramp(0, 1, FOUR)] = own.value_scale[T.ramp(i * FOUR, 1, FOUR)]
                    for e in T.unroll(FOUR):
                        own.running[0] = T.max(own.running[0], own.four[e])
                power_of_two(own.running[0], own.power)
                # Weights have 2^14 already.
                own.power[0] = own.power[0] * T.float32(2**-bias)
                own.undo[0] = own.power[1] * T.float32(2**bias)
            for i in T.unroll(TURN // PIECE):
                own.four[T.ramp(0, 1, FOUR)] = own.value_scale[T.ramp(own_column(i, tx), 1, FOUR)]
                for e in T.unroll(FOUR):
                    if halves:
                        own.four[e] = own.four[e] * own.power[0]
                    own.weight[i * FOUR + e] = own.weight[i * FOUR + e] * own.four[e]
        for part in T.unroll(parts):
            for i in T.unroll(TURN // PIECE):
                for e in T.unroll(FOUR):
                    own.rounded[e] = T.Cast(units.dtype, own.weight[i * FOUR + e])
                    own.weight[i * FOUR + e] = own.weight[i * FOUR + e] - T.Cast(
                        "float32", own.rounded[e]
                    )
                own.kept[
                    T.ramp(part * part_size + tx // OF_ROW * pitch + own_column(i, tx), 1, FOUR)
                ] = own.rounded[T.ramp(0, 1, FOUR)]

    @T.inline
    def sum_values(own, row0, column0):
        """sums = weights · values of a turn, of the warp's columns of all panels."""
        for i in T.unroll(of_rows * panels * of_columns):
            units.fill(own.sums, i)
        for k in T.serial(of_turn):
            for part in T.unroll(parts):
                for i in T.unroll(of_rows):
                    at: T.let = part * part_size + (row0 + i * units.rows) * pitch
                    units.load_w(own.w, i, own.kept[at + k * units.depth], pitch)
                for j in T.unroll(panels * of_columns):
                    column: T.let = (
                        j // of_columns * TURN + column0 + j % of_columns * units.columns
                    )
                    units.load_x_rows(
                        own.x, 0, own.tile[k * units.depth * value_pitch + column], value_pitch
                    )
                    for i in T.unroll(of_rows):
                        units.multiply(own.sums, i * (panels * of_columns) + j, own.w, i, own.x, 0)

    @T.inline
    def add_sums(own, row0, column0, tx):
        """acc += sums, by way of `score`."""
        for panel in T.unroll(panels):
            barrier()  # nobody reads what is there: first weights, then older columns
            put_sums(own, panel * of_columns, panels * of_columns, row0, column0)
            barrier()
            for i in T.unroll(TURN // PIECE):
                own.four[T.ramp(0, 1, FOUR)] = own.score[
                    T.ramp(tx // OF_ROW * pitch + own_column(i, tx), 1, FOUR)
                ]
                for e in T.unroll(FOUR):
                    at: T.let = (panel * (TURN // PIECE) + i) * FOUR + e
                    if scaled and halves:
                        own.acc[at] = own.acc[at] + own.four[e] * own.undo[0]
                    else:
                        own.acc[at] = own.acc[at] + own.four[e]

    @T.inline
    def take_keys(
        own, cache, kv_head, table, first_page, sequence, q, token0, n, head0, heads_left, row0,
        column0, tx,
    ):  # fmt: skip
        """acc, total and top of a run."""
        first_key: T.let = own.seen[0] // PAGE_TOKENS * PAGE_TOKENS
        find_pages(own, table, first_page, sequence, 0)
        fetch(own, cache, 0, kv_head, tx)
        take_query(own, q, token0, n, head0, heads_left, row0, tx)
        for i in T.unroll(own_four * FOUR):
            own.acc[i] = T.float32(0)
        own.total[0] = T.float32(0)
        own.top[0] = T.float32(NOT_SEEN)
        own.turn[0] = 0
        while first_key + own.turn[0] * TURN <= own.seen[1]:
            key0: T.let = first_key + own.turn[0] * TURN
            put(own, 0, key0, tx)
            barrier()
            fetch(own, cache, 1, kv_head, tx)
            find_pages(own, table, first_page, sequence, own.turn[0] + 1)
            score_keys(own, row0, column0)
            barrier()  # the keys are no longer read
            take_scores(own, key0, tx)
            if not scaled:
                ask(own, T.Or(key0 < own.seen[0], key0 + TURN - 1 > own.seen[1]))
                if own.answer[0] > 0:
                    hide_values(own, key0, tx)
            put(own, 1, key0, tx)
            barrier()
            weigh(own, tx)
            barrier()
            if key0 + TURN <= own.seen[1]:
                fetch(own, cache, 0, kv_head, tx)
            sum_values(own, row0, column0)
            add_sums(own, row0, column0, tx)
            own.turn[0] = own.turn[0] + 1

    @T.inline
    def put_result(own, sinks, out, token0, head0, tx):
        own.exchange[tx] = own.total[0]
        barrier()
        row: T.let = tx // OF_ROW
        if own.last[0] >= 0:
            head: T.let = head0 + row % HEADS
            sink: T.let = T.max(sinks[head] * T.float32(LOG2_E), T.float32(LOWEST))
            own.running[0] = T.max(own.top[0], sink)
            factor: T.let = T.exp2(own.top[0] - own.running[0] - T.float32(bias))
            total: T.let = own.exchange[tx] + own.exchange[T.bitwise_xor(tx, 1)]
            by: T.let = factor / (total * factor + T.exp2(sink - own.running[0]))
            for i in T.unroll(own_four):
                at: T.let = head * head_dim + own_column(i, tx)
                out[token0 + row // HEADS, T.ramp(at, 1, FOUR)] = own.acc[
                    T.ramp(i * FOUR, 1, FOUR)
                ] * T.broadcast(by, FOUR)

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
            find_run(own, token0, count, n, heads_left, positions, token_seq, tx)
            token: T.let = token0 + own.run[0]
            ask(own, T.Or(own.run[1] - own.run[0] > 1, T.Not(is_alone(token, n, token_seq))))
            if own.answer[0] > 0:
                take_keys(
                    own, cache, kv_head, table, first_page, token_seq[token], q, token0, n, head0,
                    heads_left, row0, column0, tx,
                )  # fmt: skip
                put_result(own, sinks, out, token0, head0, tx)
            own.run[0] = own.run[1]

    @T.inline
    def launch(
        n, b, p, n_pages, q, kv, positions, token_seq, page_table, first_page, sinks, out
    ):  # fmt: skip
        for group_of_tokens in T.thread_binding(T.ceildiv(n, tokens), thread="blockIdx.x"):
            for head_block in T.thread_binding(kv_heads * per_kv_head, thread="blockIdx.y"):
                for thread in T.thread_binding(threads, thread="threadIdx.x"):
                    with T.sblock("chunk"):
                        vt, hb, tx = T.axis.remap("SSS", [group_of_tokens, head_block, thread])
                        T.reads(
                            q[0:n, 0 : heads * head_dim],
                            kv[0:2, 0:kv_heads, 0:n_pages, 0 : kv.shape[3]],
                            positions[0:n],
                            token_seq[0:n],
                            page_table[0:b, 0:p],
                            first_page[0:b],
                            sinks[0:heads],
                        )
                        T.writes(out[0:n, 0 : heads * head_dim])
                        # Those that see most keys begin first.
                        work(
                            tx, T.Cast("int32", (T.ceildiv(n, tokens) - 1 - vt) * tokens), hb,
                            T.Cast("int32", n), words.view(kv, kv_heads, n_pages), q, positions,
                            token_seq, page_table, first_page, sinks, out,
                        )  # fmt: skip

    return launch
