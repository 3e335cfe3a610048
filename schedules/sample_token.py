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
values, in O(V) a step. On the CPU a step halves the range, and a row is one work item: results do
not depend on the number of threads. On GPUs a block of threads works on one row, and a step tries
seven thresholds at once; correct, not tuned.

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
from .math import KEY_MINUS_INF, KEY_PLUS_INF, exp_f32, order_key
from .rows import (
    THREADS,
    Columns,
    barrier,
    block_largest_finder,
    device_barrier,
    largest_finder,
    random_logits,
    row_lanes,
    spoil_logits,
    thread_columns,
    tie_logits,
    usable,
)

NAME = "sample_token"

ONE_BITS = 0x3F800000  # of 1 in float32

THREEFRY_PARITY = 0x1BD11BDA
# Rotations of the four rounds of a group, lowest byte first.
ROTATIONS_EVEN = 13 | 15 << 8 | 26 << 16 | 6 << 24
ROTATIONS_ODD = 17 | 29 << 8 | 16 << 16 | 24 << 24


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


def _middle(low: Any, high: Any) -> Any:
    """⌈(low + high) / 2⌉ of int32 expressions, without overflow."""
    return T.bitwise_or(low, high) - T.shift_right(T.bitwise_xor(low, high), 1)


@cache
def sample_token_items(*, vocab: int, lanes: int = 1) -> tvm.tirx.PrimFunc:
    """One item is one row; vectors are `lanes` wide."""
    every = Columns(vocab, lanes)
    chunks = every.chunks
    find_largest = largest_finder(vocab, lanes)

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
                if not usable(key[0], smallest[0]) or temperature[row] == T.float32(0):
                    for c in T.serial(chunks):
                        every.run(clear, c)
                    if usable(key[0], smallest[0]):
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


BLOCK = GpuTile(threads=THREADS)
WAYS = 8  # a step of the search on GPUs leaves one part of so many
STEPS = 11  # 8**11 > 2**32: as many leave one key


