"""Dense layers on GPUs, some rows a block of threads (gpu/gemv.py), for formats of f32 inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import tvm

from ..gpu.gemv import BLOCKS, CHUNK_WORDS, PAIR, Chunk, Gemv, GemvTile
from ..gpu.lanes import LANES
from ..kernel import Layout, Schedule, T, Tensor, gpu, prim_func
from .linear import plus_options

FEWEST = 64  # inputs: with fewer, nearly all of a block's threads would have none


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

    def fits(self, tile: GemvTile, *, rows: int, k: int, **_options: bool) -> bool:
        whole = k % (PAIR * self.chunk.inputs) == 0
        return whole and k >= FEWEST and -(-rows // tile.rows) <= BLOCKS


def rows_a_block(chunks: Chunks, tile: GemvTile) -> tuple[Schedule, ...]:
    """A schedule for each GPU family."""
    return tuple(
        Schedule(
            f"rows a block, {family}",
            gpu(family),
            partial(_build, family, chunks),
            tile,
            chunks.layouts,
            partial(chunks.fits, tile),
        )
        for family in LANES
    )


def _build(
    family: str,
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
        gemv = Gemv(family, chunks.chunk, k, tile, tokens)
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

    one, some = launch(1), launch(tile.tokens)

    @T.inline
    def body(n, x, weight, y, weight_scale=None, bias=None, residual=None):
        if n == 1:
            one(n, x, weight, weight_scale, y, bias, residual)
        else:
            some(n, x, weight, weight_scale, y, bias, residual)

    return prim_func(arguments, body)
