"""Which power of two is known to divide an index: the proof behind every vector memory access.

A load of four floats at once needs an address divisible by 16 on real hardware; a device that
does without hides the mistake. Where nothing is known the answer is 1, and the access is made
element by element.
"""

from __future__ import annotations

from typing import Any

from tvm.ir import prim

from .dtypes import from_tvm

LIMIT = 1 << 16  # zero is divisible by everything; more than this is never asked


class Divisors:
    """Powers of two that divide TIR's integer expressions; variables as they are bound."""

    def __init__(self) -> None:
        self._variables: dict[int, int] = {}

    def bind(self, variable: Any, divisor: int) -> None:
        self._variables[hash(variable)] = divisor

    def of(self, expr: Any) -> int:
        """The largest power of two, up to LIMIT, that is proven to divide `expr`.

        Wrapping around does not disturb it: the modulus is a power of two as well.
        """
        kind = type(expr)
        if kind is prim.IntImm:
            return power_of_two_in(int(expr.value))
        if kind is prim.Mul:
            return min(LIMIT, self.of(expr.a) * self.of(expr.b))
        if kind in (prim.Add, prim.Sub, prim.Min, prim.Max, prim.BitwiseOr, prim.BitwiseXor):
            return min(self.of(expr.a), self.of(expr.b))
        if kind in (prim.Mod, prim.FloorMod):
            # x - y·q, whatever q is.
            return min(self.of(expr.a), self.of(expr.b))
        if kind is prim.BitwiseAnd:
            return max(self.of(expr.a), self.of(expr.b))
        if kind is prim.Select:
            return min(self.of(expr.true_value), self.of(expr.false_value))
        if kind in (prim.LShift, prim.RShift, prim.Div, prim.FloorDiv):
            return self._scaled(kind, expr)
        if kind is prim.Cast:
            source, target = from_tvm(expr.value.ty.dtype), from_tvm(expr.ty.dtype)
            whole = source is not None and target is not None and source.is_integer
            return self.of(expr.value) if whole else 1
        return self._variables.get(hash(expr), 1)

    def _scaled(self, kind: type, expr: Any) -> int:
        """Shifts by a constant, and quotients that leave no remainder."""
        if type(expr.b) is not prim.IntImm or int(expr.b.value) <= 0:
            return 1 if kind is not prim.LShift else self.of(expr.a)
        amount = int(expr.b.value)
        if kind is prim.LShift:
            dtype = from_tvm(expr.ty.dtype)
            amount %= dtype.bits if dtype is not None else 1  # as the operator does
            return min(LIMIT, self.of(expr.a) << min(amount, 16))
        divisor = 1 << min(amount, 17) if kind is prim.RShift else amount
        own = self.of(expr.a)
        if divisor & (divisor - 1) == 0 and own >= divisor:
            # Zero's own divisor is cut off at LIMIT, which only makes this smaller.
            return own // divisor
        return 1


def power_of_two_in(number: int) -> int:
    """The largest power of two, up to LIMIT, that divides `number`."""
    return min(LIMIT, number & -number) if number else LIMIT
