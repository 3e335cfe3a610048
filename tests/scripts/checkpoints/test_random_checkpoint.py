from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints.random_checkpoint import main, write_checkpoint
from checkpoints.shapes import SHAPES, hf_config, openai_config

from mxforge.compile.checkpoint import HFCheckpoint, OpenAICheckpoint
from mxforge.compile.diff import random_tokens
from mxforge.compile.models.gpt_oss.config import GptOssConfig
from mxforge.errors import ConfigError, OutputError, UsageError

SCRIPT = Path(__file__).resolve().parents[3] / "scripts" / "make_checkpoint"


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path):
    hashes = [
        HFCheckpoint(write_checkpoint(tmp_path / str(i), "odd-5", seed=seed)).sha256()
        for i, seed in enumerate((3, 3, 4))
    ]
    assert hashes[0] == hashes[1] != hashes[2]


def test_shards_hold_the_same_tensors_as_one_file(tmp_path: Path):
    one = HFCheckpoint(write_checkpoint(tmp_path / "one", "odd-1"))
    many = HFCheckpoint(write_checkpoint(tmp_path / "many", "odd-1", max_shard_bytes=100_000))
    assert len(one.files) == 1
    assert len(many.files) > 5
    assert max(file.stat().st_size for file in many.files) < 330_000  # a tensor is not split
    for name in one.tensors:
        assert (one.tensor(name) == many.tensor(name)).all()


def test_weights_are_of_order_one(tmp_path: Path):
    checkpoint = HFCheckpoint(write_checkpoint(tmp_path / "c", "odd-4"))
    assert checkpoint.tensor("model.embed_tokens.weight").astype(float).std() == pytest.approx(
        1, rel=0.02
    )
    query = checkpoint.tensor("model.layers.0.self_attn.q_proj.weight").astype(float)
    assert query.std() * 8 == pytest.approx(1, rel=0.02)
    scales = checkpoint.tensor("model.layers.0.mlp.experts.gate_up_proj_scales")
    assert 0 < (scales == 0).mean() < 0.02
    assert scales.max() < 130
    for name, info in checkpoint.tensors.items():
        if info.dtype == "BF16":
            assert info.begin % 2 == 0, name  # aligned views


def test_overrides(tmp_path: Path):
    path = write_checkpoint(
        tmp_path / "c",
        "20b",
        overrides={
            "num_hidden_layers": 1,
            "hidden_size": 32,
            "vocab_size": 99,
            "num_local_experts": 4,
        },
    )
    config = HFCheckpoint(path).config
    assert (config.hidden_size, config.vocab_size, config.layer_types) == (
        32,
        99,
        ("sliding_attention",),
    )
    assert HFCheckpoint(path).generation_config.eos_token_ids == (0,)
    with pytest.raises(ConfigError, match="hidden_size"):
        write_checkpoint(tmp_path / "d", "20b", overrides={"hidden_size": 33})
    with pytest.raises(UsageError, match="Expected a shape out of"):
        write_checkpoint(tmp_path / "d", "30b")
    assert not (tmp_path / "d").exists()


def test_config_without_layer_types_stays_without():
    assert "layer_types" not in hf_config("odd-4")
    assert "rope_parameters" in hf_config("odd-4")
    assert len(hf_config("odd-3", {"num_hidden_layers": 7})["layer_types"]) == 7


def test_an_existing_folder_is_kept_without_force(tmp_path: Path):
    path = write_checkpoint(tmp_path / "c", "odd-5", seed=1)
    before = HFCheckpoint(path).sha256()
    with pytest.raises(OutputError, match="exists already"):
        write_checkpoint(path, "odd-5", seed=2)
    assert HFCheckpoint(path).sha256() == before
    write_checkpoint(path, "odd-5", seed=2, force=True)
    assert HFCheckpoint(path).sha256() != before


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("checkpoints.random_checkpoint._write_shards", full)
    with pytest.raises(OutputError, match="No space left"):
        write_checkpoint(tmp_path / "c", "odd-5")
    assert list(tmp_path.iterdir()) == []


def test_tokens_cover_the_vocabulary():
    tokens = random_tokens(17, 1000)
    assert tokens.dtype == np.int32
    assert set(tokens.tolist()) == set(range(17))
    assert (random_tokens(17, 10) == tokens[:10]).all()


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "made"
    assert main([str(out), "--shape", "odd-5", "--set", "vocab_size=33", "--layers", "2"]) == 0
    assert capsys.readouterr() == (f"{out}\n", "")  # a bar is drawn on terminals only
    raw = json.loads((out / "config.json").read_text())
    assert (raw["vocab_size"], raw["num_hidden_layers"]) == (33, 2)
    assert main([str(out), "--shape", "odd-5"]) == 1
    assert main([str(out), "--force", "--set", "nonsense"]) == 2
    assert main([str(out), "--force", "--seed", "-1"]) == 2
    assert "make_checkpoint:" in capsys.readouterr().err


def test_the_original_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "made"
    assert main([str(out), "--shape", "odd-1", "--layout", "openai", "--shard-bytes", "90000"]) == 0
    names = sorted(path.name for path in out.iterdir())
    assert names[:3] == [
        "config.json",
        "dtypes.json",
        f"model--00001-of-{len(names) - 2:05}.safetensors",
    ]
    checkpoint = OpenAICheckpoint(out)
    checkpoint.check()
    dtypes = json.loads((out / "dtypes.json").read_text())
    assert dtypes.keys() == checkpoint.tensors.keys()
    assert dtypes["block.0.mlp.mlp1_weight.blocks"] == "FP4"
    assert dtypes["block.0.mlp.mlp1_weight.scales"] == "UE8"
    assert dtypes["block.0.mlp.mlp1_bias"] == "BF16"
    for name, info in checkpoint.tensors.items():
        if info.dtype == "BF16":
            assert info.begin % 2 == 0, name  # aligned views
    assert main([str(tmp_path / "no"), "--shape", "odd-2", "--layout", "openai"]) == 2
    assert "cannot say layer_types" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_original_config_of_the_published_models():
    raw = openai_config(GptOssConfig.from_hf(hf_config("20b")))
    assert len(raw) == 16
    assert (raw["num_experts"], raw["experts_per_token"]) == (32, 4)
    assert (raw["initial_context_length"], raw["rope_scaling_factor"]) == (4096, 32.0)
    assert (raw["rope_ntk_alpha"], raw["rope_ntk_beta"]) == (1.0, 32.0)
    for changes, key in (
        ({"rms_norm_eps": 1e-6}, "rms_norm_eps"),
        ({"attention_bias": False}, "attention_bias"),
        ({"max_position_embeddings": 4096}, "max_position_embeddings"),
    ):
        with pytest.raises(UsageError, match=f"cannot say {key}"):
            openai_config(GptOssConfig.from_hf(hf_config("20b", changes)))


def test_script_lists_every_shape():
    shown = subprocess.run(
        [sys.executable, SCRIPT, "--help"], capture_output=True, text=True, check=True
    ).stdout
    assert all(name in shown for name in SHAPES)
