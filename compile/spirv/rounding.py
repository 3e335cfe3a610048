"""Functions on the bits of floats: rounding to integers, classes of numbers, exact remainders.

All are exact, for float16, float32 and float64 alike.
"""

from __future__ import annotations

from . import arithmetic
from .dtypes import I32, U16, U32, U64, DType, Value
from .encoding import Glsl, Op, StorageClass
from .terms import Term, where

_BITS: dict[int, DType] = {16: U16, 32: U32, 64: U64}
_MANTISSA = {16: 10, 32: 23, 64: 52}  # stored bits


def bits_of(x: Term) -> Term:
    """The encoding as an unsigned integer of the same width."""
    return x.reinterpret(_BITS[x.dtype.bits])


def infinity_bits(dtype: DType) -> int:
    return ((1 << (dtype.bits - 1 - _MANTISSA[dtype.bits])) - 1) << _MANTISSA[dtype.bits]


def _sign_bit(x: Term) -> int:
    return 1 << (x.dtype.bits - 1)


def magnitude_bits(x: Term) -> Term:
    return bits_of(x) & (_sign_bit(x) - 1)


# The classes are read off the bits: a device may assume that float comparisons see no NaN.


def isnan(x: Term) -> Term:
    return magnitude_bits(x) > infinity_bits(x.dtype)


def isinf(x: Term) -> Term:
    return magnitude_bits(x).equals(infinity_bits(x.dtype))


def isfinite(x: Term) -> Term:
    return magnitude_bits(x) < infinity_bits(x.dtype)


def fabs(x: Term) -> Term:
    return x.glsl(Glsl.F_ABS)


def copysign(x: Term, sign: Term) -> Term:
    """|x| with the sign of the other, zeros and NaN included."""
    return (magnitude_bits(x) | (bits_of(sign) & _sign_bit(x))).reinterpret(x.dtype)


def floor(x: Term) -> Term:
    return x.glsl(Glsl.FLOOR)


def ceil(x: Term) -> Term:
    return x.glsl(Glsl.CEIL)


def trunc(x: Term) -> Term:
    return Term(x.builder, arithmetic.float_truncate(x.builder, x.value))


def nearbyint(x: Term) -> Term:
    """To the nearest integer, ties to even, with the sign of x.

    Mesa 22.3 on CPUs without AVX-512 rounds float64 halves wrongly (1.5 to 1), so float64 does not
    use the device's instruction. Each step is exact, whatever the device's rounding mode.
    """
    if x.dtype.bits < 64:
        return x.glsl(Glsl.ROUND_EVEN)
    whole = trunc(x)
    rest = fabs(x - whole)
    odd = (trunc(whole * 0.5) * 2).differs(whole)
    return where((rest > 0.5) | (rest.equals(0.5) & odd), _next_away(whole, x), whole)


def round_away(x: Term) -> Term:
    """To the nearest integer, ties away from zero.

    (TVM lowers T.round to nearbyint before it gets here; this is for calls of "round" itself.)
    """
    whole = trunc(x)
    # The difference is exact, whatever the rounding.
    return where(fabs(x - whole) >= 0.5, _next_away(whole, x), whole)


def _next_away(whole: Term, sign: Term) -> Term:
    """The integer one farther from zero."""
    return whole + copysign(sign.like(1), sign)


def nextafter(x: Term, y: Term) -> Term:
    """The neighbour of x in the direction of y. A device that flushes denormals has fewer."""
    bits, magnitude = bits_of(x), magnitude_bits(x)
    away = (x < y) ^ (x < 0)
    stepped = where(away, bits + 1, bits - 1)
    smallest = (bits_of(y) & _sign_bit(y)) | 1
    moved = where(magnitude.equals(0), smallest, stepped).reinterpret(x.dtype)
    moved = where(x.equals(y), y, moved)
    return where(isnan(x) | isnan(y), x + y, moved)


def ldexp(x: Term, exponent: Term) -> Term:
    """x·2^exponent for any int32 exponent; rounded once where the result is normal."""
    low, high = {16: (-14, 15), 32: (-126, 127), 64: (-1022, 1023)}[x.dtype.bits]
    bias, mantissa = high, _MANTISSA[x.dtype.bits]
    rest = exponent.to(I32)
    for _ in range(3):  # a denormal can be as far as this from the largest number
        step = clamp(rest, low, high)
        rest = rest - step
        integer = DType("int", x.dtype.bits)
        x = x * ((step + bias).to(integer) << mantissa).reinterpret(x.dtype)
    return x


