"""mxforge export-onnx: the model as an ONNX graph, for other runtimes and as a second oracle.

    token_ids i64 [n]  →  logits f32 [n, V]

One sequence from position 0, without a KV cache, computed in float32. Formulas and shapes are those
of reference.py. Weights lie as the checkpoint stores them in OUT.data beside the graph, so that
file is as large as the checkpoint: dense tensors in bf16 (or f16, f32) are cast where they are
used, experts stay MXFP4. One expert is expanded at a time, and only those that some token picked:

    opset 18 to 23  a Loop over the picked experts takes their bytes out of the stacked tensors,
                    looks up both values of each and multiplies by 2^(scale - 127)
    opset 24        DequantizeLinear reads the same bytes as FLOAT4E2M1 with FLOAT8E8M0 scales.
                    No operator takes an expert out of a stacked 4-bit tensor, so each expert is a
                    tensor of its own, used inside an If

Shapes: n tokens, t those of an expert, H hidden, Hq / Hkv heads of D, G = Hq / Hkv, E experts,
k chosen, I intermediate, V vocabulary.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper
from tqdm import tqdm

from mxforge._version import __version__
from mxforge.errors import OutputError, UsageError

from .checkpoint import Checkpoint, check_scales, expected_tensors, layer_prefix, open_checkpoint
from .checkpoint.fingerprint import Fingerprint
from .config import MXFP4_BLOCK, ModelConfig
from .reference import dequantize_mxfp4

OLDEST_OPSET = 18  # reductions take their axes as an input from here on
FLOAT4_OPSET = 24  # the first whose DequantizeLinear takes FLOAT8E8M0 scales
NEWEST_OPSET = FLOAT4_OPSET

_VOCABULARY_ROWS = 16384  # lm_head rows cast at a time: 189 MB of the published models
_ALIGNMENT = 4096  # of every tensor in the data file, so that it can be mapped by itself
_PIECE = 1 << 24
_GRAPH_ROOM = 64 << 20  # what the graph may take on disk
_ONNX_DTYPES = {
    "bfloat16": TensorProto.BFLOAT16,
    "float16": TensorProto.FLOAT16,
    "float32": TensorProto.FLOAT,
    "uint8": TensorProto.UINT8,
}


def export_onnx(
    checkpoint: str | Path,
    output: str | Path,
    *,
    opset: int = OLDEST_OPSET,
    force: bool = False,
    announce: Callable[[str], None] = lambda text: None,
    progress: bool = False,
) -> Path:
    """Write the model of the folder `checkpoint` to `output`, its weights to `output`.data.

    opset     18 to 24: what the graph may use; onnxruntime's CPU runs all but 24
    force     replace what is there
    announce  is told what is being done; `progress` shows a bar on stderr

    Both files appear when they are complete. Returns `output`. Raises CheckpointError and its
    subclasses, ConfigError, OutputError, UsageError.
    """
    if type(opset) is not int or not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise UsageError(
            f"opset must be a whole number from {OLDEST_OPSET} to {NEWEST_OPSET}, found {opset!r}."
        )
    announce("checking the checkpoint")
    source = open_checkpoint(checkpoint)
    source.check()
    stored = _layout(source)
    with _Output(Path(output), force) as files:
        files.reserve(max(entry.end for entry in stored.values()) + _GRAPH_ROOM)
        announce("writing the weights")
        digest = _write_data(source, stored, files.data, progress)
        announce("writing the graph")
        graph = _Graph(_Weights(stored, files.data.name, opset >= FLOAT4_OPSET))
        model = _model(graph, source.config, opset)
        helper.set_model_props(model, _metadata(source, digest))
        files.graph.write_bytes(model.SerializeToString(deterministic=True))
        onnx.checker.check_model(files.graph, full_check=True)
        files.publish()
    return Path(output)


def _metadata(checkpoint: Checkpoint, source_sha256: str) -> dict[str, str]:
    """Notes in the graph; `source_sha256` is the one in the manifest of a compiled artifact."""
    config = json.dumps(checkpoint.config.to_dict(), sort_keys=True)
    return {
        "config": config,
        "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
        "source_sha256": source_sha256,
        "stop_token_ids": json.dumps(checkpoint.generation_config.eos_token_ids),
    }


# -- the graph, from token ids to logits -----------------------------------------------------------


def _model(g: _Graph, config: ModelConfig, opset: int) -> onnx.ModelProto:
    token_ids = "token_ids"  # i64 [n]
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
    x = g.to_f32(g.op("Gather", g.stored("model.embed_tokens.weight"), token_ids))  # [n, H]
    for layer in range(config.num_hidden_layers):
        g.scope = layer_prefix(layer)
        x = _attention(g, config, layer, shared, x)
        x = _moe(g, config, layer, x)
    g.scope = ""
    x = _norm(g, config, "model.norm.weight", x)
    rows = range(0, config.vocab_size, _VOCABULARY_ROWS)
    parts = [g.op("Gemm", x, g.to_f32(g.weights.lm_head(row)), transB=1) for row in rows]
    g.node("Concat", parts, ["logits"], axis=-1)  # [n, V]
    graph = helper.make_graph(
        g.nodes,
        "gpt-oss",
        [helper.make_tensor_value_info(token_ids, TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", config.vocab_size])],
        g.weights.initializers,
    )
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(
        graph,
        producer_name="mxforge",
        producer_version=__version__,
        opset_imports=opsets,
        ir_version=helper.find_min_ir_version_for(opsets),
    )


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


def _rope(g: _Graph, config: ModelConfig, position: str) -> tuple[str, str]:
    """position i64 [n] → cos and sin of the f32 angles [n, 1, D/2]."""
    column = g.op("Unsqueeze", g.to_f32(position), g.i64([1, 2]))  # [n, 1, 1]
    angles = g.op("Mul", column, g.f32(config.rope_inv_freq()))
    factor = g.f32(config.rope_attention_factor)
    return g.op("Mul", g.op("Cos", angles), factor), g.op("Mul", g.op("Sin", angles), factor)


def _norm(g: _Graph, config: ModelConfig, name: str, x: str) -> str:
    """x / sqrt(mean(x²) + eps) · weight over the last axis."""
    mean = g.op("ReduceMean", g.op("Mul", x, x), g.i64([-1]))
    root = g.op("Sqrt", g.op("Add", mean, g.f32(config.rms_norm_eps)))
    return g.op("Mul", g.op("Div", x, root), g.weight(name))


def _linear(g: _Graph, name: str, x: str, bias: bool = True) -> str:
    """x [n, in] · weight [out, in] transposed, plus bias [out]."""
    biases = [g.weight(f"{name}.bias")] if bias else []
    return g.op("Gemm", x, g.weight(f"{name}.weight"), *biases, transB=1)


def _attention(g: _Graph, config: ModelConfig, layer: int, shared: _Shared, x: str) -> str:
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


def _rotate(g: _Graph, x: str, rope: tuple[str, str]) -> str:
    """Half-split (NeoX) pairing: x [n, heads, D]."""
    cos, sin = rope
    first, second = g.node("Split", [x], [g.new("first"), g.new("second")], axis=-1, num_outputs=2)
    left = g.op("Sub", g.op("Mul", first, cos), g.op("Mul", second, sin))
    right = g.op("Add", g.op("Mul", second, cos), g.op("Mul", first, sin))
    return g.op("Concat", left, right, axis=-1)


def _moe(g: _Graph, config: ModelConfig, layer: int, x: str) -> str:
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


def _tokens_of(g: _Graph, routed: _Routed, expert: str) -> tuple[str, str]:
    """Where `expert` was picked: token i64 [t], and (token, choice) i64 [t, 2]."""
    found = g.op("NonZero", g.op("Equal", routed.ids, expert))  # i64 [2, t]
    return g.op("Gather", found, g.i64(0), axis=0), g.op("Transpose", found, perm=[1, 0])


def _add_expert(
    g: _Graph,
    config: ModelConfig,
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


def _loop(g: _Graph, config: ModelConfig, routed: _Routed, total: str) -> str:
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


def _if_picked(g: _Graph, config: ModelConfig, routed: _Routed, total: str, expert: int) -> str:
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


def _swiglu(g: _Graph, config: ModelConfig, gate_up: str) -> str:
    """[t, 2·I], gate and up interleaved → min(g, limit) · σ(α·g) · (clamp(u, ±limit) + 1)."""
    limit = config.swiglu_limit
    end, axis, step = g.i64([2 * config.intermediate_size]), g.i64([1]), g.i64([2])
    gate = g.op("Slice", gate_up, g.i64([0]), end, axis, step)  # [t, I]
    up = g.op("Slice", gate_up, g.i64([1]), end, axis, step)
    gate = g.op("Min", gate, g.f32(limit))
    up = g.op("Clip", up, g.f32(-limit), g.f32(limit))
    sigmoid = g.op("Sigmoid", g.op("Mul", gate, g.f32(config.swiglu_alpha)))
    return g.op("Mul", g.op("Mul", gate, sigmoid), g.op("Add", up, g.f32(1)))


def _expert_linear(g: _Graph, name: str, x: str, expert: str | int) -> str:
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


def _dequantized(g: _Graph, name: str, expert: str) -> str:
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


# -- building it -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stored:
    """Where a tensor of the checkpoint lies in the data file: bytes [begin, end)."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class _Weights:
    """The graph's initializers: the checkpoint's tensors as they are used, and constants."""

    def __init__(self, stored: dict[str, _Stored], location: str, float4: bool) -> None:
        self.float4 = float4
        self._stored = stored
        self._location = location
        self._tensors: dict[str, TensorProto] = {}
        self._names: dict[str, int] = {}

    @property
    def initializers(self) -> list[TensorProto]:
        return list(self._tensors.values())

    def new(self, name: str) -> str:
        """`name`, with a number where it was given before."""
        number = self._names[name] = self._names.get(name, -1) + 1
        return f"{name}_{number}" if number else name

    def stored(self, name: str) -> str:
        """A tensor of the checkpoint as it is."""
        entry = self._stored[name]
        return self._external(name, _ONNX_DTYPES[entry.dtype], entry.shape, entry.begin, entry.end)

    def is_f32(self, name: str) -> bool:
        return name in self._tensors and self._tensors[name].data_type == TensorProto.FLOAT

    def float4_blocks(self, name: str, expert: int) -> str:
        """One expert's matrix as FLOAT4E2M1 [out, in]: the low nibble is the even element."""
        _, out, groups, _ = self._stored[f"{name}_blocks"].shape
        shape = (out, groups * MXFP4_BLOCK)
        return self._rows(f"{name}_blocks", expert, 1, TensorProto.FLOAT4E2M1, shape)

    def float4_scales(self, name: str, expert: int) -> str:
        """Its scales as FLOAT8E8M0 [out, in/32]: 2^(byte - 127)."""
        shape = self._stored[f"{name}_scales"].shape[1:]
        return self._rows(f"{name}_scales", expert, 1, TensorProto.FLOAT8E8M0, shape)

    def lm_head(self, row: int) -> str:
        """The next `_VOCABULARY_ROWS` rows (or fewer) from `row` on, as stored."""
        entry = self._stored["lm_head.weight"]
        vocabulary, hidden = entry.shape
        count = min(_VOCABULARY_ROWS, vocabulary - row)
        dtype = _ONNX_DTYPES[entry.dtype]
        return self._rows("lm_head.weight", row, count, dtype, (count, hidden))

    def constant(self, array: np.ndarray) -> str:
        """A small tensor within the graph, once for equal values."""
        name = f"const.{array.dtype}.{'x'.join(map(str, array.shape))}."
        name += hashlib.sha256(array.tobytes()).hexdigest()[:16]
        if name not in self._tensors:
            self._tensors[name] = onnx.numpy_helper.from_array(array, name)
        return name

    def _rows(self, name: str, first: int, count: int, dtype: int, shape: Sequence[int]) -> str:
        """Part of a tensor along its first axis, as a tensor of its own over the same bytes."""
        entry = self._stored[name]
        size = (entry.end - entry.begin) // entry.shape[0]
        begin = entry.begin + first * size
        return self._external(f"{name}.{first}", dtype, shape, begin, begin + count * size)

    def _external(self, name: str, dtype: int, shape: Sequence[int], begin: int, end: int) -> str:
        if name not in self._tensors:
            tensor = TensorProto(
                name=name,
                data_type=dtype,
                dims=shape,
                data_location=TensorProto.EXTERNAL,
            )
            place = {"location": self._location, "offset": begin, "length": end - begin}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            self._tensors[name] = tensor
        return name


