"""The Hugging Face layout of a gpt-oss checkpoint, whose tensor names the whole compiler uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from ..config import MXFP4_BLOCK, Layout, ModelConfig
from .folder import PACKED_DTYPES, FolderCheckpoint, TensorSpec


def layer_prefix(layer: int) -> str:
    return f"model.layers.{layer}."


def expected_tensors(config: ModelConfig) -> dict[str, TensorSpec]:
    """Every tensor of a checkpoint with this config, in the order in which the model uses them."""
    h, i, e = config.hidden_size, config.intermediate_size, config.num_local_experts
    dense, packed = TensorSpec, PACKED_DTYPES
    layer: dict[str, TensorSpec] = {
        "input_layernorm.weight": dense((h,)),
        "self_attn.q_proj.weight": dense((config.q_size, h)),
        "self_attn.q_proj.bias": dense((config.q_size,)),
        "self_attn.k_proj.weight": dense((config.kv_size, h)),
        "self_attn.k_proj.bias": dense((config.kv_size,)),
        "self_attn.v_proj.weight": dense((config.kv_size, h)),
        "self_attn.v_proj.bias": dense((config.kv_size,)),
        "self_attn.o_proj.weight": dense((h, config.q_size)),
        "self_attn.o_proj.bias": dense((h,)),
        "self_attn.sinks": dense((config.num_attention_heads,)),
        "post_attention_layernorm.weight": dense((h,)),
        "mlp.router.weight": dense((e, h)),
        "mlp.router.bias": dense((e,)),
        "mlp.experts.gate_up_proj_blocks": TensorSpec(
            (e, 2 * i, h // MXFP4_BLOCK, MXFP4_BLOCK // 2), packed
        ),
        "mlp.experts.gate_up_proj_scales": TensorSpec((e, 2 * i, h // MXFP4_BLOCK), packed),
        "mlp.experts.gate_up_proj_bias": dense((e, 2 * i)),
        "mlp.experts.down_proj_blocks": TensorSpec(
            (e, h, i // MXFP4_BLOCK, MXFP4_BLOCK // 2), packed
        ),
        "mlp.experts.down_proj_scales": TensorSpec((e, h, i // MXFP4_BLOCK), packed),
        "mlp.experts.down_proj_bias": dense((e, h)),
    }
    if not config.attention_bias:
        layer = {
            name: spec
            for name, spec in layer.items()
            if not (name.startswith("self_attn.") and name.endswith(".bias"))
        }
    expected = {"model.embed_tokens.weight": dense((config.vocab_size, h))}
    for n in range(config.num_hidden_layers):
        expected |= {layer_prefix(n) + name: spec for name, spec in layer.items()}
    expected["model.norm.weight"] = dense((h,))
    expected["lm_head.weight"] = dense((config.vocab_size, h))
    return expected


class HFCheckpoint(FolderCheckpoint):
    """A checkpoint folder in the Hugging Face layout; shards need their index."""

    layout: ClassVar[Layout] = "huggingface"
    title = "the Hugging Face layout"
    foreign_prefixes = ("block.", "embedding.", "unembedding.")

    def _parse(self, raw: Mapping[str, Any]) -> ModelConfig:
        return ModelConfig.from_hf(raw)

    def stored_tensors(self) -> dict[str, TensorSpec]:
        """What the files must hold: the canonical tensors."""
        return expected_tensors(self.config)

    def tensor(self, name: str) -> np.ndarray:
        """A read-only view of the mapped file, bf16 as ml_dtypes.bfloat16; TensorMissingError."""
        return self._shard(name).array(name)

    def drop(self, name: str) -> None:
        """Let go of the tensor's resident pages once it has been packed."""
        self._shard(name).drop(name)
