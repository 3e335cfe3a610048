"""Expressions of random programs: their dtype, and for integers the range they lie in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tvm import tirx

SIGNED = ("int8", "int16", "int32", "int64")
UNSIGNED = ("uint8", "uint16", "uint32", "uint64")
INTEGERS = (*SIGNED, *UNSIGNED)
FLOATS = ("float16", "float32")
NUMBERS = (*INTEGERS, *FLOATS)
# Where values in memory lie. Wide integers leave room: the sums and products of most need no
# reduction, and TVM's simplifier, which takes it that nothing overflows, stays right.
STORED = {
    "int8": (-128, 127),
    "uint8": (0, 255),
    "int16": (-(2**15), 2**15 - 1),
    "uint16": (0, 2**16 - 1),
    "int32": (-(2**24), 2**24),
    "uint32": (0, 2**25),
    "int64": (-(2**40), 2**40),
    "uint64": (0, 2**41),
    "bool": (0, 1),
    "float16": (-512, 512),
    "float32": (-512, 512),
}


@dataclass(frozen=True)
class Expr:
    """An expression: how to write it, its dtype, and for integers the range it lies in.

    varies: its value comes from memory, so that no simplifier can know it. TVM refuses to fold
    a constant into a dtype that does not hold it.
    """

    write: Callable[[Any], Any]
    dtype: str
    low: int = 0
    high: int = 0
    varies: bool = False

    def within(self, low: int, high: int) -> bool:
        return low <= self.low and self.high <= high


def literal(value: float, dtype: str) -> Expr:
    number = tirx.const(value, dtype)
    return Expr(lambda form: number, dtype, int(value), int(value))


def limits(dtype: str) -> tuple[int, int]:
    """The least and the largest integer of a dtype."""
    information = np.iinfo(dtype)
    return int(information.min), int(information.max)


def cast(expr: Expr, dtype: str, wraps: bool = False) -> Expr:
    """`expr` as `dtype`.

    wraps: an integer may lose its high bits, where nothing can fold it. Only for what goes to
    memory: TVM's simplifier takes it that the int8 of a natural number is one, too.
    """
    if expr.dtype == dtype:
        return expr
    if dtype == "bool":
        if expr.dtype in UNSIGNED:  # comparing these with zero, TVM subtracts from zero
            expr = cast(modulo(expr, 101), "int32")
        zero = tirx.const(0, expr.dtype)
        return Expr(lambda form: tirx.NE(expr.write(form), zero), dtype, 0, 1)
    if expr.dtype in FLOATS and dtype in INTEGERS:
        low = 0 if dtype in UNSIGNED else -100
        expr = replace(clamp(expr, low, 100), low=low, high=100)
    if expr.dtype in INTEGERS and dtype in FLOATS and not expr.within(-512, 512):
        expr = modulo(expr, 101 if expr.dtype == "int8" else 251)
    if expr.dtype in INTEGERS and dtype in INTEGERS:
        fits = expr.within(*limits(dtype))
        if not fits and not (wraps and expr.varies):
            expr = modulo(expr, 113)
        elif not fits:
            low, high = STORED[dtype]
            if (low, high) != limits(dtype):  # wrapped values would be too large
                expr = modulo(expr, min(high, limits(expr.dtype)[1]) - 3)
            else:
                expr = replace(expr, low=low, high=high)
    return replace(expr, write=lambda form: tirx.Cast(dtype, expr.write(form)), dtype=dtype)


def modulo(expr: Expr, divisor: int) -> Expr:
    """In [0, divisor)."""
    by = tirx.const(divisor, expr.dtype)
    write = lambda form: tirx.floormod(expr.write(form), by)  # noqa: E731
    return replace(expr, write=write, low=0, high=divisor - 1)


def clamp(expr: Expr, low: int, high: int) -> Expr:
    least, most = tirx.const(low, expr.dtype), tirx.const(high, expr.dtype)
    return replace(expr, write=lambda form: tirx.max(tirx.min(expr.write(form), most), least))


def stored(expr: Expr, dtype: str) -> Expr:
    """`expr` as memory of `dtype` may hold it."""
    expr = cast(expr, dtype, wraps=True)
    if dtype in INTEGERS and not expr.within(*STORED[dtype]):
        return modulo(expr, STORED[dtype][1] - 2)
    return expr


def combine(operator: str, left: Expr, right: Expr) -> Expr:
    """left (operator) right, both of one dtype; operands are reduced where it could overflow."""
    dtype = left.dtype
    operation = {
        "+": lambda x, y: x + y,
        "-": lambda x, y: x - y,
        "*": lambda x, y: x * y,
        "min": tirx.min,
        "max": tirx.max,
    }[operator]

    def write(form: Any) -> Any:
        return operation(left.write(form), right.write(form))

    varies = left.varies and right.varies
    if dtype in FLOATS:  # kept finite: half precision would overflow at once
        result = Expr(write, dtype, varies=varies)
        return result if operator in ("min", "max") else clamp(result, -512, 512)
    ends = [
        {"+": x + y, "-": x - y, "*": x * y, "min": min(x, y), "max": max(x, y)}[operator]
        for x in (left.low, left.high)
        for y in (right.low, right.high)
    ]
    low, high = limits(dtype)
    if min(ends) < low or max(ends) > high:
        if dtype in UNSIGNED and operator == "-":
            return combine("+", left, right)
        bits = np.iinfo(dtype).bits
        least = 11 if bits == 8 else 181 if bits == 16 else 32749
        return combine(operator, modulo(left, least), modulo(right, least))
    return Expr(write, dtype, min(ends), max(ends), varies)
