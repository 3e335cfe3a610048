"""Elementary functions as float32 expressions, without a call into any math library.

    exp_f32, sigmoid_f32, log_f32, sin_f32, cos_f32      float32 expression -> float32 expression
    add_half                                             for rounding to integers
    order_key                                            float32 expression -> int32 expression

Each is a plain Python function over expressions, to be called inside TVMScript, on scalars and
in T.vectorized loops alike. They use float32 and int32 arithmetic only: the same formula runs on
every target, LLVM vectorizes it, and Metal and CUDA need no double precision. A product and a
sum may be fused into one FMA without harm.

The polynomials are minimax fits (Lawson's iteration in float64); the comment beside each gives
the fit's largest error in units of 2⁻²⁴.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from tvm import tirx

from .kernel import T

Expr = Any  # a float32 or int32 PrimExpr

LOG2_E = 1.442695
# ln 2 in two parts; the first has 10 bits, so that its product with any exponent is exact.
LN2_HIGH = 0.693359375
LN2_LOW = -2.121944e-4

# e^r = 1 + r + r²·P(r), |r| ≤ ln 2 / 2: 0.06
EXP_P = (0.4999999, 0.1666651, 0.04166853, 0.008370135, 0.001381166)
# ln(1+f) = f - f²/2 + s·(f²/2 + s²·R(s²)), s = f/(2+f), √½ ≤ 1+f < √2: 0.0002
LOG_R = (0.6666666, 0.4000033, 0.2853731, 0.2358215)
# sin r = r + r³·S(r²), |r| ≤ π/4: 0.07.  cos r = 1 - r²/2 + r⁴·C(r²): 0.002
SIN_S = (-0.1666665, 0.008332131, -0.0001951084)
COS_C = (0.04166665, -0.001388731, 2.443121e-05)

# π/2 = 100·2⁻⁶ + 67·2⁻¹³ + 123·2⁻²⁰ + the rest. The first three have 7 bits: their product with
# an integer below 2¹⁷ is exact. 2⁻²⁰ is kept apart because 123·2⁻²⁰ needs more than 7 digits.
HALF_PI_1, HALF_PI_2, HALF_PI_3 = 100 * 2.0**-6, 67 * 2.0**-13, 123
HALF_PI_3_UNIT = 2.0**-20
HALF_PI_REST = 3.139165e-07
TWO_OVER_PI = 0.6366198
SINCOS_LIMIT = 1.5 * 2.0**17  # |x| for which k stays below 2¹⁷

# Keys order float32 values as integers: NaN < -inf < … < -0 = 0 < … < +inf < NaN.
KEY_NONE = -(2**31)  # below every key
KEY_MINUS_INF = -0x7F800000
KEY_PLUS_INF = 0x7F800000

LOWEST = -3e38  # stands for -inf where a difference is taken
ONE_BITS = 0x3F800000  # of 1 in float32


def bind(value: Expr, body: Callable[[Any], Expr]) -> Expr:
    """body(value) with `value` computed once, however often the body uses it."""
    name = tirx.Var("t", value.ty)
    return tirx.Let(name, value, body(name))


def f32(value: float) -> Expr:
    """A constant that is the same float32 on every target: `value` to seven decimal digits.

    TVM's Metal generator prints that many, which does not hold every float32. (Constants as
    bits are no way out: the CUDA generator takes the address of the literal.)
    """
    return T.float32(float(np.float32(f"{value:.6e}")))


def _polynomial(x: Expr, coefficients: Sequence[float]) -> Expr:
    """Horner's rule; coefficients from the constant up."""
    result = f32(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = result * x + f32(coefficient)
    return result


def _power_of_two(exponent: Expr) -> Expr:
    """2^exponent for an int32 in [-126, 127]."""
    return T.reinterpret("float32", T.shift_left(exponent + T.int32(127), T.int32(23)))


def exp_f32(x: Expr) -> Expr:
    """e^x within 2 ulp (subnormal results included); 0 from -104 down, +inf from 88.73 up."""

    def scaled(r: Expr, k: Expr) -> Expr:
        value = f32(1) + (r + r * r * _polynomial(r, EXP_P))
        # Two factors, since 2^k alone leaves the normal range at both ends.
        half = T.shift_right(k, T.int32(1))
        return value * _power_of_two(half) * _power_of_two(k - half)

    def reduced(x: Expr) -> Expr:
        # Adding 256 makes the argument positive, where truncation is rounding down.
        k = T.Cast("int32", x * f32(LOG2_E) + f32(256.5)) - T.int32(256)
        return bind(
            k,
            lambda k: bind(
                T.Cast("float32", k),
                lambda kf: bind(
                    (x - kf * f32(LN2_HIGH)) - kf * f32(LN2_LOW), lambda r: scaled(r, k)
                ),
            ),
        )

    # Clamped so that the comparisons let NaN through.
    low = bind(x, lambda x: T.Select(x < f32(-104), f32(-104), x))
    return bind(bind(low, lambda x: T.Select(x > f32(89), f32(89), x)), reduced)


def sigmoid_f32(x: Expr) -> Expr:
    """1 / (1 + e^-x), within 4 ulp where the result is normal."""
    return f32(1) / (f32(1) + exp_f32(f32(0) - x))


def log_f32(x: Expr) -> Expr:
    """ln x within 2 ulp for finite x > 0, subnormals included; -inf for 0, +inf for +inf.

    Negative arguments are outside its domain: the result has no meaning.
    """
    sqrt_half_bits = 0x3F3504F3

    def combined(f: Expr, e: Expr) -> Expr:
        return bind(
            f / (f + f32(2)),
            lambda s: bind(
                s * s,
                lambda z: bind(
                    f32(0.5) * f * f,
                    lambda h: (
                        e * f32(LN2_HIGH)
                        + (f - (h - (s * (h + z * _polynomial(z, LOG_R)) + e * f32(LN2_LOW))))
                    ),
                ),
            ),
        )

    def split(bits: Expr, bias: Expr) -> Expr:
        # The exponent that leaves a mantissa in [√½, √2).
        return bind(
            T.shift_right(bits - T.int32(sqrt_half_bits), T.int32(23)),
            lambda e: bind(
                T.reinterpret("float32", bits - T.shift_left(e, T.int32(23))) - f32(1),
                lambda f: bind(T.Cast("float32", e) + bias, lambda e: combined(f, e)),
            ),
        )

    def normal(x: Expr) -> Expr:
        # Scaled, so that subnormals become normal; where the scaling begins does not matter.
        tiny = x < f32(2.0**-100)
        value = bind(
            T.reinterpret("int32", T.Select(tiny, x * f32(2.0**23), x)),
            lambda bits: split(bits, T.Select(tiny, f32(-23), f32(0))),
        )
        finite = T.Select(x < T.infinity("float32"), value, x)
        return T.Select(x == f32(0), f32(0) - T.infinity("float32"), finite)

    return bind(x, normal)


def _sine(x: Expr, quarters: int) -> Expr:
    """sin(x + quarters * π/2).

    Cody-Waite: x - k * π/2, part by part; every product but the last is exact, so that neither
    the size of x nor fused multiply-add changes the result.
    """

    def quadrant(sine: Expr, cosine: Expr, k: Expr) -> Expr:
        value = T.Select(T.bitwise_and(k, T.int32(1)) != T.int32(0), cosine, sine)
        sign = T.shift_left(T.bitwise_and(k, T.int32(2)), T.int32(30))
        return T.reinterpret("float32", T.bitwise_xor(T.reinterpret("int32", value), sign))

    def polynomials(r: Expr, k: Expr) -> Expr:
        return bind(
            r * r,
            lambda z: quadrant(
                r + r * (z * _polynomial(z, SIN_S)),
                f32(1) - (f32(0.5) * z - z * (z * _polynomial(z, COS_C))),
                k,
            ),
        )

    def reduced(x: Expr) -> Expr:
        half = T.Select(x < f32(0), f32(-0.5), f32(0.5))
        return bind(
            T.Cast("int32", x * f32(TWO_OVER_PI) + half),
            lambda k: bind(
                T.Cast("float32", k),
                lambda kf: bind(
                    (x - kf * f32(HALF_PI_1) - kf * f32(HALF_PI_2))
                    - kf * f32(HALF_PI_3) * f32(HALF_PI_3_UNIT)
                    - kf * f32(HALF_PI_REST),
                    lambda r: bind(k + T.int32(quarters), lambda k: polynomials(r, k)),
                ),
            ),
        )

    return bind(x, reduced)


def sin_f32(x: Expr) -> Expr:
    """sin x within 1e-7 absolute for |x| ≤ SINCOS_LIMIT; no meaning for an infinite x."""
    return _sine(x, 0)


def cos_f32(x: Expr) -> Expr:
    """cos x within 1e-7 absolute for |x| ≤ SINCOS_LIMIT; no meaning for an infinite x."""
    return _sine(x, 1)


def add_half(x: Expr) -> Expr:
    """x with 0.5 of its own sign added: cut off to an integer it is x rounded, half away from 0."""
    return x + T.Select(x < T.float32(0), T.float32(-0.5), T.float32(0.5))


def order_key(x: Expr) -> Expr:
    """The int32 that orders a float32 expression: sign and magnitude to two's complement.

    Conditions on keys hold even where a compiler assumes that NaN and infinity do not occur.
    """
    bits = T.reinterpret("int32", x)
    return T.Select(bits < 0, 0 - T.bitwise_and(bits, T.int32(0x7FFFFFFF)), bits)
