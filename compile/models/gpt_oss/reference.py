"""The model in NumPy, layer by layer: what every compiled tensor is held against.

Formulas are those of openai/gpt-oss (gpt_oss/torch/model.py, weights.py) and of Hugging Face
transformers 5.23 (models/gpt_oss/modeling_gpt_oss.py, integrations/mxfp4.py), which agree but
for names; tests/compile/models/gpt_oss/test_reference.py compares with the latter. Weights are read
from the checkpoint as a layer asks for them and MXFP4 experts are expanded one at a time, so a 20b
checkpoint needs little more than its largest dense tensor.

Shapes: n tokens, H hidden, Hq / Hkv heads of D, E experts, k chosen, I intermediate, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from mxforge.errors import TokenRangeError

from ...checkpoint import Checkpoint, HFCheckpoint, check_scales, open_checkpoint
from ...config import read_json_object
from ..tensors import layer_prefix
from . import tensors
from .config import GptOssConfig

if TYPE_CHECKING:
    import transformers

# e2m1: sign, two exponent bits, one mantissa bit (OCP Microscaling Formats 1.0, section 5.3.3).
_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
# Both values of each byte; the low nibble is the even element.
_E2M1_PAIRS = np.stack([_E2M1[np.arange(256) & 15], _E2M1[np.arange(256) >> 4]], axis=1)

_VOCABULARY_ROWS = 16384  # lm_head rows converted at a time


def dequantize_mxfp4(blocks: np.ndarray, scales: np.ndarray, dtype: Any = np.float32) -> np.ndarray:
    """value = e2m1 · 2^(scale - 127), exact within the range of `dtype`.

    blocks u8 [..., groups, 16], scales u8 [..., groups] → dtype [..., groups·32].
    """
    # One look-up a byte: a complex number is the pair of reals that the byte stands for.
    pairs = _E2M1_PAIRS.astype(dtype).view(np.result_type(dtype, np.complex64))[:, 0]
    values: np.ndarray = pairs.take(blocks).view(dtype)  # [..., groups, 32]
    values *= np.ldexp(np.ones((), dtype), scales.astype(np.int32) - 127)[..., None]
    return values.reshape(*blocks.shape[:-2], blocks.shape[-2] * 32)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x²) + eps) · weight over the last axis."""
    mean = np.mean(x * x, axis=-1, keepdims=True, dtype=x.dtype)
    normed: np.ndarray = weight * (x / np.sqrt(mean + x.dtype.type(eps)))
    return normed


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    e: np.ndarray = np.exp(x - x.max(axis=-1, keepdims=True))
    share: np.ndarray = e / e.sum(axis=-1, keepdims=True)
    return share


