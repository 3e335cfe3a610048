"""Products of many tokens by matrix units that read shared memory (schedules/gpu/product.py)."""

from __future__ import annotations

from functools import cache

import ml_dtypes
import numpy as np
import pytest

from mxforge.schedules.gpu.matrices import MATRICES, Matrices
from mxforge.schedules.gpu.product import ManyTiles, ProductTile
from mxforge.schedules.kernel import Size, T, Tensor, f32, prim_func, scheduled
from mxforge.schedules.linear.bf16_gpu import CHUNK, CHUNKS
from mxforge.schedules.linear.rows_gpu import dense_products

UNITS = {"float32": MATRICES["metal",], "float16": MATRICES["cuda",]}
MULTIPLY = {"metal": "simdgroup_multiply_accumulate", "cuda": "mma.sync"}
TILES = ManyTiles(least=1, wide=40)
ROWS, K = 72, 96


@cache
def program_of(simt, name: str, eps: float | None):
    """y = (x, normed where there is an eps)·Wᵀ."""
    units: Matrices = UNITS[name]

    @T.inline
    def store(given, token, pair, sums):
        for r in T.unroll(2):
            if 2 * pair + r < ROWS:
                given[token, 2 * pair + r] = sums[r]

    launch = dense_products(units, CHUNKS, TILES, rows=ROWS, k=K, group=2, store=store, eps=eps)

    @T.inline
    def body(n, x, gain, weight, y):
        launch(n, x, gain, CHUNKS.words(weight, ROWS, K), None, y)

    n = Size("n")
    arguments = (
        f32("x", n, K), f32("gain", K), Tensor("weight", (ROWS, K), "bfloat16"), f32("y", n, ROWS),
    )  # fmt: skip
    return simt.compile(scheduled(prim_func(arguments, body), "product", "test"), units.family)


def operands(n: int):
    rng = np.random.default_rng(n)
    x, gain = rng.standard_normal((n, K), np.float32), rng.uniform(0.5, 2, K).astype(np.float32)
    return x, gain, rng.standard_normal((ROWS, K)).astype(ml_dtypes.bfloat16)


def run(simt, name, x, gain, weight, eps=None):
    y = np.full((len(x), ROWS), np.nan, np.float32)
    arrays = [x, gain, CHUNK.paired(weight), y]
    return simt.run(program_of(simt, name, eps), arrays, {3}, counting=True)[3]


@pytest.mark.parametrize("n", [3, 75])
@pytest.mark.parametrize("name", UNITS)
def test_every_row_and_token_is_exact_whatever_its_size(simt, name, n):
    x, gain, weight = operands(n)
    rng = np.random.default_rng(1)
    sizes = np.exp2(rng.integers(-30, 40, (n, 1)))
    heights = np.exp2(rng.integers(-60, 60, (ROWS, 1)))
    x[:, 5] *= 1000  # beside one large input the others still count
    x[0, 5] = 0
    expected = x.astype(np.float64) @ weight.astype(np.float64).T
    scaled_weight = (weight.astype(np.float64) * heights).astype(ml_dtypes.bfloat16)
    y = run(simt, name, (x * sizes).astype(np.float32), gain, scaled_weight)
    error = np.abs(y / sizes / heights.T - expected).max(axis=1)
    assert np.all(error <= 1e-6 * np.linalg.norm(x, axis=1) * np.sqrt(K))


@pytest.mark.parametrize("name", UNITS)
def test_norm_of_the_inputs(simt, name):
    x, gain, weight = operands(33)
    y = run(simt, name, x, gain, weight, eps=1e-3)
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    expected = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-3) * gain @ weight.T
    assert np.linalg.norm(y - expected) <= 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("name", UNITS)
@pytest.mark.parametrize(("n", "tile"), [(10, TILES.small), (30, TILES.small), (64, TILES.large)])
def test_as_many_products_of_fragments_as_on_paper(simt, name, n, tile: ProductTile):
    units = UNITS[name]
    run(simt, name, *operands(n))
    row_warps, token_warps = tile.warps
    of_w = tile.rows // row_warps // units.rows
    of_x = tile.tokens // token_warps // units.columns
    busy = row_warps * -(-n // (tile.tokens // token_warps))  # warps that have tokens
    depths = -(-ROWS // tile.rows) * busy * K // units.depth
    products = depths * of_w * of_x * units.parts
    assert simt.operations(MULTIPLY[units.family]) == products
    if units.family == "metal":
        assert simt.operations("simdgroup_load") == depths * (of_w + of_x * units.parts)
    for what in ("shared read", "shared write"):
        cost = simt.costs()[what]
        assert cost.passes <= 1.05 * cost.ideal
