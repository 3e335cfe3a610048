"""gpt-oss as an ONNX graph: formulas and shapes are those of reference.py.

One expert is expanded at a time, and only those that some token picked:

    opset 18 to 23  a Loop over the picked experts takes their bytes out of the stacked tensors,
                    looks up both values of each and multiplies by 2^(scale - 127)
    opset 24        DequantizeLinear reads the same bytes as FLOAT4E2M1 with FLOAT8E8M0 scales.
                    No operator takes an expert out of a stacked 4-bit tensor, so each expert is a
                    tensor of its own, used inside an If

Shapes: n tokens, t those of an expert, H hidden, Hq / Hkv heads of D, G = Hq / Hkv, E experts,
k chosen, I intermediate, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from onnx import TensorProto, helper

from ...onnx_builder import Graph
from ..tensors import layer_prefix
from . import tensors
from .config import MXFP4_BLOCK, GptOssConfig
from .reference import dequantize_mxfp4

_VOCABULARY_ROWS = 16384  # lm_head rows cast at a time: 189 MB of the published models


def add_model(g: Graph, config: GptOssConfig, token_ids: str, logits: str) -> None:
    """The nodes from i64 [n] `token_ids` to f32 [n, V] `logits`."""
    length = g.op("Shape", token_ids)  # i64 [1]
    position = g.op("Range", g.i64(0), g.op("Squeeze", length), g.i64(1))  # i64 [n]
    behind = g.op("Sub", g.op("Unsqueeze", position, g.i64([1])), position)  # [n, n]
    causal = g.op("GreaterOrEqual", behind, g.i64(0))  # bool [n, n]
    near = g.op("And", causal, g.op("Less", behind, g.i64(config.sliding_window)))
    shared = _Shared(
        rope=_rope(g, config, position),
        visible={0: causal, config.sliding_window: near},
        sink_shape=g.op("Concat", g.i64([1, 1]), length, g.i64([1]), axis=0),
    )
    x = g.to_f32(g.op("Gather", g.stored(tensors.EMBEDDING), token_ids))  # [n, H]
    for layer in range(config.num_hidden_layers):
        g.scope = layer_prefix(layer)
        x = _attention(g, config, layer, shared, x)
        x = _moe(g, config, layer, x)
    g.scope = ""
    x = _norm(g, config, tensors.FINAL_NORM, x)
    rows = range(0, config.vocab_size, _VOCABULARY_ROWS)
    parts = [
        g.op("Gemm", x, g.to_f32(g.weights.rows(tensors.LM_HEAD, row, _VOCABULARY_ROWS)), transB=1)
        for row in rows
    ]
    g.node("Concat", parts, [logits], axis=-1)  # [n, V]


@dataclass(frozen=True)
class _Shared:
    """What all layers use.

    rope        cos and sin f32 [n, 1, D/2], times the attention factor
    visible     window (0: none) → bool [n, n], whether query i sees key j
    sink_shape  i64 [4]: 1, 1, n, 1
    """

    rope: tuple[str, str]
    visible: dict[int, str]
    sink_shape: str


def _rope(g: Graph, config: GptOssConfig, position: str) -> tuple[str, str]:
    """position i64 [n] → cos and sin of the f32 angles [n, 1, D/2]."""
    column = g.op("Unsqueeze", g.to_f32(position), g.i64([1, 2]))  # [n, 1, 1]
    angles = g.op("Mul", column, g.f32(config.rope_inv_freq()))
    factor = g.f32(config.rope_attention_factor)
    return g.op("Mul", g.op("Cos", angles), factor), g.op("Mul", g.op("Sin", angles), factor)


def _norm(g: Graph, config: GptOssConfig, name: str, x: str) -> str:
    """x / sqrt(mean(x²) + eps) · weight over the last axis."""
    mean = g.op("ReduceMean", g.op("Mul", x, x), g.i64([-1]))
    root = g.op("Sqrt", g.op("Add", mean, g.f32(config.rms_norm_eps)))
    return g.op("Mul", g.op("Div", x, root), g.weight(name))


def _linear(g: Graph, name: str, x: str, bias: bool = True) -> str:
    """x [n, in] · weight [out, in] transposed, plus bias [out]."""
    biases = [g.weight(f"{name}.bias")] if bias else []
    return g.op("Gemm", x, g.weight(f"{name}.weight"), *biases, transB=1)


def _attention(g: Graph, config: GptOssConfig, layer: int, shared: _Shared, x: str) -> str:
    """x [n, H] → x plus attention: a softmax over visible keys and a sink, whose share is lost."""
    d, groups, each = config.head_dim, config.num_key_value_heads, config.queries_per_kv
    name, bias = g.scope + "self_attn", config.attention_bias

    normed = _norm(g, config, g.scope + "input_layernorm.weight", x)

    def heads(projection: str) -> str:  # [n, Hq or Hkv, D]
        flat = _linear(g, f"{name}.{projection}", normed, bias)
        return g.op("Reshape", flat, g.i64([0, -1, d]))

    q = g.op("Reshape", _rotate(g, heads("q_proj"), shared.rope), g.i64([0, groups, each, d]))
    k = g.op("Reshape", _rotate(g, heads("k_proj"), shared.rope), g.i64([0, groups, 1, d]))
    v = g.op("Reshape", heads("v_proj"), g.i64([0, groups, 1, d]))
    q = g.op("Transpose", q, perm=[1, 2, 0, 3])  # [Hkv, G, n, D]
    k = g.op("Transpose", k, perm=[1, 2, 3, 0])  # [Hkv, 1, D, n]
    v = g.op("Transpose", v, perm=[1, 2, 0, 3])  # [Hkv, 1, n, D]
    scores = g.op("Mul", g.op("MatMul", q, k), g.f32(d**-0.5))  # [Hkv, G, n, n]
    scores = g.op("Where", shared.visible[config.window(layer)], scores, g.f32(-math.inf))
    sinks = g.op("Reshape", g.weight(f"{name}.sinks"), g.i64([groups, each, 1, 1]))
    sinks = g.op("Expand", sinks, shared.sink_shape)  # [Hkv, G, n, 1]
    share = g.op("Softmax", g.op("Concat", scores, sinks, axis=-1), axis=-1)
    share = g.op("Slice", share, g.i64([0]), g.i64([-1]), g.i64([3]))  # [Hkv, G, n, n]
    mixed = g.op("Transpose", g.op("MatMul", share, v), perm=[2, 0, 1, 3])  # [n, Hkv, G, D]
    mixed = g.op("Reshape", mixed, g.i64([0, config.q_size]))
    return g.op("Add", x, _linear(g, f"{name}.o_proj", mixed, bias))


def _rotate(g: Graph, x: str, rope: tuple[str, str]) -> str:
    """Half-split (NeoX) pairing: x [n, heads, D]."""
    cos, sin = rope
    first, second = g.node("Split", [x], [g.new("first"), g.new("second")], axis=-1, num_outputs=2)
    left = g.op("Sub", g.op("Mul", first, cos), g.op("Mul", second, sin))
    right = g.op("Add", g.op("Mul", second, cos), g.op("Mul", first, sin))
    return g.op("Concat", left, right, axis=-1)


def _moe(g: Graph, config: GptOssConfig, layer: int, x: str) -> str:
    """x [n, H] → x + Σ weight · expert(norm(x)) over each token's k experts."""
    normed = _norm(g, config, g.scope + "post_attention_layernorm.weight", x)
    logits = _linear(g, g.scope + "mlp.router", normed)  # [n, E]
    # Sorted, the lower id first among equals.
    chosen, ids = g.node(
        "TopK",
        [logits, g.i64([config.num_experts_per_tok])],
        [g.new("chosen"), g.new("expert_ids")],
    )
    routed = _Routed(normed, ids, g.op("Softmax", chosen, axis=-1))
    if g.weights.float4:
        total = x
        for expert in range(config.num_local_experts):
            total = _if_picked(g, config, routed, total, expert)
        return total
    return _loop(g, config, routed, x)


