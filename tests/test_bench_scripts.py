"""scripts/bench and scripts/bench_kernels: that they run and write tables, never how fast."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
STAMP = {"date": "2026-11-22 10:00 UTC", "commit": "0123456789ab", "versions": {"mxforge": "0.1.0"}}
MACHINE = {
    "cpu": "a CPU",
    "cores": 2,
    "memory_gib": 23.5,
    "system": "Linux x86_64",
    "python": "3.11.7",
}


def run(script: str, *arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, SCRIPTS / script, *arguments]
    result = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    return result


def measured(tok_s: float, bandwidth: float = 30.0) -> dict[str, Any]:
    return {
        "tok_s": tok_s,
        "bandwidth_gb_s": [bandwidth - 1, bandwidth + 1],
        "others_cpu_cores": 0.01,
    }


def sample(pair: int, engine: str, tok_s: float) -> dict[str, Any]:
    return {
        "pair": pair,
        "engine": engine,
        "cached": 1.0,
        "first_token_s": [1.5 + pair],
        "peak_rss_bytes": [13 << 30],
        "prefill_128": measured(16.0),
        "decode_1": measured(tok_s),
    }


def speed(engines: list[str], samples: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        **STAMP,
        "engines": engines,
        "no_peer_because": "" if len(engines) == 2 else "--no-peer was given",
        "target": "cpu:avx512vnni",
        "numerics": "fast",
        "context_length": 8192,
        "bytes_per_step": {engine: {"1": 3.0e9} for engine in engines},
        "matrix_gflop_s": 200.0,
        "prefill_flops_per_token": 6_000_000_000,
        "samples": samples,
    }


def rendered(folder: Path, sections: dict[str, Any]) -> str:
    result = {"kind": "model", "shape": "20b", "machine": MACHINE, "sections": sections}
    (folder / "a-cpu-20b.json").write_text(json.dumps(result))
    run("bench", "--render", "--results", folder)
    return (folder / "README.md").read_text()


def row(text: str, label: str) -> list[str]:
    """The cells of the first table row that begins with `label`."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {label}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("script", ["bench", "bench_kernels"])
def test_help(script):
    assert "--results" in run(script, "--help").stdout


def test_ratios_are_taken_within_pairs_and_losses_stay(tmp_path):
    samples = [
        sample(0, "mxforge", 8.0),
        sample(0, "llama.cpp", 10.0),
        sample(1, "llama.cpp", 2.0),
        sample(1, "mxforge", 1.0),
    ]
    text = rendered(tmp_path, {"speed": speed(["mxforge", "llama.cpp"], samples)})
    cells = row(text, "decode, batch 1")
    assert cells[1] == "4.50 (1.00 … 8.00)"
    assert cells[3] == "0.650 (0.500 … 0.800) ×"
    assert cells[4] == "45.0 (10.0 … 80.0) %"  # of 30 GB/s ÷ 3 GB a step
    assert row(text, "decode beside llama.cpp")[3] == "yes"
    assert row(text, "first token from process start, 16-token")[1:] == [
        "2.00 (1.50 … 2.50) s",
        "≤ 3 s",
        "yes",
    ]


def test_a_broken_promise_is_called_broken(tmp_path):
    text = rendered(tmp_path, {"import": {**STAMP, "import_s": [0.5], "import_with_engine_s": [1]}})
    assert row(text, "`import mxforge`")[1:] == ["0.500 s", "≤ 0.4 s", "**no**"]


def test_what_was_not_measured_is_called_so(tmp_path):
    text = rendered(tmp_path, {"speed": speed(["mxforge"], [sample(0, "mxforge", 8.0)])})
    assert row(text, "decode, batch 1")[2:4] == ["not measured", "not measured"]
    assert row(text, "memory while packing")[1:] == ["not measured", "≤ 4 GiB", ""]
    assert "llama.cpp is not measured: --no-peer was given." in text


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


def test_wrong_options_are_usage_errors(tmp_path):
    assert "--samples" in run("bench", "--samples", "0", "--work", tmp_path, code=2).stderr
    assert "--steps" in run("bench", "--steps", "fly", "--work", tmp_path, code=2).stderr


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="drops files from Linux's page cache")
def test_tiny_shape_without_peer(tmp_path):
    """All steps at the least size: floors first, then a checkpoint, an artifact, samples."""
    results = tmp_path / "results"
    options = ["--shape", "tiny", "--no-peer", "--quick"]
    result = run("bench", *options, "--work", tmp_path / "work", "--results", results)
    assert "floor of mxforge, batch 1" in result.stdout.splitlines()[1]
    (file,) = results.glob("*-tiny.json")
    sections = json.loads(file.read_text())["sections"]
    assert list(sections) == ["import", "compile", "speed"]
    compiling = sections["compile"]
    assert 0 < compiling["packing_s"] < compiling["total_s"]
    assert compiling["packing_peak_anonymous_bytes"] > 0
    (only,) = sections["speed"]["samples"]
    assert only["engine"] == "mxforge"
    assert only["decode_1"]["tok_s"] > 0
    assert only["cached"] in (None, 1.0)
    text = (results / "README.md").read_text()
    assert row(text, "`import mxforge`")[3] in ("yes", "**no**")


def test_bench_vulkan_writes_its_samples(vulkan, tmp_path: Path):
    said = run("bench_vulkan", "--samples", "1", "--json", tmp_path / "vulkan.json").stdout
    assert "recording a dispatch" in said
    result = json.loads((tmp_path / "vulkan.json").read_text())
    assert result["kind"] == "vulkan"
    assert len(result["recording_us"]) == len(result["generating"]["seconds"]) == 1
    assert result["generating"]["kernels"] > 10
