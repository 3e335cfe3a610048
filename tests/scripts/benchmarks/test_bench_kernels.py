"""scripts/bench_kernels and scripts/bench_vulkan: that they time kernels and write tables."""

from __future__ import annotations

import json
from pathlib import Path

from support.bench_runs import MACHINE, STAMP, row, run


def test_kernel_table_from_json(tmp_path):
    case = {
        "case": "one token",
        "bytes": 30_000_000,
        "flops": 1000,
        "schedule": "rows",
        "tile": "rows=64",
        "median_us": 2000.0,
        "least_us": 1900.0,
        "greatest_us": 2500.0,
        "calls": 5,
    }
    kernel = {
        "kernel": "bf16w_linear",
        "bandwidth_gb_s": [29.0, 31.0],
        "matrix_gflop_s": 200.0,
        "cases": [case],
    }
    result = {
        "kind": "kernels",
        "machine": MACHINE,
        "target": "cpu:avx512vnni",
        **STAMP,
        "kernels": [kernel],
    }
    (tmp_path / "a-cpu-kernels.json").write_text(json.dumps(result))
    run("bench_kernels", "--render", "--results", tmp_path)
    cells = row((tmp_path / "kernels.md").read_text(), "one token")
    assert cells[1] == "2000"
    assert cells[3] == "15.0"
    assert cells[5:] == ["memory", "50 %"]


def test_one_kernel_is_timed(tmp_path):
    result = run(
        "bench_kernels", "--kernel", "f32_rms_norm", "--seconds", "0.001", "--results", tmp_path
    )
    assert row(result.stdout, "one token")
    assert list(tmp_path.iterdir()) == []  # tracked results are of all kernels


def test_bench_vulkan_writes_its_samples(vulkan, tmp_path: Path):
    said = run("bench_vulkan", "--samples", "1", "--json", tmp_path / "vulkan.json").stdout
    assert "recording a dispatch" in said
    result = json.loads((tmp_path / "vulkan.json").read_text())
    assert result["kind"] == "vulkan"
    assert len(result["recording_us"]) == len(result["generating"]["seconds"]) == 1
    assert result["generating"]["kernels"] > 10
