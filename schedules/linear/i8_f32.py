"""Dense layer with 8-bit weights and float32 inputs; see `linear`.

Where inputs cost little beside the weights, as on GPUs, they are rounded inside the kernel or not
at all, which takes no launch.
"""

from __future__ import annotations

from ..formats.activations import F32
from ..formats.dense import DENSE, DenseFormat
from ..gpu.items import one_thread_an_item
from .i8 import I8_WEIGHT
from .i8_f32_cuda import SCHEDULES as CUDA
from .i8_f32_gpu import SCHEDULES, elements
from .linear import case, linear_kernel

LINEAR_I8_F32 = linear_kernel(
    "i8w_linear",
    I8_WEIGHT,
    F32,
    (*CUDA, *SCHEDULES, one_thread_an_item(elements)),
    (case(I8_WEIGHT, F32, "scales below float16's normal numbers", 2, 40, 96, size=1e-4),),
)

I8_F32 = DENSE.add(DenseFormat("i8xf32", "int8", I8_WEIGHT, F32, LINEAR_I8_F32))
