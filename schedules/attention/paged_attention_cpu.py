"""Attention on CPUs: an item of work is a token and up to eight query heads of one KV head.

They share each read of the cache. For each block of pages: the scores of all heads, a page's 16
keys in a vector; the softmax of each head, which also corrects what was summed up before; then the
values, 16 elements in a vector. What is summed over lies in words (see formats/kv.py), which are
multiplied at once:

    float32, float16   one number, in float32
    bfloat16           two, of a query and of weights rounded to bfloat16 (cpu/bf16.py)
    int8               four, of a query and of weights rounded to 8 bits, added up as integers; a
                       head's query has one scale, its weights, times the values' scales, one a page

A page of a KV head is 32·D elements and 32·D·G multiply-adds, G the heads: at G = 8, 4 a byte in
float16, 8 in int8.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import tvm

from mxforge.kv_layout import PAGE_TOKENS

from ..cpu.bf16 import PAIR_ISAS, PairIsa, dot_pairs, imported, word_at
from ..cpu.isa import ISAS, Isa, four
from ..cpu.vectors import LANES, add, horizontal
from ..formats.bf16 import rounded, widened
from ..formats.blocks import TINY
from ..formats.kv import BF16, F16, F32, I8_MAX, INT8, KV, KVFormat, scale
from ..kernel import Schedule, T, Tensor, TileConfig, cpu, prim_func
from ..math import LOWEST, add_half, exp_f32
from .pages import first_visible, physical_page

# Into the second-level cache: twice the bytes a second of one core that the first level's buffers
# let through (20 against 12 GB/s where K and V alternate, 24 and 27 in two streams).
PREFETCH = 2


@dataclass(frozen=True)
class AttentionTile(TileConfig):
    heads: int  # query heads of one KV head that share one read of it: at most this many
    pages: int  # pages between two corrections of the running maximum

    @property
    def keys(self) -> int:
        return self.pages * PAGE_TOKENS


# EPYC (Zen 4, 2 cores), 2026-11, decoding gpt-oss's heads at 32,768 keys whose pages follow each
# other: 34 GB/s of cache in bfloat16, as fast as memory is read here; 22 in float16 and 12 in int8,
# bound by arithmetic. Pages in random order: 21 to 26, 21 and 9. 9 pages: a window of 128 keys
# touches 9. Eight heads fill the registers of AVX-512; on AVX2, four would be 25% faster.
TILE = AttentionTile(heads=8, pages=9)


@dataclass(frozen=True)
class Products:
    """How `g` queries and their weights meet a cache of one type.

    `state` has the shape and dtype, by name, of the buffers that keep both as they are multiplied;
    the functions, T.inline, get these buffers as `own`:

      take_query(own, query, vector)     of query f32 [g·stride], for all heads
      dot_keys(own, query, sums, kv, page, kv_head)
                                         sums f32 [g·16] = scores of a page's keys
      take_weights(own, score, vector, kv, page, kv_head, i, j, key0, low, position)
                                         of score f32 [g·tile.keys]: head i, page j of the block,
                                         whose first key is key0; the weights that are multiplied
                                         are left in score, 0 where they cannot be seen
      dot_values(own, score, sums, kv, page, kv_head, j, begin, end, d0, width)
                                         sums f32 [g·16] += weights · values [begin:end, d0 :
                                         d0 + width] of page j
    """

    state: Mapping[str, tuple[tuple[int, ...], str]]
    take_query: Any
    dot_keys: Any
    take_weights: Any
    dot_values: Any

    def allocated(self) -> Any:
        """The buffers of `state`, in the PrimFunc's block in whose body this stands."""
        # TVMScript takes it as it takes a tuple.
        names = namedtuple("Own", [*self.state])  # type: ignore[misc]
        return names(*(T.sblock_alloc_buffer(shape, dtype) for shape, dtype in self.state.values()))


