"""Whether a kernel's results are those of its reference: one rule for tests and benchmarks."""

from __future__ import annotations

import numpy as np


def check(ours: np.ndarray, reference: np.ndarray, tolerance: float, what: str) -> float:
    """How far a result is from its reference; AssertionError where that is too far.

    Integers must be equal, unless the reference has reals for them: rounded numbers kept as
    integers. Of reals ‖ours - reference‖ / ‖reference‖ is at most `tolerance`.
    """
    assert ours.shape == reference.shape, what
    if np.issubdtype(reference.dtype, np.integer):
        np.testing.assert_array_equal(ours, reference, err_msg=what)
        return 0.0
    error = relative_error(ours, reference)
    assert error <= tolerance, f"{what}: {error:.3g} from the reference, {tolerance:g} allowed"
    return error


def relative_error(ours: np.ndarray, reference: np.ndarray) -> float:
    """‖ours - reference‖ / ‖reference‖ over what is finite in the reference; NaN and infinity
    must stand in the same places."""
    ours, reference = ours.astype(np.float64), reference.astype(np.float64)
    finite = np.isfinite(reference)
    np.testing.assert_array_equal(ours[~finite], reference[~finite])
    error = np.linalg.norm(ours[finite] - reference[finite])
    norm = np.linalg.norm(reference[finite])
    return float(error / norm) if norm else float(error)
