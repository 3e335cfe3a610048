"""Products of quantized activations with packed weights, on every CPU instruction set.

A token's activations are 8-bit integers, or 15-bit ones in two 8-bit digits, hi and lo, with one
scale for 32 neighbours (quantize.py). A block of 32 is summed in integers, exactly, then
multiplied by both scales, of the activations and of the weights, and added up in float32.

Weights lie in groups of 32 rows: of each block, the next four inputs of all rows side by side,
then the next four. So a register of any width holds rows, and no sum is horizontal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from ..formats.blocks import BLOCK, DIGIT_BITS
from ..kernel import TileConfig
from .isa import Dot4, Isa, eight, four, unzipped, zipped

GROUP = 32  # rows of one packed group


@dataclass(frozen=True)
class Int8Tile(TileConfig):
    tokens: int  # tokens that share a weight in registers
    rows: int  # of a group at a time; what is left waits for another pass over the activations


@dataclass(frozen=True)
class Int8Weights:
    """How stored weights become operands.

    A stored register holds `parts` operands of four inputs a row. `operand(w, at, block, i,
    vector, part)` is a u8 register: inputs 4·(i·parts + part) to + 3 of the block, of the group's
    rows vector·lanes and following; `at` is the group's index. `scale(s, at, block, row)` is a
    float32. What the operands stand for is them less `bias`, times `factor`.
    """

    parts: int
    operand: Callable[..., Any]
    scale: Callable[..., Any]
    dot: Dot4
    bias: int
    factor: float


def dot_i8(isa: Isa, k: int, tile: Int8Tile, weights: Int8Weights, digits: int = 1) -> Any:
    """The T.inline `dot(acc, part, value, row, tokens, x, w, s, at)`.

    acc[32·t : 32·t + 32] = W[at]·x[row[t]] for t < tokens, with x a tuple of buffers: q i8
    [n, digits·k], scale f32 [n, k/32], sum i32 [n, k/32], as quantize.py makes them. part: i32
    for tile.tokens·tile.rows sums; value: u8, a register.
    """
    lanes, parts, bias = isa.lanes, weights.parts, weights.bias
    vectors = tile.rows // lanes

    @T.inline
    def digit(first, part, value, row, tokens, x, w, at, h, b):
        for i in T.unroll(BLOCK // (4 * parts)):
            for v in T.unroll(vectors):
                for j in T.unroll(parts):
                    value[T.ramp(0, 1, 4 * lanes)] = weights.operand(
                        w, at, b, i, h * vectors + v, j
                    )
                    for t in T.unroll(tokens):
                        part[T.ramp((t * vectors + v) * lanes, 1, lanes)] = weights.dot(
                            part[T.ramp((t * vectors + v) * lanes, 1, lanes)],
                            value[T.ramp(0, 1, 4 * lanes)],
                            four(x[0], row[t], first + b * BLOCK + (i * parts + j) * 4, lanes),
                        )

    # The same in pairs of tokens. A pair's two sums of a vector hold two rows of both tokens each.

    @T.inline
    def half_vector(half, i, v, first, part, value, row, tokens, x, w, at, h, b):
        value[T.ramp(0, 1, 4 * lanes)] = zipped(
            half,
            weights.operand(w, at, b, i * 2 // parts, h * vectors + v, i * 2 % parts),
            weights.operand(w, at, b, (i * 2 + 1) // parts, h * vectors + v, (i * 2 + 1) % parts),
        )
        for p in T.unroll(tokens // 2):
            part[T.ramp(((p * 2 + half) * vectors + v) * lanes, 1, lanes)] = isa.dot_pairs(
                part[T.ramp(((p * 2 + half) * vectors + v) * lanes, 1, lanes)],
                value[T.ramp(0, 1, 4 * lanes)],
                eight(x[0], (row[p * 2], row[p * 2 + 1]), first + b * BLOCK + i * 8),
            )

    @T.inline
    def digit_in_pairs(first, part, value, row, tokens, x, w, at, h, b):
        for i in T.unroll(BLOCK // 8):
            for v in T.unroll(vectors):
                half_vector(0, i, v, first, part, value, row, tokens, x, w, at, h, b)
                half_vector(1, i, v, first, part, value, row, tokens, x, w, at, h, b)

    @T.inline
    def part_pairs(part, tokens):
        for p in T.unroll(tokens // 2):
            for v in T.unroll(vectors):
                one: T.let = part[T.ramp((p * 2 * vectors + v) * lanes, 1, lanes)]
                two: T.let = part[T.ramp(((p * 2 + 1) * vectors + v) * lanes, 1, lanes)]
                part[T.ramp((p * 2 * vectors + v) * lanes, 1, lanes)] = unzipped(0, one, two)
                part[T.ramp(((p * 2 + 1) * vectors + v) * lanes, 1, lanes)] = unzipped(1, one, two)

    def in_pairs(tokens: int) -> bool:
        return isa.dot_pairs is not None and tokens % 2 == 0

    @T.inline
    def add(first, part, value, row, tokens, x, w, at, h, b):
        if in_pairs(tokens):
            digit_in_pairs(first, part, value, row, tokens, x, w, at, h, b)
        else:
            digit(first, part, value, row, tokens, x, w, at, h, b)

    @T.inline
    def dot(acc, part, value, row, tokens, x, w, s, at):
        for h in T.unroll(GROUP // tile.rows):
            for t in T.unroll(tokens):
                for v in T.unroll(vectors):
                    acc[T.ramp(t * GROUP + h * tile.rows + v * lanes, 1, lanes)] = T.broadcast(
                        T.float32(0), lanes
                    )
            for b in T.serial(k // BLOCK):
                # The sum is of both digits: what a bias adds is taken off before the second.
                for t in T.unroll(tokens):
                    for v in T.unroll(vectors):
                        part[T.ramp((t * vectors + v) * lanes, 1, lanes)] = T.broadcast(
                            _less(bias if digits == 1 else 0, x[2], row[t], b), lanes
                        )
                add(0, part, value, row, tokens, x, w, at, h, b)
                if digits == 2:
                    for t in T.unroll(tokens):
                        for v in T.unroll(vectors):
                            part[T.ramp((t * vectors + v) * lanes, 1, lanes)] = part[
                                T.ramp((t * vectors + v) * lanes, 1, lanes)
                            ] * T.broadcast(T.int32(1 << DIGIT_BITS), lanes) + T.broadcast(
                                _less(bias, x[2], row[t], b), lanes
                            )
                    add(k, part, value, row, tokens, x, w, at, h, b)
                if in_pairs(tokens):
                    part_pairs(part, tokens)
                for t in T.unroll(tokens):
                    for v in T.unroll(vectors):
                        for lane in T.vectorized(lanes):
                            acc[t * GROUP + h * tile.rows + v * lanes + lane] = acc[
                                t * GROUP + h * tile.rows + v * lanes + lane
                            ] + T.Cast("float32", part[(t * vectors + v) * lanes + lane]) * (
                                x[1][row[t], b]
                                * T.float32(weights.factor)
                                * weights.scale(s, at, b, h * tile.rows + v * lanes + lane)
                            )

    return dot


def _less(bias: int, sums: Any, row: Any, block: Any) -> Any:
    """What a bias of the weights adds to a sum, taken off."""
    return sums[row, block] * -bias if bias else T.int32(0)