def _singles(tile: AttentionTile, g: int, head_dim: int, stride: int) -> Products:
    """float32 and float16."""

    @T.inline
    def take_query(own, query, vector):
        T.evaluate(0)

    @T.inline
    def dot_keys(own, query, sums, kv, page, kv_head):
        for d in T.serial(head_dim):
            prefetch(kv, page, 1, kv_head, d * PAGE_TOKENS)
            for i in T.unroll(g):
                for lane in T.vectorized(LANES):
                    sums[i * LANES + lane] = sums[i * LANES + lane] + query[
                        i * stride + d
                    ] * T.Cast("float32", kv[0, kv_head, page, d * PAGE_TOKENS + lane])

    @T.inline
    def take_weights(own, score, vector, kv, page, kv_head, i, j, key0, low, position):
        T.evaluate(0)

    @T.inline
    def dot_values(own, score, sums, kv, page, kv_head, j, begin, end, d0, width):
        for s in T.serial(end - begin):
            for i in T.unroll(g):
                for lane in T.vectorized(width):
                    sums[i * LANES + lane] = sums[i * LANES + lane] + score[
                        i * tile.keys + j * PAGE_TOKENS + begin + s
                    ] * T.Cast("float32", kv[1, kv_head, page, (begin + s) * head_dim + d0 + lane])

    return Products({}, take_query, dot_keys, take_weights, dot_values)