class _Graph:
    """The nodes of a graph in order; each call adds one and returns what its output is called.

    An inner graph (a loop's body) has nodes of its own, and sees everything outside.
    """

    def __init__(self, weights: _Weights, scope: str = "") -> None:
        self.weights = weights
        self.scope = scope  # begins the names of what is computed
        self.nodes: list[onnx.NodeProto] = []

    def inner(self) -> _Graph:
        return _Graph(self.weights, self.scope)

    def new(self, name: str) -> str:
        return self.weights.new(self.scope + name)

    def node(
        self, kind: str, inputs: list[str], outputs: list[str], **attributes: Any
    ) -> list[str]:
        self.nodes.append(helper.make_node(kind, inputs, outputs, outputs[0], **attributes))
        return outputs

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """A node with one output."""
        return self.node(kind, list(inputs), [self.new(kind)], **attributes)[0]

    def stored(self, name: str) -> str:
        return self.weights.stored(name)

    def weight(self, name: str) -> str:
        """A dense tensor of the checkpoint in f32."""
        return self.to_f32(self.stored(name))

    def to_f32(self, x: str) -> str:
        return x if self.weights.is_f32(x) else self.op("Cast", x, to=TensorProto.FLOAT)

    def i64(self, values: int | list[int]) -> str:
        return self.weights.constant(np.array(values, np.int64))

    def f32(self, values: float | np.ndarray) -> str:
        return self.weights.constant(np.array(values, np.float32))


