"""Dense layers: y = x·Wᵀ (+ bias) (+ residual), a kernel for each format of W and x."""

from __future__ import annotations

from .bf16 import LINEAR
from .bf16xbf16 import LINEAR_BF16
from .i8 import LINEAR_I8
from .i8_f32 import LINEAR_I8_F32

__all__ = ["LINEAR", "LINEAR_BF16", "LINEAR_I8", "LINEAR_I8_F32"]
