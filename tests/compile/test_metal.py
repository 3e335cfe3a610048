"""What Metal allows a kernel: counted in text that TVM wrote, refused where it is too much."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints.shapes import hf_config

from mxforge import compile_model
from mxforge.compile import metal
from mxforge.errors import TargetError

TEXT = """
struct second_kernel_args_t {{ int n; }};

kernel void first_kernel(  device float* x_ptr [[ buffer(0) ]],
  device float* y_ptr [[ buffer(1) ]],
  uint blockIdx [[threadgroup_position_in_grid]]
) {{
  thread float own[64];
  threadgroup float4 sums[{count}];
  threadgroup half halves[3];
}}

kernel void second_kernel(  device float* x_ptr [[ buffer(0) ]],
  constant second_kernel_args_t& arg [[ buffer({last}) ]]
) {{
}}
"""


def text(count: int = 1, last: int = 1) -> str:
    return TEXT.format(count=count, last=last)


def test_buffers_and_threadgroup_memory_are_counted():
    assert metal.uses(text(count=5)) == {
        "first_kernel": metal.Use(buffers=2, threadgroup_bytes=5 * 16 + 3 * 2),
        "second_kernel": metal.Use(buffers=2, threadgroup_bytes=0),
    }


def test_too_much_is_refused():
    most = metal.MOST_THREADGROUP_BYTES // 16 - 1
    metal.check(text(count=most, last=metal.MOST_BUFFERS - 1))
    with pytest.raises(TargetError, match=r"first_kernel needs 32,774 bytes of threadgroup memory"):
        metal.check(text(count=most + 1))
    with pytest.raises(TargetError, match=r"second_kernel needs 32 buffers, and Metal has 31"):
        metal.check(text(last=metal.MOST_BUFFERS))


def test_a_model_is_checked(
    odd_checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(metal, "MOST_BUFFERS", 3)
    with pytest.raises(TargetError, match="buffers, and Metal has 3"):
        compile_model(odd_checkpoint("odd-1"), "metal", tmp_path / "artifact", "fast")


@pytest.mark.slow
@pytest.mark.parametrize("formats", [{"dense": "int8"}, {"dense": "bf16", "kv": "int8"}])
def test_kernels_of_20b_are_within_the_limits(formats: dict[str, str], tmp_path: Path):
    config = tmp_path / "config.json"
    config.write_text(json.dumps(hf_config("20b")))
    compile_model(config, "metal", tmp_path / "20b", "fast", random_weights=True, **formats)
