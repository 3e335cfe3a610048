"""The exponential and logarithmic families in float32.

Vulkan promises for exp only 3 + 2|x| ulp, for log 2⁻²¹ absolutely near 1, and pow is built from
both. These are polynomials instead: minimax fits in higher precision whose largest error, in
units of 2⁻²⁴, stands beside the coefficients (constant first). Special values follow C's Annex F.
"""

from __future__ import annotations

import math

from .dtypes import F32, I32
from .encoding import Glsl, Op
from .rounding import bits_of, copysign, fabs, isfinite, isinf, isnan, nearbyint
from .terms import Term, horner, where

LOG2_E = 1.4426950408889634
# ln 2 and log10 2 in two parts; the product of the first with any exponent is exact.
LN2_HIGH, LN2_LOW = 0.693145751953125, 1.4286068203094173e-06
LOG10_2_HIGH, LOG10_2_LOW = 0.301025390625, 4.605038981195214e-06
# 2·log2 e in two parts; the product of the first with 12 bits is exact.
TWO_LOG2_E_HIGH, TWO_LOG2_E_LOW = 2.884765625, 0.0006244567779268147

# e^r = 1 + r + r²·P(r), |r| ≤ ln 2 / 2: 0.05
EXP_P = (0.49999994, 0.166665211, 0.041668389, 0.00836871006, 0.00138146104)
# ln m = s·(2 + s²·R(s²)), s = (m-1)/(m+1), √½ ≤ m < √2: less than 0.001
LOG_R = (0.666666627, 0.400003344, 0.285373092, 0.235821545)
# tanh x = x + x³·P(x²), |x| ≤ 0.625: 0.07
TANH_P = (-0.333332807, 0.133314416, -0.0537397116, 0.0206390787, -0.00570497848)
# sinh x = x + x³·P(x²), |x| ≤ 1: 0.001
SINH_P = (0.166666672, 0.0083333496, 0.000198361595, 2.81695134e-06)
# erf x = x + x·P(x²), |x| ≤ 1: 0.02
ERF_P = (
    0.128379166, -0.37612626, 0.112835854, -0.026853811, 0.00518832728, -0.000801019138,
    7.85385419e-05,
)  # fmt: skip
# 1 - erf x = e^-Q(x), 1 ≤ x ≤ 4: 0.02; from 4 on erf x rounds to 1
ERF_Q = (
    0.000353708921, 1.12704003, 0.638225615, 0.103037432, -0.0218053516, 0.00293961563,
    -0.0001855749,
)  # fmt: skip

# Where the logarithm of pow starts from: two numbers of few bits, and their log2 in two parts.
ANCHOR_BELOW, LOG2_BELOW_HIGH, LOG2_BELOW_LOW = 51 / 64, -0.32763671875, 6.206072149558971e-05
ANCHOR_ABOVE, LOG2_ABOVE_HIGH, LOG2_ABOVE_LOW = 5 / 4, 0.32177734375, 0.00015075113736234786
SQRT_HALF_BITS = 0x3F3504F3
INFINITY = math.inf


def to_int(x: Term) -> Term:
    """int32 of a whole float32 that is known to fit, without the care of a cast."""
    dtype = I32.with_lanes(x.dtype.lanes)
    return Term(x.builder, x.builder.op(Op.CONVERT_F_TO_S, dtype, x.value))


def power_of_two(exponent: Term) -> Term:
    """2^exponent for an int32 in [-126, 127]."""
    return ((exponent + 127) << 23).reinterpret(F32)


def limited(x: Term, low: float, high: float) -> Term:
    """x in [low, high]; a NaN passes."""
    x = where(x < low, low, x)
    return where(x > high, high, x)


def _scaled_exp(r: Term, k: Term) -> Term:
    """e^r·2^k for |r| ≤ ln 2 / 2 and whole |k| ≤ 250."""
    value = r.like(1) + (r + r * r * horner(r, EXP_P))
    # Two factors, since 2^k alone leaves the normal range at both ends.
    exponent = to_int(k)
    half = exponent >> 1
    return value * power_of_two(half) * power_of_two(exponent - half)


def exp(x: Term, halvings: int = 0) -> Term:
    """e^x / 2^halvings; 0 far below, +inf far above."""
    x = limited(x, -104, 91)
    k = nearbyint(x * LOG2_E)
    r = (x - k * LN2_HIGH) - k * LN2_LOW
    return _scaled_exp(r, k - halvings)


