"""Dense layers of many tokens on CUDA: a launch makes the columns, another multiplies them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..gpu.barriers import barrier
from ..kernel import Size, T, Tensor
from . import product_wgmma
from .instructions import ALL_LANES, LANES, MMA_ROWS, load_floats
from .mxfp4 import load_pair, split_floats
from .product import ProductColumns, ProductRows, ProductTile, product

PARTS = 2  # bfloat16 of an input
SPLITTERS = 256  # threads that make the columns of a token


@dataclass(frozen=True)
class Variant:
    """For whom a schedule of dense layers is, and what its name ends in."""

    arch: str
    hopper: bool
    ending: str


def variants(rows: ProductRows) -> tuple[Variant, ...]:
    """Hopper has products of its own, but of sums that are scaled afterwards."""
    hopper = Variant("sm_90a", hopper=True, ending=", wgmma")
    others = Variant("sm_80", hopper=False, ending="")
    return (hopper, others) if rows.sums is None else (others,)


def scratch(k: int, *, hopper: bool) -> tuple[Tensor, ...]:
    """What dense layers need for n tokens: the parts of their inputs."""
    if hopper:
        return (product_wgmma.columns_of("parts", Size("n", PARTS), k),)
    return (Tensor("parts", (Size("n", PARTS), k // 2), "uint32"),)


def _columns(k: int, eps: float | None, *, hopper: bool) -> Callable[..., Any]:
    """The T.inline launch(n, x, norm_weight, parts): a block for each token splits its inputs, or
    their norm, into two bfloat16: u32 [2·n, k/2], or on Hopper as product_wgmma takes them."""
    quads = -(-k // 4 // SPLITTERS)  # of a thread
    pieces = product_wgmma.pieces(k)

    @T.inline
    def split_quad(token, quad, factor, x, norm_weight, parts):
        four = T.sblock_alloc_buffer((4,), "float32", scope="local")
        weight = T.sblock_alloc_buffer((4,), "float32", scope="local")
        bits = T.sblock_alloc_buffer((4,), "uint32", scope="local")
        pairs = T.sblock_alloc_buffer((4,), "uint32", scope="local")
        load_floats(four, 0, x[token, quad * 4])
        if eps is not None:
            load_floats(weight, 0, norm_weight[quad * 4])
            for e in T.unroll(4):
                four[e] = four[e] * weight[e]
        for e in T.unroll(4):
            bits[e] = T.reinterpret("uint32", four[e])
        split_floats(bits, 0, factor, pairs)
        for part in T.unroll(PARTS):
            parts[PARTS * token + part, T.ramp(quad * 2, 1, 2)] = pairs[T.ramp(2 * part, 1, 2)]

    @T.inline
    def split_piece(n, token, piece, factor, x, norm_weight, parts):
        weight = T.sblock_alloc_buffer((2,), "uint32", scope="local")
        bits = T.sblock_alloc_buffer((4,), "uint32", scope="local")
        pairs = T.sblock_alloc_buffer((4,), "uint32", scope="local")
        out = T.sblock_alloc_buffer((4 * PARTS,), "uint32", scope="local")
        for i in T.unroll(4 * PARTS):
            out[i] = T.uint32(0)
        if product_wgmma.is_filled(piece, k):
            for i in T.unroll(2):
                for j in T.unroll(2):
                    at = T.meta_var(product_wgmma.piece_inputs(piece, 2 * i + j))
                    load_pair(bits, 2 * j, T.address_of(x[token, at]))
                    if eps is not None:
                        load_pair(weight, 0, T.address_of(norm_weight[at]))
                        for e in T.unroll(2):
                            bits[2 * j + e] = T.reinterpret(
                                "uint32",
                                T.reinterpret("float32", bits[2 * j + e])
                                * T.reinterpret("float32", weight[e]),
                            )
                split_floats(bits, 0, factor, pairs)
                for part in T.unroll(PARTS):
                    out[T.ramp(4 * part + 2 * i, 1, 2)] = pairs[T.ramp(2 * part, 1, 2)]
        for part in T.unroll(PARTS):
            product_wgmma.store_piece(parts, PARTS * n, PARTS * token + part, piece, out, 4 * part)

    @T.inline
    def work(n, token, tx, x, norm_weight, parts):
        squares = T.sblock_alloc_buffer((SPLITTERS // LANES,), "float32", scope="shared")
        four = T.sblock_alloc_buffer((4,), "float32", scope="local")
        factor = T.sblock_alloc_buffer((1,), "float32", scope="local")
        factor[0] = T.float32(1)
        if eps is not None:
            factor[0] = T.float32(0)
            for i in T.serial(quads):
                quad: T.let = i * SPLITTERS + tx
                if quad < k // 4:
                    load_floats(four, 0, x[token, quad * 4])
                    for e in T.unroll(4):
                        factor[0] = factor[0] + four[e] * four[e]
            for i in T.unroll(5):
                factor[0] = factor[0] + T.cuda.__shfl_xor_sync(
                    T.uint32(ALL_LANES), factor[0], T.shift_left(1, i), LANES
                )
            if tx % LANES == 0:
                squares[tx // LANES] = factor[0]
            barrier()
            factor[0] = T.float32(0)
            for w in T.unroll(SPLITTERS // LANES):
                factor[0] = factor[0] + squares[w]
            factor[0] = T.float32(1) / T.sqrt(factor[0] / T.float32(k) + T.float32(eps))
        if hopper:
            for i in T.serial(-(-pieces // SPLITTERS)):
                piece: T.let = i * SPLITTERS + tx
                if piece < pieces:
                    split_piece(n, token, piece, factor[0], x, norm_weight, parts)
        else:
            for i in T.serial(quads):
                quad: T.let = i * SPLITTERS + tx
                if quad < k // 4:
                    split_quad(token, quad, factor[0], x, norm_weight, parts)

    @T.inline
    def launch(n, x, norm_weight, parts):
        for token in T.thread_binding(n, thread="blockIdx.x"):
            for thread in T.thread_binding(SPLITTERS, thread="threadIdx.x"):
                with T.sblock("columns"):
                    vt, tx = T.axis.remap("SS", [token, thread])
                    work(n, vt, tx, x, norm_weight, parts)

    return launch


def products(
    rows: ProductRows, small: ProductTile, large: ProductTile, enough: int, *, tiles: int, k: int,
    eps: float | None, complete: Callable[..., Any] | None, hopper: bool,
) -> Callable[..., Any]:  # fmt: skip
    """The T.inline launch(n, x, norm_weight, weights, finish, given, parts) as of dense.py, by
    `large` blocks where there are `enough`, of so many tiles of 16 rows of W."""

    @T.inline
    def choose(given, by, tokens, lane, span):
        span[0] = 0
        span[1] = by * tokens
        span[2] = T.min(T.Cast("int32", given[0]) - by * tokens, tokens)

    @T.inline
    def store(given, expert, number, tile_, g, sums):
        given[1](given[2], T.Cast("int64", number), tile_, g, sums)

    @T.inline
    def complete_sums(given, expert, number, tile_, g, sums):
        complete(given[2], T.Cast("int64", number), tile_, g, sums)

    columns = ProductColumns(
        parts=PARTS, width=4, choose=choose, source=lambda given, number: number * PARTS,
        store=store, complete=complete and complete_sums,
    )  # fmt: skip

    def blocks(n: Any, tokens: int) -> Any:
        return T.ceildiv(n, tokens)

    make = product_wgmma.product if hopper else product
    few, many = (
        make(rows, columns, tile, all_tiles=tiles, k=k, blocks=blocks) for tile in (small, large)
    )
    make_columns = _columns(k, eps, hopper=hopper)
    large_blocks = -(-tiles * MMA_ROWS // large.rows)

    @T.inline
    def launch(n, x, norm_weight, weights, finish, given, parts):
        make_columns(n, x, norm_weight, parts)
        if T.ceildiv(n, large.columns // PARTS) * large_blocks < enough:
            few(n, n * PARTS, parts, weights, (n, finish, given))
        else:
            many(n, n * PARTS, parts, weights, (n, finish, given))

    return launch
