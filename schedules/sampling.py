"""From logits to token ids: edits, the choice of one token, log-probabilities.

m rows are sampled together; V is the vocabulary. Logits are never sorted: every threshold is
found by bisection over the integers that order float32 values, in O(V) a step. Conditions are
decided on those integers, so that a compiler which assumes that NaN and infinity do not occur
cannot change them. Rows are independent and each is one work item: results do not depend on the
number of threads. On GPUs one thread works on one row; correct, not tuned.

**adjust_logits** copies the logits and edits the copy.

    logits f32 [m, V]
    edit_row, edit_token, edit_seen, edit_count i32 [e], edit_bias f32 [e]
    penalties f32 [m, 3]                repetition (1 = off), presence, frequency (0 = off)
    mask_row i32 [m], bitmask i32 [g, ceil(V/32)]
    -> adjusted f32 [m, V]

An edit says of one token of one row whether it occurred in prompt or output (seen), how often in
the output (count), and its bias. In this order: if seen, a positive logit is divided by the
repetition penalty and another multiplied by it; frequency·count and, where count > 0, presence
are subtracted; bias is added. A row and token may occur in one edit only. Edits with a row or a
token out of range are ignored, so lists may be padded with −1. Row i may take only the tokens
whose bit (bit t % 32 of word t // 32) is set in bitmask[mask_row[i]]; a mask_row out of range
takes all. Forbidden tokens get −inf, and −inf stays −inf under every edit.

**sample_token** draws one token a row.

    logits f32 [m, V], temperature f32 [m], top_k i32 [m], top_p f32 [m], min_p f32 [m],
    seed i32 [m, 2], step i32 [m]
    -> ids i32 [m], weights f32 [m, V]

Temperature 0 takes the largest logit, the lowest id of equals. Otherwise a token's weight is
exp((logit − max logit) / temperature), and weights become 0 outside of, one after the other,

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
also the kernel's working memory. A row with a NaN or +inf logit, or with nothing but −inf, gets
id −1 and weights 0.

**token_logprobs** is the log-softmax of the raw logits at the chosen ids and at the 20 largest.

    logits f32 [m, V], ids i32 [m] -> chosen f32 [m], top_ids i32 [m, 20], top_values f32 [m, 20]

Descending, lower ids first among equals. Tokens at −inf are not listed: places left over hold id
−1 and −inf. An id out of range gives −inf, as does everything in a row that sample_token refuses.

Roofline: memory. V = 201,088 is 0.8 MB a row, which stays in the L2 cache over the passes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import tvm

from .kernel import Case, Kernel, T, Target, bind_items, parallel_items
from .math import exp_f32, log_f32

ADJUST_NAME = "adjust_logits"
SAMPLE_NAME = "sample_token"
LOGPROBS_NAME = "token_logprobs"

LANES = 16
CHUNK = 64  # vectors summed before their sum joins the row's: short sums lose less
TOP = 20  # log-probabilities listed a row

# Keys order float32 values as integers: NaN < −inf < … < −0 = 0 < … < +inf < NaN.
KEY_NONE = -(2**31)  # below every key
KEY_MINUS_INF = -0x7F800000
KEY_PLUS_INF = 0x7F800000
ONE_BITS = 0x3F800000

THREEFRY_PARITY = 0x1BD11BDA


def order_key(x: Any) -> Any:
    """The int32 that orders a float32 expression: sign and magnitude to two's complement."""
    bits = T.reinterpret("int32", x)
    return T.Select(bits < 0, 0 - T.bitwise_and(bits, T.int32(0x7FFFFFFF)), bits)


def _minus_inf() -> Any:
    return T.reinterpret("float32", T.int32(-0x800000))


# ---------------------------------------------------------------------------------- references


def adjust_logits_ref(
    logits: np.ndarray,
    edit_row: np.ndarray,
    edit_token: np.ndarray,
    edit_seen: np.ndarray,
    edit_count: np.ndarray,
    edit_bias: np.ndarray,
    penalties: np.ndarray,
    mask_row: np.ndarray,
    bitmask: np.ndarray,
    **_static: Any,
) -> tuple[np.ndarray]:
    """The module's rules in float64."""
    m, vocab = logits.shape
    out = logits.astype(np.float64)
    for row, token, seen, count, bias in zip(
        edit_row, edit_token, edit_seen, edit_count, edit_bias, strict=True
    ):
        if not (0 <= row < m and 0 <= token < vocab) or out[row, token] == -np.inf:
            continue
        repetition, presence, frequency = penalties[row].astype(np.float64)
        value = out[row, token]
        if seen:
            value = value / repetition if value > 0 else value * repetition
        out[row, token] = value - frequency * count - presence * (count > 0) + bias
    for row, mask in enumerate(mask_row):
        if 0 <= mask < len(bitmask):
            bits = np.unpackbits(bitmask[mask].view(np.uint8), bitorder="little")[:vocab]
            out[row, bits == 0] = -np.inf
    return (out,)


def threefry_ref(key: np.ndarray, counter: np.ndarray) -> np.ndarray:
    """Threefry-2x32-20 of u32 [2] and u32 [2] -> u32 [2]."""
    k = [int(key[0]), int(key[1]), int(key[0]) ^ int(key[1]) ^ THREEFRY_PARITY]
    a, b = (int(counter[0]) + k[0]) % 2**32, (int(counter[1]) + k[1]) % 2**32
    for group in range(5):
        for rotation in (13, 15, 26, 6) if group % 2 == 0 else (17, 29, 16, 24):
            a = (a + b) % 2**32
            b = ((b << rotation | b >> (32 - rotation)) % 2**32) ^ a
        a = (a + k[(group + 1) % 3]) % 2**32
        b = (b + k[(group + 2) % 3] + group + 1) % 2**32
    return np.array([a, b], np.uint32)


