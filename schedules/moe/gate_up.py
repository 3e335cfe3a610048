"""First half of an expert: h = SwiGLU(W[e]·x + bias[e]) for every (token, chosen expert).

    gate, up = even and odd rows;  gate ← min(gate, limit), up ← clamp(up, −limit, limit)
    h = gate · σ(alpha·gate) · (up + 1)                               (gpt-oss, alpha = 1.702)

x f32 [n, hidden]  ids i32 [n, top_k]  offsets i32 [experts+1], order i32 [n·top_k]: moe_plan's
blocks, scales: MXFP4 [experts, 2·intermediate, hidden] (see formats/mxfp4.py)
bias f32 [experts, 2·intermediate]
h [n·top_k, intermediate], in slot order: row t·top_k + j is token t's j-th expert.

There is a kernel for each activation format; x is passed as the format says. h is written as
`activations.results` says.

Roofline of decoding: experts_hit · 2·intermediate·hidden · 17/32 bytes.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from ..formats.activations import F32, ActivationFormat
from ..formats.mxfp4 import dequantize
from ..gpu.items import one_thread_an_item
from ..kernel import Case, Kernel, Schedule, Signature, Size, i32
from ..quantize import I8
from ..round_bf16 import BF16
from ..round_mxfp8 import MXFP8
from . import gate_up_cpu, gate_up_cuda, gate_up_gpu
from .experts import (
    cases,
    expert_arrays,
    few_cases,
    plan_arguments,
    routing,
    tame,
    weight_arguments,
)
from .swiglu import swiglu_ref


def gate_up_ref(
    activations: ActivationFormat,
    *,
    ids: np.ndarray,
    blocks: np.ndarray,
    scales: np.ndarray,
    bias: np.ndarray,
    hidden: int,
    limit: float,
    **arrays: Any,
) -> tuple[np.ndarray]:
    """The module's formula in float64, of what x stands for."""
    x = activations.taken("x", hidden, arrays)
    n, top_k = ids.shape
    h = np.empty((n * top_k, bias.shape[1] // 2))
    for expert in np.unique(ids):
        token, _ = np.nonzero(ids == expert)
        slots = np.flatnonzero(ids.ravel() == expert)
        weight = dequantize(blocks[expert], scales[expert]).astype(np.float64)
        y = x[token] @ weight.T + bias[expert]
        h[slots] = swiglu_ref(y[:, ::2], y[:, 1::2], limit)
    return (activations.results.result(h),)


def signature(
    activations: ActivationFormat,
    *,
    experts: int,
    top_k: int,
    hidden: int,
    intermediate: int,
    **_limit: float,
) -> Signature:
    n = Size("n")
    return Signature(
        (
            *activations.tensors("x", n, hidden),
            i32("ids", n, top_k),
            *plan_arguments(n, experts, top_k),
            *weight_arguments(experts, 2 * intermediate, hidden),
        ),
        activations.results.tensors("h", n * top_k, intermediate),
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
        x = rng.standard_normal((n, hidden), dtype=np.float32)
        x[:, hidden // 2] *= spike
        tame(x, edge)
        return {
            **activations.arrays("x", x),
            **routing(rng, n, experts, top_k, choose),
            **expert_arrays(rng, experts, 2 * intermediate, hidden, edge),
        }

    hit = min(experts, n * top_k)
    return Case(
        name,
        {
            "experts": experts,
            "top_k": top_k,
            "hidden": hidden,
            "intermediate": intermediate,
            "limit": 7.0,
        },
        inputs,
        flops=4 * n * top_k * intermediate * hidden,
        bytes=hit * 2 * intermediate * hidden * 17 // 32,
    )


def _kernel(name: str, activations: ActivationFormat, *others: Schedule) -> Kernel:
    made = partial(_case, activations)
    return Kernel(
        name,
        partial(signature, activations),
        partial(gate_up_ref, activations),
        few_cases(made) if activations is MXFP8 else cases(made, 240 if activations is I8 else 254),
        (*gate_up_cpu.schedules(activations), *others),
    )


GATE_UP = {
    F32.name: _kernel(
        "mxfp4w_moe_gate_up_swiglu",
        F32,
        *gate_up_cuda.schedules(F32),
        *gate_up_gpu.SCHEDULES,
        one_thread_an_item(gate_up_gpu.elements),
    ),
    BF16.name: _kernel("mxfp4w_bf16_moe_gate_up_swiglu", BF16, *gate_up_cuda.schedules(BF16)),
    I8.name: _kernel("mxfp4w_i8_moe_gate_up_swiglu", I8),
    MXFP8.name: _kernel("mxfp4w_mxfp8_moe_gate_up_swiglu", MXFP8, *gate_up_cuda.schedules(MXFP8)),
}
