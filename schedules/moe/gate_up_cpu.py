"""`gate_up` on CPUs: the walk of experts_cpu.py.

A group has the rows of 16 gates, then of their ups; the bias is packed like the rows.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import tvm

from ..cpu.int8 import GROUP
from ..cpu.mxfp4 import layouts
from ..cpu.vectors import LANES
from ..formats.activations import ActivationFormat
from ..kernel import Layout, Schedule, T, Tensor, TileConfig, prim_func
from .experts_cpu import PRODUCTS, Product, expert_walk
from .swiglu import swiglu


def row_order(rows: int) -> np.ndarray:
    """Stored rows alternate gate, up; a group takes 16 gates, then their 16 ups."""
    return np.arange(rows).reshape(rows // GROUP, LANES, 2).transpose(0, 2, 1).reshape(rows)


BIAS = Layout(shape=lambda shape: shape, pack=lambda bias: bias[:, row_order(bias.shape[1])])


def _build(
    activations: ActivationFormat,
    product: Product,
    arguments: tuple[Tensor, ...],
    *,
    experts: int,
    top_k: int,
    hidden: int,
    intermediate: int,
    limit: float,
    tile: TileConfig,
) -> tvm.tirx.PrimFunc:
    put = activations.results.put

    @T.inline
    def begin(_group, _out, _operands):
        T.evaluate(0)

    @T.inline
    def store(acc, t, slot, expert, group, h, bias):
        for lane in T.vectorized(LANES):
            value: T.let = swiglu(
                acc[t * GROUP + lane] + bias[expert, group * GROUP + lane],
                acc[t * GROUP + LANES + lane] + bias[expert, group * GROUP + LANES + lane],
                limit,
            )
            h[slot, group * LANES + lane] = put(value)

    walk = expert_walk(
        product.dot(hidden, tile),
        k=hidden,
        experts=experts,
        groups=2 * intermediate // GROUP,
        row_of=lambda slot: slot // top_k,
        begin=begin,
        store=store,
    )

    @T.inline
    def body(x, offsets, order, blocks, scales, bias, h, x_scale=None, x_sum=None):
        walk((x, x_scale, x_sum), offsets, order, blocks, scales, h, bias)

    return prim_func(arguments, body)


def schedules(activations: ActivationFormat) -> tuple[Schedule, ...]:
    return tuple(
        Schedule(
            product.name,
            product.needs,
            partial(_build, activations, product),
            product.tile,
            layouts={**layouts(product.places, row_order), "bias": BIAS},
        )
        for product in PRODUCTS[activations.product]
    )
