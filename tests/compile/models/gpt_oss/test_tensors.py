"""The one list of tensors: that it is complete, and that what refers to it has each name once."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from checkpoints.shapes import ODD_SHAPES, hf_config

from mxforge.compile.models.gpt_oss.config import GptOssConfig
from mxforge.compile.models.gpt_oss.tensors import (
    INV_FREQ,
    expected_tensors,
    piece_weights,
    stored_names,
    tensors,
    weights,
)
from mxforge.compile.models.tensors import layer_number, layer_of, layer_prefix

SHAPES = ["20b", "120b-2layers", *ODD_SHAPES]


def config_of(shape: str, **changes: object) -> GptOssConfig:
    return GptOssConfig.from_hf(hf_config(shape, changes))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("attention_bias", [True, False])
def test_the_tensors_hold_the_parameters_that_the_config_counts(shape: str, attention_bias: bool):
    config = config_of(shape, attention_bias=attention_bias)
    values = {"blocks": 2, "scales": 0}  # numbers of the model in each element
    total = sum(
        math.prod(tensor.shape) * values.get(tensor.role, 1)
        for tensor in expected_tensors(config).values()
    )
    assert total == config.parameter_count


def test_without_attention_bias_four_tensors_a_layer_are_absent():
    config = config_of("odd-1", attention_bias=False)
    absent = [name for name in tensors(config) if name not in expected_tensors(config)]
    assert absent == [
        f"model.layers.{layer}.self_attn.{projection}_proj.bias"
        for layer in range(3)
        for projection in "qkvo"
    ]
    listed = {weight.name: weight for weight in weights(config)}
    bias = listed["model.layers.0.self_attn.qkv_proj.bias"]
    assert (bias.sources, bias.rows) == ((), config.qkv_rows)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", ["huggingface", "openai"])
def test_the_files_of_every_layout_hold_each_tensor_once(shape: str, layout: str):
    config = config_of(shape)
    parts = [part for parts in stored_names(config, layout).values() for part in parts]
    assert Counter(parts) == Counter(list(expected_tensors(config)))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_pieces_of_the_model_take_every_weight_once(shape: str):
    config = config_of(shape)
    names = [weight.name for weight in weights(config)]
    pieces = ["embed", *range(config.num_hidden_layers), "head"]
    taken = Counter(name for piece in pieces for name in piece_weights(piece, names))
    assert taken.pop(INV_FREQ) == config.num_hidden_layers
    assert taken == Counter(name for name in names if name != INV_FREQ)


def test_a_layers_number_is_read_whole():
    names = [f"{layer_prefix(n)}mlp.router.weight" for n in (1, 11)]
    assert [layer_number(name) for name in (*names, "lm_head.weight")] == [1, 11, None]
    assert layer_of(dict.fromkeys(names, 0), 1) == {"mlp.router.weight": 0}
    assert piece_weights(1, names) == names[:1]
