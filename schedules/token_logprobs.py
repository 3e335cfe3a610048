"""Log-probabilities of the chosen tokens and of the 20 likeliest.

The log-softmax of the raw logits at the chosen ids and at the 20 largest. m rows are taken
together; V is the vocabulary.

    logits f32 [m, V], ids i32 [m] -> chosen f32 [m], top_ids i32 [m, 20], top_values f32 [m, 20]

Descending, lower ids first among equals. Tokens at -inf are not listed: places left over hold id
-1 and -inf. An id out of range gives -inf, as does everything in a row with a NaN or +inf logit,
or with nothing but -inf: one that sample_token refuses.

Logits are never sorted: each of the 20 is found by a pass over the row, in O(V). A row is one work
item: results do not depend on the number of threads. On GPUs a block of threads works on a row;
correct, not tuned.

Roofline: memory. V = 201,088 is 0.8 MB a row, which stays in the L2 cache over the passes.
"""

# ruff: noqa: B023 (T.inline functions are expanded where they are called, not closures)

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import tvm

from .kernel import Case, GpuTile, Kernel, T, Target, parallel_items, scheduled
from .math import KEY_MINUS_INF, KEY_NONE, KEY_PLUS_INF, exp_f32, log_f32, order_key
from .rows import (
    THREADS,
    Columns,
    barrier,
    block_largest_finder,
    largest_finder,
    random_logits,
    row_lanes,
    spoil_logits,
    thread_columns,
    tie_logits,
    usable,
)

NAME = "token_logprobs"

TOP = 20  # log-probabilities listed a row


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


@cache
def token_logprobs_items(*, vocab: int, lanes: int = 1) -> tvm.tirx.PrimFunc:
    """One item is one row; vectors are `lanes` wide."""
    every = Columns(vocab, lanes)
    chunks = every.chunks
    find_largest = largest_finder(vocab, lanes)

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
                chosen[row] = T.float32("-inf")
                for j in T.serial(TOP):
                    top_ids[row, j] = -1
                    top_values[row, j] = T.float32("-inf")
                if usable(key[0], smallest[0]):
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
                    if ids[row] >= 0 and ids[row] < vocab:  # noqa: SIM102 (`and` would read past the row)
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


BLOCK = GpuTile(threads=THREADS)


@cache
def token_logprobs_blocks(*, vocab: int) -> tvm.tirx.PrimFunc:
    """For GPUs: one block of threads is one row.

    What is written as if by all threads is the same for all of them.
    """
    every = thread_columns(vocab)
    find_largest = block_largest_finder(vocab)

    @T.prim_func(s_tir=True, private=True)
    def main(lp: T.handle, ip: T.handle, cp: T.handle, tp: T.handle, vp: T.handle):
        m = T.int64()
        logits = T.match_buffer(lp, (m, vocab), "float32")
        ids = T.match_buffer(ip, (m,), "int32")
        chosen = T.match_buffer(cp, (m,), "float32")
        top_ids = T.match_buffer(tp, (m, TOP), "int32")
        top_values = T.match_buffer(vp, (m, TOP), "float32")
        for r in T.thread_binding(m, thread="blockIdx.x"):
            with T.sblock("row"):
                row = T.axis.spatial(m, r)
                T.reads(logits[row, 0:vocab], ids[row])
                T.writes(chosen[row], top_ids[row, 0:TOP], top_values[row, 0:TOP])
                keys = T.sblock_alloc_buffer((THREADS,), "int32", scope="shared")
                columns = T.sblock_alloc_buffer((THREADS,), "int32", scope="shared")
                parts = T.sblock_alloc_buffer((THREADS,), "float32", scope="shared")
                for tx in T.thread_binding(THREADS, thread="threadIdx.x"):
                    with T.sblock("thread"):
                        T.reads(logits[row, 0:vocab], ids[row])
                        T.writes(chosen[row], top_ids[row, 0:TOP], top_values[row, 0:TOP])
                        key = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        column = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        smallest = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        last_key = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        last_column = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        largest = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        total = T.sblock_alloc_buffer((1,), "float32", scope="local")

                        @T.inline
                        def look(c):  # for the largest key
                            if order_key(logits[row, c]) > key[0]:
                                key[0] = order_key(logits[row, c])
                                column[0] = c
                            smallest[0] = T.min(smallest[0], order_key(logits[row, c]))

                        @T.inline
                        def look_on(c):  # for the largest key after the last, in order
                            if order_key(logits[row, c]) > key[0] and (
                                order_key(logits[row, c]) < last_key[0]
                                or (order_key(logits[row, c]) == last_key[0] and c > last_column[0])
                            ):
                                key[0] = order_key(logits[row, c])
                                column[0] = c

                        @T.inline
                        def add(c):
                            total[0] = total[0] + T.Select(
                                order_key(logits[row, c]) > KEY_MINUS_INF,
                                exp_f32(logits[row, c] - largest[0]),
                                T.float32(0),
                            )

                        smallest[0] = KEY_PLUS_INF
                        find_largest(look, tx, keys, columns, key, column)
                        keys[tx] = smallest[0]
                        barrier()
                        for t in T.serial(THREADS):
                            smallest[0] = T.min(smallest[0], keys[t])
                        if tx == 0:
                            chosen[row] = T.float32("-inf")
                            for j in T.serial(TOP):
                                top_ids[row, j] = -1
                                top_values[row, j] = T.float32("-inf")
                        if usable(key[0], smallest[0]):
                            largest[0] = logits[row, column[0]]
                            total[0] = T.float32(0)
                            every(add, tx)
                            parts[tx] = total[0]
                            total[0] = T.float32(0)
                            barrier()
                            for t in T.serial(THREADS):
                                total[0] = total[0] + parts[t]
                            total[0] = log_f32(total[0])
                            # Not in one `and`, which would read past the row.
                            if tx == 0 and ids[row] >= 0 and ids[row] < vocab:  # noqa: SIM102
                                if order_key(logits[row, ids[row]]) > KEY_MINUS_INF:
                                    chosen[row] = logits[row, ids[row]] - largest[0] - total[0]
                            last_key[0] = key[0]
                            last_column[0] = column[0]
                            for j in T.serial(TOP):
                                if tx == 0 and last_key[0] > KEY_MINUS_INF:
                                    top_ids[row, j] = last_column[0]
                                    top_values[row, j] = (
                                        logits[row, last_column[0]] - largest[0] - total[0]
                                    )
                                find_largest(look_on, tx, keys, columns, key, column)
                                last_key[0] = key[0]
                                last_column[0] = column[0]

    return main


@cache
def token_logprobs(target: Target, *, vocab: int) -> tvm.tirx.PrimFunc:
    """(logits, ids, chosen, top_ids, top_values) -> None, scheduled for `target`."""
    if target.is_gpu:
        return scheduled(token_logprobs_blocks(vocab=vocab), NAME, "one block a row", BLOCK)
    return parallel_items(token_logprobs_items(vocab=vocab, lanes=row_lanes(target)), NAME)


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
    build=token_logprobs,
    items=token_logprobs_items,
    reference=token_logprobs_ref,
    outputs=lambda inputs, **_: [
        (inputs["ids"].shape, "float32"),
        ((len(inputs["ids"]), TOP), "int32"),
        ((len(inputs["ids"]), TOP), "float32"),
    ],
    cases=CASES,
)
