from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from checkpoints.shapes import ODD_SHAPES, SHAPES, hf_config

from mxforge.compile.config import FULL, SLIDING
from mxforge.compile.models.gpt_oss.config import GptOssConfig, config_layout
from mxforge.errors import ConfigError


def published(**changes: Any) -> dict[str, Any]:
    """The published 20b config.json with some keys replaced, None standing for null."""
    return {**hf_config("20b"), **changes}


def parse(**changes: Any) -> GptOssConfig:
    return GptOssConfig.from_hf(published(**changes))


def without(*keys: str) -> dict[str, Any]:
    return {key: value for key, value in published().items() if key not in keys}


def test_published_20b():
    config = parse()
    assert config.parameter_count == 20_914_757_184
    assert config.weight_bytes == 13_761_264_768
    assert config.active_bytes_per_token == pytest.approx(3.71e9, rel=1e-3)
    assert config.kv_bytes_per_token(FULL) == 24 << 10
    assert config.queries_per_kv == 8
    assert config.qkv_rows == 5120
    assert config.sliding_layers == tuple(range(0, 24, 2))
    assert config.window(0) == 128
    assert config.window(1) == 0


def test_published_120b():
    raw = hf_config("120b-2layers", {"num_hidden_layers": 36})
    config = GptOssConfig.from_hf(raw)
    assert config.parameter_count == 116_829_156_672
    assert config.weight_bytes == 65_248_815_744
    assert config.active_bytes_per_token == pytest.approx(5.00e9, rel=1e-3)
    assert len(config.layer_types) == 36


def test_costs_heed_the_window():
    config = parse()
    per_layer = 2 * config.kv_size * 2
    assert config.kv_bytes_read(8192) == 12 * per_layer * (8192 + 128)
    assert config.kv_bytes_read(100) == 24 * per_layer * 100
    assert config.decode_bytes(100) == config.active_bytes_per_token + config.kv_bytes_read(100)


@pytest.mark.parametrize("name", SHAPES)
def test_dict_round_trip(name: str):
    config = GptOssConfig.from_hf(hf_config(name))
    assert GptOssConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_from_dict_refuses_other_fields():
    raw = parse().to_dict()
    with pytest.raises(ConfigError, match="Unknown config fields: colour"):
        GptOssConfig.from_dict({**raw, "colour": 1})
    del raw["hidden_size"]
    with pytest.raises(ConfigError, match="Missing config fields: hidden_size"):
        GptOssConfig.from_dict(raw)


def test_odd_shapes_cover_what_they_should():
    configs = [GptOssConfig.from_hf(hf_config(name)) for name in ODD_SHAPES]
    assert {c.queries_per_kv for c in configs} >= {1, 2, 3, 8}
    assert {c.sliding_window for c in configs} >= {1, 5, 17, 20, 128}
    assert {c.rope_type for c in configs} == {"default", "yarn"}
    assert {c.truncate for c in configs if c.rope_type == "yarn"} == {True, False}
    assert {(2, 1)} <= {(c.num_local_experts, c.num_experts_per_tok) for c in configs}
    assert any(SHAPES[name].idle_experts for name in ODD_SHAPES)
    assert all(c.head_dim != 64 and c.hidden_size % 128 for c in configs)


# -- spellings ---------------------------------------------------------------------------------


def test_rope_parameters_of_transformers_5_mean_the_same():
    old = parse()
    rope = {**published()["rope_scaling"], "rope_theta": 150000.0}
    raw = without("rope_scaling", "rope_theta")
    assert GptOssConfig.from_hf({**raw, "rope_parameters": rope}) == old


def test_rope_defaults_are_those_of_the_architecture():
    assert GptOssConfig.from_hf(without("rope_scaling", "rope_theta")) == parse()


def test_rope_type_in_its_oldest_spelling():
    config = parse(rope_scaling={"type": "default"}, rope_theta=1e4)
    assert config.rope_type == "default"
    assert config.rope_attention_factor == 1.0


def test_original_context_and_factor_follow_from_each_other():
    rope = {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 8192}
    assert parse(rope_scaling=rope).yarn_factor == 16.0
    assert (
        parse(rope_scaling={"rope_type": "yarn", "factor": 2.0}).original_max_position_embeddings
        == 131072
    )


