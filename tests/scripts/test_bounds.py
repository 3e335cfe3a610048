"""What was asked of a decoded token, beside what is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from absent_gpus import bounds, cuda, token

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "docs" / "bench"
KERNEL = {"threads": 256, "registers": 128, "shared_bytes": 20_000, "instructions": 100}


@pytest.mark.parametrize(
    ("arch", "changes", "blocks"),
    [
        ("sm_90a", {}, 2),  # by registers
        ("sm_90a", {"registers": 33}, 6),  # which come in groups of 8 for each lane
        ("sm_90a", {"registers": 16, "shared_bytes": 99_000}, 2),
        ("sm_89", {"registers": 16, "shared_bytes": 99_000}, 1),
        ("sm_89", {"registers": 16, "shared_bytes": 0}, 6),  # by warps
        ("sm_80", {"registers": 16, "shared_bytes": 0, "threads": 33}, 32),
    ],
)
def test_blocks_of_an_sm(arch: str, changes: dict[str, int], blocks: int):
    assert bounds.resident(arch, {**KERNEL, **changes}) == blocks
    threads = {**KERNEL, **changes}["threads"]
    assert bounds.warps(arch, {**KERNEL, **changes}) == blocks * -(-threads // 32)


def test_lines_say_what_misses_them():
    most = bounds.Line("a", None, 2.0, [("k", "x", 2.0), ("l", "x", 2.1), ("l", "y", 1.0)])
    assert (most.asked(), most.misses()) == ("at most 2.0", ["l"])
    assert most.shown() == "1.0 to 2.1 (l, x)"
    least = bounds.Line("b", 16, None, [("k", "x", 16), ("l", "x", 8)])
    assert (least.asked(), least.misses()) == ("at least 16", ["l"])
    assert least.shown() == "16 to 8 (l, x)"


def test_gates():
    line = bounds.Line("a", None, 2.0, [("k", "x", 2.1), ("l", "x", 2.0)])
    assert bounds.gates([line]) == ["k misses its bound: a, at most 2.0"]


def test_tracked_bounds():
    def gpus(name: str) -> dict[str, Any]:
        found = json.loads((BENCH / f"{name}-absent-gpus.json").read_text())["gpus"]
        return dict(found)

    asked = bounds.lines(gpus("cuda"), gpus("vulkan"), gpus("token"))
    assert (BENCH / "bounds-absent-gpus.md").read_text() == bounds.page(asked)
    assert bounds.gates(asked) == []
    counted = {line.what: {kernel for kernel, *_ in line.counts} for line in asked}
    for kind, called in bounds.KINDS.items():
        assert len(counted[f"instructions a weight, {called}"]) == {"mxfp4w": 4}.get(kind, 3)
    assert {"f32_split_attention", "mxfp4w_bf16_moe_down"} <= counted["warps of an SM, full grid"]
    assert all(line.counts for line in asked)
    assert set(bounds.SMS) == set(cuda.COUNTED)
    assert bounds.H200 in token.CARDS
