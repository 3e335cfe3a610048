"""Math functions on a device: the accuracy that docs promise, special values, other dtypes.

`python tests/compile/spirv/test_math.py` prints the table for the documentation.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import pytest
from support.spirv_programs import results, ulps
from tvm import tirx
from tvm.script import tirx as T

from mxforge.compile.spirv.functions import FUNCTIONS, lookup

Real = np.longdouble
INF = np.inf
erf = np.vectorize(math.erf, otypes=[np.float64])


def spread(low: float, high: float, count: int = 20_000) -> np.ndarray:
    """Both signs, magnitudes from 2^low to 2^high."""
    rng = np.random.default_rng(7)
    signs = rng.choice([-1.0, 1.0], count)
    return (2.0 ** rng.uniform(low, high, count) * signs).astype(np.float32)


def even(low: float, high: float, count: int = 20_000) -> np.ndarray:
    return np.random.default_rng(8).uniform(low, high, count).astype(np.float32)


def positive(low: float, high: float) -> np.ndarray:
    return np.concatenate([abs(spread(low, high)), even(0.5, 2)])


@dataclass(frozen=True)
class Accuracy:
    """The bound in ulp of float32 for one function, and what it is tested on."""

    bound: float
    reference: Callable[..., np.ndarray]
    arguments: tuple[np.ndarray, ...]


WIDE = np.concatenate([even(-10, 10), spread(-30, 20), spread(20, 127)])
ROUNDING = np.concatenate([spread(-30, 40), np.arange(-20, 20, 0.5, dtype=np.float32)])
BASES = np.concatenate([positive(-126, 127), even(0.5, 1.5), even(0.5, 1.5)])
EXPONENTS = np.concatenate(
    [spread(-10, 7), even(-60, 60), (even(-87, 88) / np.log(even(0.5, 1.5)))[:20_000], spread(2, 9)]
).astype(np.float32)

ACCURACY: dict[str, Accuracy] = {
    "exp": Accuracy(1.5, np.exp, (even(-87, 88.7),)),
    "exp2": Accuracy(1.5, np.exp2, (even(-126, 128),)),
    "exp10": Accuracy(1.5, lambda x: Real(10) ** x, (even(-37.9, 38.5),)),
    "log": Accuracy(1.5, np.log, (positive(-126, 127),)),
    "log2": Accuracy(2, np.log2, (positive(-126, 127),)),
    "log10": Accuracy(2.5, np.log10, (positive(-126, 127),)),
    "log1p": Accuracy(2, np.log1p, (np.concatenate([even(-1, 10), abs(spread(-60, 100))]),)),
    "pow": Accuracy(2, np.power, (BASES, EXPONENTS)),
    "tanh": Accuracy(2, np.tanh, (np.concatenate([even(-10, 10), spread(-30, 4)]),)),
    "sinh": Accuracy(2.5, np.sinh, (np.concatenate([even(-89, 89), spread(-30, 3)]),)),
    "cosh": Accuracy(2.5, np.cosh, (even(-89, 89),)),
    "asinh": Accuracy(2.5, np.arcsinh, (np.concatenate([even(-3, 3), spread(-30, 100)]),)),
    "acosh": Accuracy(3, np.arccosh, (np.concatenate([even(1, 3), 1 + abs(spread(-20, 99))]),)),
    "atanh": Accuracy(3, np.arctanh, (np.concatenate([even(-1, 1), spread(-30, 0)]),)),
    "erf": Accuracy(2, erf, (np.concatenate([even(-5, 5), spread(-30, 3)]),)),
    "sigmoid": Accuracy(4, lambda x: 1 / (1 + np.exp(-x)), (even(-80, 80),)),
    "sin": Accuracy(3, np.sin, (WIDE,)),
    "cos": Accuracy(3, np.cos, (WIDE,)),
    "tan": Accuracy(4, np.tan, (WIDE,)),
    "asin": Accuracy(3, np.arcsin, (np.concatenate([even(-1, 1), spread(-30, 0)]),)),
    "acos": Accuracy(2.5, np.arccos, (even(-1, 1),)),
    "atan": Accuracy(2.5, np.arctan, (np.concatenate([even(-4, 4), spread(-30, 60)]),)),
    "atan2": Accuracy(3, np.arctan2, (spread(-30, 30), spread(-30, 30)[::-1].copy())),
    "hypot": Accuracy(3, np.hypot, (spread(-60, 60), spread(-60, 60)[::-1].copy())),
    "sqrt": Accuracy(3, np.sqrt, (positive(-126, 127),)),
    "rsqrt": Accuracy(2.5, lambda x: 1 / np.sqrt(x), (positive(-126, 127),)),
    "floor": Accuracy(0, np.floor, (ROUNDING,)),
    "ceil": Accuracy(0, np.ceil, (ROUNDING,)),
    "trunc": Accuracy(0, np.trunc, (ROUNDING,)),
    "nearbyint": Accuracy(0, np.rint, (ROUNDING,)),
    "rint": Accuracy(0, np.rint, (ROUNDING,)),
    "round": Accuracy(0, lambda x: np.copysign(np.floor(abs(x) + Real(0.5)), x), (ROUNDING,)),
    "fabs": Accuracy(0, np.abs, (ROUNDING,)),
    "fmod": Accuracy(0, np.fmod, (spread(-120, 120), spread(-120, 120)[::-1].copy())),
    "copysign": Accuracy(0, np.copysign, (spread(-9, 9), spread(-9, 9)[::-1].copy())),
    "fmin": Accuracy(0, np.fmin, (spread(-9, 9), spread(-9, 9)[::-1].copy())),
    "fmax": Accuracy(0, np.fmax, (spread(-9, 9), spread(-9, 9)[::-1].copy())),
    "fma": Accuracy(
        8, lambda x, y, z: x * y + z, (even(1, 2), even(1, 2), even(1, 2))
    ),
}  # fmt: skip


def call(name: str, dtype: str = "float32") -> Callable[..., tirx.Expr]:
    return lambda *arguments: tirx.call_pure_extern(dtype, name, *arguments)


def errors(name: str, lanes: int = 1) -> np.ndarray:
    """Errors in ulp where argument and result are normal numbers."""
    accuracy = ACCURACY[name]
    shortest = min(len(argument) for argument in accuracy.arguments)
    arguments = [argument[:shortest] for argument in accuracy.arguments]
    with np.errstate(all="ignore"):
        exact = accuracy.reference(*[argument.astype(Real) for argument in arguments])
    (ours,) = results([call(name)], arguments, "float32", lanes)
    normal = np.isfinite(exact.astype(np.float32)) & (abs(exact) >= 2.0**-126)
    assert normal.sum() > shortest / 3
    return ulps(ours[normal], exact[normal])


@pytest.mark.parametrize("name", ACCURACY)
def test_accuracy(name):
    assert errors(name).max() <= ACCURACY[name].bound


@pytest.mark.parametrize("lanes", [3, 8])
@pytest.mark.parametrize("name", ["exp", "log", "pow", "tanh", "sin", "fmod", "erf"])
def test_accuracy_of_vectors(name, lanes):
    assert errors(name, lanes).max() <= ACCURACY[name].bound


def test_every_function_has_a_bound():
    others = {"isnan", "isinf", "isfinite", "ldexp", "nextafter"}  # exact, tested by themselves
    assert set(FUNCTIONS) == set(ACCURACY) | others


SPECIAL = np.array(
    [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, INF, -INF, np.nan, 2.0, 3.0, -3.0, 89.0, -104.0, 129.0,
     1e30, -1e30, 2.0**24, 1e-30],
    np.float32,
)  # fmt: skip


@pytest.mark.parametrize("name", [name for name, a in ACCURACY.items() if len(a.arguments) < 3])
def test_special_values(name):
    """Infinities, NaN, zeros and signs stand where C's Annex F puts them."""
    accuracy = ACCURACY[name]
    arguments = [SPECIAL]
    if len(accuracy.arguments) == 2:
        arguments = [grid.ravel() for grid in np.meshgrid(SPECIAL, SPECIAL)]
    with np.errstate(all="ignore"):
        exact = accuracy.reference(*[a.astype(Real) for a in arguments]).astype(np.float32)
    (ours,) = results([call(name)], arguments, "float32")
    special = ~np.isfinite(exact) | (exact == 0)
    np.testing.assert_array_equal(ours[special], exact[special])
    if name in ("fmin", "fmax"):
        return  # C leaves open which of two zeros is the smaller
    zeros = (exact == 0) & (ours == 0)
    np.testing.assert_array_equal(np.signbit(ours[zeros]), np.signbit(exact[zeros]))


