"""The scripts bench*: that they run, count and write tables, never how fast anything is."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints.shapes import hf_config

from mxforge.compile.models.gpt_oss.config import GptOssConfig

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import _bench  # noqa: E402
import _figures  # noqa: E402
import _formats_report  # noqa: E402
import _peers_report as report  # noqa: E402
from _bench_models import RandomModel  # noqa: E402

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


def figure(name: str, engine: str, pair: int, value: float, gb_s: float = 30.0) -> dict[str, Any]:
    """A sample."""
    return {
        "figure": name,
        "engine": engine,
        "pair": pair,
        "value": value,
        "cached": 1.0,
        "bandwidth_gb_s": [gb_s - 1, gb_s + 1],
        "others_cpu_cores": 0.01,
    }


def peers(samples: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """Results of bench_peers with these samples; a decode step reads 3 GB."""
    step = {"tokens": 1, "bytes": 3e9, "flops": 0}
    prompt = {"tokens": 128, "bytes": 11e9, "flops": 128 * 6e9}
    named = {"prefill_128": prompt, "decode": step, "decode_1k": step, "decode_32k": step}
    floors = {
        "bandwidth_gb_s": 30.0,
        "f32_matrix_gflop_s": 200.0,
        "int8_matrix_gop_s": 600.0,
        "flops_per_prompt_token": 6_000_000_000,
        "work": {"mxforge": named, "llama.cpp": named},
    }
    return {
        "kind": "peers",
        "shape": "20b",
        "machine": MACHINE,
        **STAMP,
        "complete": True,
        "target": "cpu:avx512vnni",
        "numerics": "fast",
        "no_peer_because": "",
        "figures": list(_figures.FIGURES),
        "planned_bytes": 14 << 30,
        "floors": floors,
        "samples": samples,
        **changes,
    }


def rendered(folder: Path, result: dict[str, Any], script: str, page: str) -> str:
    """What the script makes of a result."""
    (folder / "a-cpu-20b.json").write_text(json.dumps(result))
    run(script, "--render", "--results", folder)
    return (folder / page).read_text()


def row(text: str, label: str) -> list[str]:
    """The cells of the first table row that begins with `label`."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {label}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("script", ["bench", "bench_peers", "bench_formats", "bench_kernels"])
def test_help(script):
    assert "--results" in run(script, "--help").stdout


# -- scripts/bench --------------------------------------------------------------------------------


def test_a_broken_promise_is_called_broken(tmp_path):
    sections = {"import": {**STAMP, "import_s": [0.5], "import_with_engine_s": [1]}}
    result = {"kind": "model", "shape": "20b", "machine": MACHINE, "sections": sections}
    text = rendered(tmp_path, result, "bench", "README.md")
    assert row(text, "`import mxforge`")[1:] == ["0.500 s", "≤ 0.4 s", "**no**"]
    assert row(text, "memory while packing")[1:] == ["not measured", "≤ 4 GiB", ""]


# -- scripts/bench_peers: tables ------------------------------------------------------------------


def test_samples_are_cold_where_little_or_nothing_was_cached():
    shares = (1.0, 0.98, 0.0, None)  # None: read into memory of its own
    samples = [figure("decode", "mxforge", 1, 10) | {"cached": share} for share in shares]
    found = report.disturbance({"samples": samples})
    assert "and 2 with less than 99 %" in found


def test_ratios_are_taken_within_pairs_and_losses_stay(tmp_path):
    samples = [
        figure("decode", "llama.cpp", 0, 10.0),
        figure("decode", "mxforge", 0, 8.0),
        figure("decode", "mxforge", 1, 1.0),
        figure("decode", "llama.cpp", 1, 2.0),
        figure("decode", "llama.cpp", 2, 5.0),  # interrupted: it has no partner
    ]
    text = rendered(tmp_path, peers(samples), "bench_peers", "peers.md")
    cells = row(text, "decode, tok/s")
    assert cells[1:3] == ["4.50 (1.00 … 8.00)", "5.00 (2.00 … 10.0)"]
    assert cells[3:6] == ["0.650 (0.500 … 0.800) ×", "≥ 1 ×, aim 1.12 ×", "**no**"]
    assert cells[6] == "45.0 (10.0 … 80.0) %"  # of 30 GB/s ÷ 3 GB a step
    assert "A decode step reads 3.00 GB in mxforge and 3.00 GB in llama.cpp." in text
    assert list(tmp_path.glob("*.tmp")) == []


