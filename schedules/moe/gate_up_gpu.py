"""`gate_up` on GPUs: some rows a block; or one thread an output element, weights as stored.

Many tokens are products of tiles of them where there are matrix units (grouped_gpu.py).
"""

# ruff: noqa: B023 (T.inline functions are expanded where they are called, not closures)

from __future__ import annotations

from typing import Any

import tvm

from ..formats.blocks import BLOCK
from ..formats.mxfp4 import nibble_value, scale_value
from ..gpu.chosen import ROWS, WINDOW, ChosenExperts
from ..gpu.lanes import LANES, BlockSums
from ..gpu.matrices import MATRICES, Matrices, unless_there
from ..gpu.mxfp4 import UNIT, ExpertRows, ExpertsTile, product_rows
from ..kernel import Size, T, Tensor, prim_func
from .experts_gpu import FEW, schedules
from .grouped_gpu import MANY, grouped_products, scratch
from .swiglu import swiglu

# By what a target has besides, best first.
TILES: dict[tuple[str, ...], ExpertsTile] = {
    ("vulkan", "threads256"): ExpertsTile(threads=96, rows=4),
    ("vulkan",): ExpertsTile(threads=96, rows=4, together=FEW),
    ("metal",): ExpertsTile(threads=96, rows=8),
    ("cuda",): ExpertsTile(threads=96, rows=8),
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
    features: tuple[str, ...],
    arguments: tuple[Tensor, ...],
    *,
    experts: int,
    top_k: int,
    hidden: int,
    intermediate: int,
    limit: float,
    tile: ExpertsTile,
) -> tvm.tirx.PrimFunc:
    one = _one(features[0], tile, top_k, hidden, intermediate, limit)
    several = _several(features[0], tile, top_k, hidden, intermediate, limit)
    units = MATRICES.get(features)
    many = units and _many(units, tile, experts, top_k, hidden, intermediate, limit)

    @T.inline
    def body(n, x, ids, blocks, scales, bias, h, begins=None, by_expert=None):
        if n == 1:
            one(n, x, ids, blocks, scales, bias, h)
        elif (many is None) or unless_there(units, n * top_k < MANY.least * experts):
            several(n, x, ids, blocks, scales, bias, h)
        else:
            many(n, x, ids, (blocks, scales), (begins, by_expert, bias, h))

    return prim_func(arguments, body)


