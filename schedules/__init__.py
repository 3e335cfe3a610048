"""The kernels that the compiler calls; `KERNELS` holds all of them by name.

A kernel with several schedules is a file in the folder of its subject (`attention`, `linear`,
`moe`, `sample`), with a file beside it for each target family; a small one is one file here. `cpu`
and `gpu` have what schedules of one family share, `formats` the number formats.
"""

from __future__ import annotations

from .attention import (
    COMBINE_ATTENTION,
    KV_COPY_PAGES,
    PAGED_ATTENTION,
    QKV_INSERT,
    ROPE_KV_INSERT,
    SPLIT_ATTENTION,
)
from .embedding import EMBED
from .formats import ACTIVATIONS, DENSE
from .gather import GATHER_ROWS
from .kernel import Case, Kernel, Schedule, Target
from .linear import LINEAR_I8_F32  # noqa: F401 (the formats of `linear` join DENSE)
from .moe import DOWN, GATE_UP, MOE_PLAN, ROUTE, ROUTER_TOPK
from .rms_norm import RMS_NORM
from .rope import ROPE_TABLE
from .sample import ADJUST_LOGITS, NEXT_TOKENS, SAMPLE_TOKEN, TOKEN_LOGPROBS

# In the order in which a token meets them.
KERNELS: dict[str, Kernel] = {
    kernel.name: kernel
    for kernel in (
        EMBED,
        ROPE_TABLE,
        RMS_NORM,
        *(format_.kernel for format_ in DENSE.formats()),
        ROPE_KV_INSERT,
        *QKV_INSERT.values(),
        PAGED_ATTENTION,
        SPLIT_ATTENTION,
        COMBINE_ATTENTION,
        ROUTER_TOPK,
        *ROUTE.values(),
        MOE_PLAN,
        *(kernel for format_ in ACTIVATIONS.formats() for kernel in format_.kernels),
        *GATE_UP.values(),
        *DOWN.values(),
        GATHER_ROWS,
        ADJUST_LOGITS,
        SAMPLE_TOKEN,
        TOKEN_LOGPROBS,
        NEXT_TOKENS,
        KV_COPY_PAGES,
    )
}

__all__ = ["DENSE", "KERNELS", "Case", "Kernel", "Schedule", "Target"]
