"""The compact file: its MXFP4 packing, and how it expands to the published layout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from nano import compact
from support.nano import ROOT, USED, small_tensors

from mxforge.compile.checkpoint import HFCheckpoint
from mxforge.compile.models.gpt_oss.reference import dequantize_mxfp4
from mxforge.errors import CheckpointError, OutputError


def test_mxfp4_values_survive_and_others_go_to_the_nearest():
    rng = np.random.default_rng(0)
    w = rng.standard_normal((3, 5, 64)).astype(np.float32)
    w[0, 0, :32] = 0
    w[1, 1] *= 1e-20
    blocks, scales = compact.quantize_mxfp4(w)
    assert blocks.shape == (3, 5, 2, 16)
    assert scales.shape == (3, 5, 2)
    back = dequantize_mxfp4(blocks, scales)
    again = compact.quantize_mxfp4(back)
    np.testing.assert_array_equal(dequantize_mxfp4(*again), back)
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    grid = np.concatenate([-grid, grid])
    scale = np.exp2(np.repeat(scales, 32, axis=-1).astype(np.float64) - 127)
    nearest = np.abs(w[..., None] / scale[..., None] - grid).min(axis=-1)
    np.testing.assert_allclose(np.abs(w - back) / scale, nearest, rtol=1e-5, atol=1e-7)
    largest = np.abs(w / scale).reshape(3, 5, 2, 32).max(axis=-1)
    assert ((largest >= 4) & (largest < 8) | (largest == 0)).all()


def test_ties_go_to_the_even_code():
    w = np.zeros((1, 32), np.float32)
    w[0, :8] = [6, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5]
    back = dequantize_mxfp4(*compact.quantize_mxfp4(w))
    np.testing.assert_array_equal(back[0, :8], [6, 0, 1, 1, 2, 2, 4, 4])


def test_expanding_gives_every_token_its_row(small: Path, small_expanded: Path):
    checkpoint = HFCheckpoint(small_expanded)
    checkpoint.check()
    assert not checkpoint.unexpected()
    source = small_tensors()
    for name in compact.VOCABULARY_TENSORS:
        rows = source[name].astype(ml_dtypes.bfloat16)
        table = checkpoint.tensor(name)
        np.testing.assert_array_equal(table[USED], rows[:-1])
        others = np.delete(np.arange(len(table)), USED)
        assert (table[others] == rows[-1]).all()


def test_compact_floats_are_what_was_written_but_rounded(small: Path):
    floats, source = compact.Compact(small).floats(), small_tensors()
    assert floats.keys() == source.keys()
    for name, value in source.items():
        bound = 0.26 if name.endswith("proj") else 0.004  # MXFP4, bfloat16
        assert np.abs(floats[name] - value).max() <= bound * np.abs(value).max(), name


def test_what_stands_in_the_way_is_kept(small: Path, small_expanded: Path):
    before = (small_expanded / "model.safetensors").stat().st_ino
    with pytest.raises(OutputError, match="exists already"):
        compact.expand(small, small_expanded)
    assert (small_expanded / "model.safetensors").stat().st_ino == before
    assert [p.name for p in small.parent.iterdir() if p.name.startswith(".")] == []


def test_a_compact_file_of_other_shapes_is_refused(small: Path, tmp_path: Path):
    for name in ("config.json", "compact.safetensors"):
        (tmp_path / name).write_bytes((small / name).read_bytes())
    raw = json.loads((tmp_path / "config.json").read_text()) | {"intermediate_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="must be of shape"):
        compact.Compact(tmp_path)


def test_the_command_expands(small: Path, tmp_path: Path):
    words = [sys.executable, ROOT / "scripts" / "expand_nano", tmp_path / "out", "--compact", small]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, f"{tmp_path / 'out'}\n"), result.stderr
    again = subprocess.run(words, capture_output=True, text=True, check=False)
    assert again.returncode != 0
    assert "exists already" in again.stderr