@dataclass(frozen=True)
class _Routed:
    """The experts' inputs: x f32 [n, H], ids i64 [n, k], weights f32 [n, k]."""

    x: str
    ids: str
    weights: str


def _tokens_of(g: Graph, routed: _Routed, expert: str) -> tuple[str, str]:
    """Where `expert` was picked: token i64 [t], and (token, choice) i64 [t, 2]."""
    found = g.op("NonZero", g.op("Equal", routed.ids, expert))  # i64 [2, t]
    return g.op("Gather", found, g.i64(0), axis=0), g.op("Transpose", found, perm=[1, 0])


def _add_expert(
    g: Graph,
    config: GptOssConfig,
    routed: _Routed,
    total: str,
    tokens: str,
    slots: str,
    expert: str | int,
) -> str:
    """total [n, H] plus the weighted outputs of one expert, given as its number or as i64 []."""
    name = g.scope + "mlp.experts"
    x = g.op("Gather", routed.x, tokens)  # [t, H]
    gate_up = _expert_linear(g, f"{name}.gate_up_proj", x, expert)  # [t, 2·I]
    y = _expert_linear(g, f"{name}.down_proj", _swiglu(g, config, gate_up), expert)  # [t, H]
    weights = g.op("Unsqueeze", g.op("GatherND", routed.weights, slots), g.i64([1]))  # [t, 1]
    rows = g.op("Unsqueeze", tokens, g.i64([1]))
    return g.op("ScatterND", total, rows, g.op("Mul", y, weights), reduction="add")


