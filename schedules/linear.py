"""Dense layer with bfloat16 weights: y = x·Wᵀ (+ bias) (+ residual).

    x f32 [n, k]   W bf16 [rows, k]   bias f32 [rows]   residual f32 [n, rows]   y f32 [n, rows]

CPU layout: rows are interleaved in groups of `tile.rows`, zero-padded at the end, so that a
vector holds the same input position of neighbouring rows and no accumulator needs a horizontal
sum: W[g, i, r] is row g·tile.rows + r. GPUs keep the rows as stored.

Roofline of decoding: 2·rows·k bytes of weights a step, whatever n is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import tvm

from .kernel import Case, Kernel, T, Target, TileConfig, bind_items, parameter, scheduled
from .vectors import in_tiles, sizes

NAME = "bf16w_linear"


def linear_ref(
    x: np.ndarray,
    weight: np.ndarray,
    bias: np.ndarray | None = None,
    residual: np.ndarray | None = None,
    **_static: Any,
) -> tuple[np.ndarray]:
    """y = x·Wᵀ + bias + residual in float64; shapes as in the module's text."""
    y = x.astype(np.float64) @ weight.astype(np.float64).T
    if bias is not None:
        y = y + bias
    if residual is not None:
        y = y + residual
    return (y,)


@dataclass(frozen=True)
class LinearTile(TileConfig):
    rows: int  # output rows of one work item, a multiple of the 16 lanes
    tokens: int  # tokens that share one read of the weights


# EPYC (Zen 4, 2 cores), 2026-11: 26 GB/s at one token, 49 GMAC/s at eight, rows=64, tokens=4.
CPU_TILE = LinearTile(rows=64, tokens=4)


