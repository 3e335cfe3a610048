"""Several tokens on one expert: its weights are read once for four of them."""

from __future__ import annotations

import pytest
from support.kernels import call_of, made_inputs
from support.targets import METAL

from mxforge.schedules import KERNELS


@pytest.mark.parametrize(
    ("name", "k"), [("mxfp4w_moe_gate_up_swiglu", "hidden"), ("mxfp4w_moe_down", "intermediate")]
)
def test_weights_are_read_once_for_four_tokens(simt, name: str, k: str):
    kernel = KERNELS[name]
    case = next(case for case in kernel.cases if case.name == "all tokens on one expert")
    inputs = made_inputs(case)
    program = simt.compile(kernel.build(METAL, **case.static), "metal")
    tokens = len(inputs["ids"])

    def read(n: int) -> int:
        """Bytes that the first n tokens take."""
        some = {
            name: array[:n] if len(array) == tokens and name != "offsets" else array
            for name, array in inputs.items()
        }
        call = call_of(kernel, METAL, some, case.static)
        simt.run(program, call.arrays, call.written, counting=True)
        return simt.costs()["global read"].bytes

    rows, inputs_read = inputs["blocks"].shape[1], -(-case.static[k] // 64) * 64  # pairs of blocks
    weights = rows * inputs_read * 17 // 32
    token = rows // 4 * inputs_read * 4  # four rows share what they read of its inputs
    assert read(4) - read(2) < 2 * token + weights / 2
    assert read(5) - read(4) > token + weights / 2
