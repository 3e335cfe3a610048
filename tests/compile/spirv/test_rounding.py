"""Rounding to integers, on a device: values and signs are NumPy's for every float dtype.

Lavapipe's code depends on the CPU; GALLIUM_OVERRIDE_CPU_CAPS=avx hides AVX-512 from it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from support.spirv_programs import results
from tvm import tirx
from tvm.script import tirx as T

DTYPES = ("float16", "float32", "float64")


def away(x: np.ndarray) -> np.ndarray:
    """To the nearest integer, ties away from zero."""
    fraction, whole = np.modf(x)
    return np.where(abs(fraction) == 0.5, whole + np.copysign(1, x), np.rint(x))


REFERENCES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "floor": np.floor,
    "ceil": np.ceil,
    "trunc": np.trunc,
    "nearbyint": np.rint,
    "rint": np.rint,
    "round": away,
}


def values(dtype: str) -> np.ndarray:
    """Quarters near zero and at every power of two, up to where all numbers are integers; numbers
    beside one half; the largest, the smallest, denormals, infinities, NaN; both signs of all."""
    info = np.finfo(dtype)
    quarters = np.arange(0, 3, 0.25)
    half = np.asarray(0.5, dtype)
    numbers = np.concatenate(
        [
            np.arange(0, 40, 0.25),
            *(2.0**exponent + offset for exponent in range(6, info.nmant + 1)
              for offset in (quarters, -quarters)),
            2.0 ** np.arange(info.nmant + 1, info.maxexp),
            [np.nextafter(half, 0), np.nextafter(half, 1), 0.1, info.max],
            [info.smallest_normal, info.smallest_subnormal, info.smallest_subnormal * 7],
            [np.inf, np.nan],
        ],
        dtype=dtype,
        casting="same_kind",
    )  # fmt: skip
    return np.concatenate([numbers, -numbers])


@pytest.mark.parametrize("lanes", [1, 3, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_signs(dtype, lanes):
    x = values(dtype)
    flushed = np.where(abs(x) < np.finfo(dtype).smallest_normal, np.copysign(0, x), x).astype(dtype)
    operations = [lambda x, name=name: tirx.call_pure_extern(dtype, name, x) for name in REFERENCES]
    ours = results(operations, [x], dtype, lanes)
    for row, (name, reference) in zip(ours, REFERENCES.items(), strict=True):
        expected = reference(x).astype(dtype)
        # A device may read denormals as zero.
        expected = np.where(row == reference(flushed), row, expected)
        np.testing.assert_array_equal(row, expected, err_msg=name)
        signs = np.signbit(row) | np.isnan(x)  # that of a NaN is open
        np.testing.assert_array_equal(signs, np.signbit(x) | np.isnan(x), f"sign of {name}")


@pytest.mark.parametrize("dtype", DTYPES)
def test_remainders_of_large_numbers(dtype):
    x = values(dtype)
    x = x[np.isfinite(x)]
    (ours,) = results([T.truncmod], [x, np.ones_like(x)], dtype)
    np.testing.assert_array_equal(ours, np.fmod(x, 1))
