"""`i8` on CPUs.

Layout: groups of 32 rows, zero-padded at the end. weight [groups, k/32, 8, 128]: byte (b, i,
4r + j) is input 32b + 4i + j of the group's row r, as cpu/int8.py wants it; scales
[groups, k/32, 32].
"""

from __future__ import annotations

from functools import partial

import numpy as np
import tvm

from ..cpu import isa as isas
from ..cpu.int8 import GROUP, Int8Tile, Int8Weights, dot_i8
from ..cpu.isa import Isa
from ..cpu.vectors import in_tiles, sizes
from ..formats.blocks import BLOCK
from ..kernel import Layout, Schedule, T, Tensor, prim_func
from .linear import plus_options

QUADS = BLOCK // 4
DIGITS = 2

# AVX2 and SSSE3 have 16 registers, the others 32.
TILES = {
    isas.AVX512_VNNI: Int8Tile(tokens=4, rows=32),
    isas.AVX512: Int8Tile(tokens=4, rows=32),
    isas.AVX2: Int8Tile(tokens=3, rows=16),
    isas.SSSE3: Int8Tile(tokens=2, rows=8),
    isas.NEON_I8MM: Int8Tile(tokens=4, rows=16),
    isas.NEON_DOTPROD: Int8Tile(tokens=4, rows=16),
    isas.NEON: Int8Tile(tokens=2, rows=16),
    isas.PLAIN: Int8Tile(tokens=1, rows=4),
}


def _pack_weight(q: np.ndarray) -> np.ndarray:
    q = _whole_groups(q)
    grouped = q.reshape(-1, GROUP, q.shape[1] // BLOCK, QUADS, 4).transpose(0, 2, 3, 1, 4)
    packed = np.ascontiguousarray(grouped).reshape(*grouped.shape[:3], 4 * GROUP)
    return packed.view(np.uint8)


def _pack_scales(scales: np.ndarray) -> np.ndarray:
    scales = _whole_groups(scales)
    return np.ascontiguousarray(scales.reshape(-1, GROUP, scales.shape[1]).transpose(0, 2, 1))


def _whole_groups(rows: np.ndarray) -> np.ndarray:
    return np.pad(rows, ((0, -len(rows) % GROUP), (0, 0)))


LAYOUTS = {
    "weight": Layout(
        shape=lambda shape: (-(-shape[0] // GROUP), shape[1] // BLOCK, QUADS, 4 * GROUP),
        pack=_pack_weight,
        rows=GROUP,
        dtype="uint8",
    ),
    "weight_scale": Layout(
        shape=lambda shape: (-(-shape[0] // GROUP), shape[1], GROUP), pack=_pack_scales, rows=GROUP
    ),
}


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


def _build(
    isa: Isa, arguments: tuple[Tensor, ...], *, rows: int, k: int, tile: Int8Tile, **_options: bool
) -> tvm.tirx.PrimFunc:
    dot = dot_i8(isa, k, tile, _operands(isa), DIGITS)
    groups = -(-rows // GROUP)

    @T.inline
    def tokens_tile(start, tokens, acc, part, value, row, x, w, s, group, b, r, y):
        for t in T.unroll(tokens):
            row[t] = T.Cast("int32", start + t)
        dot(acc, part, value, row, tokens, x, w, s, (group,))
        for t in T.unroll(tokens):
            for i in T.serial(T.min(rows - group * GROUP, GROUP)):
                y[start + t, group * GROUP + i] = plus_options(
                    acc[t * GROUP + i], b, r, start + t, group * GROUP + i
                )

    tiles = in_tiles(sizes(tile.tokens), tokens_tile)

    @T.inline
    def body(n, x, x_scale, x_sum, weight, weight_scale, y, bias=None, residual=None):
        for g in T.parallel(groups):
            with T.sblock("item"):
                group = T.axis.spatial(groups, g)
                # Stated, as detection gives up on vector loads; nothing schedules further.
                T.reads(x[0:n, 0 : DIGITS * k])
                T.writes(y[0:n, 0:rows])
                acc = T.sblock_alloc_buffer((tile.tokens * GROUP,), "float32")
                part = T.sblock_alloc_buffer((tile.tokens * tile.rows,), "int32")
                value = T.sblock_alloc_buffer((4 * isa.lanes,), "uint8")
                row = T.sblock_alloc_buffer((tile.tokens,), "int32")
                tiles(
                    0, n,
                    (
                        acc, part, value, row, (x, x_scale, x_sum), weight, weight_scale, group,
                        bias, residual, y,
                    ),
                )  # fmt: skip

    return prim_func(arguments, body)


SCHEDULES = tuple(
    Schedule(f"rows interleaved, {isa.name}", isa.needs, partial(_build, isa), TILES[isa], LAYOUTS)
    for isa in isas.ISAS
)
