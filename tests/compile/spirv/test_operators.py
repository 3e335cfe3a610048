"""Every operator on every dtype and vector width, on a device, against NumPy or Python's integers.

All operators of one dtype run in one kernel; a failure names the operator.
"""

from __future__ import annotations

import itertools
from functools import partial

import numpy as np
import pytest
from support.spirv_programs import (
    DTYPES,
    bound,
    checked,
    elementwise,
    generate,
    lowered,
    results,
    run,
    ulps,
)
from tvm import tirx
from tvm.script import tirx as T

# A part of a value has up to four lanes: 3 is one part without vector access, 8 is two.
WIDTHS = [1, 3, 8, *(pytest.param(lanes, marks=pytest.mark.full) for lanes in (2, 4))]
INTEGERS = [dtype for dtype in DTYPES if "int" in dtype]
FLOATS = [dtype for dtype in DTYPES if "float" in dtype]


def bits(dtype: str) -> int:
    return np.dtype(dtype).itemsize * 8


def wrapped(value: int, dtype: str) -> int:
    value %= 2 ** bits(dtype)
    if dtype.startswith("int") and value >= 2 ** (bits(dtype) - 1):
        value -= 2 ** bits(dtype)
    return value


def truncated(x: int, y: int) -> int:
    quotient = abs(x) // abs(y)
    return quotient if (x < 0) == (y < 0) else -quotient


