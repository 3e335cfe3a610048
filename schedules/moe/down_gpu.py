"""`down` on GPUs: one thread an output element, weights as stored."""

from __future__ import annotations

import tvm

from ..formats.blocks import BLOCK
from ..formats.mxfp4 import nibble_value, scale_value
from ..kernel import T, Tensor, prim_func


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