def _loop(g: Graph, config: GptOssConfig, routed: _Routed, total: str) -> str:
    """`_add_expert` for each expert that some token picked."""
    picked = g.op("Unique", routed.ids, sorted=1)  # i64 [between 1 and E]
    body, count, go_on, before = g.inner(), g.new("count"), g.new("go_on"), g.new("total")
    expert = body.op("Gather", picked, count)  # i64 []
    tokens, slots = _tokens_of(body, routed, expert)
    after = _add_expert(body, config, routed, before, tokens, slots, expert)
    loop = helper.make_graph(
        [*body.nodes, helper.make_node("Identity", [go_on], [go_on + "_out"])],
        "one_expert",
        [
            helper.make_tensor_value_info(count, TensorProto.INT64, []),
            helper.make_tensor_value_info(go_on, TensorProto.BOOL, []),
            helper.make_tensor_value_info(before, TensorProto.FLOAT, [None, config.hidden_size]),
        ],
        [
            helper.make_tensor_value_info(go_on + "_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info(after, TensorProto.FLOAT, [None, config.hidden_size]),
        ],
    )
    return g.op("Loop", g.op("Size", picked), "", total, body=loop)


def _if_picked(g: Graph, config: GptOssConfig, routed: _Routed, total: str, expert: int) -> str:
    """`_add_expert` where any token picked the expert, else `total`."""
    tokens, slots = _tokens_of(g, routed, g.i64(expert))
    picked = g.op("Greater", g.op("Size", tokens), g.i64(0))
    branches = {}
    for branch in ("then_branch", "else_branch"):
        inner = g.inner()
        if branch == "then_branch":
            out = _add_expert(inner, config, routed, total, tokens, slots, expert)
        else:
            out = inner.op("Identity", total)
        value = helper.make_tensor_value_info(out, TensorProto.FLOAT, [None, config.hidden_size])
        branches[branch] = helper.make_graph(inner.nodes, branch, [], [value])
    return g.op("If", picked, **branches)


def _swiglu(g: Graph, config: GptOssConfig, gate_up: str) -> str:
    """[t, 2·I], gate and up interleaved → min(g, limit) · σ(α·g) · (clamp(u, ±limit) + 1)."""
    limit = config.swiglu_limit
    end, axis, step = g.i64([2 * config.intermediate_size]), g.i64([1]), g.i64([2])
    gate = g.op("Slice", gate_up, g.i64([0]), end, axis, step)  # [t, I]
    up = g.op("Slice", gate_up, g.i64([1]), end, axis, step)
    gate = g.op("Min", gate, g.f32(limit))
    up = g.op("Clip", up, g.f32(-limit), g.f32(limit))
    sigmoid = g.op("Sigmoid", g.op("Mul", gate, g.f32(config.swiglu_alpha)))
    return g.op("Mul", g.op("Mul", gate, sigmoid), g.op("Add", up, g.f32(1)))


def _expert_linear(g: Graph, name: str, x: str, expert: str | int) -> str:
    """x [t, in] · one expert's matrix [out, in] transposed, plus its bias [out]."""
    matrix = (
        g.op(
            "DequantizeLinear",
            g.weights.float4_blocks(name, expert),
            g.weights.float4_scales(name, expert),
            axis=1,
            block_size=MXFP4_BLOCK,
            output_dtype=TensorProto.FLOAT,
        )
        if isinstance(expert, int)
        else _dequantized(g, name, expert)
    )
    number = g.i64(expert) if isinstance(expert, int) else expert
    bias = g.to_f32(g.op("Gather", g.stored(f"{name}_bias"), number))
    return g.op("Gemm", x, matrix, bias, transB=1)


def _dequantized(g: Graph, name: str, expert: str) -> str:
    """One expert's matrix f32 [out, in] in plain operators, from blocks u8 [E, out, in/32, 16]."""
    codes = g.op("Gather", g.stored(f"{name}_blocks"), expert)  # u8 [out, in/32, 16]
    scales = g.op("Gather", g.stored(f"{name}_scales"), expert)  # u8 [out, in/32]
    # Both values of each byte, [out, in/32, 16, 2], are the block's 32 in order.
    values = g.op("Gather", g.f32(_PAIRS), g.op("Cast", codes, to=TensorProto.INT32))
    values = g.op("Reshape", values, g.i64([0, 0, MXFP4_BLOCK]))
    powers = g.op("Gather", g.f32(_POWERS), g.op("Cast", scales, to=TensorProto.INT32))
    values = g.op("Mul", values, g.op("Unsqueeze", powers, g.i64([2])))  # [out, in/32, 32]
    return g.op("Reshape", values, g.i64([0, -1]))


# The value of both nibbles of each byte [256, 2], low one first; 2^(scale - 127) of scales 0…254.
_PAIRS = dequantize_mxfp4(
    np.arange(256, dtype=np.uint8).reshape(16, 1, 16), np.full((16, 1), 127, np.uint8)
).reshape(256, 2)
_POWERS = np.ldexp(np.float32(1), np.arange(255) - 127).astype(np.float32)