@pytest.mark.parametrize(
    ("extra", "factor"),
    [
        ({}, 0.1 * math.log(32) + 1),
        ({"attention_factor": 1.25}, 1.25),
        (
            {"mscale": 2.0, "mscale_all_dim": 1.0},
            (0.2 * math.log(32) + 1) / (0.1 * math.log(32) + 1),
        ),
        ({"mscale": 2.0}, 0.1 * math.log(32) + 1),
    ],
)
def test_attention_factor(extra: dict[str, float], factor: float):
    config = parse(rope_scaling={**published()["rope_scaling"], **extra})
    assert config.rope_attention_factor == pytest.approx(factor, rel=1e-15)


def test_nullable_keys_take_their_derived_value():
    assert parse(num_key_value_heads=None).num_key_value_heads == 64
    assert parse(head_dim=None, hidden_size=2048).head_dim == 32
    assert parse(layer_types=None).layer_types[:3] == (SLIDING, FULL, SLIDING)


def test_window_may_be_null_where_no_layer_slides():
    config = parse(sliding_window=None, layer_types=[FULL] * 24)
    assert config.window(0) == 0
    with pytest.raises(ConfigError, match="sliding_window must be"):
        parse(sliding_window=None)


# -- rotary frequencies ------------------------------------------------------------------------


def test_yarn_ramp_of_the_published_model():
    config = parse()
    assert config._yarn_range() == pytest.approx((8.0928, 17.3980), abs=5e-5)
    plain = parse(rope_scaling={"rope_type": "default"}).rope_inv_freq()
    ratio = plain / config.rope_inv_freq()
    assert config.rope_inv_freq().dtype == np.float32
    assert (ratio[:9] == 1).all()
    assert ratio[18:] == pytest.approx(32, rel=1e-6)
    assert (np.diff(ratio[8:19]) > 0).all()


def test_yarn_bounds_are_clipped():
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    low, high = parse(rope_scaling=rope, rope_theta=10.0)._yarn_range()
    assert low == 0
    assert high <= 63
    assert np.isfinite(parse(rope_scaling=rope, rope_theta=10.0).rope_inv_freq()).all()


@pytest.mark.live
@pytest.mark.parametrize("name", [name for name in SHAPES if name != "120b-2layers"])
def test_frequencies_equal_those_of_transformers(name: str):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from transformers import GptOssConfig as TheirConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

    raw = hf_config(name)
    raw.pop("quantization_config")
    rotary = GptOssRotaryEmbedding(TheirConfig.from_dict(raw))
    config = GptOssConfig.from_hf(raw)
    assert rotary.attention_scaling == config.rope_attention_factor
    ours, theirs = config.rope_inv_freq(), rotary.inv_freq.numpy()
    # torch's vectorized pow is not rounded correctly: a unit in the last place, now and then.
    assert np.abs(ours.view(np.int32) - theirs.view(np.int32)).max() <= 1


# -- OpenAI's original keys --------------------------------------------------------------------

# The published original/config.json of gpt-oss-20b.
ORIGINAL = {
    "num_hidden_layers": 24,
    "num_experts": 32,
    "experts_per_token": 4,
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "swiglu_limit": 7.0,
    "head_dim": 64,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "sliding_window": 128,
    "initial_context_length": 4096,
    "rope_theta": 150000,
    "rope_scaling_factor": 32.0,
    "rope_ntk_alpha": 1,
    "rope_ntk_beta": 32,
}
# Without these the original code's values hold, which are the published ones.
OPTIONAL = ("swiglu_limit", "rope_theta", "rope_ntk_alpha", "rope_ntk_beta")


def parse_original(**changes: Any) -> GptOssConfig:
    return GptOssConfig.from_openai({**ORIGINAL, **changes})


def test_original_config_means_the_published_one():
    assert parse_original() == parse()
    assert parse_original(num_hidden_layers=36, num_experts=128) == GptOssConfig.from_hf(
        hf_config("120b-2layers", {"num_hidden_layers": 36})
    )


@pytest.mark.parametrize("key", OPTIONAL)
def test_original_config_without_what_never_changes(key: str):
    assert parse_original(**{key: None}) == parse()


def test_original_config_of_other_numbers():
    config = parse_original(
        rope_scaling_factor=2.5, initial_context_length=1001, rope_ntk_beta=8, rope_ntk_alpha=2
    )
    assert (config.max_position_embeddings, config.original_max_position_embeddings) == (2502, 1001)
    assert (config.yarn_factor, config.beta_fast, config.beta_slow) == (2.5, 8.0, 2.0)
    assert config.truncate is False


@pytest.mark.parametrize("factor", [1, 1.0, 0.5])
def test_original_config_without_scaling_is_plain_rope(factor: float):
    config = parse_original(rope_scaling_factor=factor, rope_ntk_beta=8)
    rope = {"rope_scaling": {"rope_type": "default"}, "max_position_embeddings": 4096}
    assert config == parse(**rope)


