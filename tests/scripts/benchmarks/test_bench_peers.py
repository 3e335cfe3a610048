"""scripts/bench_peers on a tiny model: that it measures and keeps samples, never how fast."""

from __future__ import annotations

import json
import os
import struct

import pytest
from benchmarks.models import RandomModel
from support.bench_runs import interrupted, of_tiny, row, run

MEASURED = pytest.mark.skipif(
    not hasattr(os, "posix_fadvise"), reason="drops files from Linux's page cache"
)
SOME = ["prefill_128", "decode_8k", "first_token", "memory"]


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


@pytest.mark.slow
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
    from benchmarks.llama_cpp_peer import stretched

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


def test_an_artifact_that_is_not_there_is_a_usage_error(tmp_path):
    options = ["--shape", "tiny", "--no-peer", "--artifact", tmp_path / "none", "--work", tmp_path]
    assert "should hold an artifact" in run("bench_peers", *options, code=2).stderr
