"""`gate_up` on GPUs: one thread an output element, weights as stored."""

from __future__ import annotations

import tvm

from ..formats.blocks import BLOCK
from ..formats.mxfp4 import nibble_value, scale_value
from ..kernel import T, Tensor, prim_func
from .swiglu import swiglu


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
