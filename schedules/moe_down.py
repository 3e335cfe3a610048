"""Second half of an expert, and the mixture of the chosen ones.

    y = residual + Σ_j weight_j · (W[e_j]·h_j + bias[e_j])

h f32 [n·top_k, units] in slot order (moe_gate_up.py)  ids i32, weights f32 [n, top_k]
offsets i32 [experts+1], order i32 [n·top_k]: moe_plan's
blocks, scales: MXFP4 [experts, hidden, units] (layouts in mxfp4.py)  bias f32 [experts, hidden]
residual, y f32 [n, hidden]

With bf16 activations h is replaced by its bits u16 (round_bf16.py), with i8 activations by q,
h_step, h_total of quantize.py. The bias is added before
the expert's weight is applied. On the CPU each thread owns its rows of y and adds the experts in
ascending order, so the sum does not depend on the batch or on the number of threads.

Roofline of decoding: experts_hit · hidden · units · 17/32 bytes.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
import tvm

from .int8 import BLOCK, GROUP
from .kernel import TARGET_KINDS, Case, Kernel, T, Target, bind_items, parameter, scheduled
from .moe_experts import (
    FORMATS,
    ExpertDot,
    cases,
    expert_arrays,
    expert_dot,
    expert_walk,
    routing,
)
from .mxfp4 import (
    Activations,
    dequantize,
    nibble_value,
    pack_blocks,
    pack_scales,
    packed_shapes,
    scale_value,
)

NAMES: dict[Activations, str] = {
    "f32": "mxfp4w_moe_down",
    "bf16": "mxfp4w_bf16_moe_down",
    "i8": "mxfp4w_i8_moe_down",
}


def down_ref(
    h: np.ndarray,
    ids: np.ndarray,
    weights: np.ndarray,
    blocks: np.ndarray,
    scales: np.ndarray,
    bias: np.ndarray,
    residual: np.ndarray,
    *,
    activations: Activations = "f32",
    **_plan_and_static: Any,
) -> tuple[np.ndarray]:
    """The module's formula in float64; of what the activations' format makes of h."""
    h = FORMATS[activations].values(h)
    top_k = ids.shape[1]
    y = residual.astype(np.float64)
    for expert in np.unique(ids):
        token, choice = np.nonzero(ids == expert)
        weight = dequantize(blocks[expert], scales[expert]).astype(np.float64)
        out = h[token * top_k + choice].astype(np.float64) @ weight.T + bias[expert]
        y[token] += weights[token, choice, None] * out
    return (y,)


@cache
def down(
    target: Target,
    *,
    experts: int,
    top_k: int,
    hidden: int,
    units: int,
    activations: Activations = "f32",
) -> tvm.tirx.PrimFunc:
    """(h | bits | q, step, total; ids, weights, offsets, order, blocks, scales, bias, residual, y),
    for `target`."""
    shape = dict(experts=experts, top_k=top_k, hidden=hidden, units=units)
    if target.is_gpu:
        return bind_items(down_items(**shape), NAMES["f32"])
    dot = expert_dot(target, activations, units)
    func = _cpu(dot, activations, **shape)
    return scheduled(func, NAMES[activations], dot.schedule, dot.tile)


def _cpu(
    dot: ExpertDot, activations: Activations, *, experts: int, top_k: int, hidden: int, units: int
) -> tvm.tirx.PrimFunc:
    blocks_shape, scales_shape = packed_shapes(experts, hidden, units, activations)

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
        dot,
        k=units,
        experts=experts,
        groups=hidden // GROUP,
        row_of=lambda slot: slot,
        begin=begin,
        store=store,
    )

    @T.prim_func(s_tir=True, private=True)
    def main():
        n = T.int64()
        h = FORMATS[activations].parameters(n * top_k, units)
        parameter("ids", (n, top_k), "int32")
        weights = parameter("weights", (n, top_k), "float32")
        offsets = parameter("offsets", (experts + 1,), "int32")
        order = parameter("order", (n * top_k,), "int32")
        w = parameter("w", blocks_shape, "uint8")
        s = parameter("s", scales_shape, "uint8")
        bias = parameter("bias", (experts, hidden), "float32")
        residual = parameter("residual", (n, hidden), "float32")
        y = parameter("y", (n, hidden), "float32")
        walk(h, offsets, order, w, s, y, (residual, weights, bias))

    return main


def down_items(
    *, experts: int, top_k: int, hidden: int, units: int, **_activations: Any
) -> tvm.tirx.PrimFunc:
    """One item is one element of y; weights as stored, f32 activations."""

    @T.prim_func(s_tir=True, private=True)
    def main(
        xp: T.handle,
        ip: T.handle,
        gp: T.handle,
        fp: T.handle,
        rp: T.handle,
        wp: T.handle,
        sp: T.handle,
        bp: T.handle,
        dp: T.handle,
        yp: T.handle,
    ):
        n = T.int64()
        h = T.match_buffer(xp, (n * top_k, units), "float32")
        ids = T.match_buffer(ip, (n, top_k), "int32")
        weights = T.match_buffer(gp, (n, top_k), "float32")
        T.match_buffer(fp, (experts + 1,), "int32")
        T.match_buffer(rp, (n * top_k,), "int32")
        w = T.match_buffer(wp, (experts, hidden, units // BLOCK, 16), "uint8")
        s = T.match_buffer(sp, (experts, hidden, units // BLOCK), "uint8")
        bias = T.match_buffer(bp, (experts, hidden), "float32")
        residual = T.match_buffer(dp, (n, hidden), "float32")
        y = T.match_buffer(yp, (n, hidden), "float32")
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
                    for b in T.serial(units // BLOCK):
                        part[0] = T.float32(0)
                        for i in T.serial(16):
                            part[0] = (
                                part[0]
                                + nibble_value(
                                    T.Cast("uint32", w[expert[0], vr, b, i] & T.uint8(15))
                                )
                                * h[vt * top_k + j, b * BLOCK + 2 * i]
                            )
                            part[0] = (
                                part[0]
                                + nibble_value(
                                    T.Cast("uint32", w[expert[0], vr, b, i] >> T.uint8(4))
                                )
                                * h[vt * top_k + j, b * BLOCK + 2 * i + 1]
                            )
                        acc[0] = acc[0] + part[0] * scale_value(s[expert[0], vr, b])
                    total[0] = total[0] + weights[vt, j] * acc[0]
                y[vt, vr] = total[0]

    return main


def pack_down(
    target: Target, blocks: np.ndarray, scales: np.ndarray, activations: Activations
) -> tuple[np.ndarray, np.ndarray]:
    """Blocks and scales of any number of experts, laid out for `target`; the bias stays."""
    if target.is_gpu:
        return blocks, scales
    return pack_blocks(blocks, activations), pack_scales(scales)


def _pack(
    target: Target,
    inputs: dict[str, np.ndarray],
    activations: Activations = "f32",
    **_static: Any,
) -> list[np.ndarray]:
    weights = pack_down(target, inputs["blocks"], inputs["scales"], activations)
    h = FORMATS["f32" if target.is_gpu else activations].arrays(inputs["h"])
    plan = [inputs[name] for name in ("ids", "weights", "offsets", "order")]
    return [*h, *plan, *weights, inputs["bias"], inputs["residual"]]


def _case(
    name: str,
    n: int,
    *,
    experts: int = 8,
    top_k: int = 2,
    hidden: int = 96,
    units: int = 64,
    choose: range | None = None,
    activations: Activations = "f32",
    spike: float = 1,
) -> Case:
    def inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
        h = rng.standard_normal((n * top_k, units), dtype=np.float32)
        h[:, units // 2] *= spike
        plan = routing(rng, n, experts, top_k, choose)
        weights = rng.random((n, top_k), dtype=np.float32)
        return {
            "h": h,
            **plan,
            "weights": weights / weights.sum(axis=1, keepdims=True),
            **expert_arrays(rng, experts, hidden, units),
            "residual": rng.standard_normal((n, hidden), dtype=np.float32),
        }

    hit = min(experts, n * top_k)
    return Case(
        name,
        {
            "experts": experts,
            "top_k": top_k,
            "hidden": hidden,
            "units": units,
            "activations": activations,
        },
        inputs,
        flops=2 * n * top_k * units * hidden,
        bytes=hit * units * hidden * 17 // 32,
    )


def _outputs(inputs: dict[str, np.ndarray], **_: Any) -> list[tuple[tuple[int, ...], str]]:
    return [(inputs["residual"].shape, "float32")]


def _kernel(activations: Activations) -> Kernel:
    return Kernel(
        NAMES[activations],
        build=down,
        items=down_items,
        reference=down_ref,
        outputs=_outputs,
        cases=cases(partial(_case, activations=activations)),
        pack=_pack,
        targets=TARGET_KINDS if activations == "f32" else ("cpu",),
    )


DOWN, DOWN_BF16, DOWN_I8 = _kernel("f32"), _kernel("bf16"), _kernel("i8")
