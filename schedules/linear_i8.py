"""Dense layer with 8-bit weights and activations: y = x·Wᵀ (+ bias) (+ residual). CPU only.

    q i8 [n, k], step f32 [n, k/32], total i32 [n, k/32]: x, of quantize.py
    W i8 [rows, k], one float16 scale per 32 inputs (the values of Q8_0)
    bias f32 [rows]   residual f32 [n, rows]   y f32 [n, rows]

Layout: groups of 32 rows, zero-padded at the end. W [groups, k/32, 8, 128]: byte (b, i, 4r + j) is
input 32b + 4i + j of the group's row r, as int8.py wants it; scales [groups, k/32, 32].

Roofline of decoding: 34/32·rows·k bytes of weights a step, whatever n is.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
import tvm

from .int8 import BLOCK, GROUP, Int8Tile, Int8Weights, dot_i8
from .isa import Isa, isa_of
from .kernel import Case, Kernel, T, Target, parameter, scheduled
from .linear import linear_items, linear_ref
from .quantize import quantize_ref

NAME = "i8w_i8_linear"
QUADS = BLOCK // 4

# AVX2 and SSSE3 have 16 registers, the others 32.
TILES = {
    "AVX-512 VNNI": Int8Tile(tokens=4, rows=32),
    "AVX-512": Int8Tile(tokens=4, rows=32),
    "AVX2": Int8Tile(tokens=2, rows=16),
    "SSSE3": Int8Tile(tokens=2, rows=8),
    "NEON dotprod": Int8Tile(tokens=4, rows=16),
    "NEON": Int8Tile(tokens=2, rows=16),
    "plain": Int8Tile(tokens=1, rows=4),
}


def quantize_weight(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[rows, k] -> i8 [rows, k/32, 32] and float16 scales [rows, k/32]: the largest of 32 is 127.

    The scale is rounded first, up where float16 needs it, so that 127 is never exceeded.
    """
    blocks = weight.astype(np.float32).reshape(len(weight), -1, BLOCK)
    peak = np.abs(blocks).max(axis=-1)
    scale = (peak / np.float32(127)).astype(np.float16)
    with np.errstate(divide="ignore", invalid="ignore"):
        q = np.rint(blocks / scale.astype(np.float32)[..., None])
    q = np.clip(np.where(scale[..., None] > 0, q, 0), -127, 127)
    return q.astype(np.int8), scale


def linear_i8_ref(
    x: np.ndarray, weight: np.ndarray, *optional: np.ndarray, **arrays: Any
) -> tuple[np.ndarray]:
    """linear_ref of the quantized x and the quantized weight, in float64."""
    q, step, _ = quantize_ref(x)
    x = q * np.repeat(step.astype(np.float64), BLOCK, axis=1)
    w, scale = quantize_weight(weight)
    weight = (w * scale.astype(np.float64)[..., None]).reshape(weight.shape)
    return linear_ref(x, weight, *optional, **arrays)


