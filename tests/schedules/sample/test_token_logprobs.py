"""Log-probabilities of logits whose answer is known without a reference."""

from __future__ import annotations

import numpy as np

from mxforge.schedules.sample.rows import TOP
from mxforge.schedules.sample.token_logprobs import TOKEN_LOGPROBS


def test_log_probabilities_of_equal_logits(harness):
    inputs = {"logits": np.full((2, 1500), 7.0, np.float32), "ids": np.array([1499, 3], np.int32)}
    chosen, top_ids, top_values = harness.run(TOKEN_LOGPROBS, inputs, {"vocab": 1500})
    np.testing.assert_allclose(chosen, -np.log(1500), rtol=1e-6)
    np.testing.assert_allclose(top_values, -np.log(1500), rtol=1e-6)
    assert top_ids.tolist() == [list(range(TOP))] * 2


def test_log_probability_of_the_certain_token_is_zero(harness):
    logits = np.full((1, 40), -np.inf, np.float32)
    logits[0, 20] = 1e4
    inputs = {"logits": logits, "ids": np.array([20], np.int32)}
    chosen, top_ids, top_values = harness.run(TOKEN_LOGPROBS, inputs, {"vocab": 40})
    assert chosen.tolist() == [0.0]
    assert top_ids[0].tolist() == [20] + [-1] * (TOP - 1)
    assert top_values[0].tolist() == [0.0] + [-np.inf] * (TOP - 1)
