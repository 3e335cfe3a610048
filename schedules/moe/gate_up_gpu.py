"""`gate_up` on GPUs: some rows a block, or one thread an output element, weights as stored."""

# ruff: noqa: B023 (T.inline functions are expanded where they are called, not closures)

from __future__ import annotations

from functools import partial

import tvm

from ..formats.blocks import BLOCK
from ..formats.mxfp4 import nibble_value, scale_value
from ..gpu.lanes import LANES, BlockSums
from ..gpu.mxfp4 import ExpertRows, ExpertsTile, layouts
from ..kernel import Schedule, T, Tensor, gpu, prim_func
from .swiglu import swiglu

TILES = {
    "vulkan": ExpertsTile(threads=96, rows=4),
    "metal": ExpertsTile(threads=96, rows=8),
    "cuda": ExpertsTile(threads=96, rows=8),
}


def elements(
    arguments: tuple[Tensor, ...],
    *,
    top_k: int,
    hidden: int,
    intermediate: int,
    limit: float,
    **_: int,
) -> tvm.tirx.PrimFunc:
    """One item is one output element: a slot's row of h, an element of the intermediate."""

    @T.inline
    def body(n, x, ids, blocks, scales, bias, h):
        for slot, row in T.grid(n * top_k, intermediate):
            with T.sblock("item"):
                vs, vi = T.axis.remap("SS", [slot, row])
                part = T.sblock_alloc_buffer((2,), "float32", scope="local")
                acc = T.sblock_alloc_buffer((2,), "float32", scope="local")
                for p in T.serial(2):
                    acc[p] = T.float32(0)
                    for b in T.serial(hidden // BLOCK):
                        part[p] = T.float32(0)
                        for i in T.serial(16):
                            part[p] = (
                                part[p]
                                + nibble_value(
                                    T.Cast(
                                        "uint32",
                                        blocks[ids[vs // top_k, vs % top_k], 2 * vi + p, b, i]
                                        & T.uint8(15),
                                    )
                                )
                                * x[vs // top_k, b * BLOCK + 2 * i]
                            )
                            part[p] = (
                                part[p]
                                + nibble_value(
                                    T.Cast(
                                        "uint32",
                                        blocks[ids[vs // top_k, vs % top_k], 2 * vi + p, b, i]
                                        >> T.uint8(4),
                                    )
                                )
                                * x[vs // top_k, b * BLOCK + 2 * i + 1]
                            )
                        acc[p] = acc[p] + part[p] * scale_value(
                            scales[ids[vs // top_k, vs % top_k], 2 * vi + p, b]
                        )
                    acc[p] = acc[p] + bias[ids[vs // top_k, vs % top_k], 2 * vi + p]
                h[vs, vi] = swiglu(acc[0], acc[1], limit)

    return prim_func(arguments, body)


def _rows(
    family: str,
    arguments: tuple[Tensor, ...],
    *,
    top_k: int,
    hidden: int,
    intermediate: int,
    limit: float,
    tile: ExpertsTile,
    **_experts: int,
) -> tvm.tirx.PrimFunc:
    """A block is a slot's rows.

    Slots are the faster axis of the grid: blocks that read the same rows of the same expert run at
    about the same time, and memory gives these once.
    """
    rows, of = tile.rows, ExpertRows(hidden, tile)
    threads = of.threads
    sums = BlockSums(family, threads, rows)
    warps = LANES[family].count(threads)

    @T.inline
    def body(n, x, ids, blocks, scales, bias, h):
        for group in T.thread_binding(2 * intermediate // rows, thread="blockIdx.y"):
            for slot in T.thread_binding(n * top_k, thread="blockIdx.x"):
                for tx in T.thread_binding(threads, thread="threadIdx.x"):
                    with T.sblock("block"):
                        vg, vs, vt = T.axis.remap("SSS", [group, slot, tx])
                        expert = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        acc = T.sblock_alloc_buffer((rows,), "float32", scope="local")
                        pair = T.sblock_alloc_buffer((2,), "float32", scope="local")
                        parts = T.sblock_alloc_buffer((sums.elements,), "float32", scope="shared")
                        expert[0] = ids[vs // top_k, vs % top_k]
                        of.products(
                            acc, x, lambda _j: vs // top_k, lambda _j: T.float32(1),
                            blocks, scales, bias, lambda _j: expert[0], vg, vt,
                        )  # fmt: skip
                        sums.share(acc, parts, vt)
                        if vt < rows // 2:
                            for r in T.unroll(2):
                                pair[r] = T.float32(0)
                            for warp in T.serial(warps):
                                for r in T.unroll(2):
                                    pair[r] = pair[r] + parts[warp * rows + 2 * vt + r]
                            h[vs, vg * (rows // 2) + vt] = swiglu(pair[0], pair[1], limit)

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
