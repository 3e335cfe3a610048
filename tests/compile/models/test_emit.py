"""Calls of kernels, as the graphs of all families make them."""

from __future__ import annotations

import pytest
from checkpoints.shapes import hf_config
from support.targets import PLAIN_CPU
from tvm.relax import TensorType, Var

from mxforge.compile.formats import Precision
from mxforge.compile.models.emit import Limits
from mxforge.compile.models.gpt_oss.config import GptOssConfig
from mxforge.compile.models.gpt_oss.graph import GptOss
from mxforge.errors import SignatureError
from mxforge.schedules.rms_norm import RMS_NORM


@pytest.mark.parametrize("names", [["x"], ["x", "weight", "residual"], ["x", "weights"]])
def test_a_call_with_other_inputs_than_the_kernels_is_refused(names):
    config = GptOssConfig.from_hf(hf_config("tiny"))
    graph = GptOss(config, PLAIN_CPU, Precision(), Limits(1, 8), [])
    inputs = {name: Var(name, TensorType((4, 64), "float32")) for name in names}
    with pytest.raises(SignatureError, match=f"norm takes x, weight, .* with {', '.join(names)};"):
        graph.call(RMS_NORM, inputs, hidden=64, eps=1e-5)
