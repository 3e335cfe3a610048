"""Rows of a dense weight times a few tokens: what matrix-vector kernels without matrix units share.

A block of threads takes some rows and strides over their inputs. A thread loads 16 bytes of each
row at a time, beside those of its neighbours, and for them the inputs of some tokens, once for all
rows. Products are summed in float32, in the end over the block. Nothing waits before that, and the
number of lanes in a warp does not matter.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..kernel import T, TileConfig
from .lanes import BlockSums

CHUNK_WORDS = 4  # 32 bits each: what a thread loads at once
QUAD = 4  # inputs, likewise
PAIR = 2  # threads whose quads of inputs take turns in memory, and fill its 32-byte sectors
BLOCKS = 65_535  # that every device has on an axis of a grid


@dataclass(frozen=True)
class GemvTile(TileConfig):
    threads: int  # of a block
    rows: int  # that share the inputs
    tokens: int  # that share the weights, where there is more than one
    ahead: int  # chunks of each row that are loaded before the first is used


@dataclass(frozen=True)
class Chunk:
    """What 16 bytes of a row stand for.

    inputs: weights among them, quads of which take turns with those of the other chunk of a pair:
        quad q of chunk c begins at input PAIR·inputs·(c // PAIR) + QUAD·(PAIR·q + c % PAIR)
    quad(words, at, q) -> four f32 expressions: quad q of the chunk that begins at words[at]
    scale(word, chunk): f32, of the chunk with this number in its row, out of the uint32 that holds
        it; the chunk's sum is multiplied by it
    scales: chunks whose scales share such a word
    """

    inputs: int
    quad: Callable[[Any, Any, Any], tuple[Any, Any, Any, Any]]
    scale: Callable[[Any, Any], Any] | None = None
    scales: int = 1

    def paired(self, weight: np.ndarray) -> np.ndarray:
        """A weight [rows, k] in this order; k is a multiple of `inputs` · PAIR."""
        quads = weight.reshape(len(weight), -1, self.inputs // QUAD, PAIR, QUAD)
        return np.ascontiguousarray(quads.swapaxes(2, 3)).reshape(weight.shape)

    def input(self, c: Any, q: Any) -> Any:
        """The first one of quad q of chunk c."""
        return c // PAIR * (PAIR * self.inputs) + (q * PAIR + c % PAIR) * QUAD


@dataclass(frozen=True)
class Gemv:
    """A block's part of the product of a weight [rows, k] with tokens [n, k].

    sums: what a block adds up: row r · token t has the number t·rows + r; behind them, where
        `normed`, are the tokens' sums of squares
    products(out, x, gain, words, scales, row, token, tx)
        a thread's part of these sums, f32 [sums.count], and its words of the weight:

            x f32 [n, k]   gain f32 [k], by which inputs are multiplied where `normed`
            words uint32 [all rows, k / chunk.inputs, 4]
            scales uint32 [all rows, chunks' scales], where the chunk has any
            row(r), token(t)   the r-th row and the t-th token of the block, each of which exists
    """

    family: str
    chunk: Chunk
    k: int
    tile: GemvTile
    tokens: int
    normed: bool = False

    @property
    def squares(self) -> int:
        """The number of the first sum of squares."""
        return self.tokens * self.tile.rows

    @property
    def sums(self) -> BlockSums:
        count = self.squares + self.tokens * self.normed
        return BlockSums(self.family, self.tile.threads, count)

    @property
    def products(self) -> Any:
        chunk, tokens, normed = self.chunk, self.tokens, self.normed
        threads, rows, ahead = self.tile.threads, self.tile.rows, self.tile.ahead
        chunks = self.k // chunk.inputs
        steps = -(-chunks // threads)
        groups = -(-steps // ahead)  # of steps; the last one may be smaller
        last = (groups - 1) * ahead  # its first step
        count = self.squares

        @T.inline
        def load(word, scale, u, words, scales, row, c):
            """The words of chunk c, of all rows."""
            for r in T.unroll(rows):
                word[T.ramp((u * rows + r) * CHUNK_WORDS, 1, CHUNK_WORDS)] = words[
                    row(r), c, T.ramp(0, 1, CHUNK_WORDS)
                ]
                if chunk.scale is not None:
                    scale[u * rows + r] = scales[row(r), c // chunk.scales]

        @T.inline
        def load_inputs(inputs, out, x, gain, token, at, real):
            """Four inputs of all tokens, from `at` on; zeros where the chunk is not `real`."""
            for t in T.unroll(tokens):
                inputs[T.ramp(t * QUAD, 1, QUAD)] = x[token(t), T.ramp(at, 1, QUAD)]
                if real is not None:
                    for i in T.unroll(QUAD):
                        inputs[t * QUAD + i] = T.Select(real, inputs[t * QUAD + i], T.float32(0))
                if normed:
                    for i in T.unroll(QUAD):
                        out[count + t] = (
                            out[count + t] + inputs[t * QUAD + i] * inputs[t * QUAD + i]
                        )
            if normed:
                inputs[T.ramp(tokens * QUAD, 1, QUAD)] = gain[T.ramp(at, 1, QUAD)]
                for t in T.unroll(tokens):
                    for i in T.unroll(QUAD):
                        inputs[t * QUAD + i] = inputs[t * QUAD + i] * inputs[tokens * QUAD + i]

        @T.inline
        def add(sum, inputs, r, i, weight):
            for t in T.unroll(tokens):
                sum[t * rows + r] = sum[t * rows + r] + weight * inputs[t * QUAD + i]

        @T.inline
        def multiply(sum, inputs, r, weights):
            add(sum, inputs, r, 0, weights[0])
            add(sum, inputs, r, 1, weights[1])
            add(sum, inputs, r, 2, weights[2])
            add(sum, inputs, r, 3, weights[3])

        @T.inline
        def use(out, part, word, scale, inputs, u, x, gain, token, c, real):
            """out += the products of chunk c."""
            if chunk.scale is not None:
                for i in T.unroll(count):
                    part[i] = T.float32(0)
            for q in T.unroll(chunk.inputs // QUAD):
                load_inputs(inputs, out, x, gain, token, chunk.input(c, q), real)
                for r in T.unroll(rows):
                    multiply(
                        part if chunk.scale is not None else out, inputs, r,
                        chunk.quad(word, (u * rows + r) * CHUNK_WORDS, q),
                    )  # fmt: skip
            if chunk.scale is not None:
                for r in T.unroll(rows):
                    for t in T.unroll(tokens):
                        out[t * rows + r] = out[t * rows + r] + part[t * rows + r] * chunk.scale(
                            scale[u * rows + r], c
                        )

        @T.inline
        def products(out, x, gain, words, scales, row, token, tx):
            word = T.sblock_alloc_buffer((ahead * rows * CHUNK_WORDS,), "uint32", scope="local")
            scale = T.sblock_alloc_buffer((ahead * rows,), "uint32", scope="local")
            part = T.sblock_alloc_buffer((count,), "float32", scope="local")
            inputs = T.sblock_alloc_buffer(((tokens + normed) * QUAD,), "float32", scope="local")

            for i in T.unroll(count + tokens * normed):
                out[i] = T.float32(0)
            for g in T.serial(groups - 1):
                for u in T.unroll(ahead):
                    load(word, scale, u, words, scales, row, (g * ahead + u) * threads + tx)
                for u in T.unroll(ahead):
                    use(
                        out, part, word, scale, inputs, u, x, gain, token,
                        (g * ahead + u) * threads + tx, None,
                    )  # fmt: skip
            # The last chunks are not enough for all threads: some take one again, times zeros.
            for u in T.unroll(steps - last):
                load(
                    word, scale, u, words, scales, row,
                    T.min((last + u) * threads + tx, chunks - 1),
                )  # fmt: skip
            for u in T.unroll(steps - last):
                use(
                    out, part, word, scale, inputs, u, x, gain, token,
                    T.min((last + u) * threads + tx, chunks - 1),
                    (last + u) * threads + tx < chunks,
                )  # fmt: skip

        return products