@pytest.mark.parametrize("key", [key for key in ORIGINAL if key not in OPTIONAL])
def test_original_config_lacks_a_key(key: str):
    with pytest.raises(ConfigError, match=f"{key} is missing"):
        parse_original(**{key: None})


@pytest.mark.parametrize("key", ORIGINAL)
@pytest.mark.parametrize("value", [0, -1, "64", True, [64], {}, 1 << 62, 1e400, math.nan])
def test_original_config_with_an_impossible_number(key: str, value: Any):
    with pytest.raises(ConfigError, match=key):
        parse_original(**{key: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 2896}, "hidden_size must be a multiple of 32"),
        ({"num_key_value_heads": 7}, "num_attention_heads must be a multiple of"),
        ({"experts_per_token": 33}, r"experts_per_token must be at most num_experts \(32\)"),
        ({"initial_context_length": 1 << 24}, "initial_context_length · rope_scaling_factor"),
        ({"bidirectional_context": True}, "does not know: bidirectional_context"),
        ({"num_local_experts": 32}, "does not know: num_local_experts"),
    ],
)
def test_original_config_in_contradiction(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        parse_original(**changes)


def test_the_keys_tell_the_layout():
    assert config_layout(published()) == "huggingface"
    assert config_layout(ORIGINAL) == "openai"
    assert config_layout({"num_experts": 32}) == "openai"
    assert config_layout({"architectures": []}) == "huggingface"
    for raw in ({}, {"n_layer": 12}):
        assert config_layout(raw) is None


def test_keys_of_both_layouts():
    with pytest.raises(ConfigError, match="mixes two layouts: .*, rope_scaling_factor of OpenAI's"):
        config_layout(published(rope_scaling_factor=16.0))


# -- bad input ---------------------------------------------------------------------------------

REQUIRED = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_local_experts",
    "vocab_size",
    "max_position_embeddings",
)


@pytest.mark.parametrize("key", REQUIRED)
def test_missing_number(key: str):
    with pytest.raises(ConfigError, match=f"{key} is missing"):
        GptOssConfig.from_hf(without(key))


@pytest.mark.parametrize("key", [*REQUIRED, "sliding_window"])
@pytest.mark.parametrize("value", [0, -1, 2.0, "64", True, [64], 1 << 62, 1e400])
def test_impossible_integer(key: str, value: Any):
    with pytest.raises(ConfigError):
        parse(**{key: value})


@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta", "swiglu_limit"])
@pytest.mark.parametrize("value", [-1, math.nan, math.inf, "1", True, {}])
def test_impossible_real(key: str, value: Any):
    with pytest.raises(ConfigError, match=key):
        parse(**{key: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 2896}, "hidden_size must be a multiple of 32"),
        ({"intermediate_size": 33}, "intermediate_size must be a multiple of 32"),
        ({"head_dim": 63}, "head_dim must be a multiple of 2"),
        ({"num_key_value_heads": 7}, "num_attention_heads must be a multiple of"),
        ({"num_experts_per_tok": 33, "experts_per_token": None}, "at most num_local_experts"),
        ({"num_experts_per_tok": 2}, "contradict each other"),
        ({"layer_types": [FULL]}, "must name all 24 layers"),
        ({"layer_types": ["chunked_attention"] * 24}, "layer_types must be made of"),
        ({"layer_types": "full_attention"}, "layer_types must be a list"),
        ({"layer_types": {}}, "layer_types must be a list"),
        ({"layer_types": [[]] * 24}, "layer_types must be made of"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings must be False"),
        ({"attention_bias": 1}, "attention_bias must be true or false"),
        ({"swiglu_alpha": 1.0}, "swiglu_alpha must be 1.702"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1.0"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method must be 'mxfp4'"),
        ({"quantization_config": "mxfp4"}, "quant_method must be 'mxfp4'"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "rope_type must be"),
        ({"rope_scaling": {"rope_type": ["yarn"]}}, "rope_type must be"),
        ({"rope_scaling": [1]}, "rope_scaling must be a JSON object"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 0}}, "yarn_factor must be"),
        (
            {
                "rope_scaling": {"rope_type": "yarn", "original_max_position_embeddings": 1},
                "max_position_embeddings": 10**400,
            },
            "max_position_embeddings must be",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": "32"}}, "yarn_factor must be"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2, "truncate": 0}}, "truncate must be"),
        ({"rope_scaling": {SLIDING: {}, FULL: {}}}, "one set for all layers"),
    ],
)
def test_contradiction(changes: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        parse(**changes)
