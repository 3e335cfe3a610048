"""`i8_f32` on GPUs: some rows a block, or one thread an output element, weights as stored.

Some rows a block: bytes are q + 128, in the order of `Chunk.paired`; a row has an even number of
scales. A byte becomes a float32 by three operations that no device is slow at, as many are at
converting integers: it is put below the 1 of 2^23, or above eight zeros there, and 2^23 + 128
taken away, which is exact.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm

from ..formats.blocks import BLOCK
from ..gpu.gemv import PAIR, Chunk, GemvTile
from ..kernel import Layout, T, Tensor, prim_func
from .linear import plus_options
from .rows_gpu import Chunks, rows_a_block

ZERO = 128  # the byte of q = 0
ONE = 0x4B000000  # the bits of 2^23, whose last place is 1
SHIFTED = 256  # what a byte above eight zeros is multiplied by


def _quad(words, at, q):
    """A word: weights 0 and 2, and 1 and 3 times `SHIFTED`."""
    low: Any = words[at + q]
    high = T.shift_right(low, T.uint32(16))
    return tuple(_byte(two, by) for two in (low, high) for by in (1, SHIFTED))


def _byte(word, by):
    """f32 `by` · q of the byte at bit 0, or for `SHIFTED` at bit 8."""
    bits = T.bitwise_or(T.bitwise_and(word, T.uint32(0xFF * by)), T.uint32(ONE))
    return T.reinterpret("float32", bits) - T.float32(2**23 + ZERO * by)


def _scale(word, chunk):
    """Of two float16, that of a pair of chunks."""
    bits = T.shift_right(word, T.Cast("uint32", chunk // PAIR % 2 * 16))
    return T.Cast("float32", T.reinterpret("float16", T.Cast("uint16", bits)))


def _pack_weight(q: np.ndarray) -> np.ndarray:
    return CHUNK.paired(q.view(np.uint8) ^ np.uint8(ZERO))


def _pack_scales(scales: np.ndarray) -> np.ndarray:
    return np.pad(scales, ((0, 0), (0, scales.shape[1] % 2)))


CHUNK = Chunk(16, _quad, 1 / SHIFTED, _scale, scales=2 * PAIR)
CHUNKS = Chunks(
    CHUNK,
    {
        "weight": Layout(shape=lambda shape: shape, pack=_pack_weight, dtype="uint8"),
        "weight_scale": Layout(
            shape=lambda shape: (shape[0], shape[1] + shape[1] % 2), pack=_pack_scales
        ),
    },
)
TILES = {
    "vulkan": GemvTile(threads=64, rows=4, tokens=4, ahead=2),
    "metal": GemvTile(threads=64, rows=4, tokens=4, ahead=2),
    "cuda": GemvTile(threads=64, rows=4, tokens=4, ahead=2),
}


def elements(
    arguments: tuple[Tensor, ...], *, rows: int, k: int, **_options: bool
) -> tvm.tirx.PrimFunc:
    """One item is one output element."""

    @T.inline
    def body(n, x, weight, weight_scale, y, bias=None, residual=None):
        for t, row in T.grid(n, rows):
            with T.sblock("item"):
                vt, vrow = T.axis.remap("SS", [t, row])
                acc = T.sblock_alloc_buffer((1,), "float32", scope="local")
                part = T.sblock_alloc_buffer((1,), "float32", scope="local")
                acc[0] = T.float32(0)
                for b in T.serial(k // BLOCK):
                    part[0] = T.float32(0)
                    for i in T.serial(BLOCK):
                        part[0] = (
                            part[0]
                            + T.Cast("float32", weight[vrow, b * BLOCK + i]) * x[vt, b * BLOCK + i]
                        )
                    acc[0] = acc[0] + part[0] * T.Cast("float32", weight_scale[vrow, b])
                y[vt, vrow] = plus_options(acc[0], bias, residual, vt, vrow)

    return prim_func(arguments, body)


SCHEDULES = rows_a_block(CHUNKS, TILES)
