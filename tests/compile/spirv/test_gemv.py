"""Matrix-vector kernels: how they read their weights."""

from __future__ import annotations

import re

import pytest
from support.spirv_programs import disassembled, kernels
from support.targets import VULKAN

from mxforge.schedules import KERNELS

STATIC = {"rows": 100, "k": 4096, "with_bias": True, "with_residual": True}


@pytest.mark.parametrize("name", ["bf16w_linear", "i8w_linear"])
def test_weights_are_loaded_16_bytes_at_once(name):
    kernel = KERNELS[name]
    tile = kernel.choose(VULKAN, **STATIC).tile
    codes = [
        code
        for code in kernels(kernel.build(VULKAN, **STATIC))
        if not code.reflection["requirements"]["matrices"]  # for many tokens
    ]
    assert len(codes) == 2  # for one token, and for several
    for code in codes:
        loads = re.findall(r"OpLoad %(\w+) %\d+ Aligned (\d+)", disassembled(code))
        chunks = 2 * tile.rows * tile.ahead  # of the loop, and of what is left
        assert loads.count(("v4uint", "16")) == chunks
        assert loads.count(("uint", "4")) == (chunks if name == "i8w_linear" else 0)  # scales
        rest = {load for load in loads if "uint" not in load[0]}
        assert rest == {("v4float", "16"), ("float", "4")}  # inputs; bias and residual
        assert "shaderFloat16" not in code.reflection["requirements"]["features"]
