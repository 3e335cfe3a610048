"""`down` on GPUs: some rows a block; or one thread an output element, weights as stored.

Many tokens are products of tiles of them where there are matrix units (grouped_gpu.py).
"""

# ruff: noqa: B023 (T.inline functions are expanded where they are called, not closures)

from __future__ import annotations

from typing import Any

import tvm

from ..formats.blocks import BLOCK
from ..formats.mxfp4 import nibble_value, scale_value
from ..gpu.chosen import ROWS, WINDOW, ChosenExperts
from ..gpu.lanes import BlockSums
from ..gpu.matrices import MATRICES, Matrices, unless_there
from ..gpu.mxfp4 import UNIT, ExpertRows, ExpertsTile, product_rows
from ..kernel import Size, T, Tensor, f32, prim_func
from .experts_gpu import FEW, schedules
from .grouped_gpu import MANY, grouped_products, mixture, scratch

# By what a target has besides, best first.
TILES = {
    ("vulkan", "threads256"): ExpertsTile(threads=96, rows=4, teams=2, ahead=2),
    ("vulkan",): ExpertsTile(threads=96, rows=4, together=FEW),
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
    features: tuple[str, ...],
    arguments: tuple[Tensor, ...],
    *,
    experts: int,
    top_k: int,
    hidden: int,
    intermediate: int,
    tile: ExpertsTile,
) -> tvm.tirx.PrimFunc:
    one = _one(features[0], tile, top_k, hidden, intermediate)
    several = _several(features[0], tile, top_k, hidden, intermediate)
    units = MATRICES.get(features)
    many = units and _many(units, tile, experts, top_k, hidden, intermediate)

    @T.inline
    def body(
        n, h, ids, weights, blocks, scales, bias, residual, y, outputs=None, begins=None,
        by_expert=None,
    ):  # fmt: skip
        if n == 1:
            one(n, h, ids, weights, blocks, scales, bias, residual, y)
        elif (many is None) or unless_there(units, n * top_k < MANY.least * experts):
            several(n, h, ids, weights, blocks, scales, bias, residual, y)
        else:
            many(n, h, ids, weights, blocks, scales, bias, residual, y, begins, by_expert, outputs)

    return prim_func(arguments, body)


def _one(family: str, tile: ExpertsTile, top_k: int, hidden: int, intermediate: int) -> Any:
    """The launch for one token: a block is some rows of all its experts. As to n, see gate_up."""
    teams = tile.teams if top_k % tile.teams == 0 else 1
    rows, of = tile.rows, ExpertRows(intermediate, tile, top_k // teams)
    sums = BlockSums(family, of.threads * teams, rows)

    @T.inline
    def one(n, h, ids, weights, blocks, scales, bias, residual, y):
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

    return one


def _several(family: str, tile: ExpertsTile, top_k: int, hidden: int, intermediate: int) -> Any:
    """The launch for more: a block is some rows of all experts of a window of tokens."""
    of = ChosenExperts(family, intermediate, hidden, top_k, tile)
    threads, most, sums = of.threads, max(tile.together), of.sums
    own = -(-WINDOW * ROWS // threads)  # elements of y of a thread

    @T.inline
    def several(n, h, ids, weights, blocks, scales, bias, residual, y):
        # Windows are the faster axis: blocks that read the same rows follow each other.
        for window_ in T.thread_binding(T.ceildiv(n, WINDOW), thread="blockIdx.x"):
            for group in T.thread_binding(of.groups, thread="blockIdx.y"):
                for thread in T.thread_binding(threads, thread="threadIdx.x"):
                    with T.sblock("block"):
                        vw, vg, tx = T.axis.remap("SSS", [window_, group, thread])
                        T.reads(h[0 : n * top_k, 0:intermediate])
                        T.writes(y[0:n, 0:hidden])
                        chosen = T.sblock_alloc_buffer((of.slots,), "int32", scope="shared")
                        heads = T.sblock_alloc_buffer((of.slots,), "int32", scope="shared")
                        next = T.sblock_alloc_buffer((of.slots,), "int32", scope="shared")
                        parts = T.sblock_alloc_buffer((sums.elements,), "float32", scope="shared")
                        sum = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        total = T.sblock_alloc_buffer((own,), "float32", scope="local")
                        slot = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        place = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        row: T.let = vg * ROWS + tx % ROWS  # threads are a multiple of the rows
                        first: T.let = T.Cast("int32", vw) * of.slots
                        count: T.let = T.min(T.Cast("int32", n * top_k) - first, of.slots)

                        @T.inline
                        def finish(slots, here, expert):
                            for i in T.unroll(own):
                                token: T.let = (i * threads + tx) // ROWS
                                slot[0] = -1
                                for t in T.unroll(most):
                                    if T.And(slots[t] // top_k == token, slot[0] < 0):
                                        slot[0] = slots[t]
                                        place[0] = t
                                if slot[0] >= 0:
                                    sums.total(parts, place[0] * ROWS + tx % ROWS, sum)
                                    total[i] = total[i] + weights[
                                        (first + slot[0]) // top_k, slot[0] % top_k
                                    ] * (T.float32(UNIT) * sum[0] + bias[expert, row])

                        for i in T.unroll(own):
                            total[i] = T.float32(0)
                        of.visit(
                            finish, ids, first, count, chosen, heads, next, parts, h,
                            lambda s: first + s, blocks, scales, vg, tx,
                        )  # fmt: skip
                        for i in T.unroll(own):
                            token: T.let = vw * WINDOW + (i * threads + tx) // ROWS
                            if token < T.min(n, (vw + 1) * WINDOW):
                                y[token, row] = total[i] + residual[token, row]

    return several


def _many(
    units: Matrices, tile: ExpertsTile, experts: int, top_k: int, hidden: int, intermediate: int
) -> Any:
    """The launches for many tokens: the outputs of all slots, then their mixture."""
    # Pairs of rows so far apart that stores are whole sectors.
    rows = product_rows(tile.rows, MANY.large.rows)

    @T.inline
    def store(given, expert, slot, pair, sums):
        bias, outputs = T.meta_var(given[2:])
        for r in T.unroll(2):
            row: T.let = rows.row(pair, r)
            if row < hidden:
                outputs[slot, row] = T.float32(UNIT) * sums[r] + bias[expert, row]

    products = grouped_products(
        units, rows, experts=experts, top_k=top_k, share=1, all_rows=hidden, k=intermediate,
        store=store,
    )  # fmt: skip
    mix = mixture(top_k, hidden)

    @T.inline
    def launch(n, h, ids, weights, blocks, scales, bias, residual, y, begins, by_expert, outputs):
        products(n, h, ids, (blocks, scales), (begins, by_expert, bias, outputs))
        mix(n, outputs, weights, residual, y)

    return launch


def _scratch(*, experts: int, top_k: int, hidden: int, **_: int) -> tuple[Tensor, ...]:
    slots = Size("n", top_k)
    return (f32("outputs", slots, hidden), *scratch(slots, experts))


SCHEDULES = schedules(_rows, TILES, _scratch)
