"""Dense layer with bfloat16 weights and inputs rounded to bfloat16; see `linear`."""

from __future__ import annotations

from ..formats.dense import BF16_WEIGHT, DENSE, DenseFormat
from ..round_bf16 import BF16
from .bf16xbf16_cpu import SCHEDULES
from .linear import case, linear_kernel

LINEAR_BF16 = linear_kernel(
    "bf16w_bf16_linear",
    BF16_WEIGHT,
    BF16,
    SCHEDULES,
    (case(BF16_WEIGHT, BF16, "one row, an odd number of inputs", 3, 1, 33, residual=True),),
)

BF16XBF16 = DENSE.add(DenseFormat("bf16xbf16", "bf16", BF16_WEIGHT, BF16, LINEAR_BF16))