def exp2(x: Term) -> Term:
    """2^x; exact for whole x."""
    x = limited(x, -151, 129)
    k = nearbyint(x)
    return _scaled_exp((x - k) * math.log(2), k)


def exp10(x: Term) -> Term:
    """10^x."""
    x = limited(x, -46, 39)
    k = nearbyint(x * math.log2(10))
    r = (x - k * LOG10_2_HIGH) - k * LOG10_2_LOW
    return _scaled_exp(r * math.log(10), k)


def _split(x: Term) -> tuple[Term, Term]:
    """(m, e) with x = m·2^e, √½ ≤ m < √2, for finite x > 0."""
    tiny = x < 2.0**-126 * 2.0**24
    bits = bits_of(where(tiny, x * 2.0**24, x)).reinterpret(I32)
    exponent = (bits - SQRT_HALF_BITS) >> 23
    m = (bits - (exponent << 23)).reinterpret(F32)
    return m, exponent.to(F32) + where(tiny, x.like(-24), 0)


def _log_of_one_plus(f: Term) -> Term:
    """ln(1 + f) for √½ ≤ 1 + f < √2.

    f - f²/2 is taken apart from the rest, so that the last sum loses nothing.
    """
    s = f / (f + 2)
    z = s * s
    half = 0.5 * f * f
    tail = s * (half + z * horner(z, LOG_R))
    return f - (half - tail)


def _log_specials(x: Term, value: Term) -> Term:
    """-inf at 0, +inf at +inf, NaN for x < 0 and NaN."""
    value = where(x.equals(0), -INFINITY, value)
    value = where(isinf(x), x, value)
    invalid = isnan(x) | (x < 0)
    return where(invalid, (bits_of(x) | 0x7FC00000).reinterpret(F32), value)


def log(x: Term) -> Term:
    m, e = _split(x)
    f = m - 1
    s = f / (f + 2)
    z = s * s
    half = 0.5 * f * f
    tail = s * (half + z * horner(z, LOG_R)) + e * LN2_LOW
    return _log_specials(x, e * LN2_HIGH + (f - (half - tail)))


def log2(x: Term) -> Term:
    """Exact for powers of two."""
    m, e = _split(x)
    return _log_specials(x, e + _log_of_one_plus(m - 1) * LOG2_E)


def log10(x: Term) -> Term:
    m, e = _split(x)
    value = e * LOG10_2_HIGH + (e * LOG10_2_LOW + _log_of_one_plus(m - 1) * math.log10(math.e))
    return _log_specials(x, value)


def log1p(x: Term) -> Term:
    """ln(1 + x), also where 1 + x rounds to 1."""
    u = x + 1
    m, e = _split(u)
    # What the sum lost; nothing of consequence for large x.
    lost = where(x < 2.0**24, x - (u - 1), 0)
    f = (m - 1) + lost * power_of_two(to_int(limited(-e, -126, 126)))
    value = _log_of_one_plus(f) + e * LN2_LOW + e * LN2_HIGH
    return where(x.equals(0), x, _log_specials(u, value))


def _head(x: Term) -> Term:
    """x without its lowest 12 bits: products of two heads are exact."""
    return (bits_of(x) & 0xFFFFF000).reinterpret(F32)


def _log2_in_two_parts(x: Term) -> tuple[Term, Term]:
    """log2 x for finite x > 0 as head + tail, the head with 12 bits; about 2⁻³² relatively."""
    m, e = _split(x)
    # log2 m = log2 a + 2·log2 e·atanh s with s = (m - a) / (m + a): three anchors keep s small.
    below, above = m < 0.9, m > 1.11
    anchor = where(below, m.like(ANCHOR_BELOW), where(above, m.like(ANCHOR_ABOVE), 1))
    base = where(below, m.like(LOG2_BELOW_HIGH), where(above, m.like(LOG2_ABOVE_HIGH), 0))
    base_low = where(below, m.like(LOG2_BELOW_LOW), where(above, m.like(LOG2_ABOVE_LOW), 0))
    f, d = m - anchor, m + anchor
    d_tail = m - (d - anchor)  # what the sum lost
    s = f / d
    s_head = _head(s)
    d_head = _head(d)
    # The exact remainder of the division, part by part.
    left = (f - s_head * d_head) - s_head * (d - d_head)
    s_tail = (left - s_head * d_tail) / d
    z = s * s
    # atanh s = s + s³·R(s²)/2
    tail = s_tail + s * z * 0.5 * horner(z, LOG_R)
    high = s_head * TWO_LOG2_E_HIGH
    low = s_head * TWO_LOG2_E_LOW + (base_low + tail * (TWO_LOG2_E_HIGH + TWO_LOG2_E_LOW))
    # The first is larger than `high` or 0, so the differences are exact: a sum and its error.
    first = e + base
    total = first + high
    error = (first - total) + high
    head = _head(total + low)
    return head, ((total - head) + low) + error


