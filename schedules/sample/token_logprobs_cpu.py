"""`token_logprobs` on CPUs: a row is one work item."""

# ruff: noqa: B023 (T.inline functions are expanded where they are called, not closures)

from __future__ import annotations

import tvm

from ..cpu.items import items_in_parallel
from ..cpu.vectors import LANES
from ..kernel import T, Tensor, prim_func
from ..math import KEY_MINUS_INF, KEY_NONE, exp_f32, log_f32, order_key
from .rows import TOP, usable
from .rows_cpu import Columns, largest_finder


def _rows(arguments: tuple[Tensor, ...], *, vocab: int) -> tvm.tirx.PrimFunc:
    lanes = LANES
    every = Columns(vocab, lanes)
    chunks = every.chunks
    find_largest = largest_finder(vocab, lanes)

    @T.inline
    def body(m, logits, ids, chosen, top_ids, top_values):
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

    return prim_func(arguments, body)


SCHEDULES = (items_in_parallel(_rows),)
