"""Operators: what +, /, %, <, << and the rest mean on every dtype.

What TIR leaves open is decided here, so that every device does the same:

- Integers wrap around. Division by zero has no defined value, and no other effect.
- A shift by the width or more is a shift by the amount modulo the width.
- min and max of floats are `a < b ? a : b` and `a > b ? a : b`: with a NaN, the second operand.
- A comparison with NaN is false, except ≠, which is true.
- Float + − × are rounded correctly, ÷ is within 2.5 ulp (Vulkan's guarantee); × and + may be
  fused by the device. Denormals may be flushed to zero.
- bfloat16 operands are widened to float32 and the result is rounded back.
"""

from __future__ import annotations

from collections.abc import Callable

from .builder import Builder
from .convert import cast
from .dtypes import BOOL, F32, U32, DType, Value
from .encoding import Glsl, Op

Binary = Callable[[Builder, Value, Value], Value]


def _in_float32(operation: Binary) -> Binary:
    """`operation`, with bfloat16 operands computed in float32."""

    def widened(b: Builder, x: Value, y: Value) -> Value:
        if x.dtype.kind != "bfloat":
            return operation(b, x, y)
        wide = F32.with_lanes(x.dtype.lanes)
        result = operation(b, cast(b, x, wide), cast(b, y, wide))
        return cast(b, result, x.dtype) if result.dtype == wide else result

    return widened


@_in_float32
def add(b: Builder, x: Value, y: Value) -> Value:
    return b.op(Op.F_ADD if x.dtype.is_float else Op.I_ADD, x.dtype, x, y)


@_in_float32
def subtract(b: Builder, x: Value, y: Value) -> Value:
    return b.op(Op.F_SUB if x.dtype.is_float else Op.I_SUB, x.dtype, x, y)


@_in_float32
def multiply(b: Builder, x: Value, y: Value) -> Value:
    return b.op(Op.F_MUL if x.dtype.is_float else Op.I_MUL, x.dtype, x, y)


@_in_float32
def divide(b: Builder, x: Value, y: Value) -> Value:
    """x / y; integers towards zero."""
    if x.dtype.is_float:
        return b.op(Op.F_DIV, x.dtype, x, y)
    if not x.dtype.is_signed:
        return b.op(Op.U_DIV, x.dtype, x, y)
    if b.known(y) not in (None, -1):
        return b.op(Op.S_DIV, x.dtype, x, y)
    # The smallest integer by -1 is undefined in SPIR-V and a trap on some CPUs: 0 - x wraps.
    minus_one = compare(Op.I_EQUAL, b, y, b.constant(y.dtype, -1))
    quotient = b.op(Op.S_DIV, x.dtype, x, b.select(minus_one, b.constant(y.dtype, 1), y))
    return b.select(minus_one, b.op(Op.S_NEGATE, x.dtype, x), quotient)


@_in_float32
def remainder(b: Builder, x: Value, y: Value) -> Value:
    """x - y·trunc(x / y), with the sign of x.

    Not OpSRem: Vulkan leaves it undefined for negative operands.
    """
    if x.dtype.is_float:
        return float_remainder(b, x, y)
    if not x.dtype.is_signed:
        return b.op(Op.U_MOD, x.dtype, x, y)
    return subtract(b, x, multiply(b, divide(b, x, y), y))


def float_remainder(b: Builder, x: Value, y: Value) -> Value:
    """The formula as it stands, each step rounded; the function fmod is exact."""
    quotient = float_truncate(b, b.op(Op.F_DIV, x.dtype, x, y))
    product = b.op(Op.F_MUL, x.dtype, quotient, y)
    return b.op(Op.F_SUB, x.dtype, x, product)


def float_truncate(b: Builder, x: Value) -> Value:
    """Towards zero, with the sign of x.

    Mesa 22.3 on CPUs without AVX-512 returns float64 from 2^24 on as it is, fraction included, and
    loses the sign of zero. Its floor and ceil are right.
    """
    if x.dtype.bits < 64:
        return b.glsl(Glsl.TRUNC, x.dtype, x)
    negative = less(b, x, b.constant(x.dtype, 0))
    return b.select(negative, b.glsl(Glsl.CEIL, x.dtype, x), b.glsl(Glsl.FLOOR, x.dtype, x))


@_in_float32
def floor_divide(b: Builder, x: Value, y: Value) -> Value:
    """floor(x / y)."""
    if x.dtype.is_float:
        return b.glsl(Glsl.FLOOR, x.dtype, b.op(Op.F_DIV, x.dtype, x, y))
    quotient = divide(b, x, y)
    if not x.dtype.is_signed:
        return quotient
    rest = subtract(b, x, multiply(b, quotient, y))
    lower = subtract(b, quotient, b.constant(x.dtype, 1))
    return b.select(_signs_differ(b, rest, y), lower, quotient)


