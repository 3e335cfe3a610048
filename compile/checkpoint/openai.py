"""OpenAI's original layout of a gpt-oss checkpoint, read under the canonical names.

    config.json   16 keys of its own, see `ModelConfig.from_openai`
    dtypes.json   not read: the .safetensors headers say as much
    model.safetensors, or shards like model--00001-of-00007.safetensors, with an index or without

Tensors are those of the Hugging Face layout under other names, with two differences. The rows of
q, k and v follow each other in one tensor attn.qkv, so these three are views of its rows. Rows of
gate and up alternate in both layouts, and MXFP4 blocks are the same bytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from mxforge.errors import CheckpointError, TensorMissingError
from mxforge.safetensors import Safetensors

from ..config import Layout, ModelConfig
from .folder import FolderCheckpoint, TensorSpec, open_shard
from .hf import expected_tensors, layer_prefix

SHARD_NAME = "model--{number:05}-of-{count:05}.safetensors"

_SHARD = re.compile(r"(.*-)(\d{1,9})-of-(\d{1,9})\.safetensors")

# Of one layer: name in the files -> the canonical tensors whose rows it holds, in this order.
_LAYER: dict[str, tuple[str, ...]] = {
    "attn.norm.scale": ("input_layernorm.weight",),
    **{
        f"attn.qkv.{kind}": tuple(f"self_attn.{name}_proj.{kind}" for name in "qkv")
        for kind in ("weight", "bias")
    },
    "attn.sinks": ("self_attn.sinks",),
    "attn.out.weight": ("self_attn.o_proj.weight",),
    "attn.out.bias": ("self_attn.o_proj.bias",),
    "mlp.norm.scale": ("post_attention_layernorm.weight",),
    "mlp.gate.weight": ("mlp.router.weight",),
    "mlp.gate.bias": ("mlp.router.bias",),
    "mlp.mlp1_weight.blocks": ("mlp.experts.gate_up_proj_blocks",),
    "mlp.mlp1_weight.scales": ("mlp.experts.gate_up_proj_scales",),
    "mlp.mlp1_bias": ("mlp.experts.gate_up_proj_bias",),
    "mlp.mlp2_weight.blocks": ("mlp.experts.down_proj_blocks",),
    "mlp.mlp2_weight.scales": ("mlp.experts.down_proj_scales",),
    "mlp.mlp2_bias": ("mlp.experts.down_proj_bias",),
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the files, and the canonical ones that its rows are made of."""

    spec: TensorSpec
    parts: tuple[str, ...]


@dataclass(frozen=True)
class _Rows:
    """Where a canonical tensor is: rows [begin, end) of the stored tensor `name`."""

    name: str
    begin: int
    end: int


def stored_tensors(config: ModelConfig) -> dict[str, StoredTensor]:
    """Every tensor of an original checkpoint, in the order in which the model uses them."""
    expected = expected_tensors(config)
    names: dict[str, tuple[str, ...]] = {"embedding.weight": ("model.embed_tokens.weight",)}
    for layer in range(config.num_hidden_layers):
        prefix = layer_prefix(layer)
        for name, parts in _LAYER.items():
            names[f"block.{layer}.{name}"] = tuple(prefix + part for part in parts)
    names["norm.scale"] = ("model.norm.weight",)
    names["unembedding.weight"] = ("lm_head.weight",)
    stored = {}
    for name, parts in names.items():
        specs = [expected[part] for part in parts]
        rows = sum(spec.shape[0] for spec in specs)
        spec = TensorSpec((rows, *specs[0].shape[1:]), specs[0].dtypes)
        stored[name] = StoredTensor(spec, parts)
    return stored


class OpenAICheckpoint(FolderCheckpoint):
    """A checkpoint folder in OpenAI's original layout."""

    layout: ClassVar[Layout] = "openai"
    title = "OpenAI's original layout"
    foreign_prefixes = ("model.", "lm_head.")

    def _parse(self, raw: Mapping[str, Any]) -> ModelConfig:
        config = ModelConfig.from_openai(raw)
        self._stored = stored_tensors(config)
        self._rows: dict[str, _Rows] = {}
        expected = expected_tensors(config)
        for name, tensor in self._stored.items():
            end = 0
            for part in tensor.parts:
                begin, end = end, end + expected[part].shape[0]
                self._rows[part] = _Rows(name, begin, end)
        return config

    def stored_tensors(self) -> dict[str, TensorSpec]:
        """What the files must hold, by their own names."""
        return {name: tensor.spec for name, tensor in self._stored.items()}

    def tensor(self, name: str) -> np.ndarray:
        """A read-only view of the mapped file, bf16 as ml_dtypes.bfloat16; TensorMissingError."""
        rows = self._find(name)
        stored = self._shard(rows.name).array(rows.name)
        view: np.ndarray = stored[rows.begin : rows.end]
        return view

    def drop(self, name: str) -> None:
        """Let go of the tensor's resident pages, and of those of its neighbours in the file."""
        stored = self._find(name).name
        self._shard(stored).drop(stored)

    def _find(self, name: str) -> _Rows:
        if name not in self._rows:
            raise TensorMissingError(
                f"{self.path}: tensor {name!r:.120} is none of this architecture; "
                "ask for a name of the Hugging Face layout."
            )
        return self._rows[name]

    def _open_without_index(self) -> dict[str, Safetensors]:
        """Every .safetensors file of the folder."""
        files = sorted(
            path
            for path in self.path.glob("*.safetensors")
            if not path.name.startswith(".")  # what macOS leaves on foreign disks
        )
        if not files:
            raise CheckpointError(
                f"Expected .safetensors files in {self.path}, found none; "
                "fetch the checkpoint's weights."
            )
        _check_complete([path.name for path in files], self)
        shard_of: dict[str, Safetensors] = {}
        for shard in map(open_shard, files):
            for name in shard.tensors:
                if name in shard_of:
                    raise CheckpointError(
                        f"{self.path}: tensor {name!r:.120} is in {shard_of[name].path.name} and "
                        f"in {shard.path.name}; keep the files of one checkpoint in a folder."
                    )
                shard_of[name] = shard
        return shard_of


def _check_complete(files: list[str], checkpoint: OpenAICheckpoint) -> None:
    """CheckpointError where the names of the files number more shards than there are."""
    for file in files:
        numbered = _SHARD.fullmatch(file)
        if numbered is None:
            continue
        prefix, number, count = numbered.groups()
        for other in range(1, min(int(count), len(files) + 1) + 1):
            expected = f"{prefix}{other:0{len(number)}}-of-{count}.safetensors"
            if expected not in files:
                raise CheckpointError(
                    f"{checkpoint.path / expected} is missing, {file} is there; fetch the "
                    "checkpoint's weights again."
                )


__all__ = ["SHARD_NAME", "OpenAICheckpoint", "StoredTensor", "stored_tensors"]
