"""The float32 expressions of `schedules.math` against NumPy in float64."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import tvm

from mxforge.compile.targets import resolve
from mxforge.schedules import math
from mxforge.schedules.gpu.items import GpuTile, bind_items
from mxforge.schedules.kernel import T

LANES = 16
HOST = resolve("cpu").tvm  # what this machine runs
FUNCTIONS = {
    "exp": math.exp_f32,
    "sigmoid": math.sigmoid_f32,
    "log": math.log_f32,
    "sin": math.sin_f32,
    "cos": math.cos_f32,
}
# Every 4001st bit pattern: all exponents, both signs, subnormals, infinities, NaN.
PATTERNS = np.arange(0, 2**32, 4001, dtype=np.uint64).astype(np.uint32).view(np.float32)


def _vectorized(function: Callable[[Any], Any]) -> tvm.tirx.PrimFunc:
    @T.prim_func(s_tir=True, private=True)
    def main(xp: T.handle, yp: T.handle):
        n = T.int64()
        x = T.match_buffer(xp, (n, LANES), "float32")
        y = T.match_buffer(yp, (n, LANES), "float32")
        for i in T.serial(n):
            for lane in T.vectorized(LANES):
                y[i, lane] = function(x[i, lane])

    return main


def _items(function: Callable[[Any], Any]) -> tvm.tirx.PrimFunc:
    @T.prim_func(s_tir=True, private=True)
    def main(xp: T.handle, yp: T.handle):
        n = T.int64()
        x = T.match_buffer(xp, (n, LANES), "float32")
        y = T.match_buffer(yp, (n, LANES), "float32")
        for i, j in T.grid(n, LANES):
            with T.sblock("item"):
                vi, vj = T.axis.remap("SS", [i, j])
                y[vi, vj] = function(x[vi, vj])

    return main


def _compile(func: tvm.tirx.PrimFunc, target: Any = HOST) -> tvm.runtime.Executable:
    module = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    return tvm.compile(module, target)


@cache
def _built(name: str, vectorized: bool = True) -> tvm.runtime.Executable:
    return _compile((_vectorized if vectorized else _items)(FUNCTIONS[name]))


def _run(name: str, values: Any, vectorized: bool = True) -> np.ndarray:
    values = np.asarray(values, np.float32)
    padded = np.resize(values, (-(-len(values) // LANES), LANES))
    x, y = (tvm.runtime.empty(padded.shape, "float32") for _ in range(2))
    x.copyfrom(padded)
    _built(name, vectorized)["main"](x, y)
    return y.numpy().reshape(-1)[: len(values)]


def _ulp(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest error in units of the last place of the float32 result."""
    spacing = np.spacing(np.abs(expected).astype(np.float32)).astype(np.float64)
    return float((np.abs(got - expected) / spacing).max())


def test_exp_over_its_whole_range():
    x = PATTERNS[(PATTERNS > -103) & (PATTERNS < 88.72)]
    assert _ulp(_run("exp", x), np.exp(x.astype(np.float64))) <= 2


def test_exp_at_its_ends():
    got = _run("exp", [-np.inf, -1e30, -104, 0, -0.0, 88.73, 1e30, np.inf, np.nan])
    np.testing.assert_array_equal(got, [0, 0, 0, 1, 1, np.inf, np.inf, np.inf, np.nan])


def test_sigmoid_where_the_result_is_normal():
    x = PATTERNS[np.abs(PATTERNS) < 87]
    assert _ulp(_run("sigmoid", x), 1 / (1 + np.exp(-x.astype(np.float64)))) <= 4


def test_sigmoid_at_its_ends():
    got = _run("sigmoid", [-np.inf, -1e30, 0, 1e30, np.inf, np.nan])
    np.testing.assert_array_equal(got, [0, 0, 0.5, 1, 1, np.nan])


def test_log_of_every_exponent():
    x = PATTERNS[(PATTERNS > 0) & np.isfinite(PATTERNS)]
    assert _ulp(_run("log", x), np.log(x.astype(np.float64))) <= 2


def test_log_near_one():
    x = np.float32(1) + np.arange(-4000, 4000, dtype=np.float32) * np.float32(2.0**-23)
    expected = np.log(x.astype(np.float64))
    got = _run("log", x)
    assert np.abs(got - expected).max() <= 1e-9
    assert got[4000] == 0


def test_log_at_its_ends():
    got = _run("log", [0.0, np.inf, np.nan, 2.0**-149])
    np.testing.assert_array_equal(got, np.float32([-np.inf, np.inf, np.nan, -149 * np.log(2)]))


@pytest.mark.parametrize("name", ["sin", "cos"])
def test_sine_and_cosine_up_to_the_last_position(name: str):
    rng = np.random.default_rng(0)
    whole = np.arange(131_072, dtype=np.float32)
    x = np.concatenate([whole, -whole[:1000], rng.uniform(-1.4e5, 1.4e5, 100_000)])
    x = x.astype(np.float32)
    assert np.abs(_run(name, x) - getattr(np, name)(x.astype(np.float64))).max() <= 1e-7


@pytest.mark.parametrize("name", ["sin", "cos"])
def test_sine_and_cosine_beside_multiples_of_a_quarter_turn(name: str):
    k = np.arange(0, 89_000, 7)
    x = (k * (np.pi / 2)).astype(np.float32)
    x = np.concatenate([np.nextafter(x, np.float32(0)), x, np.nextafter(x, np.float32(1e9))])
    assert np.abs(_run(name, x) - getattr(np, name)(x.astype(np.float64))).max() <= 1e-7


@pytest.mark.parametrize("name", FUNCTIONS)
def test_scalars_and_vectors_agree(name: str):
    x = np.random.default_rng(1).uniform(0.01, 80, 1000).astype(np.float32)
    np.testing.assert_array_max_ulp(_run(name, x), _run(name, x, vectorized=False), maxulp=2)


@pytest.mark.parametrize(("level", "register"), [("avx512", "zmm"), ("avx2", "ymm")])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_vectors_call_no_library(name: str, level: str, register: str):
    module = _compile(_vectorized(FUNCTIONS[name]), resolve(f"cpu:{level}").tvm)
    assembly = module.mod.inspect_source("s")
    called = re.findall(r"^\s+callq?\s+(\S+)", assembly, re.MULTILINE)
    assert register in assembly
    assert [symbol for symbol in called if "tvm" not in symbol.lower()] == []


@pytest.mark.parametrize("name", FUNCTIONS)
def test_metal_has_plain_float_arithmetic(name: str):
    module = _compile(
        bind_items(_items(FUNCTIONS[name]), GpuTile()), {"kind": "metal", "host": HOST}
    )
    source = module.mod.imports[0].inspect_source()
    assert "double" not in source
    assert not re.search(r"\b(exp|exp2|log|log2|sin|cos|fast|precise)\s*(\(|::)", source)


def test_constants_that_must_be_exact_survive_printing_in_seven_digits():
    exact = [
        math.LN2_HIGH,
        math.HALF_PI_1,
        math.HALF_PI_2,
        math.HALF_PI_3,
        math.HALF_PI_3_UNIT,
        2.0**23,
        256.5,
    ]
    for value in exact:
        assert float(math.f32(value).value) == value
        assert np.float32(f"{value:.6e}") == np.float32(value)