def test_sooner_and_smaller_are_better():
    samples = [
        figure("first_token", "mxforge", 0, 1.0),
        figure("first_token", "llama.cpp", 0, 4.0),
        figure("memory", "mxforge", 0, 12 << 30),
        figure("memory", "llama.cpp", 0, 6 << 30),
    ]
    text = report.figures_table(peers(samples))
    cells = row(text, "first token")
    assert cells[1:] == ["1.00", "4.00", "4.00 ×", "≤ 2 s, aim 1.2 s", "yes, and the aim", "", ""]
    cells = row(text, "peak resident")
    assert cells[1:6] == ["12.0", "6.00", "0.500 ×", "≤ 16 GiB, aim 1 ×", "yes"]


def test_long_contexts_are_compared_with_short_ones_of_the_same_pair():
    samples = [
        figure("decode_1k", "mxforge", 0, 10.0),
        figure("decode_32k", "mxforge", 0, 5.0),
        figure("decode_1k", "mxforge", 1, 5.0),
    ]
    cells = row(report.figures_table(peers(samples)), "decode at 32k")
    assert cells[1:6] == ["50.0", "not measured", "", "≥ 60 %", "**no**"]


def test_prefill_is_bound_by_the_faster_matrix_product_or_by_memory():
    result = peers([figure("prefill_128", "mxforge", 0, 50.0)])
    assert report.floor_shares(result, "prefill_128", "mxforge") == [50.0]  # of 600 / 6 tok/s
    slow = peers([figure("prefill_128", "mxforge", 0, 50.0, gb_s=2.0)])
    (share,) = report.floor_shares(slow, "prefill_128", "mxforge")
    assert share == pytest.approx(100 * 50 / (128 / 5.5))
    result["floors"]["int8_matrix_gop_s"] = None  # then nothing is known of 8-bit products
    assert report.floor_shares(result, "prefill_128", "mxforge") == []


def test_what_was_not_measured_is_called_so(tmp_path):
    result = peers(
        [figure("decode", "mxforge", 0, 8.0)], complete=False, no_peer_because="--no-peer was given"
    )
    text = rendered(tmp_path, result, "bench_peers", "peers.md")
    assert row(text, "decode, tok/s")[2:4] == ["not measured", "not measured"]
    assert "llama.cpp is not measured: --no-peer was given." in text
    assert "1 pair of samples, **interrupted** before the end" in text


def test_the_engines_take_turns():
    assert report.turns(["B", "A"], 3) == [("B", [0]), ("A", [0, 1]), ("B", [1, 2]), ("A", [2])]
    assert report.turns(["A"], 2) == [("A", [0, 1])]


def test_the_readme_shows_what_the_tracked_results_give():
    results = _bench.read_results(_bench.RESULTS, "peers")
    readme = (_bench.ROOT / "README.md").read_text()
    section = report.readme_section(results)
    assert _bench.with_section(readme, section) == readme, "run scripts/bench_peers --render"
    assert (_bench.RESULTS / "peers.md").read_text() == report.page(results)
    assert "| decode, tok/s |" in section


def test_the_readme_leaves_out_other_shapes_and_what_mxforge_has_no_value_of():
    section = report.readme_section(
        [peers([], shape="tiny"), peers([figure("decode", "llama.cpp", 0, 8.0)])]
    )
    assert section.count("| mxforge |") == 1
    assert "| decode" not in section
    with pytest.raises(ValueError, match="section"):
        _bench.with_section("# mxforge", section)


# -- scripts/bench_peers: floors ------------------------------------------------------------------


def test_active_experts_and_the_window_are_counted():
    """By hand, for the 20b shapes: 24 layers of 32 experts, 4 a token, half of them sliding."""
    config = GptOssConfig.from_hf(hf_config("20b"))
    traffic = _figures.Traffic(dense=1000, experts=3200, kv_full=10, kv_sliding=7)
    decode = _figures.work(_figures.FIGURES["decode_8k"], config, traffic)
    length = 8192 + 16 + 8
    assert decode["bytes"] == pytest.approx(1000 + 400 + length * 10 + 128 * 7)
    eight = _figures.work(_figures.FIGURES["batch_8"], config, traffic)
    assert eight["bytes"] == pytest.approx(1000 + 3200 * (1 - (7 / 8) ** 8) + 8 * 24 * 17)
    prefill = _figures.work(_figures.FIGURES["prefill_2048"], config, traffic)
    assert prefill["bytes"] == pytest.approx(4 * (1000 + 3200))  # all experts, in each chunk
    assert prefill["flops"] == 2048 * _figures.flops_per_token(config)


