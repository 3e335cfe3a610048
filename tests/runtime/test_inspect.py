"""What `mxforge inspect` knows of a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mxforge.errors import ArtifactCorruptError, ArtifactError, CheckpointError, ConfigError
from mxforge.inspect import describe
from mxforge.safetensors import SafetensorsError


def test_an_artifact_is_described_in_json_terms(text_artifact: Path) -> None:
    description = describe(text_artifact)
    assert json.loads(json.dumps(description, allow_nan=False)).keys() == description.keys()
    assert description["kind"] == "artifact"
    assert description["name"] == "small"
    assert description["numerics"] == "fast"
    assert description["tokenizer"] == "tokenizers"
    assert description["limits"]["max_batch"] == 4
    assert description["config"]["num_hidden_layers"] == 2
    assert description["kernels"]
    for kernel in description["kernels"]:
        assert {"name", "target", "schedule", "tile"} <= kernel.keys()
        assert kernel["target"] == description["target"]["name"]


def test_a_checkpoint_is_described_in_json_terms(text_checkpoint: Path) -> None:
    description = describe(text_checkpoint)
    assert json.loads(json.dumps(description, allow_nan=False)) == description
    assert description["kind"] == "checkpoint"
    assert description["format"] == "huggingface"
    assert description["tokenizer"] is True
    assert [file["file"] for file in description["files"]] == ["model.safetensors"]
    assert description["config"]["hidden_size"] == 32


def test_what_is_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nothing at that path"):
        describe(tmp_path / "absent")
    with pytest.raises(ArtifactError, match="cannot be read"):
        describe(tmp_path)
    file = tmp_path / "file"
    file.write_text("text")
    with pytest.raises(ArtifactError, match="should be the folder of an artifact"):
        describe(file)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises((CheckpointError, ConfigError)):
        describe(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(ArtifactCorruptError):
        describe(tmp_path)


def test_a_damaged_checkpoint_is_refused(text_checkpoint: Path, tmp_path: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((text_checkpoint / name).read_bytes())
    weights = (text_checkpoint / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:5000])
    with pytest.raises((CheckpointError, SafetensorsError)):
        describe(tmp_path)
