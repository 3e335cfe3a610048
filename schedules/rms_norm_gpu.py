"""`rms_norm` on GPUs: a block of threads works on one token.

x stays in registers between the sum of squares and the result.
"""

# ruff: noqa: B023 (T.inline functions are expanded where they are called, not closures)

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import tvm

from .gpu.items import GpuTile
from .gpu.lanes import LANES, BlockSums
from .kernel import Schedule, T, Tensor, gpu, prim_func

MOST_VECTORS = 8  # of a thread's registers; 20b has 6 where blocks are smallest
TILE = GpuTile(threads=128)  # what every GPU has


@dataclass(frozen=True)
class BlockNorm:
    """The norm of a token by a block of `threads`, which takes a barrier.

    squares(x, token, kept, acc, tx)   every thread: kept f32 [elements] becomes its numbers of x
        f32 [n, hidden], acc f32 [1] the sum of their squares, for sums.share(acc, parts, tx)
    factor(parts, acc)                 acc becomes 1 / sqrt(mean(x²) + eps)
    scale(x, token, kept, acc, parts, tx)   all of these; parts f32 [sums.elements] in shared
        memory, which nothing else uses before the next barrier
    each(step, tx)                     step(first element, first of `kept`) for each of its
        vectors, which have `width` elements
    """

    family: str
    threads: int
    hidden: int
    eps: float

    @property
    def width(self) -> int:
        return 1 if self.hidden % 4 else 4

    @property
    def rounds(self) -> int:
        return -(-self.hidden // (self.width * self.threads))

    @property
    def elements(self) -> int:
        return self.rounds * self.width

    @property
    def fits(self) -> bool:
        return self.rounds <= MOST_VECTORS

    @property
    def sums(self) -> BlockSums:
        return BlockSums(self.family, self.threads, 1)

    @property
    def each(self) -> Any:
        threads, width, rounds, hidden = self.threads, self.width, self.rounds, self.hidden

        @T.inline
        def each(step, tx):
            for i in T.unroll(rounds):
                if (i * threads + tx) * width < hidden:
                    step((i * threads + tx) * width, i * width)

        return each

    @property
    def squares(self) -> Any:
        width, each = self.width, self.each

        @T.inline
        def squares(x, token, kept, acc, tx):
            @T.inline
            def load(first, place):
                for i in T.vectorized(width):
                    kept[place + i] = x[token, first + i]

            @T.inline
            def add(_first, place):
                for i in T.unroll(width):
                    acc[0] = acc[0] + kept[place + i] * kept[place + i]

            each(load, tx)
            acc[0] = T.float32(0)
            each(add, tx)

        return squares

    @property
    def factor(self) -> Any:
        hidden, eps, total = self.hidden, self.eps, self.sums.total

        @T.inline
        def factor(parts, acc):
            total(parts, 0, acc)
            acc[0] = T.float32(1) / T.sqrt(acc[0] / T.float32(hidden) + T.float32(eps))

        return factor

    @property
    def scale(self) -> Any:
        squares, share, factor = self.squares, self.sums.share, self.factor

        @T.inline
        def scale(x, token, kept, acc, parts, tx):
            squares(x, token, kept, acc, tx)
            share(acc, parts, tx)
            factor(parts, acc)

        return scale


def _build(
    family: str, arguments: tuple[Tensor, ...], *, hidden: int, eps: float, tile: GpuTile
) -> tvm.tirx.PrimFunc:
    threads = tile.threads
    norm = BlockNorm(family, threads, hidden, eps)
    scale, each, width = norm.scale, norm.each, norm.width

    @T.inline
    def body(n, x, weight, y):
        for t in T.thread_binding(n, thread="blockIdx.x"):
            with T.sblock("token"):
                vt = T.axis.spatial(n, t)
                parts = T.sblock_alloc_buffer((norm.sums.elements,), "float32", scope="shared")
                for tx in T.thread_binding(threads, thread="threadIdx.x"):
                    with T.sblock("thread"):
                        T.reads(x[vt, 0:hidden], weight[0:hidden])
                        T.writes(y[vt, 0:hidden])
                        kept = T.sblock_alloc_buffer((norm.elements,), "float32", scope="local")
                        acc = T.sblock_alloc_buffer((1,), "float32", scope="local")

                        @T.inline
                        def put(first, place):
                            for i in T.vectorized(width):
                                y[vt, first + i] = kept[place + i] * acc[0] * weight[first + i]

                        scale(x, vt, kept, acc, parts, tx)
                        each(put, tx)

    return prim_func(arguments, body)


SCHEDULES = tuple(
    Schedule(
        f"a block a token, {family}",
        gpu(family),
        partial(_build, family),
        TILE,
        fits=lambda hidden, eps: BlockNorm("", TILE.threads, hidden, eps).fits,
    )
    for family in LANES
)
