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
token out of range are ignored, so lists may be padded with -1. Row i may take only the tokens
whose bit (bit t % 32 of word t // 32) is set in bitmask[mask_row[i]]; a mask_row out of range
takes all. Forbidden tokens get -inf, and -inf stays -inf under every edit.

**sample_token** draws one token a row.

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

**token_logprobs** is the log-softmax of the raw logits at the chosen ids and at the 20 largest.

    logits f32 [m, V], ids i32 [m] -> chosen f32 [m], top_ids i32 [m, 20], top_values f32 [m, 20]

Descending, lower ids first among equals. Tokens at -inf are not listed: places left over hold id
-1 and -inf. An id out of range gives -inf, as does everything in a row that sample_token refuses.

Roofline: memory. V = 201,088 is 0.8 MB a row, which stays in the L2 cache over the passes.
"""

# ruff: noqa: B023 (T.inline functions are expanded where they are called, not closures)

from __future__ import annotations

from collections.abc import Callable
from functools import cache
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

# Keys order float32 values as integers: NaN < -inf < … < -0 = 0 < … < +inf < NaN.
KEY_NONE = -(2**31)  # below every key
KEY_MINUS_INF = -0x7F800000
KEY_PLUS_INF = 0x7F800000
ONE_BITS = 0x3F800000

THREEFRY_PARITY = 0x1BD11BDA
# Rotations of the four rounds of a group, lowest byte first.
ROTATIONS_EVEN = 13 | 15 << 8 | 26 << 16 | 6 << 24
ROTATIONS_ODD = 17 | 29 << 8 | 16 << 16 | 24 << 24


def order_key(x: Any) -> Any:
    """The int32 that orders a float32 expression: sign and magnitude to two's complement."""
    bits = T.reinterpret("int32", x)
    return T.Select(bits < 0, 0 - T.bitwise_and(bits, T.int32(0x7FFFFFFF)), bits)


def _lanes(target: Target) -> int:
    return 1 if target.is_gpu else LANES


def _minus_inf() -> Any:
    return T.float32(float("-inf"))


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
        for rotation in (ROTATIONS_ODD if group % 2 else ROTATIONS_EVEN).to_bytes(4, "little"):
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


@cache
def adjust_logits(target: Target, *, vocab: int) -> tvm.tirx.PrimFunc:
    """(logits, edit_row, edit_token, edit_seen, edit_count, edit_bias, penalties, mask_row,
    bitmask, adjusted) -> None, scheduled for `target`."""
    schedule = bind_items if target.is_gpu else parallel_items
    items = adjust_logits_items(vocab=vocab, lanes=_lanes(target))
    return schedule(schedule(items, ADJUST_NAME, "item"), ADJUST_NAME, "edit")


@cache
def adjust_logits_items(*, vocab: int, lanes: int = 1) -> tvm.tirx.PrimFunc:
    """Block "item": 32 tokens of a row, masked. Block "edit": one edit of the result."""
    words = -(-vocab // 32)

    @T.inline
    def put(logits, out, bits, row, word, first, width):
        for lane in T.vectorized(width):
            out[row, word * 32 + first + lane] = T.Select(
                T.bitwise_and(T.shift_right(bits[0], first + lane), 1) != 0,
                logits[row, word * 32 + first + lane],
                _minus_inf(),
            )

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
                if mask_row[row] >= 0 and T.Cast("int64", mask_row[row]) < g:
                    bits[0] = bitmask[mask_row[row], word]
                for v in T.serial(T.min(vocab - word * 32, 32) // lanes):
                    put(logits, out, bits, row, word, v * lanes, lanes)
                for i in T.serial(T.min(vocab - word * 32, 32) % lanes):
                    put(logits, out, bits, row, word, (vocab % 32) // lanes * lanes + i, 1)
        # At least one item: a GPU cannot launch none.
        for i in T.serial(T.max(e, T.int64(1))):
            with T.sblock("edit"):
                edit = T.axis.spatial(T.max(e, T.int64(1)), i)
                T.reads(
                    edit_row[edit], edit_token[edit], edit_seen[edit], edit_count[edit],
                    edit_bias[edit], penalties[0:m, 0:3],
                )  # fmt: skip
                T.writes(out[0:m, 0:vocab])
                value = T.sblock_alloc_buffer((1,), "float32", scope="local")
                if edit < e:  # noqa: SIM102 (`and` would read the lists past their end)
                    if (
                        edit_row[edit] >= 0
                        and T.Cast("int64", edit_row[edit]) < m
                        and edit_token[edit] >= 0
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


class _Columns:
    """The columns of a row in chunks of CHUNK vectors; the last chunk has the left-over columns.

    Inside TVMScript, `run(step, c)` calls step(first, width) over chunk c: over whole vectors,
    then over single columns. The chunk lies in [begin(c), end(c)). Partial results have `lanes`
    places; single columns use the first. So the order of additions is fixed.
    """

    def __init__(self, vocab: int, lanes: int):
        vectors, rest = divmod(vocab, lanes)
        chunks = max(1, -(-vectors // CHUNK))

        @T.inline
        def columns(step, c):
            for v in T.serial(T.min(CHUNK, vectors - c * CHUNK)):
                step((c * CHUNK + v) * lanes, lanes)
            for i in T.serial(T.Select(c == chunks - 1, rest, 0)):
                step(vectors * lanes + i, 1)

        self.chunks = chunks
        self.run = columns
        self.begin = lambda c: c * (CHUNK * lanes)
        self.end = lambda c: T.Select(c == chunks - 1, vocab, (c + 1) * (CHUNK * lanes))


def _middle(low: Any, high: Any) -> Any:
    """⌈(low + high) / 2⌉ of int32 expressions, without overflow."""
    return T.bitwise_or(low, high) - T.shift_right(T.bitwise_xor(low, high), 1)


def _find_largest(vocab: int, lanes: int) -> Any:
    """Inlined: the largest key of a row and its first column; the smallest key, to see NaN.

    The scratch buffers are i32 [lanes]; results are in their first places.
    """
    every = _Columns(vocab, lanes)

    @T.inline
    def find(x, row, key, column, smallest):
        @T.inline
        def look(first, width):
            for lane in T.vectorized(width):
                column[lane] = T.Select(
                    order_key(x[row, first + lane]) > key[lane], first + lane, column[lane]
                )
                key[lane] = T.max(key[lane], order_key(x[row, first + lane]))
                smallest[lane] = T.min(smallest[lane], order_key(x[row, first + lane]))

        for lane in T.vectorized(lanes):
            key[lane] = KEY_NONE
            column[lane] = -1
            smallest[lane] = KEY_PLUS_INF
        for c in T.serial(every.chunks):
            every.run(look, c)
        for lane in T.serial(1, lanes):
            smallest[0] = T.min(smallest[0], smallest[lane])
            if key[lane] > key[0] or (key[lane] == key[0] and column[lane] < column[0]):
                key[0] = key[lane]
                column[0] = column[lane]

    return find


def _usable(largest: Any, smallest: Any) -> Any:
    """Whether a row has neither NaN nor +inf and something above -inf, by its extreme keys."""
    return T.And(T.And(largest < KEY_PLUS_INF, largest > KEY_MINUS_INF), smallest >= KEY_MINUS_INF)


# -------------------------------------------------------------------------------- sample_token


@T.inline
def _threefry(x, key, turn):
    """x u32 [2], the counter, becomes the random words; key u32 [3], the third is made here.

    turn u32 [1] is scratch: the rotation of a round, a byte of its group's four.
    """
    key[2] = T.bitwise_xor(T.bitwise_xor(key[0], key[1]), T.uint32(THREEFRY_PARITY))
    x[0] = x[0] + key[0]
    x[1] = x[1] + key[1]
    for group in T.serial(5):
        for i in T.serial(4):
            turn[0] = T.Select(group % 2 == 0, T.uint32(ROTATIONS_EVEN), T.uint32(ROTATIONS_ODD))
            turn[0] = T.bitwise_and(T.shift_right(turn[0], T.Cast("uint32", 8 * i)), T.uint32(31))
            x[0] = x[0] + x[1]
            x[1] = T.bitwise_xor(
                T.bitwise_or(
                    T.shift_left(x[1], turn[0]), T.shift_right(x[1], T.uint32(32) - turn[0])
                ),
                x[0],
            )
        x[0] = x[0] + key[(group + 1) % 3]
        x[1] = x[1] + key[(group + 2) % 3] + T.Cast("uint32", group + 1)


@cache
def sample_token(target: Target, *, vocab: int) -> tvm.tirx.PrimFunc:
    """(logits, temperature, top_k, top_p, min_p, seed, step, ids, weights) -> None, scheduled for
    `target`."""
    schedule = bind_items if target.is_gpu else parallel_items
    return schedule(sample_token_items(vocab=vocab, lanes=_lanes(target)), SAMPLE_NAME)


@cache
def sample_token_items(*, vocab: int, lanes: int = 1) -> tvm.tirx.PrimFunc:
    """One item is one row; vectors are `lanes` wide."""
    every = _Columns(vocab, lanes)
    chunks = every.chunks
    find_largest = _find_largest(vocab, lanes)

    @T.prim_func(s_tir=True, private=True)
    def main(
        lp: T.handle, tp: T.handle, kp: T.handle, pp: T.handle, np_: T.handle, sp: T.handle,
        cp: T.handle, ip: T.handle, wp: T.handle,
    ):  # fmt: skip
        m = T.int64()
        logits = T.match_buffer(lp, (m, vocab), "float32")
        temperature = T.match_buffer(tp, (m,), "float32")
        top_k = T.match_buffer(kp, (m,), "int32")
        top_p = T.match_buffer(pp, (m,), "float32")
        min_p = T.match_buffer(np_, (m,), "float32")
        seed = T.match_buffer(sp, (m, 2), "int32")
        step = T.match_buffer(cp, (m,), "int32")
        ids = T.match_buffer(ip, (m,), "int32")
        weights = T.match_buffer(wp, (m, vocab), "float32")
        for r in T.serial(m):
            with T.sblock("item"):
                row = T.axis.spatial(m, r)
                # `weights` is not listed as read: an item reads only what it wrote itself, and a
                # block that reads what it writes is not accepted as parallel.
                T.reads(
                    logits[row, 0:vocab], temperature[row], top_k[row], top_p[row], min_p[row],
                    seed[row, 0:2], step[row],
                )  # fmt: skip
                T.writes(ids[row], weights[row, 0:vocab])
                key = T.sblock_alloc_buffer((lanes,), "int32", scope="local")
                column = T.sblock_alloc_buffer((lanes,), "int32", scope="local")
                smallest = T.sblock_alloc_buffer((lanes,), "int32", scope="local")
                count = T.sblock_alloc_buffer((lanes,), "int32", scope="local")
                part = T.sblock_alloc_buffer((lanes,), "float32", scope="local")
                sums = T.sblock_alloc_buffer((chunks,), "float32", scope="local")
                low = T.sblock_alloc_buffer((1,), "int32", scope="local")
                high = T.sblock_alloc_buffer((1,), "int32", scope="local")
                middle = T.sblock_alloc_buffer((1,), "int32", scope="local")
                enough = T.sblock_alloc_buffer((1,), "float32", scope="local")
                total = T.sblock_alloc_buffer((1,), "float32", scope="local")
                running = T.sblock_alloc_buffer((1,), "float32", scope="local")
                chunk = T.sblock_alloc_buffer((1,), "int32", scope="local")
                bound = T.sblock_alloc_buffer((1,), "float32", scope="local")
                word = T.sblock_alloc_buffer((2,), "uint32", scope="local")
                cipher_key = T.sblock_alloc_buffer((3,), "uint32", scope="local")
                turn = T.sblock_alloc_buffer((1,), "uint32", scope="local")

                @T.inline
                def clear(first, width):
                    for lane in T.vectorized(width):
                        weights[row, first + lane] = T.float32(0)

                @T.inline
                def count_keys(first, width):  # of at least `middle`
                    for lane in T.vectorized(width):
                        count[lane] = count[lane] + T.Select(
                            order_key(logits[row, first + lane]) >= middle[0], 1, 0
                        )

                @T.inline
                def weigh(first, width):  # what has a key of at least `low`
                    for lane in T.vectorized(width):
                        weights[row, first + lane] = T.Select(
                            order_key(logits[row, first + lane]) >= low[0],
                            exp_f32(
                                (logits[row, first + lane] - logits[row, column[0]])
                                / temperature[row]
                            ),
                            T.float32(0),
                        )

                @T.inline
                def cut(first, width):  # weights whose bits are less than those of `low`
                    for lane in T.vectorized(width):
                        weights[row, first + lane] = T.Select(
                            T.reinterpret("int32", weights[row, first + lane]) >= low[0],
                            weights[row, first + lane],
                            T.float32(0),
                        )

                @T.inline
                def add(first, width):  # weights whose bits are at least `middle`
                    for lane in T.vectorized(width):
                        part[lane] = part[lane] + T.Select(
                            T.reinterpret("int32", weights[row, first + lane]) >= middle[0],
                            weights[row, first + lane],
                            T.float32(0),
                        )

                @T.inline
                def add_all():  # sums by chunk, and total, of weights of at least `middle`
                    total[0] = T.float32(0)
                    for c in T.serial(chunks):
                        for lane in T.vectorized(lanes):
                            part[lane] = T.float32(0)
                        every.run(add, c)
                        sums[c] = T.float32(0)
                        for lane in T.serial(lanes):
                            sums[c] = sums[c] + part[lane]
                        total[0] = total[0] + sums[c]

                find_largest(logits, row, key, column, smallest)
                ids[row] = -1
                if not _usable(key[0], smallest[0]) or temperature[row] == T.float32(0):
                    for c in T.serial(chunks):
                        every.run(clear, c)
                    if _usable(key[0], smallest[0]):
                        ids[row] = column[0]
                        weights[row, column[0]] = T.float32(1)
                else:
                    # top_k: the largest key that at least k logits reach.
                    low[0] = KEY_MINUS_INF + 1
                    if top_k[row] > 0 and top_k[row] < vocab:
                        high[0] = key[0]
                        for _bit in T.serial(32):
                            if low[0] < high[0]:
                                middle[0] = _middle(low[0], high[0])
                                for lane in T.vectorized(lanes):
                                    count[lane] = 0
                                for c in T.serial(chunks):
                                    every.run(count_keys, c)
                                for lane in T.serial(1, lanes):
                                    count[0] = count[0] + count[lane]
                                if count[0] >= top_k[row]:
                                    low[0] = middle[0]
                                else:
                                    high[0] = middle[0] - 1
                    for c in T.serial(chunks):
                        every.run(weigh, c)
                    # top_p: the largest weight at which the sum down to it is enough. Weights are
                    # positive and at most 1, so their bits order them.
                    low[0] = 1
                    if top_p[row] < T.float32(1):
                        middle[0] = 1
                        add_all()
                        enough[0] = top_p[row] * total[0]
                        high[0] = ONE_BITS
                        for _bit in T.serial(32):
                            if low[0] < high[0]:
                                middle[0] = _middle(low[0], high[0])
                                add_all()
                                if total[0] >= enough[0]:
                                    low[0] = middle[0]
                                else:
                                    high[0] = middle[0] - 1
                    if min_p[row] > T.float32(0):
                        low[0] = T.max(low[0], T.min(T.reinterpret("int32", min_p[row]), ONE_BITS))
                    for c in T.serial(chunks):
                        every.run(cut, c)
                    middle[0] = 1
                    add_all()
                    # The draw: the last chunk, and in it the last token, that has weight and
                    # before which the running sum does not exceed u·total. Rounding cannot make
                    # it miss: there is always one.
                    cipher_key[0] = T.Cast("uint32", seed[row, 0])
                    cipher_key[1] = T.Cast("uint32", seed[row, 1])
                    word[0] = T.Cast("uint32", step[row])
                    word[1] = T.uint32(0)
                    _threefry(word, cipher_key, turn)
                    bound[0] = (
                        T.Cast("float32", T.shift_right(word[0], T.uint32(8)))
                        * T.float32(2.0**-24)
                        * total[0]
                    )
                    running[0] = T.float32(0)
                    total[0] = T.float32(0)
                    chunk[0] = 0
                    for c in T.serial(chunks):
                        if sums[c] > T.float32(0) and total[0] <= bound[0]:
                            chunk[0] = c
                            running[0] = total[0]
                        total[0] = total[0] + sums[c]
                    for i in T.serial(every.end(chunk[0]) - every.begin(chunk[0])):
                        if (
                            weights[row, every.begin(chunk[0]) + i] > T.float32(0)
                            and running[0] <= bound[0]
                        ):
                            ids[row] = every.begin(chunk[0]) + i
                        running[0] = running[0] + weights[row, every.begin(chunk[0]) + i]

    return main


# ------------------------------------------------------------------------------ token_logprobs


@cache
def token_logprobs(target: Target, *, vocab: int) -> tvm.tirx.PrimFunc:
    """(logits, ids, chosen, top_ids, top_values) -> None, scheduled for `target`."""
    schedule = bind_items if target.is_gpu else parallel_items
    return schedule(token_logprobs_items(vocab=vocab, lanes=_lanes(target)), LOGPROBS_NAME)


@cache
def token_logprobs_items(*, vocab: int, lanes: int = 1) -> tvm.tirx.PrimFunc:
    """One item is one row; vectors are `lanes` wide."""
    every = _Columns(vocab, lanes)
    chunks = every.chunks
    find_largest = _find_largest(vocab, lanes)

    @T.prim_func(s_tir=True, private=True)
    def main(lp: T.handle, ip: T.handle, cp: T.handle, tp: T.handle, vp: T.handle):
        m = T.int64()
        logits = T.match_buffer(lp, (m, vocab), "float32")
        ids = T.match_buffer(ip, (m,), "int32")
        chosen = T.match_buffer(cp, (m,), "float32")
        top_ids = T.match_buffer(tp, (m, TOP), "int32")
        top_values = T.match_buffer(vp, (m, TOP), "float32")
        for r in T.serial(m):
            with T.sblock("item"):
                row = T.axis.spatial(m, r)
                T.reads(logits[row, 0:vocab], ids[row])
                T.writes(chosen[row], top_ids[row, 0:TOP], top_values[row, 0:TOP])
                key = T.sblock_alloc_buffer((lanes,), "int32", scope="local")
                column = T.sblock_alloc_buffer((lanes,), "int32", scope="local")
                smallest = T.sblock_alloc_buffer((lanes,), "int32", scope="local")
                last_key = T.sblock_alloc_buffer((1,), "int32", scope="local")
                last_column = T.sblock_alloc_buffer((1,), "int32", scope="local")
                part = T.sblock_alloc_buffer((lanes,), "float32", scope="local")
                largest = T.sblock_alloc_buffer((1,), "float32", scope="local")
                total = T.sblock_alloc_buffer((1,), "float32", scope="local")

                @T.inline
                def add(first, width):
                    for lane in T.vectorized(width):
                        part[lane] = part[lane] + T.Select(
                            order_key(logits[row, first + lane]) > KEY_MINUS_INF,
                            exp_f32(logits[row, first + lane] - largest[0]),
                            T.float32(0),
                        )

                @T.inline
                def look(first, width):  # for the largest key after the last, in order
                    for lane in T.vectorized(width):
                        smallest[lane] = T.Select(
                            T.Or(
                                order_key(logits[row, first + lane]) < last_key[0],
                                T.And(
                                    order_key(logits[row, first + lane]) == last_key[0],
                                    first + lane > last_column[0],
                                ),
                            ),
                            order_key(logits[row, first + lane]),
                            KEY_NONE,
                        )
                        column[lane] = T.Select(
                            smallest[lane] > key[lane], first + lane, column[lane]
                        )
                        key[lane] = T.max(key[lane], smallest[lane])

                find_largest(logits, row, key, column, smallest)
                chosen[row] = _minus_inf()
                for j in T.serial(TOP):
                    top_ids[row, j] = -1
                    top_values[row, j] = _minus_inf()
                if _usable(key[0], smallest[0]):
                    largest[0] = logits[row, column[0]]
                    total[0] = T.float32(0)
                    for c in T.serial(chunks):
                        for lane in T.vectorized(lanes):
                            part[lane] = T.float32(0)
                        every.run(add, c)
                        for lane in T.serial(1, lanes):
                            part[0] = part[0] + part[lane]
                        total[0] = total[0] + part[0]
                    total[0] = log_f32(total[0])
                    if ids[row] >= 0 and ids[row] < vocab:  # noqa: SIM102 (as above)
                        if order_key(logits[row, ids[row]]) > KEY_MINUS_INF:
                            chosen[row] = logits[row, ids[row]] - largest[0] - total[0]
                    last_key[0] = key[0]
                    last_column[0] = column[0]
                    for j in T.serial(TOP):
                        if last_key[0] > KEY_MINUS_INF:
                            top_ids[row, j] = last_column[0]
                            top_values[row, j] = logits[row, last_column[0]] - largest[0] - total[0]
                            for lane in T.vectorized(lanes):
                                key[lane] = KEY_NONE
                                column[lane] = -1
                            for c in T.serial(chunks):
                                every.run(look, c)
                            for lane in T.serial(1, lanes):
                                if key[lane] > key[0] or (
                                    key[lane] == key[0] and column[lane] < column[0]
                                ):
                                    key[0] = key[lane]
                                    column[0] = column[lane]
                            last_key[0] = key[0]
                            last_column[0] = column[0]

    return main


# --------------------------------------------------------------------------------------- cases


def _logits(rng: np.random.Generator, m: int, vocab: int, spike: float = 4.0) -> np.ndarray:
    return rng.standard_normal((m, vocab), dtype=np.float32) * np.float32(spike)


def _adjust_case(name: str, m: int, vocab: int, edits: int, masks: int) -> Case:
    def inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
        logits = _logits(rng, m, vocab)
        logits[:, vocab // 2] = -np.inf
        place = rng.choice(m * vocab, edits, replace=False)
        row, token = place // vocab, place % vocab
        if edits > 3:
            row[-3:], token[-3:] = (-1, 0, m), (0, vocab, 0)  # padding of three kinds
        return {
            "logits": logits,
            "edit_row": row.astype(np.int32),
            "edit_token": token.astype(np.int32),
            "edit_seen": rng.integers(0, 2, edits, dtype=np.int32),
            "edit_count": rng.integers(0, 3, edits, dtype=np.int32),
            "edit_bias": rng.standard_normal(edits, dtype=np.float32),
            "penalties": rng.uniform(0.5, 2, (m, 3)).astype(np.float32),
            "mask_row": rng.integers(-1, masks, m, dtype=np.int32),
            "bitmask": rng.integers(-(2**31), 2**31, (masks, -(-vocab // 32)), dtype=np.int32),
        }

    return Case(name, {"vocab": vocab}, inputs, tolerance=1e-6, bytes=8 * m * vocab + 20 * edits)


ADJUST_CASES = (
    _adjust_case("edits, masks and padding", 4, 201, edits=300, masks=3),
    _adjust_case("no edits, no masks", 2, 64, edits=0, masks=0),
    _adjust_case("fewer tokens than lanes", 3, 7, edits=10, masks=1),
    _adjust_case("every token of a row edited", 1, 97, edits=97, masks=1),
    _adjust_case("gpt-oss vocabulary", 1, 201_088, edits=1000, masks=1),
)

# (temperature, top_k, top_p, min_p) of the rows of a case
_PLAIN = ((1.0, 0, 1.0, 0.0),)
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


def _sample_case(
    name: str,
    vocab: int,
    rows: tuple[tuple[float, int, float, float], ...] = _ALL,
    edit: Callable[[np.ndarray], None] = lambda logits: None,
) -> Case:
    """One row for each set of parameters; `edit` changes the logits in place."""

    def inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
        logits = _logits(rng, len(rows), vocab)
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


def _tie(logits: np.ndarray) -> None:
    np.rint(logits, out=logits)
    logits[logits == 0] = -0.0
    logits[:, ::2] += 0.0  # half of the zeros become +0


def _spoil(logits: np.ndarray) -> None:
    """Rows of every kind that has no distribution, and some with much at -inf."""
    logits[0, 3] = np.nan
    logits[1, 3] = -np.nan
    logits[2, 3] = np.inf
    logits[3] = -np.inf
    logits[4:7, 1:] = -np.inf
    logits[7, ::2] = -np.inf
    logits[8] = np.nan


SAMPLE_CASES = (
    _sample_case("every parameter, partial chunk", 1500),
    _sample_case("equal logits", 40, edit=_tie),
    _sample_case("NaN, +inf, -inf", 40, edit=_spoil),
    _sample_case("fewer tokens than lanes", 5),
    _sample_case("one token", 1),
    _sample_case("gpt-oss vocabulary", 201_088, _PLAIN),
)


def _logprobs_case(
    name: str,
    m: int,
    vocab: int,
    ids: list[int],
    spike: float = 4.0,
    edit: Callable[[np.ndarray], None] = lambda logits: None,
) -> Case:
    def inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
        logits = _logits(rng, m, vocab, spike)
        edit(logits)
        return {"logits": logits, "ids": np.resize(ids, m).astype(np.int32)}

    return Case(name, {"vocab": vocab}, inputs, bytes=4 * m * (vocab + 2 + 2 * TOP))


LOGPROBS_CASES = (
    _logprobs_case("partial chunk, ids out of range", 4, 1500, [1499, 0, -1, 1500]),
    _logprobs_case("equal logits", 3, 40, [7], edit=_tie),
    _logprobs_case("NaN, +inf, -inf", 9, 40, [0, 1], edit=_spoil),
    _logprobs_case("fewer tokens than are listed", 2, 5, [4]),
    _logprobs_case("logits in the thousands", 2, 300, [11], spike=4000.0),
    _logprobs_case("gpt-oss vocabulary", 1, 201_088, [100_000]),
)


ADJUST_LOGITS = Kernel(
    ADJUST_NAME,
    build=adjust_logits,
    items=adjust_logits_items,
    reference=adjust_logits_ref,
    outputs=lambda inputs, **_: [(inputs["logits"].shape, "float32")],
    cases=ADJUST_CASES,
)

SAMPLE_TOKEN = Kernel(
    SAMPLE_NAME,
    build=sample_token,
    items=sample_token_items,
    reference=sample_token_ref,
    outputs=lambda inputs, **_: [
        (inputs["temperature"].shape, "int32"),
        (inputs["logits"].shape, "float32"),
    ],
    cases=SAMPLE_CASES,
)

TOKEN_LOGPROBS = Kernel(
    LOGPROBS_NAME,
    build=token_logprobs,
    items=token_logprobs_items,
    reference=token_logprobs_ref,
    outputs=lambda inputs, **_: [
        (inputs["ids"].shape, "float32"),
        ((len(inputs["ids"]), TOP), "int32"),
        ((len(inputs["ids"]), TOP), "float32"),
    ],
    cases=LOGPROBS_CASES,
)
