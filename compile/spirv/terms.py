"""Values with Python's operators, for formulas that should read like formulas.

A sum or product of terms is rounded by itself (NoContraction): splitting an argument into exact
parts depends on it. `horner` is where fusing is welcome.
"""

from __future__ import annotations

from collections.abc import Sequence

from . import arithmetic
from .builder import Builder, Number
from .convert import cast, reinterpret
from .dtypes import DType, Value
from .encoding import Glsl, Op


class Term:
    """A value and the builder that it lives in; numbers beside it take its dtype."""

    __slots__ = ("builder", "value")

    def __init__(self, builder: Builder, value: Value) -> None:
        self.builder = builder
        self.value = value

    @property
    def dtype(self) -> DType:
        return self.value.dtype

    def like(self, number: Number) -> Term:
        """A constant of this term's dtype."""
        return Term(self.builder, self.builder.constant(self.dtype, number))

    def _other(self, other: Term | Number) -> Value:
        return other.value if isinstance(other, Term) else self.like(other).value

    def _exact(self, op: Op, x: Value, y: Value) -> Term:
        return Term(self.builder, self.builder.op(op, x.dtype, x, y, exact=True))

    def _arithmetic(self, as_float: Op, as_integer: Op, x: Value, y: Value) -> Term:
        if x.dtype.is_float:
            return self._exact(as_float, x, y)
        return Term(self.builder, self.builder.op(as_integer, x.dtype, x, y))

    def __add__(self, other: Term | Number) -> Term:
        return self._arithmetic(Op.F_ADD, Op.I_ADD, self.value, self._other(other))

    def __radd__(self, other: Number) -> Term:
        return self._arithmetic(Op.F_ADD, Op.I_ADD, self._other(other), self.value)

    def __sub__(self, other: Term | Number) -> Term:
        return self._arithmetic(Op.F_SUB, Op.I_SUB, self.value, self._other(other))

    def __rsub__(self, other: Number) -> Term:
        return self._arithmetic(Op.F_SUB, Op.I_SUB, self._other(other), self.value)

    def __mul__(self, other: Term | Number) -> Term:
        return self._arithmetic(Op.F_MUL, Op.I_MUL, self.value, self._other(other))

    __rmul__ = __mul__

    def __truediv__(self, other: Term | Number) -> Term:
        return self._exact(Op.F_DIV, self.value, self._other(other))

    def __rtruediv__(self, other: Number) -> Term:
        return self._exact(Op.F_DIV, self._other(other), self.value)

    def __neg__(self) -> Term:
        return Term(self.builder, arithmetic.negate(self.builder, self.value))

    def _compared(self, sign: str, other: Term | Number) -> Term:
        compared = arithmetic.comparison(sign)(self.builder, self.value, self._other(other))
        return Term(self.builder, compared)

    def __lt__(self, other: Term | Number) -> Term:
        return self._compared("<", other)

    def __le__(self, other: Term | Number) -> Term:
        return self._compared("<=", other)

    def __gt__(self, other: Term | Number) -> Term:
        return self._compared(">", other)

    def __ge__(self, other: Term | Number) -> Term:
        return self._compared(">=", other)

    def equals(self, other: Term | Number) -> Term:
        return self._compared("==", other)

    def differs(self, other: Term | Number) -> Term:
        return self._compared("!=", other)

    def __and__(self, other: Term | Number) -> Term:
        both = arithmetic.bitwise_and(self.builder, self.value, self._other(other))
        return Term(self.builder, both)

    def __or__(self, other: Term | Number) -> Term:
        either = arithmetic.bitwise_or(self.builder, self.value, self._other(other))
        return Term(self.builder, either)

    def __xor__(self, other: Term | Number) -> Term:
        one = arithmetic.bitwise_xor(self.builder, self.value, self._other(other))
        return Term(self.builder, one)

    def __invert__(self) -> Term:
        return Term(self.builder, arithmetic.bitwise_not(self.builder, self.value))

    def __lshift__(self, other: Term | Number) -> Term:
        shifted = arithmetic.shift_left(self.builder, self.value, self._other(other))
        return Term(self.builder, shifted)

    def __rshift__(self, other: Term | Number) -> Term:
        shifted = arithmetic.shift_right(self.builder, self.value, self._other(other))
        return Term(self.builder, shifted)

    def to(self, dtype: DType) -> Term:
        """Cast, lane by lane."""
        return Term(
            self.builder, cast(self.builder, self.value, dtype.with_lanes(self.dtype.lanes))
        )

    def reinterpret(self, dtype: DType) -> Term:
        """The bits of each lane as another dtype of the same width."""
        dtype = dtype.with_lanes(self.dtype.lanes)
        return Term(self.builder, reinterpret(self.builder, self.value, dtype))

    def glsl(self, function: Glsl, *others: Term) -> Term:
        operands = [self.value, *[other.value for other in others]]
        return Term(self.builder, self.builder.glsl(function, self.dtype, *operands))


def where(condition: Term, yes: Term | Number, no: Term | Number) -> Term:
    """Lane by lane; at least one of the two is a term."""
    template = yes if isinstance(yes, Term) else no
    assert isinstance(template, Term)
    yes = yes if isinstance(yes, Term) else template.like(yes)
    no = no if isinstance(no, Term) else template.like(no)
    b = condition.builder
    return Term(b, b.select(condition.value, yes.value, no.value))


def horner(x: Term, coefficients: Sequence[float]) -> Term:
    """A polynomial, coefficients from the constant up, fused where the device can."""
    result = x.like(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = result.glsl(Glsl.FMA, x, x.like(coefficient))
    return result