def pow(x: Term, y: Term) -> Term:
    """x^y with C's special values; negative x only with whole y, otherwise NaN."""
    base = fabs(x)
    head, tail = _log2_in_two_parts(base)
    y_head = _head(y)
    product = y_head * head
    rest = (y - y_head) * head + y * tail
    # Clamped before the parts are used: the result is 0 or infinite beyond.
    total = limited(product + rest, -200, 200)
    k = nearbyint(total)
    inside = fabs(product) < 300
    r = where(inside, (product - k) + rest, 0)
    k = where(inside, k, where(product > 0, product.like(200), -200))
    # |r| may exceed 1/2 by the rounding of the sum only.
    value = _scaled_exp(r * math.log(2), k)
    return _pow_specials(x, y, value)


def _pow_specials(x: Term, y: Term, value: Term) -> Term:
    base = fabs(x)
    size = fabs(y)
    whole = nearbyint(y).equals(y)
    # From 2^24 on every float32 is even; below, the half of an odd one is not whole.
    odd = whole & (size < 2.0**24) & nearbyint(y * 0.5).differs(y * 0.5)
    negative = y < 0
    at_zero = where(negative, value.like(INFINITY), 0)
    at_infinity = where(negative, value.like(0), INFINITY)
    value = where(base.equals(0), at_zero, value)
    value = where(isinf(x), at_infinity, value)
    shrinks = (base < 1) ^ negative
    value = where(isinf(y), where(shrinks, value.like(0), INFINITY), value)
    value = where(odd, copysign(value, x), value)
    invalid = (x < 0) & isfinite(x) & isfinite(y) & ~whole
    nan = (bits_of(x) | 0x7FC00000).reinterpret(F32)
    value = where(invalid | isnan(x) | isnan(y), nan, value)
    one = y.equals(0) | x.equals(1) | (base.equals(1) & isinf(y))
    return where(one, 1, value)


def sigmoid(x: Term) -> Term:
    """1 / (1 + e^-x)."""
    return 1 / (exp(-x) + 1)


def tanh(x: Term) -> Term:
    size = fabs(x)
    z = x * x
    small = x + x * z * horner(z, TANH_P)
    large = 1 - 2 / (exp(2 * limited(size, 0, 20)) + 1)
    return copysign(where(size < 0.625, small, large), x)  # for the sake of -0


def sinh(x: Term) -> Term:
    z = x * x
    small = x + x * z * horner(z, SINH_P)
    half = exp(fabs(x), halvings=1)
    return where(fabs(x) < 1, small, copysign(half - 0.25 / half, x))


def cosh(x: Term) -> Term:
    half = exp(fabs(x), halvings=1)
    return half + 0.25 / half


def asinh(x: Term) -> Term:
    size = fabs(x)
    z = size * size
    moderate = log1p(size + z / ((z + 1).glsl(Glsl.SQRT) + 1))
    large = log(size) + math.log(2)
    value = where(size < 1e9, moderate, large)
    return where(x.equals(0), x, copysign(value, x))


def acosh(x: Term) -> Term:
    """NaN below 1."""
    t = x - 1
    moderate = log1p(t + (t * t + 2 * t).glsl(Glsl.SQRT))
    value = where(x < 1e9, moderate, log(x) + math.log(2))
    return where(x < 1, (bits_of(x) | 0x7FC00000).reinterpret(F32), value)


def atanh(x: Term) -> Term:
    """±inf at ±1, NaN beyond."""
    size = fabs(x)
    value = 0.5 * log1p(2 * size / (1 - size))
    value = where(size.equals(1), INFINITY, value)
    value = where(size > 1, (bits_of(x) | 0x7FC00000).reinterpret(F32), value)
    return where(x.equals(0), x, copysign(value, x))


def erf(x: Term) -> Term:
    size = limited(fabs(x), 0, 4)
    z = x * x
    small = x + x * horner(z, ERF_P)
    large = 1 - exp(-horner(size, ERF_Q))
    return where(size < 1, small, copysign(large, x))