def uniform_ref(seed: np.ndarray, step: int) -> float:
    """The uniform number that sample_token draws with; seed i32 [2]."""
    counter = np.array([step, 0], np.int32).view(np.uint32)
    return int(threefry_ref(seed.view(np.uint32), counter)[0] >> 8) / 2**24


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


# ------------------------------------------------------------------------------ adjust_logits


@lru_cache(maxsize=None)
def adjust_logits(target: Target, *, vocab: int) -> tvm.tirx.PrimFunc:
    """(logits, edit_row, edit_token, edit_seen, edit_count, edit_bias, penalties, mask_row,
    bitmask, adjusted) -> None, scheduled for `target`."""
    schedule = bind_items if target.is_gpu else parallel_items
    items = _adjust_items(vocab, 1 if target.is_gpu else LANES)
    return schedule(schedule(items, ADJUST_NAME, "item"), ADJUST_NAME, "edit")


def _adjust_items(vocab: int, lanes: int) -> tvm.tirx.PrimFunc:
    """Block "item": 32 tokens of a row, masked. Block "edit": one edit of the result."""
    words = -(-vocab // 32)

    @T.prim_func(s_tir=True, private=True)
    def main(
        lp: T.handle, erp: T.handle, etp: T.handle, esp: T.handle, ecp: T.handle, ebp: T.handle,
        pp: T.handle, mp: T.handle, bp: T.handle, op: T.handle,
    ):  # fmt: skip
        m, e, g = T.int64(), T.int64(), T.int64()
        logits = T.match_buffer(lp, (m, vocab), "float32")
        edit_row = T.match_buffer(erp, (e,), "int32")
        edit_token = T.match_buffer(etp, (e,), "int32")
        edit_seen = T.match_buffer(esp, (e,), "int32")
        edit_count = T.match_buffer(ecp, (e,), "int32")
        edit_bias = T.match_buffer(ebp, (e,), "float32")
        penalties = T.match_buffer(pp, (m, 3), "float32")
        mask_row = T.match_buffer(mp, (m,), "int32")
        bitmask = T.match_buffer(bp, (g, words), "int32")
        out = T.match_buffer(op, (m, vocab), "float32")

        for r, w in T.grid(m, words):
            with T.sblock("item"):
                row, word = T.axis.remap("SS", [r, w])
                bits = T.sblock_alloc_buffer((1,), "int32", scope="local")
                bits[0] = -1
                if 0 <= mask_row[row] and T.Cast("int64", mask_row[row]) < g:
                    bits[0] = bitmask[mask_row[row], word]
                for v in T.serial(T.min(vocab - word * 32, 32) // lanes):
                    for lane in T.vectorized(lanes):
                        out[row, word * 32 + v * lanes + lane] = T.Select(
                            T.bitwise_and(T.shift_right(bits[0], v * lanes + lane), 1) != 0,
                            logits[row, word * 32 + v * lanes + lane],
                            _minus_inf(),
                        )
                for i in T.serial(T.min(vocab - word * 32, 32) % lanes):
                    out[row, T.min(word * 32 + 32, vocab) - 1 - i] = T.Select(
                        T.bitwise_and(
                            T.shift_right(
                                bits[0], T.min(word * 32 + 32, vocab) - 1 - i - word * 32
                            ),
                            1,
                        )
                        != 0,
                        logits[row, T.min(word * 32 + 32, vocab) - 1 - i],
                        _minus_inf(),
                    )
        # At least one item: a GPU cannot launch none.
        for i in T.serial(T.max(e, T.int64(1))):
            with T.sblock("edit"):
                edit = T.axis.spatial(T.max(e, T.int64(1)), i)
                value = T.sblock_alloc_buffer((1,), "float32", scope="local")
                if edit < e:
                    if (
                        0 <= edit_row[edit]
                        and T.Cast("int64", edit_row[edit]) < m
                        and 0 <= edit_token[edit]
                        and edit_token[edit] < vocab
                    ):
                        value[0] = out[edit_row[edit], edit_token[edit]]
                        if order_key(value[0]) != KEY_MINUS_INF:
                            if edit_seen[edit] != 0:
                                if value[0] > T.float32(0):
                                    value[0] = value[0] / penalties[edit_row[edit], 0]
                                else:
                                    value[0] = value[0] * penalties[edit_row[edit], 0]
                            if edit_count[edit] > 0:
                                value[0] = (
                                    value[0]
                                    - penalties[edit_row[edit], 2]
                                    * T.Cast("float32", edit_count[edit])
                                    - penalties[edit_row[edit], 1]
                                )
                            out[edit_row[edit], edit_token[edit]] = value[0] + edit_bias[edit]

    return main


# ------------------------------------------------------------- passes over the logits of a row


class _Row:
    """Loops over the columns of one row, as inlined statements.

    `lanes` columns go together; what is left over goes one by one through lane 0. The order of
    additions is fixed by V and `lanes`.
    """

    def __init__(self, vocab: int, lanes: int):
        self.vocab = vocab
        self.lanes = lanes
        self.vectors = vocab // lanes
        self.rest = vocab % lanes
        self.chunks = -(-self.vectors // CHUNK)
        self.sums = self.chunks + 1  # the last is that of the rest


def _inlines(vocab: int, lanes: int) -> dict[str, Callable[..., Any]]:
    raise NotImplementedError