# -- writing it ------------------------------------------------------------------------------------


def _layout(checkpoint: Checkpoint) -> dict[str, _Stored]:
    """The place of every tensor in the data file, in the order in which the model uses them."""
    stored, end = {}, 0
    for name in expected_tensors(checkpoint.config):
        tensor = checkpoint.tensor(name)
        begin = end + -end % _ALIGNMENT
        end = begin + tensor.nbytes
        stored[name] = _Stored(tensor.dtype.name, tensor.shape, begin, end)
    return stored


def _write_data(
    checkpoint: Checkpoint, stored: dict[str, _Stored], path: Path, progress: bool
) -> str:
    """Copy the tensors to their places, one at a time; returns the checkpoint's fingerprint."""
    fingerprint = Fingerprint(checkpoint.config, checkpoint.generation_config.eos_token_ids)
    size = sum(entry.end - entry.begin for entry in stored.values())
    with (
        path.open("wb") as file,
        tqdm(total=size, unit="B", unit_scale=True, disable=not progress) as bar,
    ):
        for name, entry in stored.items():
            tensor = checkpoint.tensor(name)
            if name.endswith("_scales"):
                check_scales(name, tensor)
            content = tensor.reshape(-1).view(np.uint8)
            file.seek(entry.begin)
            for start in range(0, content.size, _PIECE):
                piece = content[start : start + _PIECE]
                file.write(piece.data)
                bar.update(piece.size)
            fingerprint.add(name, tensor)
            checkpoint.drop(name)
    return fingerprint.hexdigest()


