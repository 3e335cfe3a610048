"""The tables of scripts/bench_peers, from made-up samples and from the tracked ones."""

from __future__ import annotations

import pytest
from benchmarks import peers_report as report
from benchmarks.results import README, RESULTS, read_results, with_section
from support.bench_runs import figure, peers, rendered, row


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
    results = read_results(RESULTS, "peers")
    readme = README.read_text()
    section = report.readme_section(results)
    assert with_section(readme, section) == readme, "run scripts/bench_peers --render"
    assert (RESULTS / "peers.md").read_text() == report.page(results)
    assert "| decode, tok/s |" in section


def test_the_readme_leaves_out_other_shapes_and_what_mxforge_has_no_value_of():
    section = report.readme_section(
        [peers([], shape="tiny"), peers([figure("decode", "llama.cpp", 0, 8.0)])]
    )
    assert section.count("| mxforge |") == 1
    assert "| decode" not in section
    with pytest.raises(ValueError, match="section"):
        with_section("# mxforge", section)