def padded_rows(rows: int, tile: LinearTile = CPU_TILE) -> int:
    return -(-rows // tile.rows) * tile.rows


def pack_weight(target: Target, weight: np.ndarray) -> np.ndarray:
    """Lay out a bf16 [rows, k] weight for `target`: [groups, k, tile.rows] on the CPU."""
    if target.is_gpu:
        return np.ascontiguousarray(weight)
    rows, k = weight.shape
    r = CPU_TILE.rows
    groups, rest = divmod(rows, r)
    packed = np.zeros((padded_rows(rows) // r, k, r), weight.dtype)
    packed[:groups] = weight[: groups * r].reshape(groups, r, k).transpose(0, 2, 1)
    if rest:
        packed[groups, :, :rest] = weight[groups * r :].T
    return packed


def packed_shape(target: Target, rows: int, k: int) -> tuple[int, ...]:
    if target.is_gpu:
        return (rows, k)
    return (padded_rows(rows) // CPU_TILE.rows, k, CPU_TILE.rows)


@cache
def linear(
    target: Target, *, rows: int, k: int, with_bias: bool = False, with_residual: bool = False
) -> tvm.tirx.PrimFunc:
    """(x, weight, [bias], [residual], y) -> None, scheduled for `target`."""
    if target.is_gpu:
        items = linear_items(rows=rows, k=k, with_bias=with_bias, with_residual=with_residual)
        return bind_items(items, NAME)
    return _cpu(rows, k, with_bias, with_residual)


def _with_options(body, rows: int, k: int, weight_shape, bias: bool, residual: bool):
    """The PrimFunc around `body(x, w, b, r, y, n)`; b or r is None where it is absent."""

    @T.prim_func(s_tir=True, private=True)
    def main():
        n = T.int64()
        x = parameter("x", (n, k), "float32")
        w = parameter("w", weight_shape, "bfloat16")
        if bias:
            b = parameter("b", (rows,), "float32")
        if residual:
            r = parameter("r", (n, rows), "float32")
        y = parameter("y", (n, rows), "float32")
        body(x, w, b if bias else None, r if residual else None, y, n)

    return main


def _cpu(rows: int, k: int, bias: bool, residual: bool) -> tvm.tirx.PrimFunc:
    tile = CPU_TILE
    lanes = 16
    vectors = tile.rows // lanes
    groups = padded_rows(rows) // tile.rows

    @T.inline
    def tokens_tile(t0, tokens, x, w, b, r, y, acc, group):
        for i in T.unroll(tokens * vectors):
            for lane in T.vectorized(lanes):
                acc[i * lanes + lane] = T.float32(0)
        for i in T.serial(k):
            for v in T.unroll(vectors):
                for t in T.unroll(tokens):
                    for lane in T.vectorized(lanes):
                        acc[(t * vectors + v) * lanes + lane] = (
                            acc[(t * vectors + v) * lanes + lane]
                            + T.Cast("float32", w[group, i, v * lanes + lane]) * x[t0 + t, i]
                        )
        for t in T.unroll(tokens):
            for row in T.serial(T.min(rows - group * tile.rows, tile.rows)):
                y[t0 + t, group * tile.rows + row] = (
                    acc[t * tile.rows + row]
                    + (b[group * tile.rows + row] if bias else T.float32(0))
                    + (r[t0 + t, group * tile.rows + row] if residual else T.float32(0))
                )

    tiles = in_tiles(sizes(tile.tokens), tokens_tile)

    @T.inline
    def body(x, w, b, r, y, n):
        for g in T.parallel(groups):
            with T.sblock("item"):
                group = T.axis.spatial(groups, g)
                acc = T.sblock_alloc_buffer((tile.tokens * tile.rows,), "float32", scope="local")
                tiles(0, n, (x, w, b, r, y, acc, group))

    main = _with_options(body, rows, k, (groups, k, tile.rows), bias, residual)
    return scheduled(main, NAME, "rows interleaved, tokens tiled", tile)


def linear_items(
    *, rows: int, k: int, with_bias: bool = False, with_residual: bool = False
) -> tvm.tirx.PrimFunc:
    """One item is one output element; weights as stored."""

    @T.inline
    def body(x, w, b, r, y, n):
        for t, row in T.grid(n, rows):
            with T.sblock("item"):
                vt, vrow = T.axis.remap("SS", [t, row])
                acc = T.sblock_alloc_buffer((1,), "float32", scope="local")
                acc[0] = T.float32(0)
                for i in T.serial(k):
                    acc[0] = acc[0] + T.Cast("float32", w[vrow, i]) * x[vt, i]
                y[vt, vrow] = (
                    acc[0]
                    + (b[vrow] if with_bias else T.float32(0))
                    + (r[vt, vrow] if with_residual else T.float32(0))
                )

    return _with_options(body, rows, k, (rows, k), with_bias, with_residual)


def _pack(target: Target, inputs: dict[str, np.ndarray], **_static: Any) -> list[np.ndarray]:
    return [
        pack_weight(target, value) if name == "weight" else value for name, value in inputs.items()
    ]


def linear_case(
    name: str,
    n: int,
    rows: int,
    k: int,
    bias: bool = False,
    residual: bool = False,
    spike: int = 1,
    *,
    weight_bytes: float = 2,
    input_bytes: int = 4,
) -> Case:
    """A case of any dense kernel, whose weights and inputs take so many bytes an element."""

    def inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
        x = rng.standard_normal((n, k), dtype=np.float32)
        x[:, k // 2] *= spike
        weight = rng.standard_normal((rows, k), dtype=np.float32)
        if rows > 1:
            weight[0, :32] = 0  # a block without a scale, where weights have one
        arrays = {"x": x, "weight": weight.astype(ml_dtypes.bfloat16)}
        if bias:
            arrays["bias"] = rng.standard_normal(rows, dtype=np.float32)
        if residual:
            arrays["residual"] = rng.standard_normal((n, rows), dtype=np.float32)
        return arrays

    return Case(
        name,
        {"rows": rows, "k": k, "with_bias": bias, "with_residual": residual},
        inputs,
        flops=2 * n * rows * k,
        bytes=int(rows * k * weight_bytes) + n * (input_bytes * k + 4 * rows),
    )


CASES = (
    linear_case("one token, partial rows", 1, 72, 96),
    linear_case("tokens not a multiple of the tile", 7, 128, 160, bias=True),
    linear_case("one row", 3, 1, 32, residual=True),
    linear_case(
        "one channel 1000 times the others", 5, 200, 96, bias=True, residual=True, spike=1000
    ),
    linear_case("more outputs than one axis of a grid has threads for", 64, 131_200, 32),
    linear_case("20b attention output, one token", 1, 2880, 4096, bias=True, residual=True),
)

LINEAR = Kernel(
    NAME,
    build=linear,
    items=linear_items,
    reference=linear_ref,
    outputs=lambda inputs, rows, **_: [((len(inputs["x"]), rows), "float32")],
    cases=CASES,
    pack=_pack,
)
