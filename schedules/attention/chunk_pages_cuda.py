"""How a chunk's block has pages of the cache in shared memory, and fragments of B from there.

A page's keys, and its values, are 128 pieces of 16 bytes each, as in the cache of a 16-bit format
(formats/kv.py); int8 becomes bfloat16 on its way. Pieces change places within lines of 128 bytes,
so that every read and write meets each bank as seldom as can be.

A part is two pages, 32 keys: four tiles of eight columns, two blocks of 16 inputs of the second
product. Of the first product's inputs, a lane with t has 4t … 4t+3 of every 16. Words of bfloat16
hold two inputs, and are read one by one; of float16, ldmatrix puts two together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mxforge.kv_layout import PAGE_TOKENS

from ..cuda.instructions import copy_async, permuted, shared_words, store_shared_words
from ..cuda.mxfp4 import load_word, load_words
from ..cuda.warps import lane_value
from ..formats.kv import F16, KV
from ..kernel import T
from .attend import Words

HEAD = 64  # elements
PIECES = 128  # of a page's keys, or values
LINE = 8  # pieces
WORDS = 4  # u32 of a piece
PART_PAGES = 2
PART = PART_PAGES * PAGE_TOKENS
STEP_WORDS = PIECES * WORDS // 4  # of 16 elements of a page's keys
TILES = 4  # of eight keys, in a part; of eight columns, in half of a value
BLOCKS = 2  # of 16 keys, in a part


def _swap(line: Any, bits: tuple[int, ...]) -> Any:
    """The exclusive or of `bits[i]` for each bit i of a line's number."""
    terms = [line // (1 << i) % 2 * bit for i, bit in enumerate(bits)]
    return sum(terms[1:], terms[0])


@dataclass(frozen=True)
class Pages:
    """Of one format, in `pages` pages of keys and as many of values, brought by `threads`.

    start(own, cache, kv_head, page, stage, tx)     begins to bring the thread's part of its page
    finish(own, stage, first, low, high, tx)        has it there; of values that are not of keys
        low … high zeros. `first`: of the keys in the thread's page
    find(own, lane)                               own.at, by which the lane finds its words
    keys(b, own, stage, part, s)                  b u32 [8]: of inputs 16s …, all tiles
    values(b, own, stage, part, block, half)      b u32 [8]: of a block of keys, tiles of columns
    """

    kv_dtype: str
    pages: int
    threads: int

    @property
    def float16(self) -> bool:
        return self.kv_dtype == F16.name

    @property
    def scaled(self) -> bool:
        return KV[self.kv_dtype].scaled

    @property
    def of_page(self) -> int:
        """Threads that bring a page."""
        return self.threads // self.pages

    @property
    def stage_words(self) -> int:
        return 2 * self.pages * PIECES * WORDS

    @property
    def reads(self) -> int:
        """Pieces of keys, and of values, that a thread brings: of int8, half as many."""
        return PIECES // (2 if self.scaled else 1) // self.of_page

    def _place(self, stage: Any, value: int, page: Any, piece: Any) -> Any:
        """The word where a piece of keys (0) or values (1) begins."""
        line = piece // LINE
        if value:
            swap = _swap(line, (1, 2, 4)) if self.float16 else _swap(line // 2, (2, 4))
        else:
            swap = _swap(line, (1, 4)) if self.float16 else _swap(line, (4, 2))
        slot = T.bitwise_xor(piece % LINE, swap)
        return (
            stage * self.stage_words
            + ((value * self.pages + page) * PIECES + line * LINE + slot) * WORDS
        )

    @property
    def start(self) -> Any:
        bring = self._bring_scaled if self.scaled else self._bring
        keys, values = bring(0), bring(1)
        scaled = self.scaled

        @T.inline
        def start(own, cache, kv_head, page, stage, tx):
            keys(own, cache, kv_head, page, stage, tx)
            values(own, cache, kv_head, page, stage, tx)
            if not scaled:
                T.ptx["cp.async.commit_group"]()

        return start

    def _bring(self, value: int) -> Any:
        of_page, reads, place = self.of_page, self.reads, self._place

        @T.inline
        def bring(own, cache, kv_head, page, stage, tx):
            for i in T.unroll(reads):
                piece: T.let = i * of_page + tx % of_page
                copy_async(
                    T.address_of(own.cache[place(stage, value, tx // of_page, piece)]),
                    T.address_of(cache[value, kv_head, page, piece * WORDS]),
                )

        return bring

    def _bring_scaled(self, value: int) -> Any:
        """The pieces to registers, and the scales of their four slots."""
        of_page, reads = self.of_page, self.reads
        scales, is_value = Words(self.kv_dtype, HEAD).scales, value == 1

        @T.inline
        def bring(own, cache, kv_head, page, _stage, tx):
            for i in T.unroll(reads):
                at: T.let = value * reads + i
                piece: T.let = i * of_page + tx % of_page
                quad: T.let = piece // 16 if is_value else piece % 4
                load_words(
                    own.raw, at * WORDS, T.address_of(cache[value, kv_head, page, piece * WORDS])
                )
                for j in T.unroll(2):
                    load_word(
                        own.scales, at * 2 + j,
                        T.address_of(cache[value, kv_head, page, scales + quad * 2 + j]),
                    )  # fmt: skip

        return bring

    @property
    def finish(self) -> Any:
        if not self.scaled:
            return self._finish()
        keys, values = self._widen(0), self._widen(1)

        @T.inline
        def finish(own, stage, first, low, high, tx):
            keys(own, stage, first, low, high, tx)
            values(own, stage, first, low, high, tx)

        return finish

    def _finish(self) -> Any:
        of_page, reads, place = self.of_page, self.reads, self._place
        float16, word = self.float16, KV[self.kv_dtype].word

        @T.inline
        def finish(own, stage, first, low, high, tx):
            T.ptx["cp.async.wait_group"](0)
            if first < low or first + PAGE_TOKENS > high + 1:
                for i in T.unroll(reads):
                    piece: T.let = i * of_page + tx % of_page
                    at: T.let = place(stage, 1, tx // of_page, piece)
                    key: T.let = first + (piece // LINE if float16 else piece // 16 * word)
                    shared_words([own.b[0], own.b[1], own.b[2], own.b[3]], own.cache[at])
                    for w in T.unroll(WORDS):
                        own.b[w] = T.bitwise_and(own.b[w], seen(key, key + word - 1, low, high))
                    store_shared_words([own.b[0], own.b[1], own.b[2], own.b[3]], own.cache[at])

        return finish

    def _widen(self, value: int) -> Any:
        """Four inputs of four slots become two pieces of two inputs, or slots, each."""
        of_page, reads, place = self.of_page, self.reads, self._place
        is_value = value == 1
        across = 16 if is_value else 4  # pieces beside each other

        @T.inline
        def widen(own, stage, first, low, high, tx):
            for i in T.unroll(reads):
                at: T.let = value * reads + i
                piece: T.let = i * of_page + tx % of_page
                for u in T.unroll(2):
                    for w in T.unroll(WORDS):
                        if is_value:  # a word is of four slots
                            key: T.let = first + piece // across * 4 + u * 2
                            own.b[w] = scaled_pair(
                                own.raw[at * WORDS + w], u,
                                T.bitwise_and(
                                    own.scales[at * 2 + u], seen(key, key + 1, low, high)
                                ),
                            )  # fmt: skip
                        else:
                            own.b[w] = scaled_pair(
                                own.raw[at * WORDS + w], u,
                                permuted(
                                    own.scales[at * 2 + w // 2], T.uint32(0),
                                    T.Cast("uint32", 0x1010 + w % 2 * 0x2222),
                                ),
                            )  # fmt: skip
                    half: T.let = (piece // across * 2 + u) * across + piece % across
                    store_shared_words(
                        [own.b[0], own.b[1], own.b[2], own.b[3]],
                        own.cache[place(stage, value, tx // of_page, half)],
                    )

        return widen

    # The lane's words of page 0 in stage 0, by which it finds all others: own.at i32 [8].

    @property
    def find(self) -> Any:
        place, float16 = self._place, self.float16

        @T.inline
        def words(own, lane):
            for i in T.unroll(4):
                # Tile i // 2 and word i % 2 of keys; tile i of values.
                slot: T.let = i // 2 * 8 + lane // 4
                piece: T.let = (lane % 4 * 2 + i % 2) * 4 + slot // WORDS
                own.at[i] = place(0, 0, 0, piece) + slot % WORDS
                column: T.let = i * 8 + lane // 4
                own.at[4 + i] = place(0, 1, 0, lane % 4 * 16 + column // WORDS) + column % WORDS

        @T.inline
        def matrices(own, lane):
            # Of keys, matrix m = lane // 8 has inputs 4i + 2·(m % 2), and the next, of eight keys;
            # of values eight columns of keys 8·(m % 2) ….
            d: T.let = lane % 8 // 2 * 4 + lane % 2 + lane // 8 % 2 * 2
            own.at[0] = place(0, 0, 0, d * 2 + lane // 16)
            for i in T.unroll(4):
                own.at[4 + i] = place(0, 1, 0, lane % 16 * LINE + i * 2 + lane // 16)

        @T.inline
        def find(own, lane):
            if float16:
                matrices(own, lane)
            else:
                words(own, lane)
            for i in T.unroll(8):  # or nvcc computes them anew wherever they are used
                own.at[i] = lane_value(own.at[i], lane)

        return find

    def _page(self, stage: Any, page: Any) -> Any:
        """How far its words are from those of page 0 in stage 0."""
        return stage * self.stage_words + page * PIECES * WORDS

    @property
    def keys(self) -> Any:
        begin = self._page

        @T.inline
        def words(b, own, stage, part, s):
            for i in T.unroll(TILES):
                for u in T.unroll(2):
                    to: T.let = begin(stage, part * PART_PAGES + i // 2) + s * STEP_WORDS
                    shared_words([b[i * 2 + u]], own.cache[to + own.at[i % 2 * 2 + u]])

        @T.inline
        def matrices(b, own, stage, part, s):
            for h in T.unroll(PART_PAGES):
                to: T.let = begin(stage, part * PART_PAGES + h) + s * STEP_WORDS
                transposed(b, h * 4, own, to + own.at[0])

        return matrices if self.float16 else words

    @property
    def values(self) -> Any:
        begin = self._page

        @T.inline
        def words(b, own, stage, part, block, half):
            for i in T.unroll(TILES):
                for u in T.unroll(2):
                    to: T.let = begin(stage, part * PART_PAGES + block) + (
                        half * LINE * WORDS + u * 8 * LINE * WORDS
                    )
                    shared_words([b[i * 2 + u]], own.cache[to + own.at[4 + i]])

        @T.inline
        def matrices(b, own, stage, part, block, half):
            for h in T.unroll(2):
                to: T.let = begin(stage, part * PART_PAGES + block)
                transposed(b, h * 4, own, to + own.at[4 + half * 2 + h])

        return matrices if self.float16 else words


def seen(first: Any, second: Any, low: Any, high: Any) -> Any:
    """u32: 0xFFFF in each half whose key is one of low … high."""
    return T.bitwise_or(
        T.Select(T.Or(first < low, first > high), T.uint32(0), T.uint32(0xFFFF)),
        T.Select(T.Or(second < low, second > high), T.uint32(0), T.uint32(0xFFFF0000)),
    )


@T.inline
def transposed(b, at, own, place):
    """b[at …] u32 [4]: four matrices of 8 x 8 float16, of which each lane gives a row."""
    T.ptx["ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16"](
        b[at], b[at + 1], b[at + 2], b[at + 3], T.address_of(own.cache[place])
    )


# An int8 x is (128 + its last 7 bits) - 128, or - 256 where it is below zero: all are bfloat16.
_SCALED_PAIR = """#include <cuda_bf16.h>
__forceinline__ __device__ uint32_t mx_scaled_pair(uint32_t bytes, uint32_t scales) {
  uint32_t last = (bytes & 0x007F007Fu) | 0x43004300u, by = (bytes & 0x00800080u) | 0x43004300u;
  __nv_bfloat162 pair = __hmul2(__hsub2(*(__nv_bfloat162*)&last, *(__nv_bfloat162*)&by),
                                *(__nv_bfloat162*)&scales);
  return *(uint32_t*)&pair;
}
"""


def scaled_pair(word: Any, half: int, scales: Any) -> Any:
    """u32 of two bfloat16: bytes 2·half and the next of a word, int8, times two bfloat16."""
    bytes_ = permuted(word, T.uint32(0), T.Cast("uint32", 0x4140 + half * 0x0202))
    return T.cuda.func_call(
        "mx_scaled_pair", bytes_, scales, source_code=_SCALED_PAIR, return_type="uint32"
    )
