"""Which CUDA code runs on which device, by the driver's word."""

from __future__ import annotations

import ctypes

import pytest
from support.cuda_driver import CudaDriver

from mxforge import cuda
from mxforge.errors import ArtifactTargetError


@pytest.mark.parametrize(
    ("target", "capability", "runs"),
    [
        ("cuda", (8, 0), True),
        ("cuda", (12, 1), True),
        ("cuda", (7, 5), False),
        ("cuda:sm_75", (7, 5), True),
        ("cuda:sm_89", (9, 0), True),
        ("cuda:sm_89", (8, 6), False),
        ("cuda:sm_90a", (9, 0), True),
        ("cuda:sm_90a", (10, 0), False),
        ("cuda:sm_100", (9, 0), False),
    ],
)
def test_code_runs_on_its_architecture_and_later_ones(
    target, capability, runs, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: CudaDriver(*capability))
    if runs:
        cuda.check(target, 0)
    else:
        with pytest.raises(ArtifactTargetError, match=r"compile the model for cuda:sm_\d+\."):
            cuda.check(target, 0)


def test_a_device_that_is_not_there(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: CudaDriver())
    with pytest.raises(ArtifactTargetError, match="CUDA device 1, but there are 1"):
        cuda.check("cuda", 1)


def test_no_driver(monkeypatch: pytest.MonkeyPatch):
    def absent(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", absent)
    with pytest.raises(ArtifactTargetError, match="driver .* is not installed"):
        cuda.check("cuda", 0)