def _pairs(isa: PairIsa, tile: AttentionTile, g: int, head_dim: int, stride: int) -> Products:
    """bfloat16."""

    @T.inline
    def take_query(own, query, vector):
        for e in T.serial(g * stride // LANES):
            for lane in T.vectorized(LANES):
                own.query[e * LANES + lane] = rounded(query[e * LANES + lane])

    @T.inline
    def dot_keys(own, query, sums, kv, page, kv_head):
        for c in T.serial(head_dim // 2):
            prefetch(kv, page, 1, kv_head, c * 2 * PAGE_TOKENS)
            for i in T.unroll(g):
                sums[T.ramp(i * LANES, 1, LANES)] = dot_pairs(
                    isa,
                    sums[T.ramp(i * LANES, 1, LANES)],
                    T.reinterpret("int32x16", kv[0, kv_head, page, T.ramp(c * 32, 1, 32)]),
                    word_at(own.query, i * stride + c * 2),
                )

    @T.inline
    def take_weights(own, score, vector, kv, page, kv_head, i, j, key0, low, position):
        for lane in T.vectorized(LANES):
            own.weights[i * tile.keys + j * PAGE_TOKENS + lane] = rounded(
                score[i * tile.keys + j * PAGE_TOKENS + lane]
            )
        # What is divided by in the end are these.
        for lane in T.vectorized(LANES):
            score[i * tile.keys + j * PAGE_TOKENS + lane] = widened(
                own.weights[i * tile.keys + j * PAGE_TOKENS + lane]
            )

    @T.inline
    def dot_values(own, score, sums, kv, page, kv_head, j, begin, end, d0, width):
        for s in T.serial((end + 1) // 2 - begin // 2):
            slot: T.let = (begin // 2 + s) * 2
            # A neighbour that cannot be seen may be NaN.
            seen: T.let = T.bitwise_or(
                T.Select(slot >= begin, T.int32(0xFFFF), T.int32(0)),
                T.Select(slot + 1 < end, T.int32(-65536), T.int32(0)),
            )
            for i in T.unroll(g):
                sums[T.ramp(i * LANES, 1, width)] = dot_pairs(
                    isa,
                    sums[T.ramp(i * LANES, 1, width)],
                    T.bitwise_and(
                        T.reinterpret(
                            f"int32x{width}",
                            kv[1, kv_head, page, T.ramp(slot * head_dim + d0 * 2, 1, 2 * width)],
                        ),
                        T.broadcast(seen, width),
                    ),
                    word_at(own.weights, i * tile.keys + j * PAGE_TOKENS + slot),
                    width,
                )

    state = {"query": ((g * stride,), "uint16"), "weights": ((g * tile.keys,), "uint16")}
    return Products(state, take_query, dot_keys, take_weights, dot_values)


def _quads(isa: Isa, tile: AttentionTile, g: int, head_dim: int, stride: int) -> Products:
    """int8. A head's query has one scale, its weights have one a page."""
    lanes, words = isa.lanes, -(-head_dim // 4)
    size, vectors = 4 * lanes, LANES // lanes

    @T.inline
    def round_vectors(out, scales, sums, row, at, i, x, x0, vector, count):
        """out[row, at:] = x[x0:] in `count` vectors, rounded; scales[i] and sums[i] of them."""
        for lane in T.vectorized(LANES):
            vector[lane] = T.fabs(x[x0 + lane])
        for e in T.serial(count - 1):
            for lane in T.vectorized(LANES):
                vector[lane] = T.max(vector[lane], T.fabs(x[x0 + (e + 1) * LANES + lane]))
        horizontal(vector, T.max)
        scales[i] = vector[0] * T.float32(1 / I8_MAX)
        inverse: T.let = T.Select(
            vector[0] > T.float32(TINY), T.float32(I8_MAX) / vector[0], T.float32(0)
        )
        for lane in T.vectorized(LANES):
            vector[lane] = T.float32(0)
        for e in T.serial(count):
            for lane in T.vectorized(LANES):
                out[row, at + e * LANES + lane] = T.Cast(
                    "int8", add_half(x[x0 + e * LANES + lane] * inverse)
                )
            for lane in T.vectorized(LANES):
                vector[lane] = vector[lane] + T.Cast("float32", out[row, at + e * LANES + lane])
        horizontal(vector, add)
        sums[i] = T.Cast("int32", vector[0])

    @T.inline
    def take_query(own, query, vector):
        for i in T.serial(g):
            round_vectors(
                own.query, own.query_scale, own.query_sum, i, 0, i, query, i * stride, vector,
                stride // LANES,
            )  # fmt: skip

    @T.inline
    def dot(sums, kv, page, part, kv_head, element, x, start):
        """sums i32 [g·16] += 16 words of a row, from `element` on, times x[:, start:] of 4."""
        for v in T.unroll(vectors):
            for i in T.unroll(g):
                sums[T.ramp(i * LANES + v * lanes, 1, lanes)] = isa.dot_bytes(
                    sums[T.ramp(i * LANES + v * lanes, 1, lanes)],
                    T.reinterpret(
                        f"uint8x{size}",
                        kv[part, kv_head, page, T.ramp(element + v * size, 1, size)],
                    ),
                    four(x, i, start, lanes),
                )

    @T.inline
    def start(sums, weighed, i, at):
        """sums of head i begin with what the weights' bias takes off: `weighed` has Σ of its x."""
        for lane in T.vectorized(LANES):
            sums[i * LANES + lane] = weighed[at] * T.int32(-isa.byte_bias)

    @T.inline
    def dot_keys(own, query, sums, kv, page, kv_head):
        for i in T.unroll(g):
            start(own.sums, own.query_sum, i, i)
        for c in T.serial(words):
            prefetch(kv, page, 1, kv_head, c * 4 * PAGE_TOKENS)
            dot(own.sums, kv, page, 0, kv_head, c * 4 * PAGE_TOKENS, own.query, c * 4)
        for i in T.unroll(g):
            for lane in T.vectorized(LANES):
                sums[i * LANES + lane] = T.Cast("float32", own.sums[i * LANES + lane]) * (
                    own.query_scale[i] * scale(kv, head_dim, (0, kv_head, page), lane)
                )

    @T.inline
    def take_weights(own, score, vector, kv, page, kv_head, i, j, key0, low, position):
        # What cannot be seen has a weight of 0, but perhaps a scale that is NaN.
        for lane in T.vectorized(LANES):
            own.scaled[lane] = T.Select(
                T.And(key0 + lane >= low, key0 + lane <= position),
                score[i * tile.keys + j * PAGE_TOKENS + lane]
                * scale(kv, head_dim, (1, kv_head, page), lane),
                T.float32(0),
            )
        round_vectors(
            own.weights, own.weight_scale, own.weight_sum, i, j * PAGE_TOKENS, i * tile.pages + j,
            own.scaled, 0, vector, 1,
        )  # fmt: skip

    @T.inline
    def dot_values(own, score, sums, kv, page, kv_head, j, begin, end, d0, width):
        for i in T.unroll(g):
            start(own.sums, own.weight_sum, i, i * tile.pages + j)
        for s in T.unroll(PAGE_TOKENS // 4):
            dot(
                own.sums, kv, page, 1, kv_head, (s * head_dim + d0) * 4, own.weights,
                j * PAGE_TOKENS + s * 4,
            )  # fmt: skip
        for i in T.unroll(g):
            for lane in T.vectorized(LANES):
                sums[i * LANES + lane] = (
                    sums[i * LANES + lane]
                    + T.Cast("float32", own.sums[i * LANES + lane])
                    * own.weight_scale[i * tile.pages + j]
                )

    state = {
        "query": ((g, stride), "int8"),
        "query_scale": ((g,), "float32"),
        "query_sum": ((g,), "int32"),
        "weights": ((g, tile.keys), "int8"),
        "weight_scale": ((g * tile.pages,), "float32"),
        "weight_sum": ((g * tile.pages,), "int32"),
        "sums": ((g * LANES,), "int32"),
        "scaled": ((LANES,), "float32"),  # a page's weights, times the values' scales
    }
    return Products(state, take_query, dot_keys, take_weights, dot_values)


@T.inline
def prefetch(kv, page, part, kv_head, element):
    T.evaluate(
        T.call_llvm_intrin(
            "void",
            "llvm.prefetch",
            T.address_of(kv[part, kv_head, page, element]),
            T.int32(0),  # to be read
            T.int32(PREFETCH),
            T.int32(1),  # data
        )
    )


def _heads_of_item(group: int, tile: AttentionTile) -> int:
    """The largest divisor of the group within the tile."""
    return max(h for h in range(1, tile.heads + 1) if group % h == 0)


def _build(
    products_of: Callable[[AttentionTile, int, int, int], Products],
    within: Callable[[], Any],
    arguments: tuple[Tensor, ...],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    window: int,
    kv_dtype: str,
    tile: AttentionTile,
) -> tvm.tirx.PrimFunc:
    """`within` is the scope, around the whole body, in which the products may be called."""
    group = heads // kv_heads
    g = _heads_of_item(group, tile)
    per_kv_head = group // g
    word = KV[kv_dtype].word
    vectors, tail = divmod(head_dim, LANES)
    stride = -(-head_dim // LANES) * LANES  # of a head in buffers; zeros at the end
    factor = head_dim**-0.5
    products = products_of(tile, g, head_dim, stride)

    @T.inline
    def score_page(kv, own, query, score, sums, page, kv_head, j, key0, low, position):
        """Scores of the block's page j, -inf outside low ≤ key ≤ position; its values, fetched."""
        for i in T.unroll(g):
            for lane in T.vectorized(LANES):
                sums[i * LANES + lane] = T.float32(0)
        products.dot_keys(own, query, sums, kv, page, kv_head)
        for i in T.unroll(g):
            for lane in T.vectorized(LANES):
                score[i * tile.keys + j * PAGE_TOKENS + lane] = T.Select(
                    T.And(key0 + lane >= low, key0 + lane <= position),
                    sums[i * LANES + lane],
                    T.float32(0) - T.infinity("float32"),
                )

    @T.inline
    def softmax_block(kv, own, score, top, total, correction, vector, page_of, kv_head, i, keys):
        """Turn one head's scores of a block into weights; say how to correct older sums.

        `keys`: the block's first page, its number of pages, the first and the last visible key.
        """
        first, count, low, position = keys
        for lane in T.vectorized(LANES):
            vector[lane] = score[i * tile.keys + lane]
        for j in T.serial(count - 1):
            for lane in T.vectorized(LANES):
                vector[lane] = T.max(
                    vector[lane], score[i * tile.keys + (j + 1) * PAGE_TOKENS + lane]
                )
        horizontal(vector, T.max)
        correction[i] = exp_f32(T.min(top[i] - vector[0], T.float32(0)))
        top[i] = T.max(top[i], vector[0])
        total[i] = total[i] * correction[i]
        for lane in T.vectorized(LANES):
            vector[LANES + lane] = T.float32(0)
        for j in T.serial(count):
            for lane in T.vectorized(LANES):
                score[i * tile.keys + j * PAGE_TOKENS + lane] = exp_f32(
                    score[i * tile.keys + j * PAGE_TOKENS + lane] - top[i]
                )
            products.take_weights(
                own, score, vector, kv, page_of[j], kv_head, i, j, (first + j) * PAGE_TOKENS, low,
                position,
            )  # fmt: skip
            for lane in T.vectorized(LANES):
                vector[LANES + lane] = (
                    vector[LANES + lane] + score[i * tile.keys + j * PAGE_TOKENS + lane]
                )
        for lane in T.vectorized(LANES):
            vector[lane] = vector[LANES + lane]
        horizontal(vector, add)
        total[i] = total[i] + vector[0]

    @T.inline
    def add_values(kv, own, score, acc, sums, correction, page_of, kv_head, keys, d0, width):
        """acc[:, d0 : d0 + width] = corrected acc + weights · values of the visible keys.

        Meanwhile the next block's keys come from memory.
        """
        first, count, low, position = keys
        for i in T.unroll(g):
            for lane in T.vectorized(LANES):
                sums[i * LANES + lane] = T.float32(0)
        for j in T.serial(count):
            key0: T.let = (first + j) * PAGE_TOKENS
            for line in T.serial(PAGE_TOKENS // word):
                prefetch(kv, page_of[tile.pages + j], 0, kv_head, (d0 + line * word) * PAGE_TOKENS)
            products.dot_values(
                own, score, sums, kv, page_of[j], kv_head, j, T.max(low - key0, 0),
                T.min(position + 1 - key0, PAGE_TOKENS), d0, width,
            )  # fmt: skip
        for i in T.unroll(g):
            for lane in T.vectorized(width):
                acc[i * stride + d0 + lane] = (
                    acc[i * stride + d0 + lane] * correction[i] + sums[i * LANES + lane]
                )

    @T.inline
    def body(n, b, p, pages, q, kv, positions, token_seq, page_table, first_page, sinks, out):
        with within():
            # Heads are the outer part: threads then get equal shares of long and short sequences,
            # and neighbouring tokens of a chunk find their keys in the core's cache.
            for item in T.parallel(n * (heads // g)):
                with T.sblock("item"):
                    t = T.axis.spatial(n, item % n)
                    head_block = T.axis.spatial(heads // g, T.Cast("int32", item // n))
                    # Stated here, since the bounds below depend on names bound inside the block.
                    T.reads(
                        q[t, 0 : heads * head_dim],
                        kv[0:2, 0:kv_heads, 0:pages, 0 : kv.shape[3]],
                        positions[t],
                        token_seq[t],
                        page_table[0:b, 0:p],
                        first_page[0:b],
                        sinks[0:heads],
                    )
                    T.writes(out[t, 0 : heads * head_dim])
                    # Default scope: on CPUs, small buffers of scope "local" would not become
                    # registers.
                    query = T.sblock_alloc_buffer((g * stride,), "float32")
                    acc = T.sblock_alloc_buffer((g * stride,), "float32")
                    score = T.sblock_alloc_buffer((g * tile.keys,), "float32")
                    sums = T.sblock_alloc_buffer((g * LANES,), "float32")
                    vector = T.sblock_alloc_buffer((2 * LANES,), "float32")
                    top = T.sblock_alloc_buffer((g,), "float32")
                    total = T.sblock_alloc_buffer((g,), "float32")
                    correction = T.sblock_alloc_buffer((g,), "float32")
                    page_of = T.sblock_alloc_buffer((2 * tile.pages,), "int64")
                    own = products.allocated()
                    h0: T.let = head_block * g
                    kv_head: T.let = head_block // per_kv_head
                    position: T.let = positions[t]
                    low: T.let = first_visible(position, window)
                    page0: T.let = low // PAGE_TOKENS
                    page_count: T.let = position // PAGE_TOKENS + 1 - page0
                    for i in T.serial(g):
                        top[i] = T.max(sinks[h0 + i], T.float32(LOWEST))
                        total[i] = exp_f32(sinks[h0 + i] - top[i])
                    for i in T.serial(g * stride):
                        acc[i] = T.float32(0)
                        query[i] = T.float32(0)
                    for i in T.serial(g):
                        for d in T.serial(head_dim):
                            query[i * stride + d] = q[t, (h0 + i) * head_dim + d] * T.float32(
                                factor
                            )
                    products.take_query(own, query, vector)
                    for block in T.serial(T.ceildiv(page_count, tile.pages)):
                        first: T.let = page0 + block * tile.pages
                        count: T.let = T.min(page_count - block * tile.pages, tile.pages)
                        # This block's pages and the next one's.
                        for j in T.serial(2 * tile.pages):
                            page_of[j] = physical_page(
                                page_table, first_page, token_seq[t],
                                T.min(first + j, page0 + page_count - 1),
                            )  # fmt: skip
                        for j in T.serial(count):
                            score_page(
                                kv, own, query, score, sums, page_of[j], kv_head, j,
                                (first + j) * PAGE_TOKENS, low, position,
                            )  # fmt: skip
                        for i in T.serial(g):
                            softmax_block(
                                kv, own, score, top, total, correction, vector, page_of, kv_head,
                                i, (first, count, low, position),
                            )  # fmt: skip
                        for c in T.serial(vectors):
                            add_values(
                                kv, own, score, acc, sums, correction, page_of, kv_head,
                                (first, count, low, position), c * LANES, LANES,
                            )  # fmt: skip
                        if tail > 0:
                            add_values(
                                kv, own, score, acc, sums, correction, page_of, kv_head,
                                (first, count, low, position), vectors * LANES, tail,
                            )  # fmt: skip
                    for i in T.serial(g):
                        for d in T.serial(head_dim):
                            out[t, (h0 + i) * head_dim + d] = acc[i * stride + d] / total[i]

    return prim_func(arguments, body)


def _schedule(
    name: str,
    needs: frozenset[str],
    formats: tuple[KVFormat, ...],
    products_of: Callable[[AttentionTile, int, int, int], Products],
    within: Callable[[], Any] = nullcontext,
) -> Schedule:
    """For caches in these formats, which are all that the products read."""
    names = {format_.name for format_ in formats}
    return Schedule(
        f"heads of tokens in parallel, online softmax, {name}",
        needs,
        partial(_build, products_of, within),
        TILE,
        fits=lambda kv_dtype, **_: kv_dtype in names,
    )


SCHEDULES = (
    _schedule("numbers", cpu(), (F32, F16), _singles),
    *(
        _schedule(
            f"pairs, {isa.name}", isa.needs, (BF16,), partial(_pairs, isa), partial(imported, isa)
        )
        for isa in PAIR_ISAS
    ),
    *(_schedule(f"quads, {isa.name}", isa.needs, (INT8,), partial(_quads, isa)) for isa in ISAS),
)
