"""First half of an expert: h = SwiGLU(W[e]·x + bias[e]) for every (token, chosen expert).

    gate, up = even and odd rows;  gate ← min(gate, limit), up ← clamp(up, −limit, limit)
    h = gate · σ(alpha·gate) · (up + 1)                               (gpt-oss, alpha = 1.702)

x f32 [n, hidden]  ids i32 [n, top_k]  offsets i32 [experts+1], order i32 [n·top_k]: moe_plan's
blocks, scales: MXFP4 [experts, 2·units, hidden] (layouts in mxfp4.py)  bias f32 [experts, 2·units]
h f32 [n·top_k, units], in slot order: row t·top_k + j is token t's j-th expert.

With bf16 activations x is replaced by its bits u16 (round_bf16.py), with i8 activations by q,
x_step, x_total of quantize.py.

The CPU's schedule is moe_experts.py's walk; the bias is packed like the rows.

Roofline of decoding: experts_hit · 2·units·hidden · 17/32 bytes.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
import tvm

from .int8 import BLOCK, GROUP
from .kernel import TARGET_KINDS, Case, Kernel, T, Target, bind_items, parameter, scheduled
from .math import sigmoid_f32
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
    LANES,
    Activations,
    dequantize,
    gate_up_row_order,
    nibble_value,
    pack_blocks,
    pack_scales,
    packed_shapes,
    scale_value,
)

NAMES: dict[Activations, str] = {
    "f32": "mxfp4w_moe_gate_up_swiglu",
    "bf16": "mxfp4w_bf16_moe_gate_up_swiglu",
    "i8": "mxfp4w_i8_moe_gate_up_swiglu",
}
ALPHA = 1.702


def gate_up_ref(
    x: np.ndarray,
    ids: np.ndarray,
    blocks: np.ndarray,
    scales: np.ndarray,
    bias: np.ndarray,
    *,
    limit: float,
    activations: Activations = "f32",
    **_plan_and_static: Any,
) -> tuple[np.ndarray]:
    """The module's formula in float64; of what the activations' format makes of x."""
    x = FORMATS[activations].values(x)
    n, top_k = ids.shape
    h = np.empty((n * top_k, bias.shape[1] // 2))
    for expert in np.unique(ids):
        token, _ = np.nonzero(ids == expert)
        slots = np.flatnonzero(ids.ravel() == expert)
        weight = dequantize(blocks[expert], scales[expert]).astype(np.float64)
        y = x[token].astype(np.float64) @ weight.T + bias[expert]
        gate, up = np.minimum(y[:, ::2], limit), np.clip(y[:, 1::2], -limit, limit)
        with np.errstate(over="ignore"):
            h[slots] = gate / (1 + np.exp(-ALPHA * gate)) * (up + 1)
    return (h,)


@cache
def gate_up(
    target: Target,
    *,
    experts: int,
    top_k: int,
    hidden: int,
    units: int,
    limit: float,
    activations: Activations = "f32",
) -> tvm.tirx.PrimFunc:
    """(x | bits | q, step, total; ids, offsets, order, blocks, scales, bias, h), for `target`."""
    shape: dict[str, Any] = dict(
        experts=experts, top_k=top_k, hidden=hidden, units=units, limit=limit
    )
    if target.is_gpu:
        return bind_items(gate_up_items(**shape), NAMES["f32"])
    dot = expert_dot(target, activations, hidden)
    func = _cpu(dot, activations, **shape)
    return scheduled(func, NAMES[activations], dot.schedule, dot.tile)


def _swiglu(gate: Any, up: Any, limit: float) -> Any:
    gate = T.min(gate, T.float32(limit))
    up = T.max(T.min(up, T.float32(limit)), T.float32(-limit))
    return gate * sigmoid_f32(gate * T.float32(ALPHA)) * (up + T.float32(1))


def _cpu(
    dot: ExpertDot,
    activations: Activations,
    *,
    experts: int,
    top_k: int,
    hidden: int,
    units: int,
    limit: float,
) -> tvm.tirx.PrimFunc:
    blocks_shape, scales_shape = packed_shapes(experts, 2 * units, hidden, activations)

    @T.inline
    def begin(_group, _out, _operands):
        T.evaluate(0)

    @T.inline
    def store(acc, t, slot, expert, group, h, bias):
        for lane in T.vectorized(LANES):
            h[slot, group * LANES + lane] = _swiglu(
                acc[t * GROUP + lane] + bias[expert, group * GROUP + lane],
                acc[t * GROUP + LANES + lane] + bias[expert, group * GROUP + LANES + lane],
                limit,
            )

    walk = expert_walk(
        dot,
        k=hidden,
        experts=experts,
        groups=2 * units // GROUP,
        row_of=lambda slot: slot // top_k,
        begin=begin,
        store=store,
    )

    @T.prim_func(s_tir=True, private=True)
    def main():
        n = T.int64()
        x = FORMATS[activations].parameters(n, hidden)
        parameter("ids", (n, top_k), "int32")
        offsets = parameter("offsets", (experts + 1,), "int32")
        order = parameter("order", (n * top_k,), "int32")
        w = parameter("w", blocks_shape, "uint8")
        s = parameter("s", scales_shape, "uint8")
        bias = parameter("bias", (experts, 2 * units), "float32")
        h = parameter("h", (n * top_k, units), "float32")
        walk(x, offsets, order, w, s, h, bias)

    return main


def gate_up_items(
    *, experts: int, top_k: int, hidden: int, units: int, limit: float, **_activations: Any
) -> tvm.tirx.PrimFunc:
    """One item is one output element: a slot's unit; weights as stored, f32 activations."""

    @T.prim_func(s_tir=True, private=True)
    def main(
        xp: T.handle,
        ip: T.handle,
        fp: T.handle,
        rp: T.handle,
        wp: T.handle,
        sp: T.handle,
        bp: T.handle,
        hp: T.handle,
    ):
        n = T.int64()
        x = T.match_buffer(xp, (n, hidden), "float32")
        ids = T.match_buffer(ip, (n, top_k), "int32")
        T.match_buffer(fp, (experts + 1,), "int32")
        T.match_buffer(rp, (n * top_k,), "int32")
        w = T.match_buffer(wp, (experts, 2 * units, hidden // BLOCK, 16), "uint8")
        s = T.match_buffer(sp, (experts, 2 * units, hidden // BLOCK), "uint8")
        bias = T.match_buffer(bp, (experts, 2 * units), "float32")
        h = T.match_buffer(hp, (n * top_k, units), "float32")
        for slot, unit in T.grid(n * top_k, units):
            with T.sblock("item"):
                vs, vu = T.axis.remap("SS", [slot, unit])
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
                                        w[ids[vs // top_k, vs % top_k], 2 * vu + p, b, i]
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
                                        w[ids[vs // top_k, vs % top_k], 2 * vu + p, b, i]
                                        >> T.uint8(4),
                                    )
                                )
                                * x[vs // top_k, b * BLOCK + 2 * i + 1]
                            )
                        acc[p] = acc[p] + part[p] * scale_value(
                            s[ids[vs // top_k, vs % top_k], 2 * vu + p, b]
                        )
                    acc[p] = acc[p] + bias[ids[vs // top_k, vs % top_k], 2 * vu + p]
                h[vs, vu] = _swiglu(acc[0], acc[1], limit)

    return main


def pack_gate_up(
    target: Target,
    blocks: np.ndarray,
    scales: np.ndarray,
    bias: np.ndarray,
    activations: Activations,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Blocks, scales and f32 bias of any number of experts, laid out for `target`."""
    if target.is_gpu:
        return blocks, scales, bias
    rows = gate_up_row_order(blocks.shape[1])
    return pack_blocks(blocks, activations, rows), pack_scales(scales, rows), bias[:, rows]


def _pack(
    target: Target,
    inputs: dict[str, np.ndarray],
    activations: Activations = "f32",
    **_static: Any,
) -> list[np.ndarray]:
    weights = pack_gate_up(target, inputs["blocks"], inputs["scales"], inputs["bias"], activations)
    x = FORMATS["f32" if target.is_gpu else activations].arrays(inputs["x"])
    return [*x, inputs["ids"], inputs["offsets"], inputs["order"], *weights]


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
        x = rng.standard_normal((n, hidden), dtype=np.float32)
        x[:, hidden // 2] *= spike
        return {
            "x": x,
            **routing(rng, n, experts, top_k, choose),
            **expert_arrays(rng, experts, 2 * units, hidden),
        }

    hit = min(experts, n * top_k)
    return Case(
        name,
        {
            "experts": experts,
            "top_k": top_k,
            "hidden": hidden,
            "units": units,
            "limit": 7.0,
            "activations": activations,
        },
        inputs,
        flops=4 * n * top_k * units * hidden,
        bytes=hit * 2 * units * hidden * 17 // 32,
    )


def _outputs(inputs: dict[str, np.ndarray], top_k: int, units: int, **_: Any):
    return [((len(inputs["x"]) * top_k, units), "float32")]


def _kernel(activations: Activations) -> Kernel:
    return Kernel(
        NAMES[activations],
        build=gate_up,
        items=gate_up_items,
        reference=gate_up_ref,
        outputs=_outputs,
        cases=cases(partial(_case, activations=activations)),
        pack=_pack,
        targets=TARGET_KINDS if activations == "f32" else ("cpu",),
    )


GATE_UP, GATE_UP_BF16, GATE_UP_I8 = _kernel("f32"), _kernel("bf16"), _kernel("i8")
