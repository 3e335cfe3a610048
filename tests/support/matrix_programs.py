"""A product of cooperative matrices, tile by tile, for tests."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
from support.spirv_programs import device, knows_matrices
from tvm import tirx
from tvm.script import tirx as T

Shape = tuple[int, int, int]  # m, n, k of a product

LAVAPIPE: tuple[Shape, int] = ((8, 8, 8), 8)  # its matrices, and its subgroup's size


def needs_matrices() -> None:
    """Skip where vulkan:0 has no cooperative matrices, which Mesa's lavapipe of 2024 on has."""
    from mxforge import vulkan

    device()
    if not vulkan.check().matrices:
        _skip("vulkan:0 has no cooperative matrices")


def needs_tools() -> None:
    """Skip where spirv-val does not know cooperative matrices."""
    if not knows_matrices():
        _skip("this spirv-val is too old")


def _skip(reason: str) -> None:
    """Or fail where `scripts/test --mesa` says that everything is there."""
    if os.environ.get("MXFORGE_REQUIRE_MATRICES") == "1":
        pytest.fail(f"MXFORGE_REQUIRE_MATRICES=1, but {reason}")
    pytest.skip(f"{reason}; run with scripts/test --mesa")


def product(
    m: int,
    n: int,
    k: int,
    factor: str = "float16",
    total: str = "float32",
    *,
    matrix: tuple[Shape, int] = LAVAPIPE,
    through: str = "shared",
    tiles: int = 2,
    fill: Callable[..., Any] = T.tvm_fill_fragment,
    multiply: Callable[..., Any] = T.tvm_mma_sync,
) -> tirx.PrimFunc:
    """c [m, n] = a [m, k] · b [n, k]ᵀ, of whole tiles.

    A block has `tiles` subgroups. Each keeps `tiles` accumulators, of one row of matrices.

    through: "shared", tiles of a and b come by shared memory; "global", straight from there
    fill, multiply: what writes these calls
    """
    shape, lanes = matrix
    tile_m, tile_n, tile_k = shape
    threads, rows, columns = tiles * lanes, tiles * tile_m, tiles * tile_n  # of a block
    is_shared = through == "shared"

    @T.inline
    def copy(tile, source, count, first, step, thread):
        """Rows of tile_k elements."""
        for i in T.serial(count * tile_k // threads):
            at: T.let = i * threads + thread
            tile[at] = source[(first + at // tile_k) * k + step * tile_k + at % tile_k]

    @T.inline
    def load(fragments, whole, first, step, tile, place, layout):
        """A matrix of tile_k columns, of the whole or of a tile of it."""
        if is_shared:
            start: T.let = T.address_of(tile[place * tile_k])
            T.evaluate(T.tvm_load_matrix_sync(fragments.data, *shape, 0, start, tile_k, layout))
        else:
            begin: T.let = T.address_of(whole[(first + place) * k + step * tile_k])
            T.evaluate(T.tvm_load_matrix_sync(fragments.data, *shape, 0, begin, k, layout))

    @T.inline
    def work(by, bx, thread, a, b, c):
        left = T.sblock_alloc_buffer((rows * tile_k,), factor, scope="shared")
        right = T.sblock_alloc_buffer((columns * tile_k,), factor, scope="shared")
        of_a = T.sblock_alloc_buffer((tile_m * tile_k,), factor, scope="wmma.matrix_a")
        of_b = T.sblock_alloc_buffer((tile_k * tile_n,), factor, scope="wmma.matrix_b")
        sums = T.sblock_alloc_buffer((tiles * tile_m * tile_n,), total, scope="wmma.accumulator")
        T.evaluate(T.call_extern("int32", "subgroupRequireSize", lanes))
        warp: T.let = thread // lanes
        for j in T.serial(tiles):
            T.evaluate(fill(sums.data, *shape, j, T.Cast(total, 0)))
        for step in T.serial(k // tile_k):
            if is_shared:
                copy(left, a, rows, by * rows, step, thread)
                copy(right, b, columns, bx * columns, step, thread)
                T.tvm_storage_sync("shared")
            load(of_a, a, by * rows, step, left, warp * tile_m, "row_major")
            for j in T.serial(tiles):
                load(of_b, b, bx * columns, step, right, j * tile_n, "col_major")
                T.evaluate(multiply(sums.data, j, of_a.data, 0, of_b.data, 0, sums.data, j))
            if is_shared:
                T.tvm_storage_sync("shared")
        for j in T.serial(tiles):
            target: T.let = T.address_of(
                c[(by * rows + warp * tile_m) * n + bx * columns + j * tile_n]
            )
            T.evaluate(T.tvm_store_matrix_sync(sums.data, *shape, j, target, n, "row_major"))

    @T.prim_func(s_tir=True)
    def main(
        a: T.Buffer((m * k,), factor), b: T.Buffer((n * k,), factor), c: T.Buffer((m * n,), total)
    ):
        for by in T.thread_binding(m // rows, thread="blockIdx.y"):
            for bx in T.thread_binding(n // columns, thread="blockIdx.x"):
                for tx in T.thread_binding(threads, thread="threadIdx.x"):
                    with T.sblock("block"):
                        vy, vx, vt = T.axis.remap("SSS", [by, bx, tx])
                        T.reads(a[0 : m * k], b[0 : n * k])
                        T.writes(c[0 : m * n])
                        work(vy, vx, vt, a, b, c)

    return main
