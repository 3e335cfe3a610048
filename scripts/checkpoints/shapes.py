"""Shapes of random gpt-oss checkpoints, as changes to the published 20b config.json."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mxforge.compile.models.gpt_oss import HARMONY
from mxforge.compile.models.gpt_oss.config import GptOssConfig
from mxforge.errors import UsageError

MAX_SHARD_BYTES = 5_000_000_000

_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
}


@dataclass(frozen=True)
class Shape:
    """A config.json, as changes to the published one, and what a random checkpoint adds to it.

    idle_experts      experts that no token takes: their router bias is -100
    max_shard_bytes   a new file begins where this would be exceeded
    """

    why: str
    config: Mapping[str, Any]
    idle_experts: tuple[int, ...] = ()
    max_shard_bytes: int = MAX_SHARD_BYTES


# The published 20b config.json; the others say what they change (None removes a key).
_PUBLISHED: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": _YARN,
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": HARMONY.vocab_size,
}


def _alternating(layers: int) -> list[str]:
    return ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]


def _types(letters: str) -> list[str]:
    return [{"s": "sliding_attention", "f": "full_attention"}[letter] for letter in letters]


SHAPES: dict[str, Shape] = {
    "20b": Shape("gpt-oss-20b as published", {}),
    "20b-4layers": Shape("gpt-oss-20b with four of its 24 layers", {"num_hidden_layers": 4}),
    "120b-2layers": Shape(
        "gpt-oss-120b with two of its 36 layers", {"num_hidden_layers": 2, "num_local_experts": 128}
    ),
    "tiny": Shape(
        "small enough for a demo, with the real vocabulary so that it takes text",
        {
            "num_hidden_layers": 4,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_local_experts": 8,
        },
    ),
    "odd-1": Shape(
        "three queries a KV head, window 5, an expert without tokens",
        {
            "num_hidden_layers": 3,
            "hidden_size": 96,
            "intermediate_size": 160,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
            "vocab_size": 1003,
            "sliding_window": 5,
        },
        idle_experts=(2,),
    ),
    "odd-2": Shape(
        "ungrouped heads of 40, window 20, two experts and one a token, plain RoPE, "
        "full layers first",
        {
            "num_hidden_layers": 4,
            "hidden_size": 160,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 40,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "vocab_size": 777,
            "sliding_window": 20,
            "layer_types": _types("ffss"),
            "rope_scaling": {"rope_type": "default"},
            "rope_theta": 10000.0,
            "max_position_embeddings": 4096,
        },
    ),
    "odd-3": Shape(
        "window 17 (one key into a second page), head_dim 24, one MXFP4 block a row, truncated "
        "YaRN past its original context, several shards",
        {
            "num_hidden_layers": 5,
            "hidden_size": 224,
            "intermediate_size": 32,
            "num_attention_heads": 10,
            "num_key_value_heads": 5,
            "head_dim": 24,
            "num_local_experts": 9,
            "vocab_size": 513,
            "sliding_window": 17,
            "layer_types": _types("ssfsf"),
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 16.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 8.0,
                "beta_slow": 1.0,
                "truncate": True,
            },
            "rope_theta": 5000.0,
            "swiglu_limit": 2.5,
            "max_position_embeddings": 1024,
        },
        idle_experts=(0, 8),
        max_shard_bytes=300_000,
    ),
    "odd-4": Shape(
        "one KV head for eight queries, head_dim 80, 33 experts, window 128, "
        "config in the spelling of transformers 5 and without layer_types",
        {
            "num_hidden_layers": 3,
            "hidden_size": 64,
            "intermediate_size": 224,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "head_dim": 80,
            "num_local_experts": 33,
            "vocab_size": 2049,
            "layer_types": None,
            "experts_per_token": None,
            "rope_scaling": None,
            "rope_theta": None,
            "rope_parameters": {**_YARN, "rope_theta": 150000.0},
            "rms_norm_eps": 1e-6,
        },
    ),
    "odd-5": Shape(
        "the smallest everything: one layer of window 1, one expert, one MXFP4 block, a head of 2",
        {
            "num_hidden_layers": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": 2,
            "num_local_experts": 1,
            "num_experts_per_tok": 1,
            "vocab_size": 17,
            "sliding_window": 1,
            "layer_types": _types("s"),
            "rope_scaling": {"rope_type": "default"},
            "max_position_embeddings": 512,
        },
    ),
}
ODD_SHAPES = tuple(name for name in SHAPES if name.startswith("odd-"))


def hf_config(shape: str | Shape, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config.json of a shape; `overrides` replace keys (None removes one).

    With another num_hidden_layers the layer types alternate, if they are not given too.
    """
    shape = named_shape(shape) if isinstance(shape, str) else shape
    overrides = dict(overrides or {})
    raw = {**_PUBLISHED, **shape.config}
    if "num_hidden_layers" in overrides and overrides["num_hidden_layers"] != len(
        raw.get("layer_types") or ()
    ):
        raw.pop("layer_types", None)
    raw |= overrides
    if "num_experts_per_tok" in raw and raw.get("experts_per_token") is not None:
        raw["experts_per_token"] = raw["num_experts_per_tok"]
    if raw["vocab_size"] != HARMONY.vocab_size:
        raw |= {"eos_token_id": 0, "pad_token_id": 0}
    if "layer_types" not in raw and type(raw["num_hidden_layers"]) is int:
        raw["layer_types"] = _alternating(raw["num_hidden_layers"])
    # A copy: transformers writes into the nested objects that it is given.
    return copy.deepcopy({key: value for key, value in raw.items() if value is not None})


def openai_config(config: GptOssConfig) -> dict[str, Any]:
    """The config.json of OpenAI's layout; UsageError where it has no key to say the same."""
    yarn = config.rope_type == "yarn"
    context = config.original_max_position_embeddings if yarn else config.max_position_embeddings
    raw = {
        "num_hidden_layers": config.num_hidden_layers,
        "num_experts": config.num_local_experts,
        "experts_per_token": config.num_experts_per_tok,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "swiglu_limit": config.swiglu_limit,
        "head_dim": config.head_dim,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "sliding_window": config.sliding_window,
        "initial_context_length": context,
        "rope_theta": config.rope_theta,
        "rope_scaling_factor": config.yarn_factor if yarn else 1.0,
        "rope_ntk_alpha": config.beta_slow,
        "rope_ntk_beta": config.beta_fast,
    }
    said, wanted = GptOssConfig.from_openai(raw).to_dict(), config.to_dict()
    for name, value in wanted.items():
        if said[name] != value:
            raise UsageError(
                f"OpenAI's layout cannot say {name} = {json.dumps(value)}, it means "
                f"{json.dumps(said[name])}; override it or choose another shape."
            )
    return raw


def named_shape(name: str) -> Shape:
    if name not in SHAPES:
        raise UsageError(f"Expected a shape out of {', '.join(SHAPES)}, found {name!r}.")
    return SHAPES[name]
