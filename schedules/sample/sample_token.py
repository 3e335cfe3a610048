"""Draw one token a row, by temperature, top-k, top-p and min-p.

m rows are sampled together; V is the vocabulary.

    logits f32 [m, V], temperature f32 [m], top_k i32 [m], top_p f32 [m], min_p f32 [m],
    seed i32 [m, 2], step i32 [m]
    -> ids i32 [m], weights f32 [m, V]

Temperature 0 takes the largest logit, the lowest id of equals. Otherwise a token's weight is
exp((logit - max logit) / temperature), and weights become 0 outside of, one after the other,

    top_k    the k largest logits (k ≤ 0 or k ≥ V: off)
    top_p    the fewest largest weights whose sum is at least top_p times the sum of the weights
             that top_k left (top_p ≥ 1: off; the largest weight always stays)
    min_p    weights of at least min_p times the largest (min_p ≤ 0: off)

Tokens that tie with the last one kept are kept too. The token drawn is the first, in order of
ids, at which the running sum of weights exceeds u times their sum, where u in [0, 1) is the top
24 bits of the first word of Threefry-2x32 with 20 rounds (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3"), key = seed, counter = (step, 0). So a token depends on its row's
logits, parameters, seed and step alone, not on what else is in the batch.

`weights` is what was drawn from, unnormalized (1 at the chosen token at temperature 0); it is
also the kernel's working memory. A row with a NaN or +inf logit, or with nothing but -inf, gets
id -1 and weights 0.

Logits are never sorted: every threshold is found by search over the integers that order float32
values, in O(V) a step.

Roofline: memory. V = 201,088 is 0.8 MB a row, which stays in the L2 cache over the passes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from ..gpu.items import one_thread_an_item
from ..kernel import Case, Kernel, Signature, Size, f32, i32
from . import sample_token_cpu, sample_token_gpu
from .chunks_gpu import RECORD
from .rows import random_logits, spoil_logits, tie_logits
from .threefry import uniform_ref

NAME = "sample_token"


def sample_token_ref(
    logits: np.ndarray,
    temperature: np.ndarray,
    top_k: np.ndarray,
    top_p: np.ndarray,
    min_p: np.ndarray,
    seed: np.ndarray,
    step: np.ndarray,
    **_static: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """The module's rules with sorting, in float64."""
    m, vocab = logits.shape
    ids = np.full(m, -1, np.int32)
    weights = np.zeros((m, vocab))
    for row in range(m):
        x = logits[row].astype(np.float64)
        if not x.max() < np.inf or x.max() == -np.inf:
            continue
        if temperature[row] == 0:
            ids[row] = x.argmax()
            weights[row, ids[row]] = 1
            continue
        w = np.exp((x - x.max()) / np.float64(temperature[row]))
        if 0 < top_k[row] < vocab:
            w[x < np.sort(x)[-top_k[row]]] = 0
        if top_p[row] < 1:
            descending = np.sort(w)[::-1]
            enough = np.cumsum(descending) >= np.float64(top_p[row]) * w.sum()
            w[w < descending[enough.argmax()]] = 0
        w[w < min_p[row]] = 0
        running = np.cumsum(w)
        ids[row] = (running > uniform_ref(seed[row], step[row]) * running[-1]).argmax()
        weights[row] = w
    return ids, weights


def signature(*, vocab: int) -> Signature:
    m = Size("m")
    return Signature(
        (
            f32("logits", m, vocab),
            f32("temperature", m),
            i32("top_k", m),
            f32("top_p", m),
            f32("min_p", m),
            i32("seed", m, 2),
            i32("step", m),
        ),
        (i32("ids", m), f32("weights", m, vocab)),
    )


# (temperature, top_k, top_p, min_p) of the rows of a case
_PLAIN = ((1.0, 0, 1.0, 0.0),)
_CUT = ((1.0, 1000, 0.95, 0.02), (0.8, 0, 0.9, 0.0))
_ALL = (
    (0.0, 0, 1.0, 0.0),
    (0.0, 5, 0.5, 0.5),
    (1.0, 0, 1.0, 0.0),
    (0.7, 10, 1.0, 0.0),
    (1.0, 0, 0.9, 0.0),
    (1.3, 0, 1.0, 0.05),
    (2.0, 40, 0.8, 0.01),
    (0.01, 0, 0.9, 0.0),
    (100.0, 0, 0.999, 0.0),
    (1.0, 1, 1.0, 0.0),
    (1.0, 0, 0.0, 0.0),
    (1.0, 0, 1.0, 1.0),
    (1.0, 10**9, 1.0, 0.0),
)


def _case(
    name: str,
    vocab: int,
    rows: tuple[tuple[float, int, float, float], ...] = _ALL,
    edit: Callable[[np.ndarray], None] = lambda logits: None,
) -> Case:
    """One row for each set of parameters; `edit` changes the logits in place."""

    def inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
        logits = random_logits(rng, len(rows), vocab)
        edit(logits)
        temperature, top_k, top_p, min_p = zip(*rows, strict=True)
        return {
            "logits": logits,
            "temperature": np.array(temperature, np.float32),
            "top_k": np.array(top_k, np.int32),
            "top_p": np.array(top_p, np.float32),
            "min_p": np.array(min_p, np.float32),
            "seed": rng.integers(-(2**31), 2**31, (len(rows), 2), dtype=np.int32),
            "step": rng.integers(0, 131_072, len(rows), dtype=np.int32),
        }

    return Case(name, {"vocab": vocab}, inputs, bytes=8 * len(rows) * vocab)


CASES = (
    _case("every parameter, partial chunk", 1500),
    _case("equal logits", 40, edit=tie_logits),
    _case("NaN, +inf, -inf", 40, edit=spoil_logits),
    _case("fewer tokens than lanes", 5),
    _case("one token", 1),
    _case("every parameter, an odd vocabulary", 2049),
    _case("every parameter, several chunks", 12_000),
    _case("gpt-oss vocabulary", 201_088, _PLAIN),
    _case("gpt-oss vocabulary, cut off", 201_088, _CUT),
)

SAMPLE_TOKEN = Kernel(
    NAME,
    signature,
    sample_token_ref,
    CASES,
    (
        *sample_token_cpu.SCHEDULES,
        *sample_token_gpu.SCHEDULES,
        # One thread: only vocabularies that are too small for a chunk.
        replace(
            one_thread_an_item(partial(sample_token_cpu.rows, 1)),
            fits=lambda vocab: vocab < RECORD,
        ),
    ),
)
