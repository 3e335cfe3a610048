"""`bf16` on GPUs, weights as stored: some rows a block, or one thread an output element."""

from __future__ import annotations

import tvm

from ..gpu.gemv import Chunk, GemvTile
from ..kernel import Layout, T, Tensor, prim_func
from .linear import plus_options
from .rows_gpu import Chunks, rows_a_block


def _quad(words, at, q):
    """Each word has two weights, the first one below."""
    first, second = (words[at + 2 * q + i] for i in (0, 1))
    return tuple(
        T.reinterpret("float32", bits)
        for word in (first, second)
        for bits in (
            T.shift_left(word, T.uint32(16)),
            T.bitwise_and(word, T.uint32(0xFFFF0000)),
        )
    )


CHUNK = Chunk(8, _quad)
CHUNKS = Chunks(CHUNK, {"weight": Layout(shape=lambda shape: shape, pack=CHUNK.paired)})
# Not measured: by what compilers say for seven GPUs. 64 threads waste 6 % of the steps of 2,880
# inputs, four rows read half as many bytes of inputs as of weights, and two chunks ahead are what
# Adreno's registers hold.
TILE = GemvTile(threads=64, rows=4, tokens=4, ahead=2)


def elements(
    arguments: tuple[Tensor, ...], *, rows: int, k: int, **_options: bool
) -> tvm.tirx.PrimFunc:
    """One item is one output element."""

    @T.inline
    def body(n, x, weight, y, bias=None, residual=None):
        for t, row in T.grid(n, rows):
            with T.sblock("item"):
                vt, vrow = T.axis.remap("SS", [t, row])
                acc = T.sblock_alloc_buffer((1,), "float32", scope="local")
                acc[0] = T.float32(0)
                for i in T.serial(k):
                    acc[0] = acc[0] + T.Cast("float32", weight[vrow, i]) * x[vt, i]
                y[vt, vrow] = plus_options(acc[0], bias, residual, vt, vrow)

    return prim_func(arguments, body)


SCHEDULES = rows_a_block(CHUNKS, TILE)
