"""Every math function by its name, and which dtypes it takes.

Names are those of C without the suffix f, as TVM's operators have them; `lookup` also takes
"expf" and "tirx.exp". float16 and bfloat16 arguments are computed in float32 and rounded once,
except where the function is exact in its own type.

The bounds that the tests assert hold where ÷ and √ are rounded correctly, as on most devices.
Vulkan itself promises 2.5 ulp for ÷ and more for √: a device that needs them adds as much to the
functions that end in one (tan, sigmoid, atan2, hypot, sqrt, sinh, cosh).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from . import exponential, rounding, trigonometry
from .arithmetic import less
from .dtypes import F32, Value
from .encoding import Glsl
from .terms import Term, where

Formula = Callable[..., Term]


@dataclass(frozen=True)
class Function:
    """A math function.

    `bits` are the float widths that `formula` takes as they are; 16 is otherwise widened to 32,
    64 is otherwise refused.
    """

    formula: Formula
    arity: int = 1
    bits: tuple[int, ...] = (32,)


def _sqrt(x: Term) -> Term:
    return x.glsl(Glsl.SQRT)


def _rsqrt(x: Term) -> Term:
    return x.glsl(Glsl.INVERSE_SQRT)


def _fma(x: Term, y: Term, z: Term) -> Term:
    return x.glsl(Glsl.FMA, y, z)


def _fmin(x: Term, y: Term) -> Term:
    """The number where one of the two is NaN."""
    smaller = Term(x.builder, x.builder.select(less(x.builder, x.value, y.value), x.value, y.value))
    return where(rounding.isnan(y), x, smaller)


def _fmax(x: Term, y: Term) -> Term:
    """The number where one of the two is NaN."""
    larger = Term(x.builder, x.builder.select(less(x.builder, y.value, x.value), x.value, y.value))
    return where(rounding.isnan(y), x, larger)


_EVERY = (16, 32, 64)
_WIDE = (32, 64)

FUNCTIONS: dict[str, Function] = {
    "exp": Function(exponential.exp),
    "exp2": Function(exponential.exp2),
    "exp10": Function(exponential.exp10),
    "log": Function(exponential.log),
    "log2": Function(exponential.log2),
    "log10": Function(exponential.log10),
    "log1p": Function(exponential.log1p),
    "pow": Function(exponential.pow, 2),
    "sqrt": Function(_sqrt, 1, _WIDE),
    "rsqrt": Function(_rsqrt, 1, _WIDE),
    "sigmoid": Function(exponential.sigmoid),
    "tanh": Function(exponential.tanh),
    "sinh": Function(exponential.sinh),
    "cosh": Function(exponential.cosh),
    "asinh": Function(exponential.asinh),
    "acosh": Function(exponential.acosh),
    "atanh": Function(exponential.atanh),
    "erf": Function(exponential.erf),
    "sin": Function(trigonometry.sin),
    "cos": Function(trigonometry.cos),
    "tan": Function(trigonometry.tan),
    "asin": Function(trigonometry.asin),
    "acos": Function(trigonometry.acos),
    "atan": Function(trigonometry.atan),
    "atan2": Function(trigonometry.atan2, 2),
    "hypot": Function(trigonometry.hypot, 2),
    "floor": Function(rounding.floor, 1, _EVERY),
    "ceil": Function(rounding.ceil, 1, _EVERY),
    "trunc": Function(rounding.trunc, 1, _EVERY),
    "round": Function(rounding.round_away, 1, _EVERY),
    "nearbyint": Function(rounding.nearbyint, 1, _EVERY),
    "rint": Function(rounding.nearbyint, 1, _EVERY),
    "fabs": Function(rounding.fabs, 1, _EVERY),
    "isnan": Function(rounding.isnan, 1, _EVERY),
    "isinf": Function(rounding.isinf, 1, _EVERY),
    "isfinite": Function(rounding.isfinite, 1, _EVERY),
    "copysign": Function(rounding.copysign, 2, _EVERY),
    "nextafter": Function(rounding.nextafter, 2, _EVERY),
    "ldexp": Function(rounding.ldexp, 2, _WIDE),
    "fmod": Function(rounding.fmod, 2),
    "fma": Function(_fma, 3, _EVERY),
    "fmin": Function(_fmin, 2, _EVERY),
    "fmax": Function(_fmax, 2, _EVERY),
}


def lookup(name: str) -> str | None:
    """The table's key for a name such as "tirx.exp", "expf" or "exp"; None where there is none."""
    name = name.rpartition(".")[2]
    if name in FUNCTIONS:
        return name
    stem = name.removesuffix("f")
    return stem if stem in FUNCTIONS else None


def apply(function: Function, operands: list[Term]) -> Value:
    """The value of a function whose first operand's dtype it takes, widened where needed."""
    dtype = operands[0].dtype
    if dtype.kind != "bfloat" and dtype.bits in function.bits:
        return function.formula(*operands).value
    widened = [operand.to(F32) if operand.dtype == dtype else operand for operand in operands]
    result = function.formula(*widened)
    return (result.to(dtype) if result.dtype.is_float else result).value


def takes(function: Function, operand: Value) -> bool:
    """Whether the function is there for a first operand of this dtype."""
    dtype = operand.dtype
    if dtype.kind == "bfloat" or (dtype.is_float and dtype.bits == 16):
        return True
    return dtype.is_float and dtype.bits in function.bits
