"""`i8_f32` on GPUs: one thread an output element, weights as stored."""

from __future__ import annotations

import tvm

from ..formats.blocks import BLOCK
from ..kernel import T, Tensor, prim_func
from .linear import plus_options


def elements(
    arguments: tuple[Tensor, ...], *, rows: int, k: int, **_options: bool
) -> tvm.tirx.PrimFunc:
    """One item is one output element."""

    @T.inline
    def body(n, x, weight, weight_scale, y, bias=None, residual=None):
        for t, row in T.grid(n, rows):
            with T.sblock("item"):
                vt, vrow = T.axis.remap("SS", [t, row])
                acc = T.sblock_alloc_buffer((1,), "float32", scope="local")
                part = T.sblock_alloc_buffer((1,), "float32", scope="local")
                acc[0] = T.float32(0)
                for b in T.serial(k // BLOCK):
                    part[0] = T.float32(0)
                    for i in T.serial(BLOCK):
                        part[0] = (
                            part[0]
                            + T.Cast("float32", weight[vrow, b * BLOCK + i]) * x[vt, b * BLOCK + i]
                        )
                    acc[0] = acc[0] + part[0] * T.Cast("float32", weight_scale[vrow, b])
                y[vt, vrow] = plus_options(acc[0], bias, residual, vt, vrow)

    return prim_func(arguments, body)
