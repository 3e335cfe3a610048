"""`down` on GPUs: some rows a block, or one thread an output element, weights as stored."""

from __future__ import annotations

from functools import partial

import tvm

from ..formats.blocks import BLOCK
from ..formats.mxfp4 import nibble_value, scale_value
from ..gpu.mxfp4 import ExpertRows, ExpertsTile, layouts
from ..kernel import Schedule, T, Tensor, gpu, prim_func

TILES = {
    "vulkan": ExpertsTile(threads=96, rows=4),
    "metal": ExpertsTile(threads=96, rows=4),
    "cuda": ExpertsTile(threads=96, rows=4),
}


def elements(
    arguments: tuple[Tensor, ...], *, top_k: int, hidden: int, intermediate: int, **_experts: int
) -> tvm.tirx.PrimFunc:
    """One item is one element of y."""

    @T.inline
    def body(n, h, ids, weights, blocks, scales, bias, residual, y):
        for t, row in T.grid(n, hidden):
            with T.sblock("item"):
                vt, vr = T.axis.remap("SS", [t, row])
                expert = T.sblock_alloc_buffer((1,), "int32", scope="local")
                part = T.sblock_alloc_buffer((1,), "float32", scope="local")
                acc = T.sblock_alloc_buffer((1,), "float32", scope="local")
                total = T.sblock_alloc_buffer((1,), "float32", scope="local")
                total[0] = residual[vt, vr]
                for j in T.serial(top_k):
                    expert[0] = ids[vt, j]
                    acc[0] = bias[expert[0], vr]
                    for b in T.serial(intermediate // BLOCK):
                        part[0] = T.float32(0)
                        for i in T.serial(16):
                            part[0] = (
                                part[0]
                                + nibble_value(
                                    T.Cast("uint32", blocks[expert[0], vr, b, i] & T.uint8(15))
                                )
                                * h[vt * top_k + j, b * BLOCK + 2 * i]
                            )
                            part[0] = (
                                part[0]
                                + nibble_value(
                                    T.Cast("uint32", blocks[expert[0], vr, b, i] >> T.uint8(4))
                                )
                                * h[vt * top_k + j, b * BLOCK + 2 * i + 1]
                            )
                        acc[0] = acc[0] + part[0] * scale_value(scales[expert[0], vr, b])
                    total[0] = total[0] + weights[vt, j] * acc[0]
                y[vt, vr] = total[0]

    return prim_func(arguments, body)


def _rows(
    family: str,
    arguments: tuple[Tensor, ...],
    *,
    top_k: int,
    hidden: int,
    intermediate: int,
    tile: ExpertsTile,
    **_experts: int,
) -> tvm.tirx.PrimFunc:
    """A block is a token's rows, of all its experts.

    Tokens are the faster axis of the grid: blocks that read the same rows, perhaps of the same
    experts, run at about the same time, and memory gives these once.
    """
    rows, of = tile.rows, ExpertRows(family, intermediate, tile)
    sums, threads = of.sums, of.threads

    @T.inline
    def body(n, h, ids, weights, blocks, scales, bias, residual, y):
        for group in T.thread_binding(hidden // rows, thread="blockIdx.y"):
            for token in T.thread_binding(n, thread="blockIdx.x"):
                for tx in T.thread_binding(threads, thread="threadIdx.x"):
                    with T.sblock("block"):
                        vg, vt, vx = T.axis.remap("SSS", [group, token, tx])
                        expert = T.sblock_alloc_buffer((top_k,), "int32", scope="local")
                        acc = T.sblock_alloc_buffer((rows,), "float32", scope="local")
                        one = T.sblock_alloc_buffer((rows,), "float32", scope="local")
                        total = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        parts = T.sblock_alloc_buffer((sums.elements,), "float32", scope="shared")
                        for j in T.unroll(top_k):
                            expert[j] = ids[vt, j]
                        for r in T.unroll(rows):
                            acc[r] = T.float32(0)
                        for j in T.unroll(top_k):
                            for r in T.unroll(rows):
                                one[r] = T.float32(0)
                            of.products(one, h, vt * top_k + j, blocks, scales, expert[j], vg, vx)
                            for r in T.unroll(rows):
                                acc[r] = acc[r] + weights[vt, j] * one[r]
                        sums.share(acc, parts, vx)
                        if vx < rows:
                            sums.total(parts, vx, total)
                            total[0] = total[0] + residual[vt, vg * rows + vx]
                            for j in T.unroll(top_k):
                                total[0] = (
                                    total[0] + weights[vt, j] * bias[expert[j], vg * rows + vx]
                                )
                            y[vt, vg * rows + vx] = total[0]

    return prim_func(arguments, body)


SCHEDULES = tuple(
    Schedule(
        f"some rows a block, {family}",
        gpu(family),
        partial(_rows, family),
        tile,
        layouts(tile.rows),
        unused=frozenset({"offsets", "order"}),
    )
    for family, tile in TILES.items()
)
