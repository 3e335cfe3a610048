"""`down` on CUDA for one token: a block takes a tile of 16 rows, and the token's experts in order.

Its warps divide K. Every lane adds an expert's share to its own sums, so that the warps meet once,
at the end. While a warp multiplies, the weights of the next expert are on their way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..cuda.instructions import LANES, MMA_ROWS
from ..cuda.mxfp4 import (
    LOWER,
    STEP,
    Inputs,
    load_step,
    load_word,
    multiply_step,
    read_columns,
    stage_rows,
    staged_words,
    steps,
)
from ..gpu.barriers import barrier
from ..kernel import T
from .experts_cuda import whole

AHEAD = 2  # experts whose weights are on their way


class _Same:
    """The rows of the first token, by their number."""

    def __getitem__(self, number: Any) -> Any:
        return number


def _columns(inputs: Inputs, top_k: int) -> int:
    """Of inputs in shared memory, where they change places by twos."""
    return -(-inputs.parts * top_k // 2) * 2


def _words(inputs: Inputs, splits: int, *, top_k: int, intermediate: int) -> int:
    """u32 of shared memory."""
    staged = steps(intermediate) * STEP // 2 * _columns(inputs, top_k)
    return max(staged, splits * MMA_ROWS)


def one_token_fits(inputs: Inputs, splits: int, **shape: int) -> bool:
    return 4 * (_words(inputs, splits, **shape) + MMA_ROWS) <= 48 << 10


def one_token(
    inputs: Inputs, splits: int, *, top_k: int, hidden: int, intermediate: int
) -> Callable[..., Any]:
    """The T.inline launch(h, ids, weights, blocks, scales, bias, residual, y) by blocks of so many
    warps, where `one_token_fits`."""
    all_steps = steps(intermediate)
    depth = -(-all_steps // splits)  # steps of a warp
    threads = LANES * splits
    own, columns = inputs.own, _columns(inputs, top_k)
    rows, shape = _Same(), {"top_k": top_k, "intermediate": intermediate}

    @T.inline
    def work(vi, tx, h, ids, weights, blocks, scales, bias, residual, y):
        # The inputs, then the sums of the warps.
        xs = T.sblock_alloc_buffer((_words(inputs, splits, **shape),), "uint32", scope="shared")
        words = T.sblock_alloc_buffer((AHEAD * depth * 4,), "uint32", scope="local")
        scale = T.sblock_alloc_buffer((AHEAD * depth,), "uint32", scope="local")
        a = T.sblock_alloc_buffer((8,), "uint32", scope="local")
        b = T.sblock_alloc_buffer((8,), "uint32", scope="local")
        part = T.sblock_alloc_buffer((4,), "float32", scope="local")
        acc = T.sblock_alloc_buffer((2 * own,), "float32", scope="local")
        total = T.sblock_alloc_buffer((2,), "float32", scope="local")
        # A thread's own, where it takes no register.
        begun = T.sblock_alloc_buffer((MMA_ROWS,), "float32", scope="shared")
        out = T.sblock_alloc_buffer((1,), "float32", scope="local")
        raw = T.sblock_alloc_buffer(
            (staged_words(inputs, intermediate, top_k, threads),), "uint32", scope="local"
        )
        pairs = T.sblock_alloc_buffer((4,), "uint32", scope="local")
        expert = T.sblock_alloc_buffer((top_k,), "uint32", scope="local")
        word = T.sblock_alloc_buffer((1,), "uint32", scope="local")
        T.attr(0, "tirx.launch_bounds_min_blocks_per_sm", 2)
        warp: T.let = tx // LANES
        lane: T.let = tx % LANES
        row: T.let = vi * MMA_ROWS + tx % MMA_ROWS

        @T.inline
        def load(j):
            """A warp's part of an expert."""
            for d in T.unroll(depth):
                if depth * splits == all_steps or warp * depth + d < all_steps:
                    load_step(
                        blocks, scales, T.reinterpret("int32", expert[j]),
                        vi * all_steps + warp * depth, d, lane, words, scale, j % AHEAD * depth + d,
                    )  # fmt: skip

        for j in T.unroll(top_k):
            load_word(expert, j, T.address_of(ids[0, j]))
        load(0)
        stage_rows(
            inputs, intermediate, columns, h, rows, 1, 0, top_k, top_k, tx, threads, xs, raw, pairs
        )
        # What does not wait for the products: residual and bias.
        if tx < MMA_ROWS:
            load_word(word, 0, T.address_of(residual[0, row]))
            out[0] = T.reinterpret("float32", word[0])
            for j in T.unroll(top_k):
                load_word(word, 0, T.address_of(weights[0, j]))
                out[0] = (
                    out[0]
                    + T.reinterpret("float32", word[0])
                    * bias[T.reinterpret("int32", expert[j]), row]
                )
            begun[tx] = out[0]
        for r in T.unroll(2):
            total[r] = T.float32(0)
        barrier()
        for j in T.unroll(top_k):
            if j + 1 < top_k:
                load(j + 1)
            load_word(word, 0, T.address_of(weights[0, j]))
            for i in T.unroll(2 * own):
                acc[i] = T.float32(0)
            for d in T.unroll(depth):
                if depth * splits == all_steps or warp * depth + d < all_steps:
                    # A column without a token has the inputs of one that has.
                    read_columns(
                        xs, columns, warp * depth + d,
                        j * inputs.parts + lane // 4 % inputs.parts, lane % 4, b,
                    )  # fmt: skip
                    multiply_step(
                        inputs, words, scale, j % AHEAD * depth + d, 1, None, b, a, part, acc, 0
                    )
            for r in T.unroll(2):
                total[r] = total[r] + T.reinterpret("float32", word[0]) * acc[r * own]
        barrier()  # the inputs are no longer read
        if lane % 4 == 0:
            for r in T.unroll(2):
                xs[warp * MMA_ROWS + lane // 4 + 8 * r] = T.reinterpret("uint32", total[r])
        barrier()
        if tx < MMA_ROWS:
            total[0] = T.float32(0)
            for w in T.unroll(splits):
                total[0] = total[0] + T.reinterpret("float32", xs[w * MMA_ROWS + tx])
            y[0, row] = begun[tx] + total[0] * T.float32(LOWER)

    @T.inline
    def launch(h, ids, weights, blocks, scales, bias, residual, y):
        for tile in T.thread_binding(hidden // MMA_ROWS, thread="blockIdx.x"):
            for thread in T.thread_binding(threads, thread="threadIdx.x"):
                with T.sblock("one_token"):
                    vi, tx = T.axis.remap("SS", [tile, thread])
                    T.reads(
                        whole(h), whole(ids), whole(weights), whole(blocks), whole(scales),
                        whole(bias), whole(residual),
                    )  # fmt: skip
                    T.writes(whole(y))
                    work(vi, tx, h, ids, weights, blocks, scales, bias, residual, y)

    return launch
