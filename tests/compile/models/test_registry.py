"""That a config.json goes to the family that claims it, and what is said where none does."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints.random_checkpoint import write_checkpoint
from checkpoints.shapes import hf_config

from mxforge.compile.checkpoint import HFCheckpoint, OpenAICheckpoint, open_checkpoint
from mxforge.compile.checkpoint.fingerprint import fingerprint
from mxforge.compile.config import FULL, Layout, ModelConfig, required
from mxforge.compile.models import registry
from mxforge.compile.models.family import ChatFormat, Family
from mxforge.compile.models.gpt_oss import GPT_OSS
from mxforge.compile.models.gpt_oss.config import GptOssConfig
from mxforge.compile.models.registry import claim, parse_config, read_config
from mxforge.compile.models.tensors import Tensor, Weight
from mxforge.errors import (
    CheckpointError,
    ConfigError,
    TensorShapeError,
    UnknownArchitectureError,
)
from mxforge.safetensors import SafetensorsWriter

ORIGINAL = {"num_experts": 4, "experts_per_token": 2, "rope_scaling_factor": 32.0}


@dataclass(frozen=True)
class ToyConfig(ModelConfig):
    colour: str = "red"


class ToyFamily(Family[ToyConfig]):
    """A dense model of which only checkpoints can be read."""

    name = "toy"
    model_type = "toy_model"
    architecture = "ToyForCausalLM"
    chat = ChatFormat("tokenizers", vocab_size=10, stop_token_ids=(7, 3))

    def parse(self, raw: Mapping[str, Any], layout: Layout) -> ToyConfig:
        layers = required(raw, "num_hidden_layers")
        return ToyConfig(
            num_hidden_layers=layers,
            hidden_size=required(raw, "hidden_size"),
            num_key_value_heads=1,
            head_dim=8,
            num_local_experts=0,
            vocab_size=required(raw, "vocab_size"),
            sliding_window=1,
            layer_types=(FULL,) * layers,
            max_position_embeddings=64,
            colour=raw.get("colour", "red"),
        )

    def tensors(self, config: ToyConfig) -> dict[str, Tensor]:
        shape = (config.vocab_size, config.hidden_size)
        return {"embedding.weight": Tensor("embedding.weight", shape, "embedding")}

    def weights(self, config: ToyConfig) -> list[Weight]:
        return [Weight(t.name, t.role, (t,)) for t in self.tensors(config).values()]

    def piece_weights(self, piece: str | int, names: Iterable[str]) -> list[str]:
        raise NotImplementedError

    def module(self, *arguments: Any) -> Any:
        raise NotImplementedError

    def reference(self, *arguments: Any) -> Any:
        raise NotImplementedError

    def add_onnx(self, *arguments: Any) -> None:
        raise NotImplementedError


TOY = ToyFamily()
TOY_RAW = {
    "model_type": "toy_model",
    "architectures": ["ToyForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "vocab_size": 10,
    "colour": "blue",
}


@pytest.fixture(params=["first", "last"])
def with_toy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy family beside the real ones, in either order."""
    families = (TOY, *registry.FAMILIES) if request.param == "first" else (*registry.FAMILIES, TOY)
    monkeypatch.setattr(registry, "FAMILIES", families)


def write_toy(folder: Path, shape: tuple[int, int] = (10, 32)) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TOY_RAW))
    with SafetensorsWriter(
        folder / "model.safetensors", [("embedding.weight", "F32", shape)]
    ) as writer:
        writer.write("embedding.weight", np.ones(shape, np.float32))
    return folder


def test_no_two_families_claim_the_same():
    for key in ("name", "model_type", "architecture"):
        values = [getattr(family, key) for family in registry.FAMILIES]
        assert len(set(values)) == len(values), key
    assert all("huggingface" in family.layouts for family in registry.FAMILIES)


