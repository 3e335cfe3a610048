"""Sectors of global memory and passes over shared memory's banks, of patterns known by heart."""

from __future__ import annotations

import numpy as np
import pytest
from support.simt.bodies import compile_body
from support.simt.harness import Cost

SHARED = "  __shared__ alignas(64) float a_ptr[1056];\n"
# Body -> what accesses of a kind cost two warps.
GLOBAL = {
    "y[tx] = x[tx];": Cost(requests=2, passes=8, ideal=8, bytes=256),
    "if (tx < 32) y[tx] = x[tx * 2];": Cost(requests=1, passes=8, ideal=4, bytes=128),
    "if (tx < 8) y[tx] = x[tx * 8];": Cost(requests=1, passes=8, ideal=1, bytes=32),
    "y[tx] = x[5];": Cost(requests=2, passes=2, ideal=2, bytes=8),
    "if (tx < 16) *(float4*)(y + tx * 4) = *(float4*)(x + tx * 4);": Cost(1, 8, 8, 256),
    "for (int i = 0; i < 64; i += 64) y[tx] = x[tx + i];": Cost(2, 8, 8, 256),
}
BANKS = {
    "a_ptr[tx] = 0;": Cost(requests=2, passes=2, ideal=2, bytes=256),
    "a_ptr[tx * 2] = 0;": Cost(requests=2, passes=4, ideal=2, bytes=256),
    "if (tx < 32) a_ptr[tx * 32] = 0;": Cost(requests=1, passes=32, ideal=1, bytes=128),
    "if (tx < 32) a_ptr[tx * 33] = 0;": Cost(requests=1, passes=1, ideal=1, bytes=128),
    "if (tx < 32) *(float4*)(a_ptr + tx * 4) = *(float4*)(x);": Cost(1, 4, 4, 512),
}


FRAGMENT = "threadgroup float a_ptr[288];\n  simdgroup_float8x8 m;\n  simdgroup_load(m, a_ptr, "
FRAGMENTS = {
    "8);": Cost(requests=2, passes=4, ideal=4, bytes=512),
    "36);": Cost(requests=2, passes=8, ideal=4, bytes=512),
    "8, 0, true);": Cost(requests=4, passes=8, ideal=4, bytes=512),
    "36, 0, true);": Cost(requests=4, passes=4, ideal=4, bytes=512),
}


def cost(simt, body: str, what: str, kind: str = "cuda") -> Cost:
    program = compile_body(simt, kind, body)
    x = np.zeros(64, np.float32)
    simt.run(program, [x, x], {1}, counting=True)
    return simt.costs()[what]


@pytest.mark.parametrize("body", list(GLOBAL))
def test_sectors(simt, body):
    assert cost(simt, body, "global read") == GLOBAL[body]


@pytest.mark.parametrize("body", list(BANKS))
def test_bank_passes(simt, body):
    assert cost(simt, SHARED + body, "shared write") == BANKS[body]


@pytest.mark.parametrize("rest", list(FRAGMENTS))
def test_bank_passes_of_fragments(simt, rest):
    assert cost(simt, FRAGMENT + rest, "shared read", "metal") == FRAGMENTS[rest]
    assert simt.operations("simdgroup_load") == 2  # one of each warp
    assert simt.operations("simdgroup_store") == 0


def test_broadcast_is_one_pass(simt):
    body = f"{SHARED}  if (tx == 0) a_ptr[3] = 1;\n  __syncthreads();\n  y[tx] = a_ptr[3];"
    assert cost(simt, body, "shared read") == Cost(requests=2, passes=2, ideal=2, bytes=256)


def test_nothing_is_counted_unasked(simt):
    program = compile_body(simt, "cuda", "y[tx] = x[tx];")
    x = np.zeros(64, np.float32)
    simt.run(program, [x, x], {1})
    assert simt.costs()["global read"] == Cost(0, 0, 0, 0)
