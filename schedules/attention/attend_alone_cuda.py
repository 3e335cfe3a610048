"""Attention of decoded tokens in a call with chunks, on CUDA: a block looks for that of a sequence.

There may be thousands of tokens in such a call. There are as many blocks as sequences, and the
warps of each share the keys of a token, as where all tokens are decoded.
"""

from __future__ import annotations

from typing import Any

from ..cuda.instructions import wait_for_launch_before
from ..gpu.barriers import barrier
from ..kernel import T
from .attend import HEADS, Words, is_alone
from .pages import first_visible


def alone(
    work: Any, *, threads: int, blocks_of_sm: int, heads: int, kv_heads: int, head_dim: int,
    kv_dtype: str, window: int,
) -> Any:  # fmt: skip
    """The T.inline launch(n, b, p, pages, q, kv, positions, token_seq, page_table, first_page,
    sinks, out) of the tokens that are alone in their sequence.

    work(tx, cache, q, page_table, first_page, sequence, sinks, out, stats, t, row, head block, low,
    high) is a thread's part of a token.
    """
    words = Words(kv_dtype, head_dim)
    per_kv_head = -(-(heads // kv_heads) // HEADS)

    @T.inline
    def find(found, sequence, n, token_seq, tx):
        if tx == 0:
            found[0] = -1
        barrier()
        for i in T.serial(T.ceildiv(n, threads)):
            t: T.let = i * threads + tx
            if t < n and T.And(token_seq[t] == sequence, is_alone(t, n, token_seq)):
                found[0] = t
        barrier()

    @T.inline
    def launch(
        n, b, p, n_pages, q, kv, positions, token_seq, page_table, first_page, sinks, out
    ):  # fmt: skip
        for of_sequence in T.thread_binding(b, thread="blockIdx.x"):
            for head_block in T.thread_binding(kv_heads * per_kv_head, thread="blockIdx.y"):
                for thread in T.thread_binding(threads, thread="threadIdx.x"):
                    with T.sblock("alone"):
                        vs, hb, tx = T.axis.remap("SSS", [of_sequence, head_block, thread])
                        T.reads(
                            q[0:n, 0 : heads * head_dim],
                            kv[0:2, 0:kv_heads, 0:n_pages, 0 : kv.shape[3]],
                            positions[0:n],
                            token_seq[0:n],
                            page_table[0:b, 0:p],
                            first_page[0:b],
                            sinks[0:heads],
                        )
                        T.writes(out[0:n, 0 : heads * head_dim])
                        T.attr(0, "tirx.launch_bounds_min_blocks_per_sm", blocks_of_sm)
                        found = T.sblock_alloc_buffer((1,), "int32", scope="shared")
                        sequence: T.let = T.Cast("int32", vs)
                        find(found, sequence, T.Cast("int32", n), token_seq, tx)
                        t: T.let = found[0]
                        if t < 0:
                            wait_for_launch_before()
                            T.evaluate(T.thread_return())
                        work(
                            tx, words.view(kv, kv_heads, n_pages), q, page_table, first_page,
                            sequence, sinks, out, None, t, 0, hb,
                            first_visible(positions[t], window), positions[t],
                        )  # fmt: skip

    return launch
