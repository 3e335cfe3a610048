"""Whether a kernel's results are those of its reference: one rule for tests and benchmarks."""

from __future__ import annotations

import numpy as np

ROUNDED = 1e-3  # of bfloat16: of ten numbers one next to a tie may go the other way


def check(ours: np.ndarray, reference: np.ndarray, tolerance: float, what: str) -> float:
    """How far a result is from its reference; AssertionError where that is too far.

    Integers must be equal, unless the reference has reals for them: rounded numbers kept as
    integers. Of reals ‖ours - reference‖ / ‖reference‖ is at most `tolerance`; where ours are
    uint16, they are the bits of bfloat16, and it is at most ROUNDED.
    """
    assert ours.shape == reference.shape, what
    if np.issubdtype(reference.dtype, np.integer):
        np.testing.assert_array_equal(ours, reference, err_msg=what)
        return 0.0
    if ours.dtype == np.uint16:
        ours = (ours.astype(np.uint32) << 16).view(np.float32)
        tolerance = max(tolerance, ROUNDED)
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
