"""`qkv_insert` on GPUs but CUDA's newer ones: some rows a block (gpu/gemv.py), and for many tokens
a product of tiles where there are matrix units (gpu/product.py).

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
from ..gpu.matrices import MATRICES, unless_there
from ..gpu.product import STEP
from ..kernel import Schedule, T, Tensor, gpu, prim_func
from ..linear import bf16_gpu, i8_f32_gpu
from ..linear.rows_gpu import MANY, TARGETS, Chunks, dense_products
from .kv_insert_gpu import insertion, rotation
from .pages import physical_page

# Not measured. With two chunks ahead Adreno's compiler needs all registers that it has, for nothing
# that its estimate or AMD's would show.
TILE = GemvTile(threads=64, rows=4, tokens=4, ahead=1)
# A scale is of a whole head, so that a block takes all of its rows, 8 at a time: of 20b's 2,880
# inputs, 256 threads have 23 or 46 KB on the way. Not measured.
SCALED_TILE = GemvTile(threads=256, rows=8, tokens=2, ahead=1)
SCALED_FAMILIES = ("metal", "vulkan")  # CUDA's tensor cores are worth three launches
THREADS256 = ("threads256",)


def _build(
    features: tuple[str, ...],
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
    scaled = KV[kv_dtype].scaled
    all_heads = heads + 2 * kv_heads
    half = head_dim // 2
    pairs = tile.rows // 2  # of a block
    head_tiles = half // pairs  # blocks of a head

    rotate, insert = rotation(head_dim), insertion(kv_dtype, head_dim)
    # Of a cache with scales, blocks of whole heads of keys and values, which take longest, are
    # the first.
    whole_heads = 2 * kv_heads if scaled else 0
    row_tiles = whole_heads + (all_heads - whole_heads) * head_tiles

    def turns_of(block):
        return T.Select(block < whole_heads, head_tiles, 1) if scaled else 1

    def first_tile(block):
        if not scaled:
            return block
        return T.Select(block < whole_heads, (heads + block) * head_tiles, block - whole_heads)

    def row(row_tile, r):
        """The r-th row of a block; the first `pairs` are the lower halves."""
        i = row_tile % head_tiles * pairs + r % pairs
        return row_tile // head_tiles * head_dim + r // pairs * half + i

    @T.inline
    def complete(pair, t, bias, cos_sin, head, i):
        """pair: elements i and i + D/2 of a head, from their normed sums."""
        pair[0] = pair[0] + bias[head * head_dim + i]
        pair[1] = pair[1] + bias[head * head_dim + half + i]
        if head < heads + kv_heads:
            rotate(pair, cos_sin, t, i)

    @T.inline
    def total(pair, out, parts, sums, squares, first, t, bias, cos_sin, head, i):
        """pair: the same from the block's sums `first` and `pairs` on."""
        sums.total(parts, squares, out)
        pair[2] = T.float32(1) / T.sqrt(out[0] / T.float32(hidden) + T.float32(eps))
        sums.total(parts, first, out)
        pair[0] = out[0] * pair[2]
        sums.total(parts, first + pairs, out)
        pair[1] = out[0] * pair[2]
        complete(pair, t, bias, cos_sin, head, i)

    @T.inline
    def store(pair, kv, q, page, slot, t, head, i):
        """Put them where they belong."""
        if head < heads:
            q[t, head * head_dim + i] = pair[0]
            q[t, head * head_dim + half + i] = pair[1]
        elif head < heads + kv_heads:
            insert(pair, kv, page, slot, 0, head - heads, i)
        else:
            insert(pair, kv, page, slot, 1, head - heads - kv_heads, i)

    def launch(tokens):
        """`tokens` at a time, each time all weights."""
        gemv = Gemv(features[0], chunks.chunk, hidden, tile, tokens, normed=True)
        sums, products = gemv.sums, gemv.products

        def token(token_tile, n, t):
            return T.min(token_tile * tokens + t, n - 1)

        @T.inline
        def block(n, x, gain, words, scales, others, vt, vr, tx):
            bias, cos_sin, positions, token_seq, page_table, first_page, kv, q = others
            out = T.sblock_alloc_buffer((sums.count,), "float32", scope="local")
            pair = T.sblock_alloc_buffer((3,), "float32", scope="local")
            parts = T.sblock_alloc_buffer((sums.elements,), "float32", scope="shared")
            # Of a cache with scales: the heads that a block of keys or values has, one a token.
            whole = T.sblock_alloc_buffer((tokens * head_dim,), "float32", scope="shared")
            for turn in T.serial(turns_of(vr)):
                tile_of_turn: T.let = first_tile(vr) + turn
                products(
                    out, x, gain, words, scales, partial(row, tile_of_turn),
                    partial(token, vt, n), tx,
                )  # fmt: skip
                sums.share(out, parts, tx)
                if tx < tokens * pairs:
                    t: T.let = vt * tokens + tx // pairs
                    head: T.let = tile_of_turn // head_tiles
                    i: T.let = tile_of_turn % head_tiles * pairs + tx % pairs
                    if t < n:
                        total(
                            pair, out, parts, sums, gemv.squares + tx // pairs,
                            tx // pairs * tile.rows + tx % pairs, t, bias, cos_sin, head, i,
                        )  # fmt: skip
                        if scaled and head >= heads:
                            whole[tx // pairs * head_dim + i] = pair[0]
                            whole[tx // pairs * head_dim + half + i] = pair[1]
                        else:
                            store(
                                pair, kv, q,
                                physical_page(
                                    page_table, first_page, token_seq[t],
                                    positions[t] // PAGE_TOKENS,
                                ),
                                positions[t] % PAGE_TOKENS, t, head, i,
                            )  # fmt: skip
                if scaled:
                    T.tvm_storage_sync("shared")
            if scaled:
                for turn in T.serial(-(-tokens * half // tile.threads)):
                    item: T.let = turn * tile.threads + tx
                    of: T.let = item // half
                    t: T.let = vt * tokens + of
                    head: T.let = first_tile(vr) // head_tiles
                    if head >= heads and of < tokens and t < n:
                        pair[2] = T.float32(0)
                        for j in T.serial(head_dim):
                            pair[2] = T.max(pair[2], T.fabs(whole[of * head_dim + j]))
                        pair[0] = whole[of * head_dim + item % half]
                        pair[1] = whole[of * head_dim + half + item % half]
                        store(
                            pair, kv, q,
                            physical_page(
                                page_table, first_page, token_seq[t], positions[t] // PAGE_TOKENS
                            ),
                            positions[t] % PAGE_TOKENS, t, head, item % half,
                        )  # fmt: skip

        @T.inline
        def blocks(n, x, gain, weight, weight_scale, others):
            # Blocks that read the same weights follow each other.
            for token_tile in T.thread_binding(T.ceildiv(n, tokens), thread="blockIdx.x"):
                for row_tile in T.thread_binding(row_tiles, thread="blockIdx.y"):
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

    def launch_many(units):
        @T.inline
        def completed(others, t, number, sums):
            complete(sums, t, others[0], others[1], number // half, number % half)

        @T.inline
        def stored(others, t, number, sums):
            positions, token_seq, page_table, first_page, kv, q = T.meta_var(others[2:])
            if not scaled:
                completed(others, t, number, sums)
            page: T.let = physical_page(
                page_table, first_page, token_seq[t], positions[t] // PAGE_TOKENS
            )
            store(sums, kv, q, page, positions[t] % PAGE_TOKENS, t, number // half, number % half)

        return dense_products(
            units, chunks, MANY, rows=all_heads * head_dim, k=hidden, group=head_dim, eps=eps,
            store=stored, complete=completed if scaled else None,
        )  # fmt: skip

    one, some = launch(1), launch(tile.tokens)
    units = MATRICES.get(features) if hidden % STEP == 0 else None
    if units and scaled and (units.dtype != "float32" or MANY.large.rows % head_dim):
        units = None  # whose heads are not whole in a tile's sums
    many = units and launch_many(units)

    @T.inline
    def body(
        n, x, norm_weight, weight, bias, cos_sin, positions, token_seq, page_table, first_page,
        kv, q, weight_scale=None,
    ):  # fmt: skip
        others = T.meta_var((bias, cos_sin, positions, token_seq, page_table, first_page, kv, q))
        if n == 1:
            one(n, x, norm_weight, weight, weight_scale, others)
        elif (many is None) or unless_there(units, n < MANY.least):
            some(n, x, norm_weight, weight, weight_scale, others)
        else:
            words = chunks.words(weight, all_heads * head_dim, hidden)
            if weight_scale is None:
                many(n, x, norm_weight, words, None, others)
            else:
                scales = chunks.scales(weight_scale, all_heads * head_dim, hidden)
                many(n, x, norm_weight, words, scales, others)

    return prim_func(arguments, body)


def _fits(
    chunks: Chunks,
    tile: GemvTile,
    scaled: bool,
    *,
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    kv_dtype: str,
    **_eps: float,
) -> bool:
    rows = (heads + 2 * kv_heads) * head_dim
    fits = KV[kv_dtype].scaled == scaled and head_dim % tile.rows == 0
    return fits and chunks.fits(tile, rows=rows, k=hidden)


def _schedules(chunks: Chunks) -> tuple[Schedule, ...]:
    return tuple(
        Schedule(
            f"rows a block{', whole heads where scales are' * scaled}, {' '.join(features)}",
            gpu(*features, *(THREADS256 if scaled and features[0] == "vulkan" else ())),
            partial(_build, features, chunks),
            tile,
            chunks.layouts,
            partial(_fits, chunks, tile, scaled),
        )
        for tile, scaled, families in ((TILE, False, LANES), (SCALED_TILE, True, SCALED_FAMILIES))
        for features in TARGETS
        if features[0] in families and not (scaled and features[1:])
    )


BF16_SCHEDULES = _schedules(bf16_gpu.CHUNKS)
I8_SCHEDULES = _schedules(i8_f32_gpu.CHUNKS)
