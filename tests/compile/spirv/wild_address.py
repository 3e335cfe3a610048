"""A kernel that reads 2 KiB outside. test_validation.py runs it under the validation layers.

They tell of it, but the read takes place: farther away it would end the process.
"""

from __future__ import annotations

import numpy as np
from support.spirv_programs import bound, run
from tvm import tirx


def test_fails_under_the_layers():
    i = tirx.Var("i", "int32")
    x, out = (tirx.decl_buffer((64,), "float32", name) for name in ("x", "out"))
    store = tirx.BufferStore(out, tirx.BufferLoad(x, [i + 512]), [i])
    function = tirx.PrimFunc([x, out], bound(i, "threadIdx.x", 64, store))
    run(function.with_attr("s_tir", True), np.zeros(64, np.float32), np.zeros(64, np.float32))