class _Output:
    """The two files, written in a hidden folder beside their place and moved when complete.

    graph  where to write the graph; data  where to write the weights

    What a killed run left in the hidden folder is removed by the next one to the same output; a
    lock tells who still lives. OutputError where something is there already (without `force`) or
    cannot be replaced, where nothing can be written, or the disk is full.
    """

    def __init__(self, output: Path, force: bool) -> None:
        self.output = output.resolve()  # a link stays, what it points to is written
        self.force = force
        self._partial = self.output.with_name(f".{self.output.name}.partial")
        self.graph = self._partial / self.output.name
        self.data = self._partial / f"{self.output.name}.data"
        self._needed = 0
        self._lock: int | None = None

    def __enter__(self) -> _Output:
        with self._errors():
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self._check_replaceable()
            self._lock = self._locked_folder()
            for left in self._partial.iterdir():
                left.unlink()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
        # Only errors about our files are ours: the block reads a checkpoint, too.
        if isinstance(error, OSError) and self._is_ours(error):
            with self._errors():
                raise error

    def reserve(self, size: int) -> None:
        """Say that `size` bytes will be written in all; OutputError where they are not free."""
        self._needed = size
        if size > self._free():
            raise OutputError(self._full())

    def publish(self) -> None:
        """Move both files to their places."""
        for path in (self.data, self.graph):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        self._check_replaceable()
        # The graph goes first and comes last: where it is, its own weights are beside it.
        output, data = self._places()
        output.unlink(missing_ok=True)
        self.data.replace(data)
        self.graph.replace(output)

    def _check_replaceable(self) -> None:
        for path in self._places():
            if path.is_dir():
                raise OutputError(f"{path} is a folder; name a file to be made.")
            if path.exists() and not self.force:
                raise OutputError(
                    f"{path} exists already; choose another output, or --force to replace it."
                )

    def _locked_folder(self) -> int:
        """The hidden folder, made where it is not there and locked; the lock dies with us."""
        while True:
            self._partial.mkdir(exist_ok=True)
            folder = os.open(self._partial, os.O_RDONLY)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Another run may have removed it in between, and made a new one.
                if os.path.samestat(os.fstat(folder), self._partial.stat()):
                    return folder
            except BlockingIOError:
                os.close(folder)
                raise OutputError(
                    f"{self.output} is being written by another process; wait for it, or choose "
                    "another output."
                ) from None
            except FileNotFoundError:
                pass
            os.close(folder)

    def _is_ours(self, error: OSError) -> bool:
        ours = {self._partial, self.graph, self.data, *self._places()}
        return error.errno in _DISK_FULL or any(
            isinstance(name, str | Path) and Path(name) in ours
            for name in (error.filename, error.filename2)
        )

    def _places(self) -> tuple[Path, Path]:
        """Where graph and weights belong."""
        return self.output, self.output.with_name(self.data.name)

    def _free(self) -> int:
        return shutil.disk_usage(self.output.parent).free

    def _full(self) -> str:
        return (
            f"{self.output} needs {self._needed} bytes, but {self._free()} are free on its disk; "
            "free some space or choose another output."
        )

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in _DISK_FULL:
                raise OutputError(f"The disk is full: {self._full()}") from error
            raise OutputError(
                f"{self.output} cannot be written ({error.strerror or error}); choose another "
                "output."
            ) from error


_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
