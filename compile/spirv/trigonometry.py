"""The trigonometric family in float32, on the whole range of float32.

Vulkan promises for sin and cos only 2⁻¹¹ absolutely within ±π, for atan 4096 ulp. Coefficients as
in `exponential`: constant first, the fit's largest error in units of 2⁻²⁴ beside them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from .dtypes import F32, I32, I64, U32, U64, Value
from .encoding import Glsl
from .exponential import to_int
from .rounding import bits_of, copysign, fabs, isinf, isnan, nearbyint
from .terms import Term, horner, where

# π/2 in three parts, the first two of 17 bits: their products with |k| < 128 are exact.
HALF_PI_1, HALF_PI_2, HALF_PI_3 = 1.5707855224609375, 1.0804273188114166e-05, 6.077100506506192e-11
SMALL = 128.0  # |x| up to which three parts are enough
# 2/π after a word of zeros, 32 bits a word, the highest first.
TWO_OVER_PI = (
    0, 0xA2F9836E, 0x4E441529, 0xFC2757D1, 0xF534DDC0, 0xDB629599, 0x3C439041, 0xFE5163AB,
)  # fmt: skip

# sin r = r + r³·S(r²), cos r = 1 - r²/2 + r⁴·C(r²), |r| ≤ π/4: 0.06 and 0.002
SIN_S = (-0.166666552, 0.0083321603, -0.000195152825)
COS_C = (0.0416666456, -0.00138873677, 2.44384501e-05)
# tan r = r + r³·P(r²), |r| ≤ π/4: 0.02
TAN_P = (
    0.333333492, 0.133326635, 0.054059919, 0.02128217, 0.0108358487, 8.95029807e-05, 0.00437628571,
)  # fmt: skip
# atan x = x + x³·P(x²), |x| ≤ tan(π/8): 0.01
ATAN_P = (-0.333333164, 0.199984714, -0.142435327, 0.105938099, -0.0607821345)
# asin x = x + x³·P(x²), |x| ≤ 1/2: 0.08
ASIN_P = (0.166667521, 0.0749529749, 0.0454703756, 0.0241795257, 0.0421662852)

TAN_PI_8 = 0.41421356
TAN_3PI_8 = 2.4142135
# π/4 and its multiples: float32 and what it leaves.
QUARTER_PI, QUARTER_PI_LOW = 0.7853981852531433, -2.1855694143368964e-08
HALF_PI, HALF_PI_LOW = 1.5707963705062866, -4.371138828673793e-08


def _reduce(x: Term) -> tuple[Term, Term]:
    """(r, k) with x = r + k·π/2, |r| ≤ π/4; k int32, modulo 4. Lane by lane, since the two ways
    of reducing differ a hundredfold in cost."""
    b = x.builder
    scalar = x.dtype.scalar
    pair = U32.with_lanes(2)
    rs, ks = [], []
    for lane in b.lanes(x.value):
        term = Term(b, Value(scalar, (lane,)))

        def packed(reduced: tuple[Term, Term]) -> Value:
            r, k = reduced
            return b.from_lanes(pair, [bits_of(r).value.id, k.reinterpret(U32).value.id])

        both = b.choose(
            (fabs(term) <= SMALL).value,
            lambda term=term: packed(_reduce_small(term)),  # type: ignore[misc]
            lambda term=term: packed(_reduce_large(term)),  # type: ignore[misc]
        )
        r, k = (Term(b, Value(U32, (part,))) for part in b.lanes(both))
        rs.append(r.reinterpret(F32).value.id)
        ks.append(k.value.id)
    lanes = x.dtype.lanes
    return (
        Term(b, b.from_lanes(x.dtype, rs)),
        Term(b, b.from_lanes(I32.with_lanes(lanes), ks)),
    )


def _reduce_small(x: Term) -> tuple[Term, Term]:
    """Cody and Waite's: π/2 is subtracted part by part, each difference exact or rounded last."""
    k = nearbyint(x * (2 / math.pi))
    r = ((x - k * HALF_PI_1) - k * HALF_PI_2) - k * HALF_PI_3
    return r, to_int(k)


def _reduce_large(x: Term) -> tuple[Term, Term]:
    """Payne and Hanek's: the mantissa times the 96 bits of 2/π that matter, in integers.

    Bits that stand for multiples of four quarters are left out; the 94 after the point are more
    than the closest approach of a float32 to a multiple of π/2 consumes.
    """
    bits = bits_of(x)
    mantissa = ((bits & 0x7FFFFF) | 0x800000).to(U64)
    # The first bit that matters, from the start of the table: a mantissa has the unit 2^(e-150).
    position = ((bits >> 23) & 0xFF) - 120
    index, shift = position >> 5, (position & 31).to(U64)
    words = [_table(TWO_OVER_PI[start:], index) for start in range(4)]
    high, middle, low = (
        ((((first.to(U64) << 32) | second.to(U64)) << shift) >> 32)
        for first, second in itertools.pairwise(words)
    )
    carry = (mantissa * low) >> 32
    carry = mantissa * middle + carry
    top = ((mantissa * high + (carry >> 32)) << 32) | (carry & 0xFFFFFFFF)
    fraction = (top << 2).reinterpret(I64)
    k = (top >> 62).to(I32) + where(fraction < 0, top.like(1).to(I32), 0)
    r = fraction.to(F32) * (math.pi / 2 * 2.0**-64)
    negative = bits_of(x) >= 0x80000000
    r = where(negative, -r, r)
    nan = (bits | 0x7FC00000).reinterpret(F32)
    return where(isinf(x) | isnan(x), nan, r), where(negative, -k, k)