@pytest.mark.usefixtures("with_toy")
def test_model_type_and_architectures_choose_the_family(tmp_path: Path):
    for raw in (TOY_RAW, {**TOY_RAW, "architectures": None}, {**TOY_RAW, "model_type": None}):
        family, layout, config = parse_config(raw)
        assert (family, layout) == (TOY, "huggingface")
        assert config == TOY.parse(TOY_RAW, "huggingface")
        assert ToyConfig.from_dict(config.to_dict()) == config
    assert claim(hf_config("20b")) == (GPT_OSS, "huggingface")
    assert claim(ORIGINAL) == (GPT_OSS, "openai")
    path = tmp_path / "config.json"
    path.write_text(json.dumps(hf_config("20b")))
    assert isinstance(read_config(path).config, GptOssConfig)


@pytest.mark.usefixtures("with_toy")
def test_checkpoints_are_read_by_the_tensors_of_their_family(tmp_path: Path):
    checkpoint = open_checkpoint(write_toy(tmp_path / "toy"))
    checkpoint.check()
    assert checkpoint.family is TOY
    assert checkpoint.config.num_local_experts == 0
    assert checkpoint.generation_config.eos_token_ids == (7, 3)
    assert (checkpoint.tensor("embedding.weight") == 1).all()
    assert fingerprint(checkpoint) == fingerprint(open_checkpoint(tmp_path / "toy"))
    with pytest.raises(TensorShapeError, match=r"embedding\.weight must have the shape \[10, 32\]"):
        open_checkpoint(write_toy(tmp_path / "wide", (10, 64))).check()
    gpt_oss = open_checkpoint(write_checkpoint(tmp_path / "gpt", "odd-5"))
    gpt_oss.check()
    assert gpt_oss.family is GPT_OSS


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        (
            {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
            "'llama', arch",
        ),
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"architectures": ["GptOssForSequenceClassification"]}, "GptOssForSequenceClassification"),
        ({"model_type": "gpt_oss", "architectures": ["LlamaForCausalLM"]}, "LlamaForCausalLM"),
        ({"model_type": ["gpt_oss"]}, r"model_type \['gpt_oss'\]"),
        ({"architectures": []}, r"architectures \[\]"),
        ({**ORIGINAL, "model_type": "openai_privacy_filter"}, "openai_privacy_filter"),
        ({"layer_types": [FULL]}, "neither, but layer_types"),
        ({"n_layer": 12, "\x1b[2J": 0}, r"neither, but n_layer, \\x1b\[2J"),
        ({}, "neither, but no keys"),
    ],
)
def test_a_model_that_no_family_claims(raw: dict[str, Any], found: str):
    with pytest.raises(UnknownArchitectureError, match=found) as caught:
        claim(raw)
    known = (
        "the families that can be compiled are gpt-oss (model_type 'gpt_oss', architecture "
        "'GptOssForCausalLM', or OpenAI's original layout)."
    )
    assert str(caught.value).endswith(known)
    assert str(caught.value).isprintable()


@pytest.mark.usefixtures("with_toy")
def test_the_error_names_every_family():
    with pytest.raises(UnknownArchitectureError, match="gpt-oss .*") as caught:
        claim({"model_type": "llama"})
    assert "toy (model_type 'toy_model', architecture 'ToyForCausalLM')" in str(caught.value)


def test_what_is_no_object_or_mixes_layouts():
    with pytest.raises(ConfigError, match=r"config\.json must be a JSON object"):
        claim([])  # type: ignore[arg-type]
    for raw in (hf_config("20b"), {"layer_types": [FULL]}):
        with pytest.raises(ConfigError, match="mixes two layouts"):
            claim({**raw, "rope_scaling_factor": 16.0})


def test_a_reader_refuses_the_other_layout(tmp_path: Path):
    hf = write_checkpoint(tmp_path / "hf", "odd-1")
    original = write_checkpoint(tmp_path / "openai", "odd-1", layout="openai")
    for reader, folder in ((HFCheckpoint, original), (OpenAICheckpoint, hf)):
        with pytest.raises(CheckpointError, match="Expected a checkpoint in .*open_checkpoint"):
            reader(folder)