@_in_float32
def floor_remainder(b: Builder, x: Value, y: Value) -> Value:
    """x - y·floor(x / y), with the sign of y."""
    if x.dtype.is_float:
        return subtract(b, x, multiply(b, floor_divide(b, x, y), y))
    rest = remainder(b, x, y)
    if not x.dtype.is_signed:
        return rest
    return b.select(_signs_differ(b, rest, y), add(b, rest, y), rest)


def _signs_differ(b: Builder, rest: Value, divisor: Value) -> Value:
    """Whether a non-zero remainder has another sign than the divisor."""
    zero = b.constant(rest.dtype, 0)
    truth = BOOL.with_lanes(rest.dtype.lanes)
    signs = b.op(Op.BITWISE_XOR, rest.dtype, rest, divisor)
    return b.op(
        Op.LOGICAL_AND,
        truth,
        b.op(Op.I_NOT_EQUAL, truth, rest, zero),
        b.op(Op.S_LESS_THAN, truth, signs, zero),
    )


@_in_float32
def minimum(b: Builder, x: Value, y: Value) -> Value:
    if x.dtype.is_integer:
        return b.glsl(Glsl.S_MIN if x.dtype.is_signed else Glsl.U_MIN, x.dtype, x, y)
    return b.select(less(b, x, y), x, y)


@_in_float32
def maximum(b: Builder, x: Value, y: Value) -> Value:
    if x.dtype.is_integer:
        return b.glsl(Glsl.S_MAX if x.dtype.is_signed else Glsl.U_MAX, x.dtype, x, y)
    return b.select(less(b, y, x), x, y)


def negate(b: Builder, x: Value) -> Value:
    return b.op(Op.F_NEGATE if x.dtype.is_float else Op.S_NEGATE, x.dtype, x)


# Comparison: the instruction for (float, signed, unsigned) operands.
_COMPARISONS = {
    "==": (Op.F_ORD_EQUAL, Op.I_EQUAL, Op.I_EQUAL),
    "!=": (Op.F_UNORD_NOT_EQUAL, Op.I_NOT_EQUAL, Op.I_NOT_EQUAL),
    "<": (Op.F_ORD_LESS_THAN, Op.S_LESS_THAN, Op.U_LESS_THAN),
    "<=": (Op.F_ORD_LESS_THAN_EQUAL, Op.S_LESS_THAN_EQUAL, Op.U_LESS_THAN_EQUAL),
    ">": (Op.F_ORD_GREATER_THAN, Op.S_GREATER_THAN, Op.U_GREATER_THAN),
    ">=": (Op.F_ORD_GREATER_THAN_EQUAL, Op.S_GREATER_THAN_EQUAL, Op.U_GREATER_THAN_EQUAL),
}


def comparison(sign: str) -> Binary:
    """The operator written `sign`: two values of one dtype to a bool in each lane."""
    as_float, as_signed, as_unsigned = _COMPARISONS[sign]

    @_in_float32
    def compared(b: Builder, x: Value, y: Value) -> Value:
        if x.dtype.kind == "bool":
            word = U32.with_lanes(x.dtype.lanes)
            x, y = cast(b, x, word), cast(b, y, word)
        signed = as_signed if x.dtype.is_signed else as_unsigned
        return compare(as_float if x.dtype.is_float else signed, b, x, y)

    return compared


def compare(op: Op, b: Builder, x: Value, y: Value) -> Value:
    return b.op(op, BOOL.with_lanes(x.dtype.lanes), x, y)


less = comparison("<")


def bitwise(on_bits: Op, on_bools: Op) -> Binary:
    """An operator on integers' bits that means logic on bools."""

    def operation(b: Builder, x: Value, y: Value) -> Value:
        return b.op(on_bools if x.dtype.kind == "bool" else on_bits, x.dtype, x, y)

    return operation


bitwise_and = bitwise(Op.BITWISE_AND, Op.LOGICAL_AND)
bitwise_or = bitwise(Op.BITWISE_OR, Op.LOGICAL_OR)
bitwise_xor = bitwise(Op.BITWISE_XOR, Op.LOGICAL_NOT_EQUAL)


def bitwise_not(b: Builder, x: Value) -> Value:
    return b.op(Op.LOGICAL_NOT if x.dtype.kind == "bool" else Op.NOT, x.dtype, x)


def shift_left(b: Builder, x: Value, amount: Value) -> Value:
    return b.op(Op.SHIFT_LEFT_LOGICAL, x.dtype, x, _amount(b, x.dtype, amount))


def shift_right(b: Builder, x: Value, amount: Value) -> Value:
    """Arithmetic on signed integers, logical on unsigned ones."""
    op = Op.SHIFT_RIGHT_ARITHMETIC if x.dtype.is_signed else Op.SHIFT_RIGHT_LOGICAL
    return b.op(op, x.dtype, x, _amount(b, x.dtype, amount))


def _amount(b: Builder, dtype: DType, amount: Value) -> Value:
    known = b.known(amount)
    if known is not None and 0 <= known < dtype.bits:
        return amount
    return b.op(Op.BITWISE_AND, amount.dtype, amount, b.constant(amount.dtype, dtype.bits - 1))