def _table(entries: Sequence[int], index: Term) -> Term:
    """entries[index] for an index of 0 to 4."""
    result = index.like(entries[0])
    for position in range(1, 5):
        result = where(index.equals(position), entries[position], result)
    return result


def _sine(x: Term, quarters: int) -> Term:
    """sin(x + quarters·π/2)."""
    r, k = _reduce(x)
    z = r * r
    sine = r + r * (z * horner(z, SIN_S))
    cosine = 1 - (0.5 * z - z * (z * horner(z, COS_C)))
    k = k + quarters
    value = where((k & 1).differs(0), cosine, sine)
    return where((k & 2).differs(0), -value, value)


def sin(x: Term) -> Term:
    return where(x.equals(0), x, _sine(x, 0))  # for the sake of -0


def cos(x: Term) -> Term:
    return _sine(x, 1)


def tan(x: Term) -> Term:
    r, k = _reduce(x)
    z = r * r
    value = r + r * (z * horner(z, TAN_P))
    return where(x.equals(0), x, where((k & 1).differs(0), -1 / value, value))


def atan(x: Term) -> Term:
    size = fabs(x)
    middle, large = size > TAN_PI_8, size > TAN_3PI_8
    reduced = where(middle, (size - 1) / (size + 1), size)
    reduced = where(large, -1 / size, reduced)
    base = where(large, x.like(HALF_PI), where(middle, x.like(QUARTER_PI), 0))
    low = where(large, x.like(HALF_PI_LOW), where(middle, x.like(QUARTER_PI_LOW), 0))
    z = reduced * reduced
    value = base + (reduced + (reduced * z * horner(z, ATAN_P) + low))
    return copysign(value, x)


def atan2(y: Term, x: Term) -> Term:
    """The angle of (x, y) in [-π, π], with C's special values."""
    size_x, size_y = fabs(x), fabs(y)
    both = isinf(x) & isinf(y)
    swapped = size_y > size_x
    smaller = where(swapped, size_x, size_y)
    larger = where(swapped, size_y, size_x)
    quotient = smaller / where(larger.equals(0), 1, larger)
    quotient = where(both, 1, where(isinf(larger), 0, quotient))
    angle = atan(quotient)
    angle = where(swapped, HALF_PI - (angle - HALF_PI_LOW), angle)
    left = bits_of(x) >= 0x80000000
    angle = where(left, 2 * HALF_PI - (angle - 2 * HALF_PI_LOW), angle)
    nan = (bits_of(x) | bits_of(y) | 0x7FC00000).reinterpret(F32)
    return where(isnan(x) | isnan(y), nan, copysign(angle, y))


def _asin_core(size: Term) -> tuple[Term, Term]:
    """(p, large): asin p' by the series, where p' is |x| or √((1-|x|)/2) from 1/2 on."""
    large = size > 0.5
    half = (1 - size) * 0.5
    z = where(large, half, size * size)
    p = where(large, half.glsl(Glsl.SQRT), size)
    return p + p * z * horner(z, ASIN_P), large


def asin(x: Term) -> Term:
    """NaN outside [-1, 1]."""
    size = fabs(x)
    core, large = _asin_core(size)
    value = where(large, HALF_PI - (2 * core - HALF_PI_LOW), core)
    nan = (bits_of(x) | 0x7FC00000).reinterpret(F32)
    return where(size > 1, nan, copysign(value, x))


def acos(x: Term) -> Term:
    """NaN outside [-1, 1]."""
    size = fabs(x)
    core, large = _asin_core(size)
    negative = x < 0
    far = where(negative, 2 * HALF_PI - (2 * core - 2 * HALF_PI_LOW), 2 * core)
    near = where(negative, HALF_PI + (core + HALF_PI_LOW), HALF_PI - (core - HALF_PI_LOW))
    nan = (bits_of(x) | 0x7FC00000).reinterpret(F32)
    return where(size > 1, nan, where(large, far, near))


def hypot(x: Term, y: Term) -> Term:
    """√(x² + y²) without overflow on the way."""
    size_x, size_y = fabs(x), fabs(y)
    swapped = size_y > size_x
    larger, smaller = where(swapped, size_y, size_x), where(swapped, size_x, size_y)
    quotient = smaller / where(larger.equals(0), 1, larger)
    value = larger * (quotient * quotient + 1).glsl(Glsl.SQRT)
    value = where(isnan(x) | isnan(y), x + y, value)
    return where(isinf(x) | isinf(y), math.inf, value)
