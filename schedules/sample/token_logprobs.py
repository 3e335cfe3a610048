"""Log-probabilities of the chosen tokens and of the 20 likeliest.

The log-softmax of the raw logits at the chosen ids and at the 20 largest. m rows are taken
together; V is the vocabulary.

    logits f32 [m, V], ids i32 [m] -> chosen f32 [m], top_ids i32 [m, 20], top_values f32 [m, 20]

Descending, lower ids first among equals. Tokens at -inf are not listed: places left over hold id
-1 and -inf. An id out of range gives -inf, as does everything in a row with a NaN or +inf logit,
or with nothing but -inf: one that sample_token refuses.

Logits are never sorted: each of the 20 is found by a pass over the row, in O(V).

Roofline: memory. V = 201,088 is 0.8 MB a row, which stays in the L2 cache over the passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..kernel import Case, Kernel, Signature, Size, f32, i32
from . import token_logprobs_cpu, token_logprobs_gpu
from .rows import TOP, random_logits, spoil_logits, tie_logits

NAME = "token_logprobs"


def token_logprobs_ref(
    logits: np.ndarray, ids: np.ndarray, **_static: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The module's rules with sorting, in float64."""
    m, vocab = logits.shape
    chosen = np.full(m, -np.inf)
    top_ids = np.full((m, TOP), -1, np.int32)
    top_values = np.full((m, TOP), -np.inf)
    for row in range(m):
        x = logits[row].astype(np.float64)
        if not x.max() < np.inf or x.max() == -np.inf:
            continue
        values = x - x.max() - np.log(np.exp(x - x.max()).sum())
        order = [t for t in np.argsort(-x, kind="stable")[:TOP] if x[t] > -np.inf]
        top_ids[row, : len(order)] = order
        top_values[row, : len(order)] = values[order]
        if 0 <= ids[row] < vocab:
            chosen[row] = values[ids[row]]
    return chosen, top_ids, top_values


def signature(*, vocab: int) -> Signature:
    m = Size("m")
    return Signature(
        (f32("logits", m, vocab), i32("ids", m)),
        (f32("chosen", m), i32("top_ids", m, TOP), f32("top_values", m, TOP)),
    )


def _case(
    name: str,
    m: int,
    vocab: int,
    ids: list[int],
    spike: float = 4.0,
    edit: Callable[[np.ndarray], None] = lambda logits: None,
) -> Case:
    def inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
        logits = random_logits(rng, m, vocab, spike)
        edit(logits)
        return {"logits": logits, "ids": np.resize(ids, m).astype(np.int32)}

    return Case(name, {"vocab": vocab}, inputs, bytes=4 * m * (vocab + 2 + 2 * TOP))


CASES = (
    _case("partial chunk, ids out of range", 4, 1500, [1499, 0, -1, 1500]),
    _case("equal logits", 3, 40, [7], edit=tie_logits),
    _case("NaN, +inf, -inf", 9, 40, [0, 1], edit=spoil_logits),
    _case("fewer tokens than are listed", 2, 5, [4]),
    _case("logits in the thousands", 2, 300, [11], spike=4000.0),
    _case("gpt-oss vocabulary", 1, 201_088, [100_000]),
)

TOKEN_LOGPROBS = Kernel(
    NAME,
    signature,
    token_logprobs_ref,
    CASES,
    (*token_logprobs_cpu.SCHEDULES, *token_logprobs_gpu.SCHEDULES),
)