def test_bytes_are_counted_from_the_manifest():
    shapes = {
        "model.embed_tokens.weight": ([100, 8], "bfloat16"),
        "model.layers.0.self_attn.o_proj.weight": ([8, 8], "uint8"),
        "model.layers.0.self_attn.o_proj.weight_scale": ([8], "float16"),
        "model.layers.0.mlp.router.weight": ([4, 8], "bfloat16"),
        "model.layers.0.mlp.experts.down_proj_blocks": ([4, 8, 8], "uint8"),
        "model.layers.0.mlp.experts.down_proj_bias": ([4, 8], "float32"),
    }
    weights = [{"name": n, "shape": s, "dtype": d} for n, (s, d) in shapes.items()]
    memory = {"kv_bytes_per_page_full": 1600, "kv_bytes_per_page_sliding": 160}
    traffic = _figures.Traffic.of_manifest({"weights": weights, "memory": memory})
    assert (traffic.dense, traffic.experts) == (64 + 16 + 64, 256 + 128)
    assert (traffic.kv_full, traffic.kv_sliding) == (100, 10)


def test_bytes_of_the_gguf_are_those_of_its_file(tmp_path):
    gguf = pytest.importorskip("gguf")
    import _random_gguf

    config = GptOssConfig.from_hf(hf_config("tiny", {"vocab_size": 500}))
    _random_gguf.write_gguf(tmp_path / "tiny.gguf", config)
    tensors = gguf.GGUFReader(tmp_path / "tiny.gguf").tensors
    nbytes = {tensor.name: int(tensor.n_bytes) for tensor in tensors}
    traffic = _figures.Traffic.of_gguf(config)
    assert traffic.experts == sum(n for name, n in nbytes.items() if "_exps." in name)
    unread = nbytes["token_embd.weight"]
    assert traffic.dense + traffic.experts == sum(nbytes.values()) - unread


# -- scripts/bench_peers: measuring ---------------------------------------------------------------

