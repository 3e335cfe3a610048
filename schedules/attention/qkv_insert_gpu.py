"""`qkv_insert` on GPUs without matrix units of ours: some rows a block (gpu/gemv.py).

The norm needs no pass of its own: qkv = W·(x · norm_weight) / rms(x), and each block adds up the
squares beside the products. Half of a block's rows are neighbours in one head, the others what
they are rotated with, so that the block ends with whole pairs.
"""

from __future__ import annotations

from functools import partial

import tvm

from mxforge.kv_layout import PAGE_TOKENS

from ..formats.kv import KV
from ..gpu.gemv import Gemv, GemvTile
from ..gpu.lanes import LANES
from ..kernel import Schedule, T, Tensor, gpu, prim_func
from ..linear import bf16_gpu, i8_f32_gpu
from ..linear.rows_gpu import Chunks
from .pages import physical_page

# Not measured. With two chunks ahead Adreno's compiler needs all registers that it has, for nothing
# that its estimate or AMD's would show.
TILE = GemvTile(threads=64, rows=4, tokens=4, ahead=1)


def _build(
    family: str,
    chunks: Chunks,
    arguments: tuple[Tensor, ...],
    *,
    hidden: int,
    eps: float,
    heads: int,
    kv_heads: int,
    head_dim: int,
    kv_dtype: str,
    tile: GemvTile,
) -> tvm.tirx.PrimFunc:
    kv_format = KV[kv_dtype]
    all_heads = heads + 2 * kv_heads
    half = head_dim // 2
    pairs = tile.rows // 2  # of a block
    head_tiles = half // pairs  # blocks of a head

    def row(row_tile, r):
        """The r-th row of a block; the first `pairs` are the lower halves."""
        i = row_tile % head_tiles * pairs + r % pairs
        return row_tile // head_tiles * head_dim + r // pairs * half + i

    @T.inline
    def rotate(pair, cos_sin, t, i):
        """pair[0:2], elements i and i + D/2 of a head; pair[2] is lost."""
        pair[2] = pair[0]
        pair[0] = pair[0] * cos_sin[t, i] - pair[1] * cos_sin[t, half + i]
        pair[1] = pair[1] * cos_sin[t, i] + pair[2] * cos_sin[t, half + i]

    @T.inline
    def insert(kv, pair, part, head, page, at, i, slot):
        kv[part, head, page, at(i, slot)] = kv_format.store(pair[0], None)
        kv[part, head, page, at(half + i, slot)] = kv_format.store(pair[1], None)

    @T.inline
    def finish(pair, bias, cos_sin, slot, page, kv, q, t, head, i):
        """Put elements i and i + D/2 of a head where they belong."""
        pair[0] = pair[0] + bias[head * head_dim + i]
        pair[1] = pair[1] + bias[head * head_dim + half + i]
        if head < heads + kv_heads:
            rotate(pair, cos_sin, t, i)
        if head < heads:
            q[t, head * head_dim + i] = pair[0]
            q[t, head * head_dim + half + i] = pair[1]
        elif head < heads + kv_heads:
            insert(kv, pair, 0, head - heads, page, kv_format.key_at, i, slot)
        else:
            insert(
                kv, pair, 1, head - heads - kv_heads, page,
                partial(kv_format.value_at, head_dim), i, slot,
            )  # fmt: skip

    def launch(tokens):
        """`tokens` at a time, each time all weights."""
        gemv = Gemv(family, chunks.chunk, hidden, tile, tokens, normed=True)
        sums, products = gemv.sums, gemv.products

        def token(token_tile, n, t):
            return T.min(token_tile * tokens + t, n - 1)

        @T.inline
        def block(n, x, gain, words, scales, others, vt, vr, tx):
            bias, cos_sin, positions, token_seq, page_table, first_page, kv, q = others
            out = T.sblock_alloc_buffer((sums.count,), "float32", scope="local")
            pair = T.sblock_alloc_buffer((3,), "float32", scope="local")
            parts = T.sblock_alloc_buffer((sums.elements,), "float32", scope="shared")
            products(out, x, gain, words, scales, partial(row, vr), partial(token, vt, n), tx)
            sums.share(out, parts, tx)
            if tx < tokens * pairs:
                t: T.let = vt * tokens + tx // pairs
                i: T.let = vr % head_tiles * pairs + tx % pairs
                if t < n:
                    first: T.let = tx // pairs * tile.rows + tx % pairs
                    sums.total(parts, gemv.squares + tx // pairs, out)
                    pair[2] = T.float32(1) / T.sqrt(out[0] / T.float32(hidden) + T.float32(eps))
                    sums.total(parts, first, out)
                    pair[0] = out[0] * pair[2]
                    sums.total(parts, first + pairs, out)
                    pair[1] = out[0] * pair[2]
                    finish(
                        pair, bias, cos_sin, positions[t] % PAGE_TOKENS,
                        physical_page(
                            page_table, first_page, token_seq[t], positions[t] // PAGE_TOKENS
                        ),
                        kv, q, t, vr // head_tiles, i,
                    )  # fmt: skip

        @T.inline
        def blocks(n, x, gain, weight, weight_scale, others):
            # Blocks that read the same weights follow each other.
            for token_tile in T.thread_binding(T.ceildiv(n, tokens), thread="blockIdx.x"):
                for row_tile in T.thread_binding(all_heads * head_tiles, thread="blockIdx.y"):
                    for thread in T.thread_binding(tile.threads, thread="threadIdx.x"):
                        with T.sblock("block"):
                            vt, vr, tx = T.axis.remap("SSS", [token_tile, row_tile, thread])
                            # Stated, as detection gives up on vector loads.
                            T.reads(x[0:n, 0:hidden])
                            T.writes(others[7][0:n, 0 : heads * head_dim])
                            words = chunks.words(weight, all_heads * head_dim, hidden)
                            if weight_scale is None:
                                block(n, x, gain, words, None, others, vt, vr, tx)
                            else:
                                scales = chunks.scales(weight_scale, all_heads * head_dim, hidden)
                                block(n, x, gain, words, scales, others, vt, vr, tx)

        return blocks

    one, some = launch(1), launch(tile.tokens)

    @T.inline
    def body(
        n, x, norm_weight, weight, bias, cos_sin, positions, token_seq, page_table, first_page,
        kv, q, weight_scale=None,
    ):  # fmt: skip
        if n == 1:
            one(
                n, x, norm_weight, weight, weight_scale,
                (bias, cos_sin, positions, token_seq, page_table, first_page, kv, q),
            )  # fmt: skip
        else:
            some(
                n, x, norm_weight, weight, weight_scale,
                (bias, cos_sin, positions, token_seq, page_table, first_page, kv, q),
            )  # fmt: skip

    return prim_func(arguments, body)


def _fits(
    chunks: Chunks,
    *,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    kv_dtype: str,
    **_eps: float,
) -> bool:
    """A scale would be of a whole head, which no block has."""
    rows = (heads + 2 * kv_heads) * head_dim
    whole = head_dim % TILE.rows == 0 and not KV[kv_dtype].scaled
    return whole and chunks.fits(TILE, rows=rows, k=hidden)


def _schedules(chunks: Chunks) -> tuple[Schedule, ...]:
    return tuple(
        Schedule(
            f"rows a block, {family}",
            gpu(family),
            partial(_build, family, chunks),
            TILE,
            chunks.layouts,
            partial(_fits, chunks),
        )
        for family in LANES
    )


BF16_SCHEDULES = _schedules(bf16_gpu.CHUNKS)
I8_SCHEDULES = _schedules(i8_f32_gpu.CHUNKS)