def swiglu(gate_up: np.ndarray, limit: float, alpha: float) -> np.ndarray:
    """[..., 2·I] with gate and up interleaved → [..., I].

    g = min(g, limit), u = clamp(u, ±limit), y = g · sigmoid(alpha · g) · (u + 1).
    """
    real = gate_up.dtype.type
    gate = np.minimum(gate_up[..., 0::2], real(limit))
    up = np.clip(gate_up[..., 1::2], real(-limit), real(limit))
    with np.errstate(over="ignore"):  # a very negative gate: exp → inf, sigmoid → 0, rightly
        sigmoid = 1 / (1 + np.exp(real(-alpha) * gate))
    y: np.ndarray = gate * sigmoid * (up + 1)
    return y


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    """Half-split (NeoX) pairing: x [n, heads, D], cos and sin [n, D/2]."""
    first, second = np.split(x, 2, axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


@dataclass(frozen=True)
class LayerTrace:
    """Every tensor of one layer worth comparing, in the order of computation."""

    attention_input: np.ndarray  # [n, H]     after input_layernorm
    queries: np.ndarray  # [n, Hq, D]  rotated
    keys: np.ndarray  # [n, Hkv, D]  rotated
    values: np.ndarray  # [n, Hkv, D]
    attention: np.ndarray  # [n, Hq·D]  before o_proj
    after_attention: np.ndarray  # [n, H]  residual stream
    mlp_input: np.ndarray  # [n, H]     after post_attention_layernorm
    router_logits: np.ndarray  # [n, E]
    expert_ids: np.ndarray  # i32 [n, k]  descending by logit, lower id first among equals
    expert_weights: np.ndarray  # [n, k]  softmax over the chosen logits
    output: np.ndarray  # [n, H]        residual stream

    @property
    def router_gap(self) -> np.ndarray:
        """[n]: by how much the last chosen logit leads the best one left out (inf if none is)."""
        k = self.expert_ids.shape[1]
        ordered = np.sort(self.router_logits, axis=-1)[:, ::-1]
        if k == ordered.shape[1]:
            return np.full(len(ordered), np.inf, ordered.dtype)
        gap: np.ndarray = ordered[:, k - 1] - ordered[:, k]
        return gap


class ReferenceModel:
    """The model over a checkpoint, in `dtype` (float32 or float64), one sequence at a time.

    float64 computes everything in float64 except the rotary angles, which are float32 products
    by definition: position · inv_freq rounded otherwise is another model.
    """

    def __init__(self, checkpoint: Checkpoint | str | Path, dtype: Any = np.float32) -> None:
        if isinstance(checkpoint, str | Path):
            checkpoint = open_checkpoint(checkpoint)
        self.checkpoint = checkpoint
        self.checkpoint.check()
        self.config = cast("GptOssConfig", self.checkpoint.config)
        self._tensors = tensors.tensors(self.config)
        self.dtype = np.dtype(dtype)
        self._inv_freq = self.config.rope_inv_freq()

    def weight(self, name: str) -> np.ndarray:
        """A dense tensor of the checkpoint, converted to the model's dtype."""
        return self.checkpoint.tensor(name).astype(self.dtype)

    def expert(self, layer: int, projection: str, expert: int) -> np.ndarray:
        """The matrix [out, in] of one expert; `projection` is 'gate_up_proj' or 'down_proj'."""
        name = f"{layer_prefix(layer)}mlp.experts.{projection}"
        scales = self.checkpoint.tensor(f"{name}_scales")[expert]
        check_scales(f"{name}_scales[{expert}]", scales)
        return dequantize_mxfp4(
            self.checkpoint.tensor(f"{name}_blocks")[expert], scales, self.dtype
        )

    def embed(self, tokens: Sequence[int] | np.ndarray) -> np.ndarray:
        """[n] token ids → [n, H]; TokenRangeError outside the vocabulary."""
        ids = np.asarray(tokens, np.int64)
        if ids.size and (ids.min() < 0 or ids.max() >= self.config.vocab_size):
            raise TokenRangeError(
                f"Token ids must lie in 0…{self.config.vocab_size - 1}, "
                f"found {ids.min()} to {ids.max()}."
            )
        return self.checkpoint.tensor(tensors.EMBEDDING)[ids].astype(self.dtype)

    def rope_table(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin [n, D/2] of the float32 angles, both times the attention factor."""
        angles = np.asarray(positions).astype(np.float32)[:, None] * self._inv_freq
        factor = self.dtype.type(self.config.rope_attention_factor)
        angles = angles.astype(self.dtype)
        return np.cos(angles) * factor, np.sin(angles) * factor

    def layer(
        self,
        layer: int,
        x: np.ndarray,
        positions: np.ndarray | None = None,
        expert_ids: np.ndarray | None = None,
    ) -> LayerTrace:
        """One layer over one sequence, every token seeing those before it.

        x [n, H] residual stream; positions i [n], ascending, 0…n-1 by default; expert_ids
        i32 [n, k] pins the routing (the weights are still the softmax of their own logits).
        """
        config, prefix = self.config, layer_prefix(layer)
        x = np.asarray(x, self.dtype)
        positions = np.arange(len(x)) if positions is None else np.asarray(positions)
        n, d = len(x), config.head_dim

        attention_input = self._norm(prefix + "input_layernorm.weight", x)
        cos, sin = self.rope_table(positions)
        q = self._linear(prefix + "self_attn.q_proj", attention_input).reshape(n, -1, d)
        k = self._linear(prefix + "self_attn.k_proj", attention_input).reshape(n, -1, d)
        values = self._linear(prefix + "self_attn.v_proj", attention_input).reshape(n, -1, d)
        queries, keys = rotate(q, cos, sin), rotate(k, cos, sin)
        sinks = self.weight(prefix + "self_attn.sinks")
        attention = self._attention(queries, keys, values, sinks, positions, config.window(layer))
        after_attention = x + self._linear(prefix + "self_attn.o_proj", attention)

        mlp_input = self.mlp_norm(layer, after_attention)
        logits = self._linear(prefix + "mlp.router", mlp_input)
        if expert_ids is None:
            expert_ids = np.argsort(-logits, axis=-1, kind="stable")[
                :, : config.num_experts_per_tok
            ]
        weights = softmax(np.take_along_axis(logits, expert_ids, axis=-1))
        output = after_attention + self._experts(layer, mlp_input, expert_ids, weights)
        return LayerTrace(
            attention_input,
            queries,
            keys,
            values,
            attention,
            after_attention,
            mlp_input,
            logits,
            expert_ids.astype(np.int32),
            weights,
            output,
        )

    def mlp_norm(self, layer: int, x: np.ndarray) -> np.ndarray:
        """x [n, H], the residual stream after attention, as router and experts take it."""
        return self._norm(layer_prefix(layer) + "post_attention_layernorm.weight", x)

    def router(self, layer: int) -> np.ndarray:
        """The router's matrix [E, H]."""
        return self.weight(layer_prefix(layer) + "mlp.router.weight")

    def head(self, x: np.ndarray) -> np.ndarray:
        """Final norm and lm_head: [m, H] → logits [m, V]."""
        normed = self._norm(tensors.FINAL_NORM, np.asarray(x, self.dtype))
        table = self.checkpoint.tensor(tensors.LM_HEAD)
        logits = np.empty((len(normed), self.config.vocab_size), self.dtype)
        for row in range(0, len(table), _VOCABULARY_ROWS):
            rows = table[row : row + _VOCABULARY_ROWS].astype(self.dtype)
            logits[:, row : row + len(rows)] = normed @ rows.T
        return logits

    def trace(self, tokens: Sequence[int] | np.ndarray) -> Iterator[LayerTrace]:
        """The layers of one sequence from position 0, one after the other."""
        x = self.embed(tokens)
        for layer in range(self.config.num_hidden_layers):
            trace = self.layer(layer, x)
            yield trace
            x = trace.output

    def logits(
        self, tokens: Sequence[int] | np.ndarray, rows: Sequence[int] | np.ndarray | None = None
    ) -> np.ndarray:
        """Logits [n, V] of one sequence from position 0, or only those of the positions `rows`."""
        x = self.embed(tokens)
        for trace in self.trace(tokens):
            x = trace.output
        return self.head(x if rows is None else x[np.asarray(rows)])

    def _norm(self, name: str, x: np.ndarray) -> np.ndarray:
        return rms_norm(x, self.weight(name), self.config.rms_norm_eps)

    def _linear(self, name: str, x: np.ndarray) -> np.ndarray:
        y: np.ndarray = x @ self.weight(f"{name}.weight").T
        bias = self._tensors[f"{name}.bias"]
        return y if bias.absent else y + self.weight(bias.name)

    def _attention(
        self,
        queries: np.ndarray,
        keys: np.ndarray,
        values: np.ndarray,
        sinks: np.ndarray,
        positions: np.ndarray,
        window: int,
    ) -> np.ndarray:
        """softmax over [q·k / √D of the visible keys, sink], the sink's share dropped.

        Key j is visible to query i where i - window < j ≤ i (j ≤ i with window 0).
        """
        n, d = len(queries), self.config.head_dim
        behind = positions[:, None] - positions[None, :]
        visible = (behind >= 0) & ((behind < window) if window else True)
        group = self.config.queries_per_kv
        out = np.empty((n, self.config.num_attention_heads, d), self.dtype)
        scale = self.dtype.type(d**-0.5)
        for head in range(self.config.num_attention_heads):
            scores = queries[:, head] @ keys[:, head // group].T * scale
            scores = np.where(visible, scores, -np.inf)
            with_sink = np.concatenate(
                [scores, np.broadcast_to(sinks[head], (n, 1))], axis=1, dtype=self.dtype
            )
            out[:, head] = softmax(with_sink)[:, :-1] @ values[:, head // group]
        return out.reshape(n, -1)

    def _experts(
        self, layer: int, x: np.ndarray, expert_ids: np.ndarray, weights: np.ndarray
    ) -> np.ndarray:
        """Σ weight · (down(swiglu(gate_up(x))) + bias) over each token's experts."""
        config, name = self.config, f"{layer_prefix(layer)}mlp.experts"
        gate_up_bias = self.weight(f"{name}.gate_up_proj_bias")
        down_bias = self.weight(f"{name}.down_proj_bias")
        total = np.zeros_like(x)
        for expert in np.unique(expert_ids):
            token, choice = np.nonzero(expert_ids == expert)
            gate_up = x[token] @ self.expert(layer, "gate_up_proj", expert).T + gate_up_bias[expert]
            y = swiglu(gate_up, config.swiglu_limit, config.swiglu_alpha)
            y = y @ self.expert(layer, "down_proj", expert).T + down_bias[expert]
            total[token] += y * weights[token, choice, None]
        return total


def transformers_model(checkpoint: HFCheckpoint) -> transformers.GptOssForCausalLM:
    """The same checkpoint in Hugging Face transformers: float32, eager attention, no KV cache.

    transformers' own loader expands MXFP4 into bfloat16 only, so the experts are expanded here
    and the state dict is filled by hand; they are stored [E, in, out] there. Needs torch and
    transformers (the dependency group `reference`).
    """
    import torch
    from transformers import GptOssConfig, GptOssForCausalLM

    raw = read_json_object(checkpoint.path / "config.json")
    raw.pop("quantization_config", None)
    config = GptOssConfig.from_dict(raw)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    config.use_cache = False
    with torch.device("meta"):
        empty: Any = GptOssForCausalLM(config)
    model: GptOssForCausalLM = empty.to_empty(device="cpu").float().eval()
    source = ReferenceModel(checkpoint, np.float32)
    state = {}
    for name in model.state_dict():
        owner, _, projection = name.rpartition(".")
        if owner.endswith("experts") and projection in ("gate_up_proj", "down_proj"):
            layer = int(owner.split(".")[2])
            experts = range(source.config.num_local_experts)
            array = np.stack([source.expert(layer, projection, e).T for e in experts])
        else:
            array = source.weight(name)
        state[name] = torch.from_numpy(np.ascontiguousarray(array))
    model.load_state_dict(state, strict=True, assign=True)
    # The rotary buffers are not part of the state and were lost with the meta device.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def transformers_logits(
    model: transformers.GptOssForCausalLM, tokens: Sequence[int] | np.ndarray
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Logits f32 [n, V] of one sequence, and the residual stream [n, H] before each layer.

    The last entry of the list is the stream after the last layer and the final norm.
    """
    import torch

    ids = torch.from_numpy(np.asarray(tokens, np.int64))[None]
    with torch.no_grad():
        result = model(ids, use_cache=False, output_hidden_states=True)
    return result.logits[0].numpy(), [state[0].numpy() for state in result.hidden_states]