def _one(
    family: str, tile: ExpertsTile, top_k: int, hidden: int, intermediate: int, limit: float
) -> Any:
    """The launch for one token: a block is some rows of one of its experts.

    It has n like any number, lest TVM make offsets of 32 bits, each of which costs AMD's compilers
    an address.
    """
    rows, of = tile.rows, ExpertRows(hidden, tile)
    threads = of.threads
    sums = BlockSums(family, threads, rows)
    warps = LANES[family].count(threads)

    @T.inline
    def one(n, x, ids, blocks, scales, bias, h):
        for token in T.thread_binding(n, thread="blockIdx.z"):
            for group in T.thread_binding(2 * intermediate // rows, thread="blockIdx.y"):
                for choice in T.thread_binding(top_k, thread="blockIdx.x"):
                    for tx in T.thread_binding(threads, thread="threadIdx.x"):
                        with T.sblock("block"):
                            vn, vg, vs, vt = T.axis.remap("SSSS", [token, group, choice, tx])
                            expert = T.sblock_alloc_buffer((1,), "int32", scope="local")
                            acc = T.sblock_alloc_buffer((rows,), "float32", scope="local")
                            pair = T.sblock_alloc_buffer((2,), "float32", scope="local")
                            parts = T.sblock_alloc_buffer(
                                (sums.elements,), "float32", scope="shared"
                            )
                            expert[0] = ids[vn, vs]
                            of.products(
                                acc, x, lambda _j: vn, lambda _j: T.float32(1),
                                blocks, scales, bias, lambda _j: expert[0], vg, vt,
                            )  # fmt: skip
                            sums.share(acc, parts, vt)
                            if vt < rows // 2:
                                for r in T.unroll(2):
                                    pair[r] = T.float32(0)
                                for warp in T.serial(warps):
                                    for r in T.unroll(2):
                                        pair[r] = pair[r] + parts[warp * rows + 2 * vt + r]
                                h[vn * top_k + vs, vg * (rows // 2) + vt] = swiglu(
                                    pair[0], pair[1], limit
                                )

    return one


def _several(
    family: str, tile: ExpertsTile, top_k: int, hidden: int, intermediate: int, limit: float
) -> Any:
    """The launch for more: a block is some rows of all experts of a window of tokens."""
    of = ChosenExperts(family, hidden, 2 * intermediate, top_k, tile)
    threads, most, sums = of.threads, max(tile.together), of.sums
    pairs = ROWS // 2

    @T.inline
    def several(n, x, ids, blocks, scales, bias, h):
        # Windows are the faster axis: blocks that read the same rows follow each other.
        for window_ in T.thread_binding(T.ceildiv(n, WINDOW), thread="blockIdx.x"):
            for group in T.thread_binding(of.groups, thread="blockIdx.y"):
                for thread in T.thread_binding(threads, thread="threadIdx.x"):
                    with T.sblock("block"):
                        vw, vg, tx = T.axis.remap("SSS", [window_, group, thread])
                        T.reads(x[0:n, 0:hidden])
                        T.writes(h[0 : n * top_k, 0:intermediate])
                        chosen = T.sblock_alloc_buffer((of.slots,), "int32", scope="shared")
                        heads = T.sblock_alloc_buffer((of.slots,), "int32", scope="shared")
                        next = T.sblock_alloc_buffer((of.slots,), "int32", scope="shared")
                        parts = T.sblock_alloc_buffer((sums.elements,), "float32", scope="shared")
                        sum = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        slot = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        pair = T.sblock_alloc_buffer((2,), "float32", scope="local")
                        first: T.let = T.Cast("int32", vw) * of.slots
                        count: T.let = T.min(T.Cast("int32", n * top_k) - first, of.slots)
                        unit: T.let = vg * pairs + tx % pairs

                        @T.inline
                        def finish(slots, here, expert):
                            if tx < here * pairs:
                                slot[0] = slots[0]
                                for t in T.unroll(most):
                                    slot[0] = T.Select(tx // pairs == t, slots[t], slot[0])
                                for r in T.unroll(2):
                                    sums.total(parts, 2 * tx + r, sum)
                                    pair[r] = T.float32(UNIT) * sum[0] + bias[expert, 2 * unit + r]
                                h[first + slot[0], unit] = swiglu(pair[0], pair[1], limit)

                        of.visit(
                            finish, ids, first, count, chosen, heads, next, parts, x,
                            lambda s: (first + s) // top_k, blocks, scales, vg, tx,
                        )  # fmt: skip

    return several


def _many(
    units: Matrices, tile: ExpertsTile, experts: int, top_k: int, hidden: int, intermediate: int,
    limit: float,
) -> Any:  # fmt: skip
    """The launches for many tokens."""

    @T.inline
    def store(given, expert, slot, unit, sums):
        bias, h = T.meta_var(given[2:])
        begin = T.sblock_alloc_buffer((2,), "float32", scope="local")
        begin[T.ramp(0, 1, 2)] = bias[expert, T.ramp(2 * unit, 1, 2)]
        h[slot, unit] = swiglu(
            T.float32(UNIT) * sums[0] + begin[0], T.float32(UNIT) * sums[1] + begin[1], limit
        )

    return grouped_products(
        units, product_rows(tile.rows, 2), experts=experts, top_k=top_k, share=top_k,
        all_rows=2 * intermediate, k=hidden, store=store,
    )  # fmt: skip


def _scratch(*, experts: int, top_k: int, **_: float) -> tuple[Tensor, ...]:
    return scratch(Size("n", top_k), experts)


SCHEDULES = schedules(_rows, TILES, _scratch)
