"""`sample_token` on CPUs: a row is one work item, a step of a search halves the range.

So results do not depend on the number of threads.
"""

# ruff: noqa: B023 (T.inline functions are expanded where they are called, not closures)

from __future__ import annotations

from functools import partial
from typing import Any

import tvm

from ..cpu.items import items_in_parallel
from ..cpu.vectors import LANES
from ..kernel import T, Tensor, prim_func
from ..math import KEY_MINUS_INF, ONE_BITS, exp_f32, order_key
from .rows import usable
from .rows_cpu import Columns, largest_finder
from .threefry import threefry


def _middle(low: Any, high: Any) -> Any:
    """⌈(low + high) / 2⌉ of int32 expressions, without overflow."""
    return T.bitwise_or(low, high) - T.shift_right(T.bitwise_xor(low, high), 1)


def rows(lanes: int, arguments: tuple[Tensor, ...], *, vocab: int) -> tvm.tirx.PrimFunc:
    """One item is a row; vectors are `lanes` wide."""
    every = Columns(vocab, lanes)
    chunks = every.chunks
    find_largest = largest_finder(vocab, lanes)

    @T.inline
    def body(m, logits, temperature, top_k, top_p, min_p, seed, step, ids, weights):
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
                    threefry(word, cipher_key, turn)
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

    return prim_func(arguments, body)


SCHEDULES = (items_in_parallel(partial(rows, LANES)),)
