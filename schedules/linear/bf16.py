"""Dense layer with bfloat16 weights and float32 inputs; see `linear`."""

from __future__ import annotations

from ..formats.activations import F32
from ..formats.dense import BF16_WEIGHT, DENSE, DenseFormat
from ..gpu.items import one_thread_an_item
from . import bf16_cpu, bf16_cuda, bf16_gpu
from .linear import case, linear_kernel

LINEAR = linear_kernel(
    "bf16w_linear",
    BF16_WEIGHT,
    F32,
    (
        *bf16_cpu.SCHEDULES,
        *bf16_cuda.SCHEDULES,
        *bf16_gpu.SCHEDULES,
        one_thread_an_item(bf16_gpu.elements),
    ),
    (
        case(
            BF16_WEIGHT,
            F32,
            "more outputs than one axis of a grid has threads for",
            64,
            131_200,
            32,
        ),
    ),
)

BF16 = DENSE.add(DenseFormat("bf16", "bf16", BF16_WEIGHT, F32, LINEAR))
