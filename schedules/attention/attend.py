"""What attention's GPU schedules share: how the cache is read, and what a block is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tvm

from mxforge.kv_layout import PAGE_TOKENS

from ..formats.kv import KV, scale_at
from ..gpu.matrices import Matrices, unless_there
from ..kernel import T, Tensor, prim_func
from .pages import first_visible
from .splits import SPLITS, split_pages

HEADS = 8  # of a block: query heads of one KV head; where there are fewer, some stay idle
WORDS = 4  # that a thread reads at once


@dataclass(frozen=True)
class Words:
    """What four words of a cache in one format hold.

    Of keys: `wide` slots beside each other, `word` elements of each. Of values: `wide` elements
    beside each other, of `word` slots each. Number i of the first kind and j of the second is
    element i·word + j of the four words (formats/kv.py).
    """

    kv_dtype: str
    head_dim: int

    @property
    def word(self) -> int:
        return KV[self.kv_dtype].word

    @property
    def elements(self) -> int:
        """In four words."""
        return 4 * WORDS // KV[self.kv_dtype].element_bytes

    @property
    def wide(self) -> int:
        return self.elements // self.word

    @property
    def heads(self) -> int:
        """That a thread takes: so that it has 32 sums."""
        return 32 // self.wide

    @property
    def key_units(self) -> int:
        """Reads of a page's keys, for one group of `wide` slots."""
        return -(-self.head_dim // self.word)

    @property
    def slot_groups(self) -> int:
        return PAGE_TOKENS // self.wide

    @property
    def row(self) -> int:
        """Words of a page's row."""
        elements = KV[self.kv_dtype].shape(1, 1, self.head_dim)[-1]
        return elements * KV[self.kv_dtype].element_bytes // 4

    @property
    def scales(self) -> int:
        """The word of a row with the scales of the first two slots."""
        return scale_at(self.head_dim, 0) // 4

    def view(self, kv: Any, kv_heads: int, pages: Any) -> Any:
        """The cache [2, Hkv, pages, row] as uint32."""
        return T.decl_buffer((2, kv_heads, pages, self.row), "uint32", data=kv.data)

    def key_at(self, unit: Any, slot_group: Any) -> Any:
        return unit * (self.slot_groups * WORDS) + slot_group * WORDS

    def value_at(self, unit: Any, column: Any) -> Any:
        """Of slots unit·word and following, elements column·wide and following."""
        return unit * (self.head_dim // self.wide * WORDS) + column * WORDS

    def number(self, words: Any, at: Any, i: Any, j: Any) -> Any:
        """float32 number i, j of the four words from `at` on; of int8 without its scale."""
        element = i * self.word + j
        per_word = self.elements // WORDS
        shift = T.Cast("uint32", element % per_word * (32 // per_word))
        return _NUMBER[self.kv_dtype](words[at + element // per_word], shift)


def _half(word: Any, shift: Any) -> Any:
    bits = T.Cast("uint16", T.shift_right(word, shift))
    return T.Cast("float32", T.reinterpret("float16", bits))


def upper(word: Any, shift: Any) -> Any:
    """float32 of a bfloat16: the upper half of its bits."""
    bits = T.shift_right(word, shift)
    return T.reinterpret("float32", T.shift_left(bits, T.uint32(16)))


def _byte(word: Any, shift: Any) -> Any:
    # In place of a conversion, of which NVIDIA's GPUs do 16 in the time of 128 others: as the last
    # bits of 2²³ + 128.
    low = T.bitwise_and(T.shift_right(word, shift), T.uint32(0xFF))
    bits = T.bitwise_or(T.bitwise_xor(low, T.uint32(0x80)), T.uint32(0x4B000000))
    return T.reinterpret("float32", bits) - T.float32(8388736)


_NUMBER: dict[str, Callable[[Any, Any], Any]] = {
    "float32": lambda word, _shift: T.reinterpret("float32", word),
    "float16": _half,
    "bfloat16": upper,
    "int8": _byte,
}


def is_alone(token: Any, n: Any, token_seq: Any) -> Any:
    """Whether no other token is of its sequence: those of a sequence follow each other."""
    before = T.And(token > 0, token_seq[T.max(token - 1, 0)] == token_seq[token])
    after = T.And(token + 1 < n, token_seq[T.min(token + 1, n - 1)] == token_seq[token])
    return T.Not(T.Or(before, after))


def by_token(
    attend: Any,
    split: bool,
    words: Words,
    *,
    heads: int,
    kv_heads: int,
    window: int,
) -> Any:
    """The T.inline launch(n, b, …, out, partial, stats, alone), where a block is a token, HEADS
    heads of a KV head and, of split keys, a split. Its threads:

    attend(cache, q, page_table, first_page, sequence, sinks, out, stats, t, row, hb, low, high)
        T.inline: of head block hb of token t, the keys low … high, into `row` of out and stats;
        of split keys sinks are None, else stats and the row. There may be no keys in a split.

    alone: where it is given and is not 0, there are no keys either for a token that is not the only
        one of its sequence
    """
    per_kv_head = -(-(heads // kv_heads) // HEADS)

    def last_visible(t: Any, n: Any, positions: Any, token_seq: Any, alone: Any) -> Any:
        if alone is None:
            return positions[t]
        return T.Select(T.Or(alone == 0, is_alone(t, n, token_seq)), positions[t], T.int32(-1))

    @T.inline
    def launch(
        n, b, p, pages, q, kv, positions, token_seq, page_table, first_page, sinks, out,
        partial=None, stats=None, alone=None,
    ):  # fmt: skip
        # Two dimensions or three, since some devices end each of them at 65,535 blocks.
        for token in T.thread_binding(n, thread="blockIdx.x"):
            for head_block in T.thread_binding(kv_heads * per_kv_head, thread="blockIdx.y"):
                if split:
                    for of_split in T.thread_binding(SPLITS, thread="blockIdx.z"):
                        with T.sblock("block"):
                            t, hb, row = T.axis.remap("SSS", [token, head_block, of_split])
                            T.reads(
                                q[t, 0 : heads * words.head_dim],
                                kv[0:2, 0:kv_heads, 0:pages, 0 : kv.shape[3]],
                                positions[t],
                                token_seq[t],
                                page_table[0:b, 0:p],
                                first_page[0:b],
                            )
                            T.writes(
                                partial[t, row, 0 : heads * words.head_dim],
                                stats[t, row, 0:heads, 0:2],
                            )
                            size: T.let = split_pages(positions[t] + 1) * PAGE_TOKENS
                            attend(
                                words.view(kv, kv_heads, pages), q, page_table, first_page,
                                token_seq[t], None, partial, stats, t, row, hb, row * size,
                                T.min(row * size + size - 1, positions[t]),
                            )  # fmt: skip
                else:
                    with T.sblock("block"):
                        t, hb = T.axis.remap("SS", [token, head_block])
                        T.reads(
                            q[t, 0 : heads * words.head_dim],
                            kv[0:2, 0:kv_heads, 0:pages, 0 : kv.shape[3]],
                            positions[0:n],
                            token_seq[0:n],
                            page_table[0:b, 0:p],
                            first_page[0:b],
                            sinks[0:heads],
                        )
                        T.writes(out[t, 0 : heads * words.head_dim])
                        attend(
                            words.view(kv, kv_heads, pages), q, page_table, first_page,
                            token_seq[t], sinks, out, None, t, 0, hb,
                            first_visible(positions[t], window),
                            last_visible(t, n, positions, token_seq, alone),
                        )  # fmt: skip

    return launch


def by_chunk(
    work: Any, words: Words, *, tokens: int, threads: int, heads: int, kv_heads: int
) -> Any:
    """The T.inline launch(n, b, p, pages, q, kv, positions, token_seq, page_table, first_page,
    sinks, out), where a block is `tokens` tokens that follow each other and HEADS heads of a KV
    head. Its threads:

    work(tx, token0, hb, n, cache, q, positions, token_seq, page_table, first_page, sinks, out)
        T.inline: of head block hb of the tokens from token0 on, of n in all
    """
    per_kv_head = -(-(heads // kv_heads) // HEADS)
    width = heads * words.head_dim

    @T.inline
    def launch(n, b, p, pages, q, kv, positions, token_seq, page_table, first_page, sinks, out):
        for group_of_tokens in T.thread_binding(T.ceildiv(n, tokens), thread="blockIdx.x"):
            for head_block in T.thread_binding(kv_heads * per_kv_head, thread="blockIdx.y"):
                for thread in T.thread_binding(threads, thread="threadIdx.x"):
                    with T.sblock("chunk"):
                        vt, hb, tx = T.axis.remap("SSS", [group_of_tokens, head_block, thread])
                        T.reads(
                            q[0:n, 0:width],
                            kv[0:2, 0:kv_heads, 0:pages, 0 : kv.shape[3]],
                            positions[0:n],
                            token_seq[0:n],
                            page_table[0:b, 0:p],
                            first_page[0:b],
                            sinks[0:heads],
                        )
                        T.writes(out[0:n, 0:width])
                        # Those that see most keys begin first.
                        work(
                            tx, T.Cast("int32", (T.ceildiv(n, tokens) - 1 - vt) * tokens), hb,
                            T.Cast("int32", n), words.view(kv, kv_heads, pages), q, positions,
                            token_seq, page_table, first_page, sinks, out,
                        )  # fmt: skip

    return launch


def over_blocks(
    attend: Any,
    split: bool,
    arguments: tuple[Tensor, ...],
    words: Words,
    *,
    heads: int,
    kv_heads: int,
    window: int,
    least: int = 0,
    chunks: Any = None,
    others: Any = None,
    units: Matrices | None = None,
) -> tvm.tirx.PrimFunc:
    """The code of PAGED_ATTENTION or, of split keys, of SPLIT_ATTENTION.

    attend: what by_token launches
    chunks(n, b, …, out), the body's arguments, is launched where there are `least` tokens beyond
    one of each sequence, and one of `units` if there are any. Tokens that are alone in their
    sequence are left to others(n, b, …, out) or, where it is None, to `attend`.
    """
    one_by_one = by_token(attend, split, words, heads=heads, kv_heads=kv_heads, window=window)

    @T.inline
    def body(
        n, b, p, pages, q, kv, positions, token_seq, page_table, first_page, sinks=None, out=None,
        partial=None, stats=None,
    ):  # fmt: skip
        if chunks is None:
            one_by_one(
                n, b, p, pages, q, kv, positions, token_seq, page_table, first_page, sinks, out,
                partial, stats,
            )  # fmt: skip
        elif others is None:
            # An integer: TVM looks at conditions around an access again for each access.
            many: T.let = T.Cast("int32", T.Not(unless_there(units, n - b < least)))
            if many > 0:
                chunks(
                    n, b, p, pages, q, kv, positions, token_seq, page_table, first_page, sinks, out
                )
            if T.Or(many == 0, b > 1):
                one_by_one(
                    n, b, p, pages, q, kv, positions, token_seq, page_table, first_page, sinks, out,
                    alone=many,
                )  # fmt: skip
        elif unless_there(units, n - b < least):
            one_by_one(
                n, b, p, pages, q, kv, positions, token_seq, page_table, first_page, sinks, out
            )
        else:
            chunks(n, b, p, pages, q, kv, positions, token_seq, page_table, first_page, sinks, out)
            if b > 1:
                others(
                    n, b, p, pages, q, kv, positions, token_seq, page_table, first_page, sinks, out
                )

    return prim_func(arguments, body)