def packed_shapes(rows: int, k: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the weights and the scales."""
    groups = -(-rows // GROUP)
    return (groups, k // BLOCK, QUADS, 4 * GROUP), (groups, k // BLOCK, GROUP)


def pack_weight(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Any number of rows of a [rows, k] weight as u8 and float16 arrays in this layout."""
    q, scale = quantize_weight(weight)
    rows, blocks, _ = q.shape
    padding = -rows % GROUP
    q = np.pad(q, ((0, padding), (0, 0), (0, 0)))
    scale = np.pad(scale, ((0, padding), (0, 0)))
    grouped = q.reshape(-1, GROUP, blocks, QUADS, 4).transpose(0, 2, 3, 1, 4)
    packed = np.ascontiguousarray(grouped).reshape(-1, blocks, QUADS, 4 * GROUP)
    scales = scale.reshape(-1, GROUP, blocks).transpose(0, 2, 1)
    return packed.view(np.uint8), np.ascontiguousarray(scales)


def _operands(isa: Isa) -> Int8Weights:
    size = 4 * isa.lanes
    return Int8Weights(
        parts=1,
        operand=lambda w, at, b, i, vector, _part: w[(*at, b, i, T.ramp(vector * size, 1, size))],
        scale=lambda s, at, b, row: T.Cast("float32", s[(*at, b, row)]),
        dot=isa.dot_bytes,
        bias=isa.byte_bias,
        factor=1.0,
    )


@cache
def linear_i8(
    target: Target, *, rows: int, k: int, with_bias: bool = False, with_residual: bool = False
) -> tvm.tirx.PrimFunc:
    """(q, step, total, weight, scales, [bias], [residual], y) -> None, scheduled for a CPU."""
    isa = isa_of(target)
    tile = TILES[isa.name]
    dot = dot_i8(isa, k, tile, _operands(isa))
    weight_shape, scales_shape = packed_shapes(rows, k)
    groups = weight_shape[0]

    @T.inline
    def tokens_tile(acc, part, value, row, tokens, start, x, w, s, group, b, r, y):
        for t in T.unroll(tokens):
            row[t] = T.Cast("int32", start + t)
        dot(acc, part, value, row, tokens, x, w, s, (group,))
        for t in T.unroll(tokens):
            for i in T.serial(T.min(rows - group * GROUP, GROUP)):
                y[start + t, group * GROUP + i] = (
                    acc[t * GROUP + i]
                    + (b[group * GROUP + i] if with_bias else T.float32(0))
                    + (r[start + t, group * GROUP + i] if with_residual else T.float32(0))
                )

    @T.prim_func(s_tir=True, private=True)
    def main():
        n = T.int64()
        q = parameter("q", (n, k), "int8")
        step = parameter("step", (n, k // BLOCK), "float32")
        total = parameter("total", (n, k // BLOCK), "int32")
        w = parameter("w", weight_shape, "uint8")
        s = parameter("s", scales_shape, "float16")
        if with_bias:
            b = parameter("b", (rows,), "float32")
        if with_residual:
            r = parameter("r", (n, rows), "float32")
        y = parameter("y", (n, rows), "float32")
        for g in T.parallel(groups):
            with T.sblock("item"):
                group = T.axis.spatial(groups, g)
                # Said here because detection gives up on vector loads; nothing schedules further.
                T.reads(q[0:n, 0:k])
                T.writes(y[0:n, 0:rows])
                acc = T.sblock_alloc_buffer((tile.tokens * GROUP,), "float32")
                part = T.sblock_alloc_buffer((tile.tokens * tile.rows,), "int32")
                value = T.sblock_alloc_buffer((4 * isa.lanes,), "uint8")
                row = T.sblock_alloc_buffer((tile.tokens,), "int32")
                for t in T.serial(n // tile.tokens):
                    tokens_tile(
                        acc, part, value, row, tile.tokens, t * tile.tokens, (q, step, total),
                        w, s, group, b if with_bias else None, r if with_residual else None, y,
                    )  # fmt: skip
                for t in T.serial(n % tile.tokens):
                    tokens_tile(
                        acc, part, value, row, 1, n // tile.tokens * tile.tokens + t,
                        (q, step, total),
                        w, s, group, b if with_bias else None, r if with_residual else None, y,
                    )  # fmt: skip

    return scheduled(main, NAME, f"rows interleaved, {isa.name}", tile)


def _pack(_target: Target, inputs: dict[str, np.ndarray], **_static: Any) -> list[np.ndarray]:
    x, weight, *rest = inputs.values()
    return [*quantize_ref(x), *pack_weight(weight), *rest]


def _case(
    name: str, n: int, rows: int, k: int, bias: bool = False, residual: bool = False, spike: int = 1
) -> Case:
    def inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
        x = rng.standard_normal((n, k), dtype=np.float32)
        x[:, k // 2] *= spike
        weight = rng.standard_normal((rows, k), dtype=np.float32)
        weight[0, :BLOCK] = 0  # a block without a scale
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
        bytes=rows * k * 34 // 32 + n * (k + 4 * rows),
    )


CASES = (
    _case("one token, partial rows", 1, 72, 96),
    _case("tokens not a multiple of the tile", 7, 128, 160, bias=True),
    _case("one row", 3, 1, 32, residual=True),
    _case("one channel 1000 times the others", 5, 200, 96, bias=True, residual=True, spike=1000),
    _case("20b attention output, one token", 1, 2880, 4096, bias=True, residual=True),
)

LINEAR_I8 = Kernel(
    NAME,
    build=linear_i8,
    items=linear_items,
    reference=linear_i8_ref,
    outputs=lambda inputs, rows, **_: [((len(inputs["x"]), rows), "float32")],
    cases=CASES,
    pack=_pack,
    targets=("cpu",),
)