def clamp(x: Term, low: int, high: int) -> Term:
    b = x.builder
    return Term(
        b,
        arithmetic.maximum(
            b, arithmetic.minimum(b, x.value, x.like(high).value), x.like(low).value
        ),
    )


def fmod(x: Term, y: Term) -> Term:
    """x - y·trunc(x/y), exact for every quotient, with the sign of x; float32.

    NaN where x is infinite, y is zero or either is NaN; x where y is infinite. Integers
    throughout, so that neither rounding nor flushing of denormals has a part in it.
    """
    b = x.builder
    remainder = x.dtype.with_lanes(1)
    lanes = [
        _fmod_lane(Term(b, Value(remainder, (p,))), Term(b, Value(remainder, (q,)))).value.id
        for p, q in zip(b.lanes(x.value), b.lanes(y.value), strict=True)
    ]
    return Term(b, b.from_lanes(x.dtype, lanes))


_SHIFT = 8  # bits of the quotient in one step: a mantissa has 24, a register 32


def _fmod_lane(x: Term, y: Term) -> Term:
    b = x.builder
    divisor_exponent, divisor = _parts(y)
    exponent, dividend = _parts(x)
    pointer_type = b.pointer_type(StorageClass.FUNCTION, b.type_id(U32))
    rest = b.assembler.local_variable(pointer_type, StorageClass.FUNCTION)
    # A divisor of zero would be undefined; its result is replaced below.
    divisor = where(divisor.equals(0), 1, divisor)
    distance = exponent - divisor_exponent
    smaller = distance < 0
    b.store(rest, where(smaller, dividend, _modulo(dividend, divisor)).value.id)

    def step(index: Value) -> None:
        left = distance - Term(b, index)
        shift = where(left < _SHIFT, left, _SHIFT).to(U32)
        current = Term(b, Value(U32, (b.load(b.type_id(U32), rest),)))
        b.store(rest, _modulo(current << shift, divisor).value.id)

    b.for_loop(
        b.constant(I32, 0),
        b.constant(I32, _SHIFT),
        lambda index: (Term(b, index) < distance).value,
        step,
    )
    final = Term(b, Value(U32, (b.load(b.type_id(U32), rest),)))
    value = _from_parts(final, where(smaller, exponent, divisor_exponent))
    value = where(magnitude_bits(x) < magnitude_bits(y), x, copysign(value, x))
    invalid = ~isfinite(x) | isnan(y) | magnitude_bits(y).equals(0)
    return where(invalid, (bits_of(x) | 0x7FC00000).reinterpret(x.dtype), value)


def _parts(x: Term) -> tuple[Term, Term]:
    """(exponent, mantissa) with |x| = mantissa·2^(exponent - 150); denormals as they are."""
    magnitude = magnitude_bits(x)
    field = magnitude >> 23
    normal = field.differs(0)
    mantissa = where(normal, (magnitude & 0x7FFFFF) | 0x800000, magnitude)
    return where(normal, field, 1).to(I32), mantissa


def _from_parts(mantissa: Term, exponent: Term) -> Term:
    """mantissa·2^(exponent - 150) as a float32, for a mantissa below 2^24; exact."""
    b = mantissa.builder
    # Normalized by hand: the bits above the highest one are moved into the exponent.
    highest = Term(b, b.glsl(Glsl.FIND_U_MSB, mantissa.dtype, mantissa.value)).to(I32)
    wanted = mantissa.like(23).to(I32) - highest
    room = exponent - 1
    shift = where(wanted < room, wanted, room)
    shift = where(mantissa.equals(0), 0, shift)
    moved = mantissa << shift.to(U32)
    field = where(moved >= 0x800000, (exponent - shift).to(U32), 0)
    bits = (field << 23) | (moved & 0x7FFFFF)
    return bits.reinterpret(DType("float", 32))


def _modulo(x: Term, y: Term) -> Term:
    return Term(x.builder, x.builder.op(Op.U_MOD, x.dtype, x.value, y.value))
