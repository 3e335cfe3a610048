"""scripts/bench_formats: its table, and runs of it on a tiny model."""

from __future__ import annotations

import json
from typing import Any

import pytest
from benchmarks import formats_report
from benchmarks.results import NUMERICS, RESULTS, read_results, with_section
from support.bench_runs import MACHINE, STAMP, interrupted, of_tiny, row, run


def choice(error: float, options: dict[str, str], *samples: tuple[float, float]) -> dict[str, Any]:
    """A choice's results: its worst errors, and pairs of the default's speed and its own."""
    return {
        **STAMP,
        "options": options,
        "formats": {"kv": "bf16", "activations": "int8", "dense": "int8", **options},
        "bytes": {"weights_a_token": 2.5e9, "cache_a_token": 24576.0},
        "errors": [
            {"shape": "odd-1", "tensor": "logits", "error": error},
            {"shape": "odd-2", "tensor": "layer 1 output", "error": error / 2},
        ],
        "samples": [
            {"pair": pair, "figure": "decode_1k", "default": its, "value": own}
            for pair, (its, own) in enumerate(samples)
        ],
    }


def formats(**choices: dict[str, Any]) -> dict[str, Any]:
    """Results of bench_formats."""
    return {
        "kind": "formats",
        "machine": MACHINE,
        "target": "cpu:avx512vnni",
        "shape": "20b-4layers",
        "shape_is": "four of 24 layers",
        "bound": 1e-2,
        "choices": choices,
    }


def test_a_choice_stands_beside_the_default_and_a_broken_bound_is_called_so(tmp_path):
    wide = choice(2e-3, {"kv": "f32"}, (10.0, 5.0), (20.0, 30.0))
    rough = choice(1.2e-2, {"kv": "int8"})
    result = formats(default=choice(9e-3, {}), wide=wide, rough=rough)
    (tmp_path / "formats.json").write_text(json.dumps(result))
    text = run("bench_formats", "--render", "--results", tmp_path).stdout
    expected = ["1 (15.0 tok/s)", *["1 (not measured)"] * 2, "2.50", "24.6", "9.0e-3", "yes"]
    assert row(text, "the default: kv bf16, activations int8, dense int8")[1:] == expected
    cells = row(text, "`--kv f32`")[1:]
    assert cells[:2] == ["1.00 (0.500 … 1.50) ×", "not measured"]
    assert cells[-2:] == ["2.0e-3", "yes"]
    assert row(text, "`--kv int8`")[-2:] == ["1.2e-2", "**no**"]
    assert "20b-4layers: four of 24 layers" in " ".join(text.split())
    assert "of 2 pairs" in " ".join(text.split())


def test_the_page_shows_what_the_tracked_formats_give():
    results = read_results(RESULTS, "formats")
    page = NUMERICS.read_text()
    section = formats_report.page_section(results)
    assert with_section(page, section) == page, "run scripts/bench_formats --render"


@pytest.mark.slow
def test_interrupted_formats_keep_what_they_have(tmp_path):
    options = [*of_tiny(tmp_path / "work", tmp_path), "--quick", "--samples", "1000"]
    said, found = interrupted(
        tmp_path,
        "formats.json",
        lambda result: result["choices"]["kv-f16"]["samples"],
        "bench_formats",
        *options,
        "--only",
        "kv-f16",
    )
    assert 2 <= len(found["choices"]["kv-f16"]["samples"]) < 3000
    assert found["choices"]["default"]["errors"]
    assert row(said, "`--kv f16`")[-1] == "yes"
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.slow
def test_one_choice_of_the_tiny_shape_is_measured_and_another_added(tmp_path):
    """Of the tiny shape; the second run keeps what the first one has found."""
    options = ["--shape", "tiny", "--quick", "--work", tmp_path / "work", "--results", tmp_path]
    first = run("bench_formats", *options, "--only", "dense-bf16").stdout
    assert float(row(first, "`--dense bf16`")[1].removesuffix(" ×")) > 0
    assert row(first, "`--kv f32`")[1:4] == ["not measured"] * 3
    before = json.loads((tmp_path / "formats.json").read_text())["choices"]["dense-bf16"]
    again = run("bench_formats", *options, "--only", "kv-int8", "--samples", "2").stdout
    found = json.loads((tmp_path / "formats.json").read_text())["choices"]
    assert found["dense-bf16"] == before
    taken = [(s["pair"], s["figure"]) for s in found["kv-int8"]["samples"]]
    assert taken == [(p, f) for p in (0, 1) for f in formats_report.MEASURED]
    bytes_read = {name: its["bytes"] for name, its in found.items()}
    assert bytes_read["kv-int8"]["cache_a_token"] < bytes_read["default"]["cache_a_token"]
    assert bytes_read["dense-bf16"]["weights_a_token"] > bytes_read["default"]["weights_a_token"]
    assert row(again, "`--kv int8`")[-1] in ("yes", "**no**")
    assert list((tmp_path / "work").iterdir()) == []


def test_formats_of_another_machine_are_not_mixed_with_this_ones(tmp_path):
    (tmp_path / "formats.json").write_text(json.dumps(formats()))
    options = ["--only", "exact", "--work", tmp_path / "work", "--results", tmp_path]
    assert "leave --only out" in run("bench_formats", *options, code=2).stderr
