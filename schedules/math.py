"""Elementary functions as float32 expressions, without a call into any math library.

    exp_f32, sigmoid_f32, log_f32, sin_f32, cos_f32      float32 expression -> float32 expression

Each is a plain Python function over expressions, to be called inside TVMScript, on scalars and
in T.vectorized loops alike. They use float32 and int32 arithmetic only: the same formula runs on
every target, LLVM vectorizes it, and Metal and CUDA need no double precision. A product and a
sum may be fused into one FMA without harm.

The polynomials are minimax fits (Lawson's iteration in float64, coefficients rounded to float32);
the comment beside each gives its largest error in units of 2⁻²⁴.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx

from .kernel import T

Expr = Any  # a float32 or int32 PrimExpr

LOG2_E = 1.4426950408889634
# ln 2 in two parts; the first has 10 bits, so that its product with any exponent is exact.
LN2_HIGH = 0.693359375
LN2_LOW = -2.1219444005469058e-4

# e^r = 1 + r + r²·P(r), |r| ≤ ln 2 / 2: 0.06
EXP_P = (0.4999999403953552, 0.16666509211063385, 0.04166852682828903, 0.008370134979486465,
         0.0013811662793159485)  # fmt: skip
# ln(1+f) = f − f²/2 + s·(f²/2 + s²·R(s²)), s = f/(2+f), √½ ≤ 1+f < √2: 0.0002
LOG_R = (0.6666666269302368, 0.4000033438205719, 0.28537309169769287, 0.23582153022289276)
# sin r = r + r³·S(r²), |r| ≤ π/4: 0.07.  cos r = 1 − r²/2 + r⁴·C(r²): 0.002
SIN_S = (-0.16666653752326965, 0.008332131430506706, -0.00019510838319547474)
COS_C = (0.04166664555668831, -0.0013887305976822972, 2.4431205019936897e-05)

# π/2 as a sum of parts of 7 significant bits: part · k is exact for |k| < 2¹⁷.
HALF_PI_PARTS = (1.5625, 0.0081787109375, 0.00011730194091796875, 3.129243850708008e-07,
                 9.89530235528946e-10, 2.5579538487363607e-12)  # fmt: skip
SINCOS_LIMIT = 1.5 * 2.0**17  # |x| for which k stays below 2¹⁷


def bind(value: Expr, body: Callable[[Any], Expr]) -> Expr:
    """body(value) with `value` computed once, however often the body uses it."""
    name = tirx.Var("t", value.ty)
    return tirx.Let(name, value, body(name))


def _f32(value: float) -> Expr:
    return T.float32(value)


def _polynomial(x: Expr, coefficients: Sequence[float]) -> Expr:
    """Horner's rule; coefficients from the constant up."""
    result = _f32(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = result * x + _f32(coefficient)
    return result


def _power_of_two(exponent: Expr) -> Expr:
    """2^exponent for an int32 in [-126, 127]."""
    return T.reinterpret("float32", T.shift_left(exponent + T.int32(127), T.int32(23)))


def exp_f32(x: Expr) -> Expr:
    """e^x within 2 ulp (subnormal results included); 0 from −104 down, +inf from 88.73 up."""

    def scaled(r: Expr, k: Expr) -> Expr:
        value = _f32(1) + (r + r * r * _polynomial(r, EXP_P))
        # Two factors, since 2^k alone leaves the normal range at both ends.
        half = T.shift_right(k, T.int32(1))
        return value * _power_of_two(half) * _power_of_two(k - half)

    def reduced(x: Expr) -> Expr:
        # Adding 256 makes the argument positive, where truncation is rounding down.
        k = T.Cast("int32", x * _f32(LOG2_E) + _f32(256.5)) - T.int32(256)
        return bind(
            k,
            lambda k: bind(
                T.Cast("float32", k),
                lambda kf: bind(
                    (x - kf * _f32(LN2_HIGH)) - kf * _f32(LN2_LOW), lambda r: scaled(r, k)
                ),
            ),
        )

    # Clamped so that the comparisons let NaN through.
    low = bind(x, lambda x: T.Select(x < _f32(-104), _f32(-104), x))
    return bind(bind(low, lambda x: T.Select(x > _f32(89), _f32(89), x)), reduced)


def sigmoid_f32(x: Expr) -> Expr:
    """1 / (1 + e^−x), within 4 ulp where the result is normal."""
    return _f32(1) / (_f32(1) + exp_f32(_f32(0) - x))


def log_f32(x: Expr) -> Expr:
    """ln x within 2 ulp for finite x > 0, subnormals included; −inf for 0, +inf for +inf.

    Negative arguments are outside its domain: the result has no meaning.
    """
    sqrt_half_bits = 0x3F3504F3

    def combined(f: Expr, e: Expr) -> Expr:
        return bind(
            f / (f + _f32(2)),
            lambda s: bind(
                s * s,
                lambda z: bind(
                    _f32(0.5) * f * f,
                    lambda h: e * _f32(LN2_HIGH)
                    + (f - (h - (s * (h + z * _polynomial(z, LOG_R)) + e * _f32(LN2_LOW)))),
                ),
            ),
        )

    def split(bits: Expr, bias: Expr) -> Expr:
        # The exponent that leaves a mantissa in [√½, √2).
        return bind(
            T.shift_right(bits - T.int32(sqrt_half_bits), T.int32(23)),
            lambda e: bind(
                T.reinterpret("float32", bits - T.shift_left(e, T.int32(23))) - _f32(1),
                lambda f: bind(T.Cast("float32", e) + bias, lambda e: combined(f, e)),
            ),
        )

    def normal(x: Expr) -> Expr:
        tiny = x < _f32(2.0**-126)
        value = bind(
            T.reinterpret("int32", T.Select(tiny, x * _f32(2.0**24), x)),
            lambda bits: split(bits, T.Select(tiny, _f32(-24), _f32(0))),
        )
        finite = T.Select(x < T.infinity("float32"), value, x)
        return T.Select(x == _f32(0), _f32(0) - T.infinity("float32"), finite)

    return bind(x, normal)


def _sincos(x: Expr, body: Callable[[Expr, Expr], Expr]) -> Expr:
    """body(sin x, cos x).

    Cody–Waite: x − k·π/2 with k·part exact for every part, so that neither the size of x nor
    fused multiply-add changes the result.
    """
    a, b, c, d, e, f = HALF_PI_PARTS

    def quadrant(sine: Expr, cosine: Expr, k: Expr) -> Expr:
        swap = T.bitwise_and(k, T.int32(1)) != T.int32(0)
        sign_bit = T.int32(30)  # bit 1 of the quadrant, shifted to bit 31

        def signed(value: Expr, quarter: Expr) -> Expr:
            sign = T.shift_left(T.bitwise_and(quarter, T.int32(2)), sign_bit)
            return T.reinterpret(
                "float32", T.bitwise_xor(T.reinterpret("int32", value), sign)
            )

        return bind(
            signed(T.Select(swap, cosine, sine), k),
            lambda s: bind(
                signed(T.Select(swap, sine, cosine), k + T.int32(1)), lambda c: body(s, c)
            ),
        )

    def polynomials(r: Expr, k: Expr) -> Expr:
        return bind(
            r * r,
            lambda z: bind(
                r + r * (z * _polynomial(z, SIN_S)),
                lambda sine: bind(
                    _f32(1) - (_f32(0.5) * z - z * (z * _polynomial(z, COS_C))),
                    lambda cosine: quadrant(sine, cosine, k),
                ),
            ),
        )

    def reduced(x: Expr) -> Expr:
        half = T.Select(x < _f32(0), _f32(-0.5), _f32(0.5))
        return bind(
            T.Cast("int32", x * _f32(0.6366197723675814) + half),
            lambda k: bind(
                T.Cast("float32", k),
                # The large parts cancel exactly; the small ones are summed first.
                lambda kf: bind(
                    (((x - kf * _f32(a)) - kf * _f32(b)) - kf * _f32(c))
                    - (kf * _f32(d) + (kf * _f32(e) + kf * _f32(f))),
                    lambda r: polynomials(r, k),
                ),
            ),
        )

    return bind(x, reduced)


def sin_f32(x: Expr) -> Expr:
    """sin x within 1e-7 absolute for |x| ≤ SINCOS_LIMIT; no meaning for an infinite x."""
    return _sincos(x, lambda sine, _: sine)


def cos_f32(x: Expr) -> Expr:
    """cos x within 1e-7 absolute for |x| ≤ SINCOS_LIMIT; no meaning for an infinite x."""
    return _sincos(x, lambda _, cosine: cosine)