@cache
def sample_token_blocks(target: Target, *, vocab: int) -> tvm.tirx.PrimFunc:
    """For GPUs: one block of threads is one row.

    What is written as if by all threads is the same for all of them.
    """
    weights_barrier = device_barrier(target)
    every = thread_columns(vocab)
    find_largest = block_largest_finder(vocab)
    segment = -(-vocab // THREADS)  # columns in a row, for the draw

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
        for r in T.thread_binding(m, thread="blockIdx.x"):
            with T.sblock("row"):
                row = T.axis.spatial(m, r)
                T.reads(
                    logits[row, 0:vocab], temperature[row], top_k[row], top_p[row], min_p[row],
                    seed[row, 0:2], step[row],
                )  # fmt: skip
                T.writes(ids[row], weights[row, 0:vocab])
                keys = T.sblock_alloc_buffer((THREADS,), "int32", scope="shared")
                columns = T.sblock_alloc_buffer((THREADS,), "int32", scope="shared")
                parts = T.sblock_alloc_buffer((THREADS, WAYS - 1), "float32", scope="shared")
                totals = T.sblock_alloc_buffer((WAYS - 1,), "float32", scope="shared")
                before = T.sblock_alloc_buffer((THREADS,), "float32", scope="shared")
                for tx in T.thread_binding(THREADS, thread="threadIdx.x"):
                    with T.sblock("thread"):
                        T.reads(logits[row, 0:vocab], parts[0:THREADS, 0:7])
                        T.writes(ids[row], weights[row, 0:vocab], parts[0:THREADS, 0:7])
                        key = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        column = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        smallest = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        sums = T.sblock_alloc_buffer((WAYS - 1,), "float32", scope="local")
                        bounds = T.sblock_alloc_buffer((WAYS - 1,), "int32", scope="local")
                        low = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        high = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        left = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        enough = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        bound = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        running = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        total = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        chosen = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        drawn = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        word = T.sblock_alloc_buffer((2,), "uint32", scope="local")
                        cipher_key = T.sblock_alloc_buffer((3,), "uint32", scope="local")
                        turn = T.sblock_alloc_buffer((1,), "uint32", scope="local")

                        @T.inline
                        def look(c):
                            if order_key(logits[row, c]) > key[0]:
                                key[0] = order_key(logits[row, c])
                                column[0] = c
                            smallest[0] = T.min(smallest[0], order_key(logits[row, c]))

                        @T.inline
                        def count_keys(c):
                            for j in T.unroll(WAYS - 1):
                                sums[j] = sums[j] + T.Select(
                                    order_key(logits[row, c]) >= bounds[j],
                                    T.float32(1), T.float32(0),
                                )  # fmt: skip

                        @T.inline
                        def add_weights(c):
                            for j in T.unroll(WAYS - 1):
                                sums[j] = sums[j] + T.Select(
                                    T.reinterpret("int32", weights[row, c]) >= bounds[j],
                                    weights[row, c], T.float32(0),
                                )  # fmt: skip

                        @T.inline
                        def choose(c):
                            weights[row, c] = T.Select(c == drawn[0], T.float32(1), T.float32(0))

                        @T.inline
                        def weigh(c):  # what has a key of at least `low`
                            weights[row, c] = T.Select(
                                order_key(logits[row, c]) >= low[0],
                                exp_f32(
                                    (logits[row, c] - logits[row, column[0]]) / temperature[row]
                                ),
                                T.float32(0),
                            )

                        @T.inline
                        def cut(c):  # weights whose bits are less than those of `low`
                            weights[row, c] = T.Select(
                                T.reinterpret("int32", weights[row, c]) >= low[0],
                                weights[row, c], T.float32(0),
                            )  # fmt: skip

                        @T.inline
                        def sum_all(add):  # the block's sums above each of the bounds
                            for j in T.unroll(WAYS - 1):
                                sums[j] = T.float32(0)
                            every(add, tx)
                            for j in T.unroll(WAYS - 1):
                                parts[tx, j] = sums[j]
                            barrier()
                            # Thread j adds up the sums of bound j. All threads adding up all of
                            # them take seven times the reads and seven times the code.
                            if tx < WAYS - 1:
                                total[0] = T.float32(0)
                                for t in T.serial(THREADS):
                                    total[0] = total[0] + parts[t, tx]
                                totals[tx] = total[0]
                            barrier()
                            for j in T.unroll(WAYS - 1):
                                sums[j] = totals[j]

                        @T.inline
                        def search(add):  # the largest bound in [low, high] with sums enough
                            for _step in T.serial(STEPS):
                                for j in T.unroll(WAYS - 1):
                                    bounds[j] = low[0] + T.Cast(
                                        "int32",
                                        T.shift_right(
                                            (T.Cast("int64", high[0]) - T.Cast("int64", low[0]))
                                            * (j + 1) + 7,
                                            T.int64(3),
                                        ),
                                    )  # fmt: skip
                                sum_all(add)
                                left[0] = high[0]
                                high[0] = T.max(low[0], bounds[0] - 1)
                                for j in T.unroll(WAYS - 1):
                                    if sums[j] >= enough[0]:
                                        low[0] = bounds[j]
                                        if j == WAYS - 2:
                                            high[0] = left[0]
                                        else:
                                            high[0] = T.max(
                                                bounds[j], bounds[T.min(j + 1, WAYS - 2)] - 1
                                            )

                        smallest[0] = KEY_PLUS_INF
                        find_largest(look, tx, keys, columns, key, column)
                        keys[tx] = smallest[0]
                        barrier()
                        for t in T.serial(THREADS):
                            smallest[0] = T.min(smallest[0], keys[t])
                        drawn[0] = -1
                        if not usable(key[0], smallest[0]) or temperature[row] == T.float32(0):
                            if usable(key[0], smallest[0]):
                                drawn[0] = column[0]
                            every(choose, tx)
                        else:
                            # top_k: the largest key that at least k logits reach. Counts below
                            # 2^24 are exact in float32.
                            low[0] = KEY_MINUS_INF + 1
                            if top_k[row] > 0 and top_k[row] < vocab:
                                high[0] = key[0]
                                enough[0] = T.Cast("float32", top_k[row])
                                search(count_keys)
                            every(weigh, tx)
                            # top_p: the largest weight at which the sum down to it is enough.
                            # Weights are positive and at most 1, so their bits order them.
                            low[0] = 1
                            if top_p[row] < T.float32(1):
                                for j in T.unroll(WAYS - 1):
                                    bounds[j] = 1
                                sum_all(add_weights)
                                enough[0] = top_p[row] * sums[0]
                                high[0] = ONE_BITS
                                search(add_weights)
                            if min_p[row] > T.float32(0):
                                low[0] = T.max(
                                    low[0], T.min(T.reinterpret("int32", min_p[row]), ONE_BITS)
                                )
                            every(cut, tx)
                            weights_barrier()
                            # The draw: the last segment of columns, and in it the last token, that
                            # has weight and before which the running sum does not exceed u·total.
                            # Rounding cannot make it miss: there is always one.
                            total[0] = T.float32(0)
                            for i in T.serial(segment):
                                if tx * segment + i < vocab:
                                    total[0] = total[0] + weights[row, tx * segment + i]
                            parts[tx, 0] = total[0]
                            barrier()
                            total[0] = T.float32(0)
                            running[0] = T.float32(0)
                            for t in T.serial(THREADS):
                                running[0] = T.Select(t == tx, total[0], running[0])
                                total[0] = total[0] + parts[t, 0]
                            before[tx] = running[0]
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
                            # Each thread judges its own segment: where all judge all of them,
                            # an unrolled loop keeps 128 sums in registers, and spills.
                            keys[tx] = T.Select(
                                T.And(parts[tx, 0] > T.float32(0), running[0] <= bound[0]), tx, 0
                            )
                            barrier()
                            chosen[0] = 0
                            for t in T.serial(THREADS):
                                chosen[0] = T.max(chosen[0], keys[t])
                            running[0] = before[chosen[0]]
                            for i in T.serial(segment):
                                if chosen[0] * segment + i < vocab:
                                    if (
                                        weights[row, chosen[0] * segment + i] > T.float32(0)
                                        and running[0] <= bound[0]
                                    ):
                                        drawn[0] = chosen[0] * segment + i
                                    running[0] = running[0] + weights[row, chosen[0] * segment + i]
                        if tx == 0:
                            ids[row] = drawn[0]

    return main


@cache
def sample_token(target: Target, *, vocab: int) -> tvm.tirx.PrimFunc:
    """(logits, temperature, top_k, top_p, min_p, seed, step, ids, weights) -> None, scheduled for
    `target`."""
    if target.is_gpu:
        return scheduled(sample_token_blocks(target, vocab=vocab), NAME, "one block a row", BLOCK)
    return parallel_items(sample_token_items(vocab=vocab, lanes=row_lanes(target)), NAME)


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
    _case("gpt-oss vocabulary", 201_088, _PLAIN),
)

SAMPLE_TOKEN = Kernel(
    NAME,
    build=sample_token,
    items=sample_token_items,
    reference=sample_token_ref,
    outputs=lambda inputs, **_: [
        (inputs["temperature"].shape, "int32"),
        (inputs["logits"].shape, "float32"),
    ],
    cases=CASES,
)
