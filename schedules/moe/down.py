"""Second half of an expert, and the mixture of the chosen ones.

    y = residual + Σ_j weight_j · (W[e_j]·h_j + bias[e_j])

h f32 [n·top_k, intermediate] in slot order (gate_up.py)  ids i32, weights f32 [n, top_k]
offsets i32 [experts+1], order i32 [n·top_k]: moe_plan's
blocks, scales: MXFP4 [experts, hidden, intermediate] (see formats/mxfp4.py)
bias f32 [experts, hidden]
residual, y f32 [n, hidden]

There is a kernel for each activation format; h is passed as the format says. The bias is added
before the expert's weight is applied.

Roofline of decoding: experts_hit · hidden · intermediate · 17/32 bytes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from ..formats.activations import F32, ActivationFormat
from ..formats.mxfp4 import dequantize
from ..gpu.items import one_thread_an_item
from ..kernel import Case, Kernel, Schedule, Signature, Size, f32, i32
from ..quantize import I8
from ..round_bf16 import BF16
from ..round_mxfp8 import MXFP8
from . import down_cpu, down_cuda, down_gpu
from .experts import (
    cases,
    expert_arrays,
    few_cases,
    plan_arguments,
    routing,
    tame,
    weight_arguments,
)


def down_ref(
    activations: ActivationFormat,
    *,
    ids: np.ndarray,
    weights: np.ndarray,
    blocks: np.ndarray,
    scales: np.ndarray,
    bias: np.ndarray,
    residual: np.ndarray,
    intermediate: int,
    **arrays: Any,
) -> tuple[np.ndarray]:
    """The module's formula in float64, of what h stands for."""
    h = activations.taken("h", intermediate, arrays)
    top_k = ids.shape[1]
    y = residual.astype(np.float64)
    for expert in np.unique(ids):
        token, choice = np.nonzero(ids == expert)
        weight = dequantize(blocks[expert], scales[expert]).astype(np.float64)
        out = h[token * top_k + choice] @ weight.T + bias[expert]
        y[token] += weights[token, choice, None] * out
    return (y,)


def signature(
    activations: ActivationFormat, *, experts: int, top_k: int, hidden: int, intermediate: int
) -> Signature:
    n = Size("n")
    return Signature(
        (
            *activations.tensors("h", n * top_k, intermediate),
            i32("ids", n, top_k),
            f32("weights", n, top_k),
            *plan_arguments(n, experts, top_k),
            *weight_arguments(experts, hidden, intermediate),
            f32("residual", n, hidden),
        ),
        (f32("y", n, hidden),),
    )


def _case(
    activations: ActivationFormat,
    name: str,
    n: int,
    *,
    experts: int = 8,
    top_k: int = 2,
    hidden: int = 96,
    intermediate: int = 64,
    choose: range | None = None,
    spike: float = 1,
    edge: tuple[int, ...] = (),
) -> Case:
    def inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
        h = rng.standard_normal((n * top_k, intermediate), dtype=np.float32)
        h[:, intermediate // 2] *= spike
        tame(h, edge)
        plan = routing(rng, n, experts, top_k, choose)
        weights = rng.random((n, top_k), dtype=np.float32)
        return {
            **activations.arrays("h", h),
            "ids": plan["ids"],
            "weights": weights / weights.sum(axis=1, keepdims=True),
            "offsets": plan["offsets"],
            "order": plan["order"],
            **expert_arrays(rng, experts, hidden, intermediate, edge),
            "residual": rng.standard_normal((n, hidden), dtype=np.float32),
        }

    hit = min(experts, n * top_k)
    return Case(
        name,
        {
            "experts": experts,
            "top_k": top_k,
            "hidden": hidden,
            "intermediate": intermediate,
        },
        inputs,
        flops=2 * n * top_k * intermediate * hidden,
        bytes=hit * intermediate * hidden * 17 // 32,
    )


def _kernel(name: str, activations: ActivationFormat, *others: Schedule) -> Kernel:
    made = partial(_case, activations)
    return Kernel(
        name,
        partial(signature, activations),
        partial(down_ref, activations),
        few_cases(made) if activations is MXFP8 else cases(made, 240 if activations is I8 else 254),
        (*down_cpu.schedules(activations), *others),
    )


DOWN = {
    F32.name: _kernel(
        "mxfp4w_moe_down",
        F32,
        *down_cuda.schedules(F32),
        *down_gpu.SCHEDULES,
        one_thread_an_item(down_gpu.elements),
    ),
    BF16.name: _kernel("mxfp4w_bf16_moe_down", BF16, *down_cuda.schedules(BF16)),
    I8.name: _kernel("mxfp4w_i8_moe_down", I8),
    MXFP8.name: _kernel("mxfp4w_mxfp8_moe_down", MXFP8, *down_cuda.schedules(MXFP8)),
}
