"""The first half of an expert layer's block in one launch: norm, router, choice of experts.

    h = rms_norm(x, norm_weight, eps)                                   (rms_norm.py)
    ids, weights = router_topk(h·Wᵀ + bias, top_k)                      (router_topk.py)

    x f32 [n, hidden]   norm_weight f32 [hidden]
    W called `weight` bf16 [experts, hidden]   bias f32 [experts]
    -> h [n, hidden] as the format of the activations says, ids i32 [n, top_k], weights f32
       [n, top_k]

The router takes h before it is rounded to the format. There is a kernel for each format that
experts' kernels take on GPUs, where one launch is faster than three. Elsewhere, and where no
schedule fits, the kernels above are called.

Roofline of decoding: the router's bytes a token, 2·experts·hidden.
"""

from __future__ import annotations

from functools import partial

import ml_dtypes
import numpy as np

from ..formats.activations import F32, ActivationFormat
from ..formats.dense import BF16_WEIGHT
from ..kernel import Case, Kernel, Signature, Size, f32, i32
from ..linear.linear import linear_ref
from ..rms_norm import rms_norm_ref
from ..round_bf16 import BF16
from . import route_cuda, route_gpu
from .router_topk import router_topk_ref


def route_ref(
    activations: ActivationFormat,
    *,
    x: np.ndarray,
    norm_weight: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray,
    experts: int,
    top_k: int,
    hidden: int,
    eps: float,
) -> tuple[np.ndarray, ...]:
    """(h…, ids, weights)."""
    (h,) = rms_norm_ref(x, norm_weight, eps)
    (logits,) = linear_ref(BF16_WEIGHT, F32, rows=experts, k=hidden, x=h, weight=weight, bias=bias)
    return (activations.result(h), *router_topk_ref(logits, top_k))


def signature(
    activations: ActivationFormat, *, experts: int, top_k: int, hidden: int, **_eps: float
) -> Signature:
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k must lie in [1, {experts}], the number of experts; got {top_k}")
    n = Size("n")
    return Signature(
        (
            f32("x", n, hidden),
            f32("norm_weight", hidden),
            *BF16_WEIGHT.tensors("weight", experts, hidden),
            f32("bias", experts),
        ),
        (*activations.tensors("h", n, hidden), i32("ids", n, top_k), f32("weights", n, top_k)),
    )


def _case(
    name: str, n: int, experts: int, top_k: int, hidden: int, equal: int = 0, spike: float = 1.0
) -> Case:
    """`equal` experts, the others by turns, have no weights and the same large bias."""

    def inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
        x = rng.standard_normal((n, hidden), dtype=np.float32)
        x[:, hidden // 2] *= spike
        w = rng.standard_normal((experts, hidden)) / hidden**0.5
        bias = rng.standard_normal(experts, dtype=np.float32)
        w[: 2 * equal : 2], bias[: 2 * equal : 2] = 0, 2.5
        return {
            "x": x,
            "norm_weight": rng.uniform(0.5, 2, hidden).astype(np.float32),
            "weight": w.astype(ml_dtypes.bfloat16),
            "bias": bias,
        }

    static = {"experts": experts, "top_k": top_k, "hidden": hidden, "eps": 1e-5}
    return Case(
        name,
        static,
        inputs,
        flops=2 * n * experts * hidden,
        bytes=2 * experts * hidden + 8 * n * (hidden + top_k),
    )


CASES = (
    _case("one token", 1, 32, 4, 96),
    _case("odd numbers of experts", 17, 9, 3, 200),
    _case("one expert", 2, 1, 1, 8),
    _case("every expert taken", 3, 5, 5, 64),
    _case("equal logits", 8, 32, 4, 96, equal=12),
    _case("one channel 1000 times the others", 5, 24, 4, 160, spike=1000.0),
    _case("more experts than a block has threads", 2, 600, 5, 64),
    _case("inputs and experts that warps share unevenly", 2, 80, 4, 1120),
    _case("20b, one token", 1, 32, 4, 2880),
    _case("120b, four tokens", 4, 128, 4, 2880),
)


def _kernel(name: str, activations: ActivationFormat) -> Kernel:
    return Kernel(
        name,
        partial(signature, activations),
        partial(route_ref, activations),
        CASES,
        (route_cuda.schedule(activations), *route_gpu.schedules(activations)),
    )


# By the names of formats of activations.
ROUTE = {F32.name: _kernel("f32_moe_route", F32), BF16.name: _kernel("bf16_moe_route", BF16)}
