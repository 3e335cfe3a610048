"""`down` on CPUs: the walk of experts_cpu.py.

Each thread owns its rows of y and adds the experts in ascending order, so that the sum does not
depend on the batch or on the number of threads.
"""

from __future__ import annotations

from functools import partial

import tvm

from ..cpu.int8 import GROUP
from ..cpu.mxfp4 import layouts
from ..formats.activations import ActivationFormat
from ..kernel import Schedule, T, Tensor, TileConfig, prim_func
from .experts_cpu import PRODUCTS, Product, expert_walk


def _build(
    product: Product,
    arguments: tuple[Tensor, ...],
    *,
    experts: int,
    top_k: int,
    hidden: int,
    intermediate: int,
    tile: TileConfig,
) -> tvm.tirx.PrimFunc:
    @T.inline
    def begin(group, y, operands):
        for t in T.serial(y.shape[0]):
            for lane in T.vectorized(GROUP):
                y[t, group * GROUP + lane] = operands[0][t, group * GROUP + lane]

    @T.inline
    def store(acc, t, slot, expert, group, y, operands):
        for lane in T.vectorized(GROUP):
            y[slot // top_k, group * GROUP + lane] = y[
                slot // top_k, group * GROUP + lane
            ] + operands[1][slot // top_k, slot % top_k] * (
                acc[t * GROUP + lane] + operands[2][expert, group * GROUP + lane]
            )

    walk = expert_walk(
        product.dot(intermediate, tile),
        k=intermediate,
        experts=experts,
        groups=hidden // GROUP,
        row_of=lambda slot: slot,
        begin=begin,
        store=store,
    )

    @T.inline
    def body(
        h, weights, offsets, order, blocks, scales, bias, residual, y, h_scale=None, h_sum=None
    ):
        walk((h, h_scale, h_sum), offsets, order, blocks, scales, y, (residual, weights, bias))

    return prim_func(arguments, body)


def schedules(activations: ActivationFormat) -> tuple[Schedule, ...]:
    return tuple(
        Schedule(
            product.name,
            product.needs,
            partial(_build, product),
            product.tile,
            layouts=layouts(product.places),
        )
        for product in PRODUCTS[activations.product]
    )
