"""What `mxforge inspect` knows of a folder."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from support.small import TEXT_VOCAB

from mxforge.cli import main
from mxforge.errors import ArtifactCorruptError, ArtifactError, CheckpointError, ConfigError
from mxforge.inspect import describe
from mxforge.plan import (
    Constant,
    Feature,
    Function,
    Launch,
    Number,
    Op,
    Operation,
    Plan,
    Role,
    Step,
    Symbol,
    Tensor,
)
from mxforge.plan_text import described
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


def test_a_launch_plan_is_told_kernel_by_kernel(
    text_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(text_artifact), "--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (decode,) = (line for line in lines if line.startswith("decode("))
    assert decode.startswith("decode(tokens int32[b], positions int32[b], token_seq int32[b], ")
    assert "2 caches, " in decode
    assert decode.endswith(f"weights) -> float32[b, {TEXT_VOCAB}]")
    steps = lines[lines.index(decode) + 2 :]
    assert lines[lines.index(decode) + 1] == "  where b <= 4"
    assert re.fullmatch(
        r"  \w*embed\w*\(tokens, model\.embed_tokens\.weight, %\d+ float32\[b, 32\]\)", steps[1]
    )
    copy = tmp_path / "copy"
    shutil.copytree(text_artifact, copy)
    (copy / "model.plan").write_bytes(b"mxplan")
    assert main(["inspect", str(copy), "--plan"]) == 1
    assert "model.plan should be a launch plan" in capsys.readouterr().err


def test_launches_are_told_with_their_sizes_and_conditions() -> None:
    values = (Symbol("n"), Constant(32), Operation(Op.DIV, 0, 1), Feature("wide"), Constant(0))
    x = Tensor(Role.INPUT, "float32", (0,), "x")
    launch = Launch((2, 1, 1), (1, 1, 1), 4, overlaps=True)
    step = Step("twice", (0, Number(0, 64)), launch, when=3)
    plan = Plan((Function("main", values, (x,), (), (step,), (0,)),), workspace=0)
    assert list(described(plan))[-1] == (
        "  if has(wide): twice(x, n) [(n // 32) x 32 x 32; 32 x 32 x 32; 0; overlaps]"
    )
