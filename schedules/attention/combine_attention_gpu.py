"""Splits put together on GPUs: a block is one head of a token.

Its threads are four columns each, and rows of them, which share the splits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import tvm

from ..gpu.items import one_thread_an_item
from ..kernel import Schedule, T, Tensor, TileConfig, gpu, prim_func
from ..math import LOWEST, exp_f32
from .splits import SPLITS


@dataclass(frozen=True)
class CombineTile(TileConfig):
    threads: int  # of a block


# Of a head of 64, a thread reads four splits. Not measured.
TILE = CombineTile(threads=128)
VECTOR = 4  # columns of a thread


def _largest(stats: Any, t: Any, split: Any, h: Any) -> Any:
    """The largest score of a split, or LOWEST where it has no keys."""
    used = stats[t, split, h, 1] > T.float32(0)
    return T.Select(used, stats[t, split, h, 0], T.float32(LOWEST))


def _fits(*, head_dim: int, **_heads: int) -> bool:
    return head_dim % VECTOR == 0 and head_dim <= VECTOR * TILE.threads


def _build(
    arguments: tuple[Tensor, ...], *, heads: int, head_dim: int, tile: CombineTile
) -> tvm.tirx.PrimFunc:
    columns = head_dim // VECTOR
    rows = min(tile.threads // columns, SPLITS)
    threads = rows * columns
    each = -(-SPLITS // rows)  # splits of a thread

    @T.inline
    def body(n, partial, stats, sinks, out):
        for token in T.thread_binding(n, thread="blockIdx.x"):
            for head in T.thread_binding(heads, thread="blockIdx.y"):
                with T.sblock("block"):
                    t, h = T.axis.remap("SS", [token, head])
                    T.reads(
                        partial[t, 0:SPLITS, 0 : heads * head_dim],
                        stats[t, 0:SPLITS, 0:heads, 0:2],
                        sinks[h],
                    )
                    T.writes(out[t, 0 : heads * head_dim])
                    shared = T.sblock_alloc_buffer((rows * head_dim,), "float32", scope="shared")
                    totals = T.sblock_alloc_buffer((rows,), "float32", scope="shared")
                    acc = T.sblock_alloc_buffer((VECTOR,), "float32", scope="local")
                    top = T.sblock_alloc_buffer((1,), "float32", scope="local")
                    total = T.sblock_alloc_buffer((1,), "float32", scope="local")
                    for tx in T.thread_binding(threads, thread="threadIdx.x"):
                        column: T.let = tx % columns * VECTOR
                        top[0] = T.max(sinks[h], T.float32(LOWEST))
                        for split in T.unroll(SPLITS):
                            top[0] = T.max(top[0], _largest(stats, t, split, h))
                        total[0] = T.float32(0)
                        acc[T.ramp(0, 1, VECTOR)] = T.broadcast(T.float32(0), VECTOR)
                        for i in T.unroll(each):
                            split: T.let = i * rows + tx // columns
                            if split < SPLITS:
                                of_split: T.let = stats[t, split, h, 1]
                                if of_split > T.float32(0):
                                    weight: T.let = exp_f32(stats[t, split, h, 0] - top[0])
                                    total[0] = total[0] + weight * of_split
                                    acc[T.ramp(0, 1, VECTOR)] = (
                                        acc[T.ramp(0, 1, VECTOR)]
                                        + T.broadcast(weight, VECTOR)
                                        * partial[
                                            t, split, T.ramp(h * head_dim + column, 1, VECTOR)
                                        ]
                                    )
                        shared[T.ramp(tx * VECTOR, 1, VECTOR)] = acc[T.ramp(0, 1, VECTOR)]
                        if tx % columns == 0:
                            totals[tx // columns] = total[0]
                        if tx < columns:
                            total[0] = exp_f32(sinks[h] - top[0])
                            acc[T.ramp(0, 1, VECTOR)] = T.broadcast(T.float32(0), VECTOR)
                            for row in T.unroll(rows):
                                total[0] = total[0] + totals[row]
                                acc[T.ramp(0, 1, VECTOR)] = (
                                    acc[T.ramp(0, 1, VECTOR)]
                                    + shared[T.ramp((row * columns + tx) * VECTOR, 1, VECTOR)]
                                )
                            out[t, T.ramp(h * head_dim + column, 1, VECTOR)] = acc[
                                T.ramp(0, 1, VECTOR)
                            ] / T.broadcast(total[0], VECTOR)

    return prim_func(arguments, body)


def _elements(arguments: tuple[Tensor, ...], *, heads: int, head_dim: int) -> Any:
    """One item is one number of the result."""

    @T.inline
    def body(n, partial, stats, sinks, out):
        for token, head, column in T.grid(n, heads, head_dim):
            with T.sblock("item"):
                t, h, d = T.axis.remap("SSS", [token, head, column])
                top = T.sblock_alloc_buffer((1,), "float32", scope="local")
                total = T.sblock_alloc_buffer((1,), "float32", scope="local")
                acc = T.sblock_alloc_buffer((1,), "float32", scope="local")
                top[0] = T.max(sinks[h], T.float32(LOWEST))
                for split in T.serial(SPLITS):
                    top[0] = T.max(top[0], _largest(stats, t, split, h))
                total[0] = exp_f32(sinks[h] - top[0])
                acc[0] = T.float32(0)
                for split in T.serial(SPLITS):
                    if stats[t, split, h, 1] > T.float32(0):
                        weight: T.let = exp_f32(stats[t, split, h, 0] - top[0])
                        total[0] = total[0] + weight * stats[t, split, h, 1]
                        acc[0] = acc[0] + weight * partial[t, split, h * head_dim + d]
                out[t, h * head_dim + d] = acc[0] / total[0]

    return prim_func(arguments, body)


SCHEDULES = (
    Schedule("a block a head", gpu(), _build, TILE, fits=_fits),
    one_thread_an_item(_elements),
)
