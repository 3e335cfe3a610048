"""How a chunk's block has keys and values of the cache in shared memory, for attend_chunk_gpu.py.

A turn is two pages. Its keys, and its values, are pieces of 16 bytes, as the cache has them: of
keys, groups of slots of all pages follow each other, then units of elements; of values columns
follow each other, then units of slots, then pages (Words). They become numbers of the matrix units'
type on their way from registers to shared memory: keys [element, key], values [key, element].
"""

from __future__ import annotations

from typing import Any, NamedTuple

from mxforge.kv_layout import PAGE_TOKENS

from ..formats.kv import BF16, F16_MAX, KV
from ..gpu.matrices import Matrices
from ..kernel import T
from .attend import WORDS, Words, upper
from .pages import physical_page

FOUR = 4  # numbers that a thread reads or writes at once
PAGES = 2  # of a turn
TURN = PAGES * PAGE_TOKENS  # keys


class ChunkPages(NamedTuple):
    """Of one format and one kind of matrix units. T.inline functions; key0 is a turn's first key.

    find(own, table, first_page, sequence, turn)   own.page: a turn's physical pages
    fetch(own, cache, value, kv_head, tx)          keys (0) or values (1) of these to registers
    hide(own, key0, tx)              0 for fetched values that nobody sees, which may be NaN; those
                                     of int8 have a scale of 0
    put(own, value, key0, tx)        what was fetched to own.tile, scales to own.key_scale or
                                     own.value_scale
    """

    reads: int  # pieces of keys, and of values, that a thread brings
    pitches: tuple[int, int]  # numbers from a line of own.tile to the next: of keys, of values
    size: int  # numbers of own.tile
    find: Any
    fetch: Any
    hide: Any
    put: Any


def chunk_pages(units: Matrices, threads: int, *, head_dim: int, kv_dtype: str) -> ChunkPages:
    words = Words(kv_dtype, head_dim)
    scaled, word, wide = KV[kv_dtype].scaled, words.word, words.wide
    slot_units = PAGE_TOKENS // word
    across_keys, across_values = PAGES * words.slot_groups, head_dim // wide
    all_pieces = TURN * head_dim // words.elements
    reads = -(-all_pieces // threads)
    whole = all_pieces % threads == 0
    pitches = (TURN + units.pads[0], head_dim + units.pads[0])
    clipped = units.dtype == "float16" and kv_dtype == BF16.name
    assert threads >= TURN  # one for each scale

    # The number of a thread's piece i is i · threads + tx.

    def page_of(own: Any, value: int, piece: Any) -> Any:
        """Its physical page."""
        of_page = across_values * slot_units if value else words.slot_groups
        return T.Select(piece // of_page % PAGES == 0, own.page[0], own.page[1])

    def word_of(value: int, piece: Any) -> Any:
        """Its first word in a page."""
        if not value:
            return words.key_at(piece // across_keys, piece % words.slot_groups)
        return words.value_at(piece // across_values % slot_units, piece % across_values)

    def place_of(value: int, piece: Any) -> Any:
        """Where its first number goes, in own.tile."""
        across = across_values if value else across_keys
        return piece // across * word * pitches[value] + piece % across * wide

    def is_there(i: int, tx: Any) -> Any:
        return whole or i * threads + tx < all_pieces

    def first_half(tx: Any) -> Any:
        """Of eight numbers, some lanes write the last four first: they meet different banks."""
        return tx // FOUR % 2 if wide > FOUR else 0

    def outside(own: Any, key: Any) -> Any:
        """Whether no token sees a key."""
        return T.Or(key < own.seen[0], key > own.seen[1])

    def mask(own: Any, key: Any) -> Any:
        """u32: the bits of a word, of `word` slots from key on, whose slots some token sees."""
        if word == 1:
            return T.Select(outside(own, key), T.uint32(0), T.uint32(0xFFFFFFFF))
        return T.bitwise_or(
            T.Select(outside(own, key), T.uint32(0), T.uint32(0xFFFF)),
            T.Select(outside(own, key + 1), T.uint32(0), T.uint32(0xFFFF0000)),
        )

    @T.inline
    def find(own, table, first_page, sequence, turn):
        for i in T.unroll(PAGES):
            own.page[i] = physical_page(
                table, first_page, sequence,
                T.min(own.seen[0] // PAGE_TOKENS + turn * PAGES + i, own.seen[1] // PAGE_TOKENS),
            )  # fmt: skip

    @T.inline
    def fetch(own, cache, value, kv_head, tx):
        for i in T.unroll(reads):
            if is_there(i, tx):
                own.raw[T.ramp(i * WORDS, 1, WORDS)] = cache[
                    value, kv_head, page_of(own, value, i * threads + tx),
                    T.ramp(word_of(value, i * threads + tx), 1, WORDS),
                ]  # fmt: skip
        if scaled:  # all threads, of which the first have what is used
            own.raw_scale[0] = cache[
                value, kv_head,
                T.Select(tx // PAGE_TOKENS % PAGES == 0, own.page[0], own.page[1]),
                words.scales + tx % PAGE_TOKENS // 2,
            ]  # fmt: skip

    @T.inline
    def hide(own, key0, tx):
        if not scaled:
            for i in T.unroll(reads):
                for w in T.unroll(WORDS):
                    own.raw[i * WORDS + w] = T.bitwise_and(
                        own.raw[i * WORDS + w],
                        mask(own, key0 + (i * threads + tx) // across_values * word),
                    )

    @T.inline
    def swap_halves(own, at, turned):
        for w in T.unroll(WORDS // 2):
            own.read[0] = own.raw[at + w]
            own.read[1] = own.raw[at + w + WORDS // 2]
            own.raw[at + w] = T.Select(turned == 0, own.read[0], own.read[1])
            own.raw[at + w + WORDS // 2] = T.Select(turned == 0, own.read[1], own.read[0])

    @T.inline
    def put_piece(own, at, to, pitch, turned):
        """Four words from raw[at] on: `wide` numbers at tile[to], and at the next lines'."""
        for j in T.unroll(word):
            for h in T.unroll(wide // FOUR):
                for e in T.unroll(FOUR):
                    own.four[e] = words.number(own.raw, at, h * FOUR + e, j)
                    if clipped:
                        own.four[e] = T.max(
                            T.min(own.four[e], T.float32(F16_MAX)), T.float32(-F16_MAX)
                        )
                    own.rounded[e] = T.Cast(units.dtype, own.four[e])
                own.tile[T.ramp(to + j * pitch + T.bitwise_xor(h, turned) * FOUR, 1, FOUR)] = (
                    own.rounded[T.ramp(0, 1, FOUR)]
                )

    @T.inline
    def put_scale(own, to, key, tx):
        to[tx] = T.Select(
            outside(own, key),
            T.float32(0),
            upper(own.raw_scale[0], T.Cast("uint32", tx % 2 * 16)),
        )

    @T.inline
    def put(own, value, key0, tx):
        for i in T.unroll(reads):
            if wide > FOUR:
                swap_halves(own, i * WORDS, first_half(tx))
            if is_there(i, tx):
                put_piece(
                    own, i * WORDS, place_of(value, i * threads + tx), pitches[value],
                    first_half(tx),
                )  # fmt: skip
        if scaled:
            put_scale(own, own.value_scale if value == 1 else own.key_scale, key0 + tx % TURN, tx)

    return ChunkPages(
        reads, pitches, max(head_dim * pitches[0], TURN * pitches[1]), find, fetch, hide, put
    )
