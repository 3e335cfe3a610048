"""scripts/bench and what all scripts bench* do: help, wrong options."""

from __future__ import annotations

import json

import pytest
from support.bench_runs import MACHINE, STAMP, rendered, row, run


@pytest.mark.parametrize("script", ["bench", "bench_peers", "bench_formats", "bench_kernels"])
def test_help(script):
    assert "--results" in run(script, "--help").stdout


def test_wrong_options_are_usage_errors(tmp_path):
    for script in ("bench", "bench_peers", "bench_formats"):
        assert "--samples" in run(script, "--samples", "0", "--work", tmp_path, code=2).stderr
    assert "--steps" in run("bench", "--steps", "fly", "--work", tmp_path, code=2).stderr
    said = run("bench_formats", "--only", "exact", "fly", "--work", tmp_path, code=2).stderr
    assert "--only takes some of default control kv-f32" in said
    said = run("bench_peers", "--figures", "decode,fly", "--work", tmp_path, code=2).stderr
    assert "--figures takes some of" in said
    assert said.rstrip().endswith("found fly.")


def test_a_broken_promise_is_called_broken(tmp_path):
    sections = {"import": {**STAMP, "import_s": [0.5], "import_with_engine_s": [1]}}
    result = {"kind": "model", "shape": "20b", "machine": MACHINE, "sections": sections}
    text = rendered(tmp_path, result, "bench", "README.md")
    assert row(text, "`import mxforge`")[1:] == ["0.500 s", "≤ 0.4 s", "**no**"]
    assert row(text, "memory while packing")[1:] == ["not measured", "≤ 4 GiB", ""]


def test_bench_of_the_tiny_shape(tmp_path):
    """All steps at the least size: a checkpoint and an artifact."""
    results = tmp_path / "results"
    options = ["--shape", "tiny", "--quick", "--work", tmp_path / "work", "--results", results]
    run("bench", *options)
    (file,) = results.glob("*-tiny.json")
    sections = json.loads(file.read_text())["sections"]
    assert list(sections) == ["import", "compile"]
    compiling = sections["compile"]
    assert 0 < compiling["packing_s"] < compiling["total_s"]
    assert compiling["packing_peak_anonymous_bytes"] > 0
    assert row((results / "README.md").read_text(), "`import mxforge`")[3] in ("yes", "**no**")
