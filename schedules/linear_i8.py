"""Dense layer with 8-bit weights: y = x·Wᵀ (+ bias) (+ residual). CPU only.

    q i8 [n, 2k], step f32 [n, k/32], total i32 [n, k/32]: x, of quantize.py, in two planes
    W i8 [rows, k], one float16 scale per 32 inputs (the values of Q8_0)
    bias f32 [rows]   residual f32 [n, rows]   y f32 [n, rows]

Layout: groups of 32 rows, zero-padded at the end. W [groups, k/32, 8, 128]: byte (b, i, 4r + j) is
input 32b + 4i + j of the group's row r, as int8.py wants it; scales [groups, k/32, 32].

Roofline of decoding: 34/32·rows·k bytes of weights a step, whatever n is.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import numpy as np
import tvm

from .int8 import BLOCK, GROUP, Int8Tile, Int8Weights, dot_i8
from .isa import Isa, isa_of
from .kernel import Kernel, T, Target, parameter, scheduled
from .linear import linear_case, linear_items, linear_ref
from .quantize import dequantize, quantize_ref
from .vectors import in_tiles, sizes

NAME = "i8w_i16_linear"
PLANES = 2  # with one, activations would cost as much accuracy as the weights do
QUADS = BLOCK // 4

# AVX2 and SSSE3 have 16 registers, the others 32.
TILES = {
    "AVX-512 VNNI": Int8Tile(tokens=4, rows=32),
    "AVX-512": Int8Tile(tokens=4, rows=32),
    "AVX2": Int8Tile(tokens=3, rows=16),
    "SSSE3": Int8Tile(tokens=2, rows=8),
    "NEON i8mm": Int8Tile(tokens=4, rows=16),
    "NEON dotprod": Int8Tile(tokens=4, rows=16),
    "NEON": Int8Tile(tokens=2, rows=16),
    "plain": Int8Tile(tokens=1, rows=4),
}


def weight_scales(weight: np.ndarray) -> np.ndarray:
    """Float16 [rows, k/32] of a weight [rows, k]: what 1 of 127 is worth."""
    blocks = weight.astype(np.float32).reshape(len(weight), -1, BLOCK)
    return (np.abs(blocks).max(axis=-1) / np.float32(127)).astype(np.float16)


def quantize_weight(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """i8 [rows, k/32, 32] and weight_scales, rounded before, of a weight [rows, k]."""
    blocks = weight.astype(np.float32).reshape(len(weight), -1, BLOCK)
    scales = weight_scales(weight)
    wide = scales.astype(np.float32)[..., None]
    with np.errstate(divide="ignore"):
        inverse = np.where(wide > 0, 1 / wide, 0)
    return np.clip(np.rint(blocks * inverse), -127, 127).astype(np.int8), scales


def linear_i8_ref(
    x: np.ndarray, weight: np.ndarray, *optional: np.ndarray, **arrays: Any
) -> tuple[np.ndarray]:
    """linear_ref of the quantized x and the quantized weight, in float64."""
    x = dequantize(*quantize_ref(x, planes=PLANES)[:2])
    w, scales = quantize_weight(weight)
    weight = (w * scales.astype(np.float64)[..., None]).reshape(weight.shape)
    return linear_ref(x, weight, *optional, **arrays)


def packed_shapes(rows: int, k: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of the weights and the scales."""
    groups = -(-rows // GROUP)
    return (groups, k // BLOCK, QUADS, 4 * GROUP), (groups, k // BLOCK, GROUP)


def pack_weight(weight: np.ndarray) -> np.ndarray:
    """The 8-bit values of any number of rows of a weight [rows, k], u8 in this layout."""
    q = _whole_groups(quantize_weight(weight)[0])
    grouped = q.reshape(-1, GROUP, q.shape[1], QUADS, 4).transpose(0, 2, 3, 1, 4)
    packed = np.ascontiguousarray(grouped).reshape(-1, q.shape[1], QUADS, 4 * GROUP)
    return packed.view(np.uint8)


def pack_scales(weight: np.ndarray) -> np.ndarray:
    """Their scales, float16 in this layout."""
    scales = _whole_groups(weight_scales(weight))
    return np.ascontiguousarray(scales.reshape(-1, GROUP, scales.shape[1]).transpose(0, 2, 1))


def _whole_groups(rows: np.ndarray) -> np.ndarray:
    return np.pad(rows, ((0, -len(rows) % GROUP), *((0, 0),) * (rows.ndim - 1)))


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
    dot = dot_i8(isa, k, tile, _operands(isa), PLANES)
    weight_shape, scales_shape = packed_shapes(rows, k)
    groups = weight_shape[0]

    @T.inline
    def tokens_tile(start, tokens, acc, part, value, row, x, w, s, group, b, r, y):
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

    tiles = in_tiles(sizes(tile.tokens), tokens_tile)

    @T.prim_func(s_tir=True, private=True)
    def main():
        n = T.int64()
        q = parameter("q", (n, PLANES * k), "int8")
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
                T.reads(q[0:n, 0 : PLANES * k])
                T.writes(y[0:n, 0:rows])
                acc = T.sblock_alloc_buffer((tile.tokens * GROUP,), "float32")
                part = T.sblock_alloc_buffer((tile.tokens * tile.rows,), "int32")
                value = T.sblock_alloc_buffer((4 * isa.lanes,), "uint8")
                row = T.sblock_alloc_buffer((tile.tokens,), "int32")
                tiles(
                    0, n,
                    (
                        acc, part, value, row, (q, step, total), w, s, group,
                        b if with_bias else None, r if with_residual else None, y,
                    ),
                )  # fmt: skip

    return scheduled(main, NAME, f"rows interleaved, {isa.name}", tile)


def _pack(_target: Target, inputs: dict[str, np.ndarray], **_static: Any) -> list[np.ndarray]:
    x, weight, *rest = inputs.values()
    return [*quantize_ref(x, planes=PLANES), pack_weight(weight), pack_scales(weight), *rest]


_case = partial(linear_case, weight_bytes=34 / 32, input_bytes=PLANES)
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
