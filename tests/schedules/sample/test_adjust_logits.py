"""Edits of logits: penalties, biases and masks."""

from __future__ import annotations

import numpy as np

from mxforge.schedules.sample.adjust_logits import ADJUST_LOGITS


def test_penalties_and_bias_by_hand(harness):
    inputs = {
        "logits": np.array([[2.0, -2.0, 2.0, -np.inf, 5.0]], np.float32),
        "edit_row": np.zeros(4, np.int32),
        "edit_token": np.arange(4, dtype=np.int32),
        "edit_seen": np.array([1, 1, 0, 1], np.int32),
        "edit_count": np.array([0, 3, 0, 1], np.int32),
        "edit_bias": np.array([0.0, 0.0, -1.5, 9.0], np.float32),
        "penalties": np.array([[2.0, 0.25, 0.125]], np.float32),
        "mask_row": np.array([-1], np.int32),
        "bitmask": np.zeros((0, 1), np.int32),
    }
    (out,) = harness.run(ADJUST_LOGITS, inputs, {"vocab": 5})
    assert out[0].tolist() == [1.0, -4.0 - 3 * 0.125 - 0.25, 0.5, -np.inf, 5.0]
