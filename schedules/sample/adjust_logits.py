"""Edits of the logits before a token is drawn: penalties, biases, masks.

adjust_logits copies the logits and edits the copy. m rows are sampled together; V is the
vocabulary.

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

32 tokens of a row are one work item, and so is an edit: results do not depend on the number of
threads. On GPUs one thread works on one item; correct, not tuned.

Roofline: memory, 8·V bytes a row.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import tvm

from ..cpu.items import items_in_parallel
from ..cpu.vectors import LANES
from ..gpu.items import one_thread_an_item
from ..kernel import Case, Kernel, Signature, Size, T, Tensor, f32, i32, prim_func
from ..math import KEY_MINUS_INF, order_key
from .rows import random_logits

NAME = "adjust_logits"


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


def signature(*, vocab: int) -> Signature:
    m, e, g = Size("m"), Size("e"), Size("g")
    return Signature(
        (
            f32("logits", m, vocab),
            *(i32(f"edit_{name}", e) for name in ("row", "token", "seen", "count")),
            f32("edit_bias", e),
            f32("penalties", m, 3),
            i32("mask_row", m),
            i32("bitmask", g, -(-vocab // 32)),
        ),
        (f32("adjusted", m, vocab),),
    )


def _items(lanes: int, arguments: tuple[Tensor, ...], *, vocab: int) -> tvm.tirx.PrimFunc:
    """Block "item": 32 tokens of a row, masked. Block "edit": one edit of the result."""
    words = -(-vocab // 32)

    @T.inline
    def put(logits, out, bits, row, word, first, width):
        for lane in T.vectorized(width):
            out[row, word * 32 + first + lane] = T.Select(
                T.bitwise_and(T.shift_right(bits[0], first + lane), 1) != 0,
                logits[row, word * 32 + first + lane],
                T.float32("-inf"),
            )

    @T.inline
    def body(
        m, e, g, logits, edit_row, edit_token, edit_seen, edit_count, edit_bias, penalties,
        mask_row, bitmask, adjusted,
    ):  # fmt: skip

        for r, w in T.grid(m, words):
            with T.sblock("item"):
                row, word = T.axis.remap("SS", [r, w])
                bits = T.sblock_alloc_buffer((1,), "int32", scope="local")
                bits[0] = -1
                if mask_row[row] >= 0 and T.Cast("int64", mask_row[row]) < g:
                    bits[0] = bitmask[mask_row[row], word]
                for v in T.serial(T.min(vocab - word * 32, 32) // lanes):
                    put(logits, adjusted, bits, row, word, v * lanes, lanes)
                for i in T.serial(T.min(vocab - word * 32, 32) % lanes):
                    put(logits, adjusted, bits, row, word, (vocab % 32) // lanes * lanes + i, 1)
        # At least one item: a GPU cannot launch none.
        for i in T.serial(T.max(e, T.int64(1))):
            with T.sblock("edit"):
                edit = T.axis.spatial(T.max(e, T.int64(1)), i)
                T.reads(
                    edit_row[edit], edit_token[edit], edit_seen[edit], edit_count[edit],
                    edit_bias[edit], penalties[0:m, 0:3],
                )  # fmt: skip
                T.writes(adjusted[0:m, 0:vocab])
                value = T.sblock_alloc_buffer((1,), "float32", scope="local")
                if edit < e:  # noqa: SIM102 (`and` would read the lists past their end)
                    if (
                        edit_row[edit] >= 0
                        and T.Cast("int64", edit_row[edit]) < m
                        and edit_token[edit] >= 0
                        and edit_token[edit] < vocab
                    ):
                        value[0] = adjusted[edit_row[edit], edit_token[edit]]
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
                            adjusted[edit_row[edit], edit_token[edit]] = value[0] + edit_bias[edit]

    return prim_func(arguments, body)


def _case(name: str, m: int, vocab: int, edits: int, masks: int) -> Case:
    def inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
        logits = random_logits(rng, m, vocab)
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


CASES = (
    _case("edits, masks and padding", 4, 201, edits=300, masks=3),
    _case("no edits, no masks", 2, 64, edits=0, masks=0),
    _case("fewer tokens than lanes", 3, 7, edits=10, masks=1),
    _case("every token of a row edited", 1, 97, edits=97, masks=1),
    _case("gpt-oss vocabulary", 1, 201_088, edits=1000, masks=1),
)

ADJUST_LOGITS = Kernel(
    NAME,
    signature,
    adjust_logits_ref,
    CASES,
    (
        items_in_parallel(partial(_items, LANES), ("item", "edit")),
        one_thread_an_item(partial(_items, 1), ("item", "edit")),
    ),
)