MEASURED = pytest.mark.skipif(
    not hasattr(os, "posix_fadvise"), reason="drops files from Linux's page cache"
)
SOME = ["prefill_128", "decode_8k", "first_token", "memory"]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Where the tiny models of these tests are made, once."""
    return tmp_path_factory.mktemp("work")


def of_tiny(work: Path, results: Path) -> list[str]:
    return ["--shape", "tiny", "--work", str(work), "--results", str(results)]


@MEASURED
def test_tiny_shape_beside_llama_cpp(work, tmp_path):
    """Floors first, then both engines; their samples, in pairs, stand in the file."""
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    options = [*of_tiny(work, tmp_path), "--quick", "--samples", "2", "--figures", ",".join(SOME)]
    result = run("bench_peers", *options)
    floors = result.stdout.partition("## tiny")[0]
    assert "floor of llama.cpp prefill_128" in floors
    assert "floor of mxforge   decode_8k" in floors
    (file,) = tmp_path.glob("*-tiny-peers.json")
    found = json.loads(file.read_text())
    assert (found["complete"], found["figures"]) == (True, SOME)
    keys = {(sample["pair"], sample["engine"], sample["figure"]) for sample in found["samples"]}
    assert keys == {(p, e, f) for p in (0, 1) for e in ("mxforge", "llama.cpp") for f in SOME}
    assert len(found["samples"]) == len(keys)
    assert all(s["value"] > 0 and s["bandwidth_gb_s"][0] > 0 for s in found["samples"])
    assert "not measured" not in "".join(row((tmp_path / "peers.md").read_text(), "prefill of 128"))


def interrupted(
    folder: Path, pattern: str, samples: Callable[[Any], list[Any]], script: str, *options: str
) -> tuple[str, dict[str, Any]]:
    """What a script said that was stopped after two samples, and the results that it left."""
    words = [sys.executable, str(SCRIPTS / script), *options]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and process.poll() is None:
            files = list(folder.glob(pattern))
            if files and len(samples(json.loads(files[0].read_text()))) >= 2:
                break
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
        said, told = process.communicate(timeout=60)
    assert process.returncode == 130, told[-2000:]
    assert "Traceback" not in told
    assert "interrupted" in told
    (file,) = folder.glob(pattern)
    found: dict[str, Any] = json.loads(file.read_text())
    return said, found


@MEASURED
def test_an_interrupted_run_keeps_what_it_has(work, tmp_path):
    model = RandomModel.of("tiny", work)
    if not model.artifact.exists():
        model.compile()
    options = [*of_tiny(work, tmp_path), "--no-peer", "--quick", "--samples", "1000"]
    options += ["--artifact", str(model.artifact), "--figures", "first_token"]
    said, found = interrupted(
        tmp_path, "*-peers.json", lambda result: result["samples"], "bench_peers", *options
    )
    assert 2 <= len(found["samples"]) < 1000
    assert not found["complete"]
    assert "interrupted" in (tmp_path / "peers.md").read_text()
    assert "first token" in said


def test_a_stretched_state_has_the_rows_over_and_over():
    pytest.importorskip("llama_cpp")
    from _llama_cpp import stretched

    def cache(first: int, rows: list[int]) -> bytes:
        """One layer, rows of one byte."""
        cells = b"".join(struct.pack("<iIi", first + i, 1, 0) for i in range(len(rows)))
        head = struct.pack("<II", 1, len(rows)) + cells + struct.pack("<II", 0, 1)
        return head + 2 * (struct.pack("<IQ", 1, 1) + bytes(rows))

    state = b"whatever" + cache(0, [1, 2, 3, 4]) + cache(2, [7, 8])
    assert bytes(stretched(state, 4)) == state
    longer = b"whatever" + cache(0, [1, 2, 3, 4, 1, 2, 3]) + cache(5, [7, 8])
    assert bytes(stretched(state, 7)) == longer
    with pytest.raises(SystemExit, match="more in it"):
        stretched(state + b"x", 7)
    with pytest.raises(SystemExit, match="not of the layout"):
        stretched(b"whatever" + b"\2" + state[9:], 7)


# -- scripts/bench_formats ------------------------------------------------------------------------


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


def test_the_readme_shows_what_the_tracked_formats_give():
    results = _bench.read_results(_bench.RESULTS, "formats")
    readme = (_bench.ROOT / "README.md").read_text()
    section = _formats_report.readme_section(results)
    assert _bench.with_section(readme, section) == readme, "run scripts/bench_formats --render"


def test_what_a_choice_reads_is_counted_as_an_artifact_says(work):
    """Of the tiny shape, without compiling it and as compiled."""
    from mxforge.artifact import read_manifest
    from mxforge.compile.targets import resolve

    model = RandomModel.of("tiny", work)
    if not model.artifact.exists():
        model.compile()
    target = resolve("cpu")
    counted = _figures.Traffic.of_model(
        model.config, target, target.precision("fast", model.config)
    )
    manifest = dataclasses.asdict(read_manifest(model.artifact))
    assert counted == _figures.Traffic.of_manifest(manifest)


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
    assert taken == [(p, f) for p in (0, 1) for f in _formats_report.MEASURED]
    bytes_read = {name: its["bytes"] for name, its in found.items()}
    assert bytes_read["kv-int8"]["cache_a_token"] < bytes_read["default"]["cache_a_token"]
    assert bytes_read["dense-bf16"]["weights_a_token"] > bytes_read["default"]["weights_a_token"]
    assert row(again, "`--kv int8`")[-1] in ("yes", "**no**")
    assert list((tmp_path / "work").iterdir()) == []


# -- scripts/bench_kernels ------------------------------------------------------------------------


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
    for script in ("bench", "bench_peers", "bench_formats"):
        assert "--samples" in run(script, "--samples", "0", "--work", tmp_path, code=2).stderr
    assert "--steps" in run("bench", "--steps", "fly", "--work", tmp_path, code=2).stderr
    said = run("bench_formats", "--only", "exact", "fly", "--work", tmp_path, code=2).stderr
    assert "--only takes some of default control kv-f32" in said
    said = run("bench_peers", "--figures", "decode,fly", "--work", tmp_path, code=2).stderr
    assert "--figures takes some of" in said
    assert said.rstrip().endswith("found fly.")


def test_an_artifact_that_is_not_there_is_a_usage_error(tmp_path):
    options = ["--shape", "tiny", "--no-peer", "--artifact", tmp_path / "none", "--work", tmp_path]
    assert "should hold an artifact" in run("bench_peers", *options, code=2).stderr


def test_formats_of_another_machine_are_not_mixed_with_this_ones(tmp_path):
    (tmp_path / "formats.json").write_text(json.dumps(formats()))
    options = ["--only", "exact", "--work", tmp_path / "work", "--results", tmp_path]
    assert "leave --only out" in run("bench_formats", *options, code=2).stderr


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


def test_bench_vulkan_writes_its_samples(vulkan, tmp_path: Path):
    said = run("bench_vulkan", "--samples", "1", "--json", tmp_path / "vulkan.json").stdout
    assert "recording a dispatch" in said
    result = json.loads((tmp_path / "vulkan.json").read_text())
    assert result["kind"] == "vulkan"
    assert len(result["recording_us"]) == len(result["generating"]["seconds"]) == 1
    assert result["generating"]["kernels"] > 10
