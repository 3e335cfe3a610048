"""Experts' products for many tokens on GPUs whose matrix units read shared memory.

The launches:

    sort      the slots by expert
    product   a block takes some rows of an expert's weights and some of its tokens (gpu/product.py)
    mixture   of the second half: a token's weighted outputs
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..gpu.barriers import barrier
from ..gpu.matrices import Matrices
from ..gpu.product import ManyTiles, ProductColumns, ProductRows, product, products
from ..kernel import Size, T, Tensor, i32

THREADS = 128  # of a block that sorts or mixes: what every GPU has
FOUR = 4  # numbers that are read at once
MANY = ManyTiles()


def scratch(slots: Size, experts: int) -> tuple[Tensor, ...]:
    """What a product needs: expert e's slots are by_expert[begins[e] : begins[e + 1]]."""
    return (i32("begins", experts + 1), i32("by_expert", slots))


def sorting(experts: int, top_k: int) -> Callable[..., Any]:
    """The T.inline launch(n, ids, begins, by_expert).

    A block for each expert counts and places its slots. A thread has every 128th of all slots, so
    that an expert's are in the order of threads, and of each thread's own: always the same one.
    """

    @T.inline
    def sort(expert, tx, slots, ids, begins, by_expert):
        # Of each thread: slots of experts before this one, and slots of this one.
        before = T.sblock_alloc_buffer((THREADS,), "int32", scope="shared")
        same = T.sblock_alloc_buffer((THREADS,), "int32", scope="shared")
        count = T.sblock_alloc_buffer((2,), "int32", scope="local")
        four = T.sblock_alloc_buffer((2 * FOUR,), "int32", scope="local")
        for i in T.unroll(2):
            count[i] = 0
        for i in T.serial(T.ceildiv(slots, THREADS)):
            slot: T.let = i * THREADS + tx
            real: T.let = T.min(slot, slots - 1)
            id_: T.let = T.Select(slot < slots, ids[real // top_k, real % top_k], experts)
            count[0] = count[0] + T.Select(id_ < expert, 1, 0)
            count[1] = count[1] + T.Select(id_ == expert, 1, 0)
        before[tx] = count[0]
        same[tx] = count[1]
        barrier()
        count[0] = 0  # where the expert's begin
        count[1] = 0  # and the thread's among them
        for j in T.serial(THREADS // FOUR):
            four[T.ramp(0, 1, FOUR)] = before[T.ramp(j * FOUR, 1, FOUR)]
            four[T.ramp(FOUR, 1, FOUR)] = same[T.ramp(j * FOUR, 1, FOUR)]
            for i in T.unroll(FOUR):
                count[0] = count[0] + four[i]
                count[1] = count[1] + T.Select(j * FOUR + i < tx, four[FOUR + i], 0)
        if tx == 0:
            begins[expert] = count[0]
            if expert == experts - 1:
                begins[experts] = slots
        count[0] = count[0] + count[1]
        for i in T.serial(T.ceildiv(slots, THREADS)):
            slot: T.let = i * THREADS + tx
            real: T.let = T.min(slot, slots - 1)
            if ids[real // top_k, real % top_k] == expert and slot < slots:
                by_expert[count[0]] = slot
                count[0] = count[0] + 1

    @T.inline
    def launch(n, ids, begins, by_expert):
        for block in T.thread_binding(experts, thread="blockIdx.x"):
            for thread in T.thread_binding(THREADS, thread="threadIdx.x"):
                with T.sblock("sort"):
                    expert, tx = T.axis.remap("SS", [block, thread])
                    T.reads(ids[0:n, 0:top_k])
                    T.writes(begins[0 : experts + 1], by_expert[0 : n * top_k])
                    sort(expert, tx, T.Cast("int32", n * top_k), ids, begins, by_expert)

    return launch


def grouped_products(
    units: Matrices, rows: ProductRows, *, experts: int, top_k: int, share: int, all_rows: int,
    k: int, store: Any,
) -> Callable[..., Any]:  # fmt: skip
    """The T.inline launch(n, x, ids, weights, given): `sorting` and the product.

    x f32 [n·top_k / share, k]: so many slots have the same inputs
    weights: blocks and scales
    given: begins, by_expert, and what store(given, expert, slot, pair, sums) takes; UNIT (mxfp4.py)
        times sums are those of a pair of rows
    """

    @T.inline
    def choose(given, by, tokens, span):
        # Expert e has the blocks from begins[e] // tokens + e on: as many as it needs, at least.
        begins = T.meta_var(given[0])
        some = T.sblock_alloc_buffer((2,), "int32", scope="local")
        some[0] = 0
        some[1] = experts - 1
        for _ in T.serial((experts - 1).bit_length()):
            middle: T.let = (some[0] + some[1] + 1) // 2
            if begins[middle] // tokens + middle <= by:
                some[0] = middle
            else:
                some[1] = T.max(middle - 1, some[0])
        begin: T.let = begins[some[0]]
        end: T.let = begins[some[0] + 1]
        first: T.let = begin + (by - begin // tokens - some[0]) * tokens
        span[0] = T.Select(first < end, some[0], -1)
        span[1] = first
        span[2] = T.min(end - first, tokens)

    @T.inline
    def stored(given, expert, number, pair, sums):
        store(given, expert, given[1][number], pair, sums)

    columns = ProductColumns(choose, lambda given, number: given[1][number] // share, stored)

    def make(units, tile):
        return product(
            units, rows, columns, tile, all_rows=all_rows, k=k,
            blocks=lambda n, tokens: n * top_k // tokens + experts,
        )  # fmt: skip

    multiply = products(units, MANY, make)
    sort = sorting(experts, top_k)

    @T.inline
    def launch(n, x, ids, weights, given):
        sort(n, ids, given[0], given[1])
        multiply(n * top_k < MANY.wide * experts, (n, x, None, weights, given))

    return launch


def mixture(top_k: int, hidden: int) -> Callable[..., Any]:
    """The T.inline launch(n, outputs, weights, residual, y): y = residual + a token's weighted
    outputs, f32 [n·top_k, hidden]. A thread takes four rows of a token."""

    @T.inline
    def work(piece, n, outputs, weights, residual, y):
        sums = T.sblock_alloc_buffer((FOUR,), "float32", scope="local")
        four = T.sblock_alloc_buffer((FOUR,), "float32", scope="local")
        token: T.let = piece // (hidden // FOUR)
        row: T.let = piece % (hidden // FOUR) * FOUR
        if token < n:
            sums[T.ramp(0, 1, FOUR)] = residual[token, T.ramp(row, 1, FOUR)]
            for j in T.serial(top_k):
                four[T.ramp(0, 1, FOUR)] = outputs[token * top_k + j, T.ramp(row, 1, FOUR)]
                for i in T.unroll(FOUR):
                    sums[i] = sums[i] + weights[token, j] * four[i]
            y[token, T.ramp(row, 1, FOUR)] = sums[T.ramp(0, 1, FOUR)]

    @T.inline
    def launch(n, outputs, weights, residual, y):
        for block in T.thread_binding(
            T.ceildiv(n * (hidden // FOUR), THREADS), thread="blockIdx.x"
        ):
            for thread in T.thread_binding(THREADS, thread="threadIdx.x"):
                with T.sblock("mixture"):
                    vb, tx = T.axis.remap("SS", [block, thread])
                    T.reads(outputs[0 : n * top_k, 0:hidden], residual[0:n, 0:hidden])
                    T.writes(y[0:n, 0:hidden])
                    work(vb * THREADS + tx, n, outputs, weights, residual, y)

    return launch