# name -> (TIR, Python's integers); a divisor of zero is left out
INTEGER_OPERATORS = {
    "+": (lambda x, y: x + y, lambda x, y: x + y),
    "-": (lambda x, y: x - y, lambda x, y: x - y),
    "*": (lambda x, y: x * y, lambda x, y: x * y),
    "truncdiv": (T.truncdiv, truncated),
    "truncmod": (T.truncmod, lambda x, y: x - y * truncated(x, y)),
    "floordiv": (T.floordiv, lambda x, y: x // y),
    "floormod": (T.floormod, lambda x, y: x % y),
    "min": (T.min, min),
    "max": (T.max, max),
    "&": (T.bitwise_and, lambda x, y: x & y),
    "|": (T.bitwise_or, lambda x, y: x | y),
    "^": (T.bitwise_xor, lambda x, y: x ^ y),
    "~": (lambda x, y: T.bitwise_not(x), lambda x, y: ~x),
    "popcount": (lambda x, y: T.popcount(x), None),
    "select": (lambda x, y: T.Select(x < y, x, y + y), lambda x, y: x if x < y else y + y),
}
COMPARISONS = {
    "<": (lambda x, y: x < y),
    "<=": (lambda x, y: x <= y),
    ">": (lambda x, y: x > y),
    ">=": (lambda x, y: x >= y),
    "==": (lambda x, y: x == y),
    "!=": (lambda x, y: x != y),
}


def integer_pairs(dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of the interesting values, and random ones of every size; no zero divisors."""
    info = np.iinfo(dtype)
    edges = {0, 1, 2, 3, 7, 8, info.max, info.max - 1, info.max // 2}
    edges |= {info.min, info.min + 1, -1, -2, -3, -7} if info.min else set()
    pairs = [(x, y) for x, y in itertools.product(sorted(edges), repeat=2) if y]
    rng = np.random.default_rng(bits(dtype))
    for _ in range(100):
        size = int(rng.integers(1, bits(dtype)))
        pair = [int(rng.integers(info.min >> size, (info.max >> size) + 1)) for _ in "xy"]
        pairs.append((pair[0], pair[1] or 1))
    x, y = np.array(pairs, dtype).T
    return x, y


@pytest.mark.parametrize("lanes", WIDTHS)
@pytest.mark.parametrize("dtype", INTEGERS)
def test_integer_operators(dtype, lanes):
    x, y = integer_pairs(dtype)
    ours = results([tir for tir, _ in INTEGER_OPERATORS.values()], [x, y], dtype, lanes)
    for row, (name, (_, reference)) in zip(ours, INTEGER_OPERATORS.items(), strict=True):
        if reference is None:
            expected = [bin(int(a) % 2 ** bits(dtype)).count("1") for a in x]
        else:
            expected = [
                wrapped(reference(int(a), int(b)), dtype) for a, b in zip(x, y, strict=True)
            ]
        np.testing.assert_array_equal(row, np.array(expected, dtype), err_msg=name)


@pytest.mark.parametrize("lanes", WIDTHS)
@pytest.mark.parametrize("dtype", INTEGERS)
def test_shifts_take_the_amount_modulo_the_width(dtype, lanes):
    x, _ = integer_pairs(dtype)
    amounts = np.resize(np.arange(2 * bits(dtype)), len(x)).astype(dtype)
    left, right = results([T.shift_left, T.shift_right], [x, amounts], dtype, lanes)
    taken = [int(amount) % bits(dtype) for amount in amounts]
    for row, python in ((left, int.__lshift__), (right, int.__rshift__)):
        expected = [wrapped(python(int(a), s), dtype) for a, s in zip(x, taken, strict=True)]
        np.testing.assert_array_equal(row, np.array(expected, dtype))


@pytest.mark.parametrize("lanes", WIDTHS)
@pytest.mark.parametrize("dtype", ["int32", "uint32", "int64", "uint64"])
def test_leading_zeros(dtype, lanes):
    x = np.array([0, 1, 2, 3, 255, 2**31 - 1, np.iinfo(dtype).max, 2 ** (bits(dtype) // 2)], dtype)
    (ours,) = results([lambda x: T.Cast(dtype, T.clz(x))], [x], dtype, lanes)
    expected = [bits(dtype) - int(value).bit_length() for value in x]
    np.testing.assert_array_equal(ours, np.array(expected, dtype))


def float_pairs(dtype: str) -> tuple[np.ndarray, np.ndarray]:
    edges = [0.0, -0.0, 1.0, -1.5, 3.0, 1e-3, -1e3, np.inf, -np.inf, np.nan]
    x, y = np.array(list(itertools.product(edges, repeat=2)), dtype).T
    rng = np.random.default_rng(1)
    return (
        np.concatenate([x, rng.normal(0, 10, 100).astype(dtype)]),
        np.concatenate([y, rng.normal(0, 10, 100).astype(dtype)]),
    )


FLOAT_OPERATORS = {
    "+": (lambda x, y: x + y, np.add),
    "-": (lambda x, y: x - y, np.subtract),
    "*": (lambda x, y: x * y, np.multiply),
    "/": (lambda x, y: x / y, np.divide),
    "min": (T.min, lambda x, y: np.where(x < y, x, y)),
    "max": (T.max, lambda x, y: np.where(x > y, x, y)),
    "floor": (lambda x, y: T.floor(x), lambda x, y: np.floor(x)),
    "ceil": (lambda x, y: T.ceil(x), lambda x, y: np.ceil(x)),
    "trunc": (lambda x, y: T.trunc(x), lambda x, y: np.trunc(x)),
    "nearbyint": (lambda x, y: T.nearbyint(x), lambda x, y: np.rint(x)),
    "fabs": (lambda x, y: T.abs(x), lambda x, y: np.abs(x)),
    "sqrt": (lambda x, y: T.sqrt(x), lambda x, y: np.sqrt(x)),
    "copysign": (T.copysign, np.copysign),
    "select": (lambda x, y: T.Select(x < y, x, y), lambda x, y: np.where(x < y, x, y)),
    "negative": (lambda x, y: -x, lambda x, y: -x),
}


@pytest.mark.parametrize("lanes", WIDTHS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_float_operators(dtype, lanes):
    x, y = float_pairs(dtype)
    ours = results([tir for tir, _ in FLOAT_OPERATORS.values()], [x, y], dtype, lanes)
    with np.errstate(all="ignore"):
        for row, (name, (_, reference)) in zip(ours, FLOAT_OPERATORS.items(), strict=True):
            expected = reference(x, y).astype(dtype)
            finite = np.isfinite(expected)
            np.testing.assert_array_equal(row[~finite], expected[~finite], err_msg=name)
            # ÷ and √ are within 2.5 ulp by Vulkan's word, the others exact or correctly rounded.
            assert ulps(row[finite], expected[finite]).max() <= 2.5, name


@pytest.mark.parametrize("lanes", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_comparisons(dtype, lanes):
    x, y = float_pairs(dtype) if dtype in FLOATS else integer_pairs(dtype)
    operations = [
        lambda x, y, compare=compare: T.Cast("int32", compare(x, y))
        for compare in COMPARISONS.values()
    ]
    ours = results(operations, [x, y], "int32", lanes)
    for row, (name, compare) in zip(ours, COMPARISONS.items(), strict=True):
        np.testing.assert_array_equal(row, compare(x, y).astype("int32"), err_msg=name)


@pytest.mark.parametrize("lanes", [1, 8])
@pytest.mark.parametrize("source", [dtype for dtype in INTEGERS if "64" not in dtype])
def test_comparisons_of_widened_numbers_with_constants(source, lanes):
    """Drivers rewrite these, and one of them wrongly (see `convert`).

    Reinterpreted twice, or TVM rewrites them before.
    """
    x, _ = integer_pairs(source)
    info = np.iinfo(source)
    for to in ("int64", "uint64"):
        constants = [c for c in (-5, 0, 1, 100, info.min, info.max) if c >= np.iinfo(to).min]
        cases = list(itertools.product(COMPARISONS.items(), constants))

        def operation(x, compare, c, to=to):
            widened = T.reinterpret(to, T.reinterpret("uint64", T.Cast(to, x)))
            return T.Cast("int32", compare(widened, tirx.const(c, to)))

        operations = [partial(operation, compare=compare, c=c) for (_, compare), c in cases]
        ours = results(operations, [x], "int32", lanes)
        for row, ((name, compare), c) in zip(ours, cases, strict=True):
            expected = compare(x.astype(to), np.array(c, to)).astype("int32")
            np.testing.assert_array_equal(row, expected, err_msg=f"{to}(x) {name} {c}")


@pytest.mark.parametrize("lanes", [1, 4])
def test_classes_of_floats(lanes):
    x = np.array([0, 1, -1, np.inf, -np.inf, np.nan, -np.nan, 3e38, 1e-38], "float32")
    tests = (T.isnan, T.isinf, T.isfinite)
    ours = results([lambda x, f=f: T.Cast("int32", f(x)) for f in tests], [x], "int32", lanes)
    for row, reference in zip(ours, (np.isnan, np.isinf, np.isfinite), strict=True):
        np.testing.assert_array_equal(row, reference(x).astype("int32"))


def expected_cast(x: np.ndarray, to: str) -> np.ndarray:
    """Casts as `convert` defines them."""
    with np.errstate(all="ignore"):
        if x.dtype.kind == "f" and "int" in to:
            info = np.iinfo(to)
            limited = [min(max(v, -1e30), 1e30) for v in x.astype(np.float64)]
            values = [0 if np.isnan(v) else min(max(int(v), info.min), info.max) for v in limited]
            return np.array(values, to)
        return x.astype(to)


@pytest.mark.parametrize("lanes", [1, pytest.param(8, marks=pytest.mark.full)])
@pytest.mark.parametrize("source", DTYPES)
def test_casts(source, lanes):
    if source in FLOATS:
        x, _ = float_pairs(source)
        more = [3e9, -3e9, 200, -200, 70000, 4e18, 1e19, 2e19, -1e19, 255.5, -0.9, 127.9, 65519]
        with np.errstate(all="ignore"):
            x = np.concatenate([x, np.array(more).astype(source)])
    else:
        x, _ = integer_pairs(source)
    for to in DTYPES:
        (ours,) = results([lambda x, to=to: T.Cast(to, x)], [x], to, lanes)
        expected = expected_cast(x, to)
        if "float" in to:
            finite = np.isfinite(expected) & np.isfinite(ours)
            np.testing.assert_array_equal(np.isnan(ours), np.isnan(expected))
            assert ulps(ours[finite], expected[finite].astype(np.longdouble)).max() <= 1, to
        else:
            np.testing.assert_array_equal(ours, expected, err_msg=to)


@pytest.mark.parametrize(
    ("source", "lanes", "to"),
    [
        ("uint8", 4, "uint32"), ("uint8", 8, "uint64"), ("uint32", 1, "uint8x4"),
        ("uint64", 1, "uint16x4"), ("float16", 2, "uint32"), ("float32", 4, "uint32x4"),
        ("float64", 1, "int64"), ("uint8", 16, "uint32x4"), ("uint32", 2, "float16x4"),
    ],
)  # fmt: skip
def test_reinterpretation(source, lanes, to):
    scalar, _, count = to.partition("x")
    n, width = 16, int(count or 1)
    rng = np.random.default_rng(0)
    x = rng.integers(0, 100, n * lanes).astype(source)
    out = np.zeros(x.nbytes // np.dtype(scalar).itemsize, scalar)
    block = tirx.Var("block", "int32")
    array = tirx.decl_buffer((len(x),), source, "x")
    result = tirx.decl_buffer((len(out),), scalar, "out")
    load = tirx.BufferLoad(array, [tirx.Ramp(block * lanes, 1, lanes) if lanes > 1 else block])
    place = tirx.Ramp(block * width, 1, width) if width > 1 else block
    store = tirx.BufferStore(result, T.reinterpret(to, load), [place])
    body = bound(block, "blockIdx.x", n, store)
    function = tirx.PrimFunc([array, result], body).with_attr("s_tir", True)
    np.testing.assert_array_equal(run(function, x, out)[-1], x.view(scalar))


@pytest.mark.parametrize("lanes", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_width_validates(dtype, lanes):
    operators = FLOAT_OPERATORS if dtype in FLOATS else INTEGER_OPERATORS
    operations = [tir for tir, _ in operators.values()]
    checked(generate(lowered(elementwise(operations, [dtype, dtype], dtype, 96 * lanes, lanes))))