@pytest.mark.parametrize("name", ["exp", "log", "tanh", "erf", "sin", "sqrt", "sigmoid", "cosh"])
def test_float16_is_rounded_once_from_float32(name):
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    low, high = (0.01, 100) if name in ("log", "sqrt") else (-10, 10)
    with np.errstate(invalid="ignore"):
        x = every[(every >= low) & (every <= high)]
    (ours,) = results([call(name, "float16")], [x], "float16", 4)
    exact = ACCURACY[name].reference(x.astype(Real))
    normal = abs(exact) >= 2.0**-14
    assert ulps(ours[normal], exact[normal]).max() <= 1


def test_ldexp_and_nextafter():
    x = np.concatenate([spread(-126, 127), SPECIAL])
    n = np.resize(np.arange(-300, 300), len(x)).astype(np.int32)
    (ours,) = results([call("ldexpf")], [x, n], "float32")
    with np.errstate(over="ignore", under="ignore"):
        exact = np.ldexp(x, n)
    normal = ~(abs(exact) < 2.0**-126)
    np.testing.assert_array_equal(ours[normal], exact[normal])
    y = x[::-1].copy()
    (ours,) = results([call("nextafterf")], [x, y], "float32")
    np.testing.assert_array_equal(ours, np.nextafter(x, y))


def test_exact_functions_take_float64():
    x = np.array([1.5, -2.5, 0.1, 1e300, -0.0])
    operations = (T.floor, T.ceil, T.trunc, T.sqrt, T.abs)
    ours = results(operations, [abs(x)], "float64")
    for row, reference in zip(ours, (np.floor, np.ceil, np.trunc, np.sqrt, np.abs), strict=True):
        np.testing.assert_array_equal(row, reference(abs(x)))


@pytest.mark.parametrize(
    ("name", "key"),
    [("expf", "exp"), ("tirx.exp", "exp"), ("erff", "erf"), ("erf", "erf"), ("prim.log2", "log2"),
     ("sinhf", "sinh"), ("printf", None), ("f", None)],
)  # fmt: skip
def test_names(name, key):
    assert lookup(name) == key


def main() -> None:
    """The table of the documentation."""
    print("| function | promised, ulp | measured, ulp |")
    print("|---|---|---|")
    for name, accuracy in ACCURACY.items():
        print(f"| {name} | {accuracy.bound:g} | {errors(name).max():.2f} |")


if __name__ == "__main__":
    main()
