"""Dense layers on GPUs, some rows a block of threads (gpu/gemv.py), for formats of f32 inputs.

Where there are matrix units, many tokens are multiplied by tiles of them (gpu/product.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import tvm

from ..gpu.gemv import BLOCKS, CHUNK_WORDS, PAIR, QUAD, Chunk, Gemv, GemvTile
from ..gpu.lanes import LANES
from ..gpu.matrices import MATRICES, Matrices, unless_there
from ..gpu.product import STEP, ManyTiles, ProductColumns, ProductRows, product, products
from ..kernel import Layout, Schedule, T, Tensor, gpu, prim_func
from .linear import plus_options

FEWEST = 64  # inputs: with fewer, nearly all of a block's threads would have none
# Best first: what has matrix units takes them for many tokens.
TARGETS = tuple(dict.fromkeys((*MATRICES, *((family,) for family in LANES))))
MANY = ManyTiles()
GROUP = 64  # rows: a pair of a product's rows is so far apart that stores are whole sectors


@dataclass(frozen=True, eq=False)
class Chunks:
    """A format of weights as `Gemv` reads them.

    layouts: of the weight's tensors, called weight and, where chunks have scales, weight_scale;
        rows are whole 16 bytes, of scales whole words
    """

    chunk: Chunk
    layouts: Mapping[str, Layout]

    def words(self, weight, rows: int, k: int):
        return T.decl_buffer(
            (rows, k // self.chunk.inputs, CHUNK_WORDS), "uint32", data=weight.data
        )

    def scales(self, scale, rows: int, k: int):
        words = -(-(k // self.chunk.inputs) // self.chunk.scales)
        return T.decl_buffer((rows, words), "uint32", data=scale.data)

    def product_rows(self, group: int) -> ProductRows:
        """The same weight, (words, scales), for many tokens."""
        chunk = self.chunk
        assert STEP % (PAIR * chunk.inputs) == 0

        @T.inline
        def load(weights, expert, row, c, words, scale, slot):
            words[T.ramp(slot * CHUNK_WORDS, 1, CHUNK_WORDS)] = weights[0][
                row, c, T.ramp(0, 1, CHUNK_WORDS)
            ]
            if chunk.scale is not None:
                scale[slot] = weights[1][row, c // chunk.scales]

        @T.inline
        def keep_quad(weights, factor, four, keep, at):
            four[0] = weights[0] * factor
            four[1] = weights[1] * factor
            four[2] = weights[2] * factor
            four[3] = weights[3] * factor
            keep(at, four, 0)

        @T.inline
        def put(words, scale, slot, s, row, c, keep):
            four = T.sblock_alloc_buffer((QUAD,), "float32", scope="local")
            for q in T.unroll(chunk.inputs // QUAD):
                keep_quad(
                    chunk.quad(words, slot * CHUNK_WORDS, q),
                    T.float32(1) if chunk.scale is None else chunk.scale(scale[slot], c),
                    four, keep, chunk.input(c % (STEP // chunk.inputs), q),
                )  # fmt: skip

        return ProductRows(
            chunk.inputs, 1, int(chunk.scale is not None), group, load=load, put=put,
            parts=1 if chunk.scale is None else 2,
        )  # fmt: skip

    def fits(self, tile: GemvTile, *, rows: int, k: int, **_options: bool) -> bool:
        whole = k % (PAIR * self.chunk.inputs) == 0
        return whole and k >= FEWEST and -(-rows // tile.rows) <= BLOCKS


def rows_a_block(chunks: Chunks, tile: GemvTile) -> tuple[Schedule, ...]:
    """A schedule for each GPU family."""
    return tuple(
        Schedule(
            f"rows a block, {' '.join(features)}",
            gpu(*features),
            partial(_build, features, chunks),
            tile,
            chunks.layouts,
            partial(chunks.fits, tile),
        )
        for features in TARGETS
    )


def dense_products(
    units: Matrices, chunks: Chunks, tiles: ManyTiles, *, rows: int, k: int, group: int, store: Any,
    eps: float | None = None, complete: Any = None,
) -> Any:  # fmt: skip
    """The T.inline launch(n, x, gain, words, scales, given) for many tokens; gain f32 [k] is of a
    norm with `eps`. store and complete(given, token, pair, sums) get pairs of rows in `group`s;
    see `ProductColumns`."""

    @T.inline
    def choose(given, by, tokens, span):
        span[0] = 0
        span[1] = by * tokens
        span[2] = T.min(T.Cast("int32", given[0]) - by * tokens, tokens)

    @T.inline
    def stored(given, expert, number, pair, sums):
        store(given[1], T.Cast("int64", number), pair, sums)

    @T.inline
    def completed(given, expert, number, pair, sums):
        complete(given[1], T.Cast("int64", number), pair, sums)

    of_rows = chunks.product_rows(group)
    columns = ProductColumns(
        choose, lambda given, number: number, stored, eps, completed if complete else None
    )

    def make(units, tile):
        return product(
            units, of_rows, columns, tile, all_rows=rows, k=k,
            blocks=lambda n, tokens: T.ceildiv(n, tokens),
        )  # fmt: skip

    multiply = products(units, tiles, make)

    @T.inline
    def launch(n, x, gain, words, scales, given):
        multiply(n < tiles.wide, (n, x, gain, (words, scales), (n, given)))

    return launch


def _build(
    features: tuple[str, ...],
    chunks: Chunks,
    arguments: tuple[Tensor, ...],
    *,
    rows: int,
    k: int,
    tile: GemvTile,
    **_options: bool,
) -> tvm.tirx.PrimFunc:
    def launch(tokens):
        """`tokens` at a time, each time all weights."""
        gemv = Gemv(features[0], chunks.chunk, k, tile, tokens)
        sums, products = gemv.sums, gemv.products

        def row(row_tile, r):
            return T.min(row_tile * tile.rows + r, rows - 1)

        def token(token_tile, n, t):
            return T.min(token_tile * tokens + t, n - 1)

        @T.inline
        def block(n, x, words, scales, y, bias, residual, vt, vr, tx):
            out = T.sblock_alloc_buffer((sums.count,), "float32", scope="local")
            parts = T.sblock_alloc_buffer((sums.elements,), "float32", scope="shared")
            products(out, x, None, words, scales, partial(row, vr), partial(token, vt, n), tx)
            sums.share(out, parts, tx)
            if tx < sums.count:
                own_row: T.let = vr * tile.rows + tx % tile.rows
                own_token: T.let = vt * tokens + tx // tile.rows
                if own_row < rows and own_token < n:
                    sums.total(parts, tx, out)
                    y[own_token, own_row] = plus_options(out[0], bias, residual, own_token, own_row)

        @T.inline
        def blocks(n, x, weight, weight_scale, y, bias, residual):
            # Blocks that read the same weights follow each other.
            for token_tile in T.thread_binding(T.ceildiv(n, tokens), thread="blockIdx.x"):
                for row_tile in T.thread_binding(-(-rows // tile.rows), thread="blockIdx.y"):
                    for thread in T.thread_binding(tile.threads, thread="threadIdx.x"):
                        with T.sblock("block"):
                            vt, vr, tx = T.axis.remap("SSS", [token_tile, row_tile, thread])
                            # Stated, as detection gives up on vector loads.
                            T.reads(x[0:n, 0:k])
                            T.writes(y[0:n, 0:rows])
                            words = chunks.words(weight, rows, k)
                            if weight_scale is None:
                                block(n, x, words, None, y, bias, residual, vt, vr, tx)
                            else:
                                scales = chunks.scales(weight_scale, rows, k)
                                block(n, x, words, scales, y, bias, residual, vt, vr, tx)

        return blocks

    units = MATRICES.get(features) if k % STEP == 0 else None
    of_rows = chunks.product_rows(GROUP)

    @T.inline
    def store(given, token, pair, sums):
        for r in T.unroll(2):
            row: T.let = of_rows.row(pair, r)
            if row < rows:
                given[0][token, row] = plus_options(sums[r], given[1], given[2], token, row)

    one, some = launch(1), launch(tile.tokens)

    many = units and dense_products(units, chunks, MANY, rows=rows, k=k, group=GROUP, store=store)

    @T.inline
    def body(n, x, weight, y, weight_scale=None, bias=None, residual=None):
        if n == 1:
            one(n, x, weight, weight_scale, y, bias, residual)
        elif (many is None) or unless_there(units, n < MANY.least):
            some(n, x, weight, weight_scale, y, bias, residual)
        else:
            words = chunks.words(weight, rows, k)
            if weight_scale is None:
                many(n, x, None, words, None, (y, bias, residual))
            else:
                scales = chunks.scales(weight_scale, rows, k)
                many(n, x, None, words, scales, (y, bias, residual))

    return prim_func(arguments, body)
