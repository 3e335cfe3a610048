"""`i8_f32` on GPUs: some rows a block, or one thread an output element, weights as stored.

Some rows a block: a weight in the order of `Chunk.paired`; an even number of scales a row.
"""

from __future__ import annotations

import numpy as np
import tvm

from ..formats.blocks import BLOCK
from ..gpu.gemv import PAIR, Chunk, GemvTile
from ..kernel import Layout, T, Tensor, prim_func
from .linear import plus_options
from .rows_gpu import Chunks, rows_a_block


def _quad(words, at, q):
    """The bytes of a word, the lowest first."""
    return tuple(
        T.Cast("float32", T.Cast("int8", T.shift_right(words[at + q], T.uint32(right))))
        for right in (0, 8, 16, 24)
    )


def _scale(word, chunk):
    """Of two float16, that of a pair of chunks."""
    bits = T.shift_right(word, T.Cast("uint32", chunk // PAIR % 2 * 16))
    return T.Cast("float32", T.reinterpret("float16", T.Cast("uint16", bits)))


def _pack_scales(scales: np.ndarray) -> np.ndarray:
    return np.pad(scales, ((0, 0), (0, scales.shape[1] % 2)))


CHUNK = Chunk(16, _quad, _scale, 2 * PAIR)
CHUNKS = Chunks(
    CHUNK,
    {
        "weight": Layout(shape=lambda shape: shape, pack=CHUNK.paired),
        "weight_scale": Layout(
            shape=lambda shape: (shape[0], shape[1] + shape[1] % 2), pack=_pack_scales
        ),
    },
)
# Not measured: by what compilers say for seven GPUs. With two chunks ahead Adreno's spills.
TILE = GemvTile(threads=64, rows=4, tokens=4, ahead=1)


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


SCHEDULES = rows_a_block(CHUNKS, TILE)
