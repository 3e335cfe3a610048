"""The router: which experts a token takes, and with which weights.

The `top_k` largest of a token's logits and the softmax over them.

    logits f32 [n, experts] -> ids i32 [n, top_k], weights f32 [n, top_k]

Descending; of equal logits the lower expert id comes first, so a prefill chunk and a single token
agree. Logits are ordered as integers (see math.order_key): a NaN gives NaN weights, but ids
that are distinct and in range.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm

from ..cpu.items import items_in_parallel
from ..gpu.items import one_thread_an_item
from ..kernel import Case, Kernel, Signature, Size, T, Tensor, f32, i32, prim_func
from ..math import KEY_NONE, exp_f32, order_key
from . import router_topk_gpu

NAME = "f32_router_topk"


def router_topk_ref(
    logits: np.ndarray, top_k: int, **_static: Any
) -> tuple[np.ndarray, np.ndarray]:
    """The module's formulas, the softmax in float64."""
    ids = np.argsort(-logits, axis=-1, kind="stable")[:, :top_k]
    chosen = np.take_along_axis(logits, ids, axis=-1).astype(np.float64)
    weights = np.exp(chosen - chosen[:, :1])
    return ids.astype(np.int32), weights / weights.sum(axis=-1, keepdims=True)


def signature(*, experts: int, top_k: int) -> Signature:
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k must lie in [1, {experts}], the number of experts; got {top_k}")
    n = Size("n")
    return Signature((f32("logits", n, experts),), (i32("ids", n, top_k), f32("weights", n, top_k)))


def _tokens(arguments: tuple[Tensor, ...], *, experts: int, top_k: int) -> tvm.tirx.PrimFunc:
    """One item is one token: `top_k` rounds of looking for the next in order."""

    @T.inline
    def body(n, logits, ids, weights):
        for t in T.serial(n):
            with T.sblock("item"):
                vt = T.axis.spatial(n, t)
                T.reads(logits[vt, 0:experts])
                T.writes(ids[vt, 0:top_k], weights[vt, 0:top_k])
                key = T.sblock_alloc_buffer((experts,), "int32", scope="local")
                best = T.sblock_alloc_buffer((1,), "int32", scope="local")
                total = T.sblock_alloc_buffer((1,), "float32", scope="local")
                for e in T.serial(experts):
                    key[e] = order_key(logits[vt, e])
                for j in T.serial(top_k):
                    best[0] = 0
                    for e in T.serial(1, experts):
                        if key[e] > key[best[0]]:
                            best[0] = e
                    key[best[0]] = T.int32(KEY_NONE)
                    ids[vt, j] = best[0]
                weights[vt, 0] = T.float32(1)  # exp(0)
                total[0] = T.float32(1)
                for j in T.serial(1, top_k):
                    weights[vt, j] = exp_f32(logits[vt, ids[vt, j]] - logits[vt, ids[vt, 0]])
                    total[0] = total[0] + weights[vt, j]
                for j in T.serial(top_k):
                    weights[vt, j] = weights[vt, j] / total[0]

    return prim_func(arguments, body)


def _case(name: str, n: int, experts: int, top_k: int, levels: int = 0, spike: float = 1.0) -> Case:
    """`levels` > 0 draws logits from that many values, so that many are equal."""

    def inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
        if levels:
            logits = rng.integers(-levels, levels, (n, experts)).astype(np.float32)
            logits[0] = -0.0
            logits[0, 1::2] = 0.0  # equal to -0
        else:
            logits = rng.standard_normal((n, experts), dtype=np.float32)
        logits[:, experts // 2] *= spike
        return {"logits": logits}

    static = {"experts": experts, "top_k": top_k}
    return Case(
        name, static, inputs, flops=n * experts * top_k, bytes=4 * n * (experts + 2 * top_k)
    )


CASES = (
    _case("one token", 1, 32, 4),
    _case("equal logits", 40, 32, 4, levels=2),
    _case("every expert taken", 3, 5, 5),
    _case("one expert", 2, 1, 1),
    _case("one expert's logit 1000 times the others'", 9, 24, 4, spike=1000.0),
    _case("120b, a chunk", 512, 128, 4),
    _case("more experts, and more of them chosen, than a block has threads", 2, 300, 130),
)

ROUTER_TOPK = Kernel(
    NAME,
    signature,
    router_topk_ref,
    CASES,
    (items_in_parallel(_tokens), *router_topk_gpu.SCHEDULES, one_thread_an_item(_tokens)),
)
