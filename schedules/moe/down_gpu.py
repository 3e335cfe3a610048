"""`down` on GPUs: some rows a block, or one thread an output element, weights as stored."""

# ruff: noqa: B023 (T.inline functions are expanded where they are called, not closures)

from __future__ import annotations

from functools import partial

import tvm

from ..formats.blocks import BLOCK
from ..formats.mxfp4 import nibble_value, scale_value
from ..gpu.lanes import BlockSums
from ..gpu.mxfp4 import ExpertRows, ExpertsTile, layouts
from ..kernel import Schedule, T, Tensor, gpu, prim_func

# By what a target has besides, best first.
TILES = {
    ("vulkan", "threads256"): ExpertsTile(threads=96, rows=4, teams=2, ahead=2),
    ("vulkan",): ExpertsTile(threads=96, rows=4),
    ("metal",): ExpertsTile(threads=96, rows=8, teams=4),
    ("cuda",): ExpertsTile(threads=96, rows=8, teams=4),
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
    teams = tile.teams if top_k % tile.teams == 0 else 1
    rows, of = tile.rows, ExpertRows(intermediate, tile, top_k // teams)
    sums = BlockSums(family, of.threads * teams, rows)

    @T.inline
    def body(n, h, ids, weights, blocks, scales, bias, residual, y):
        for group in T.thread_binding(hidden // rows, thread="blockIdx.y"):
            for token in T.thread_binding(n, thread="blockIdx.x"):
                for team in T.thread_binding(teams, thread="threadIdx.y"):
                    for lane in T.thread_binding(of.threads, thread="threadIdx.x"):
                        with T.sblock("thread"):
                            vg, vt, vm, vl = T.axis.remap("SSSS", [group, token, team, lane])
                            expert = T.sblock_alloc_buffer(
                                (top_k // teams,), "int32", scope="local"
                            )
                            weight = T.sblock_alloc_buffer(
                                (top_k // teams,), "float32", scope="local"
                            )
                            acc = T.sblock_alloc_buffer((rows,), "float32", scope="local")
                            total = T.sblock_alloc_buffer((1,), "float32", scope="local")
                            before = T.sblock_alloc_buffer((rows,), "float32", scope="local")
                            parts = T.sblock_alloc_buffer(
                                (sums.elements,), "float32", scope="shared"
                            )
                            tx: T.let = vm * of.threads + vl
                            for j in T.unroll(top_k // teams):
                                expert[j] = ids[vt, j * teams + vm]
                                weight[j] = weights[vt, j * teams + vm]
                            for v in T.unroll(rows // 4):
                                before[T.ramp(v * 4, 1, 4)] = residual[
                                    vt, T.ramp(vg * rows + v * 4, 1, 4)
                                ]
                            of.products(
                                acc, h, lambda j: vt * top_k + j * teams + vm,
                                lambda j: weight[j],
                                blocks, scales, bias, lambda j: expert[j], vg, vl,
                            )  # fmt: skip
                            for r in T.unroll(rows):
                                acc[r] = acc[r] + T.Select(tx == 0, before[r], T.float32(0))
                            sums.share(acc, parts, tx)
                            if tx < rows:
                                sums.total(parts, tx, total)
                                y[vt, vg * rows + tx] = total[0]

    return prim_func(arguments, body)


SCHEDULES = tuple(
    Schedule(
        f"some rows a block, {' '.join(features)}",
        gpu(*features),
        partial(_rows, features[0]),
        tile,
        layouts(tile.rows),
        unused=frozenset({"offsets", "order"}),
    )
    for features, tile in TILES.items()
)
