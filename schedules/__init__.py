"""The kernels that the compiler calls, one module each; `KERNELS` holds all of them by name."""

from __future__ import annotations

from .adjust_logits import ADJUST_LOGITS
from .attention import PAGED_ATTENTION
from .embedding import EMBED
from .gather import GATHER_ROWS
from .kernel import Case, Kernel, Target
from .kv_append import ROPE_KV_APPEND
from .kv_copy import KV_COPY_PAGES
from .linear import LINEAR
from .linear_bf16 import LINEAR_BF16
from .linear_i8 import LINEAR_I8
from .moe_down import DOWN, DOWN_BF16, DOWN_I8
from .moe_gate_up import GATE_UP, GATE_UP_BF16, GATE_UP_I8
from .moe_plan import MOE_PLAN
from .quantize import QUANTIZE_I8, QUANTIZE_I16
from .rms_norm import RMS_NORM
from .rope import ROPE_TABLE
from .round_bf16 import ROUND_BF16
from .router_topk import ROUTER_TOPK
from .sample_token import SAMPLE_TOKEN
from .token_logprobs import TOKEN_LOGPROBS

# In the order in which a token meets them.
KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        EMBED,
        ROPE_TABLE,
        RMS_NORM,
        LINEAR,
        LINEAR_BF16,
        LINEAR_I8,
        ROPE_KV_APPEND,
        PAGED_ATTENTION,
        ROUTER_TOPK,
        MOE_PLAN,
        ROUND_BF16,
        QUANTIZE_I8,
        QUANTIZE_I16,
        GATE_UP,
        GATE_UP_BF16,
        GATE_UP_I8,
        DOWN,
        DOWN_BF16,
        DOWN_I8,
        GATHER_ROWS,
        ADJUST_LOGITS,
        SAMPLE_TOKEN,
        TOKEN_LOGPROBS,
        KV_COPY_PAGES,
    )
}

__all__ = ["KERNELS", "Case", "Kernel", "Target"]
