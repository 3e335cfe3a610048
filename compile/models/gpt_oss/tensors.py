"""The tensors of a gpt-oss model: names, shapes and roles.

`_layer_tensors` and `tensors` are the one list; what is packed together and what OpenAI's original
files call them refers to its names.

Shapes: H hidden, Hq / Hkv heads of D, E experts, I intermediate, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mxforge.schedules.attention import QKV_INSERT
from mxforge.schedules.formats import ACTIVATIONS
from mxforge.schedules.moe import ROUTE

from ...config import Layout
from ..tensors import Fused, Tensor, TensorRole, Weight, WeightRole, layer_prefix
from .config import MXFP4_BLOCK, GptOssConfig

INV_FREQ = "rope.inv_freq"  # of no checkpoint: follows from the config
EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
LM_HEAD = "lm_head.weight"


def tensors(config: GptOssConfig) -> dict[str, Tensor]:
    """Every tensor of the architecture by name, in the order in which the model uses them."""
    hidden, vocabulary = config.hidden_size, config.vocab_size
    listed = [Tensor(EMBEDDING, (vocabulary, hidden), "embedding")]
    for layer in range(config.num_hidden_layers):
        listed += _layer_tensors(config, layer_prefix(layer))
    listed += [
        Tensor(FINAL_NORM, (hidden,), "norm"),
        Tensor(LM_HEAD, (vocabulary, hidden), "dense"),
    ]
    return {tensor.name: tensor for tensor in listed}


def _layer_tensors(config: GptOssConfig, prefix: str) -> list[Tensor]:
    h, i, e = config.hidden_size, config.intermediate_size, config.num_local_experts
    q, kv, block = config.q_size, config.kv_size, MXFP4_BLOCK
    shapes: dict[str, tuple[tuple[int, ...], TensorRole]] = {
        "input_layernorm.weight": ((h,), "norm"),
        "self_attn.q_proj.weight": ((q, h), "dense"),  # q = Hq·D
        "self_attn.q_proj.bias": ((q,), "bias"),
        "self_attn.k_proj.weight": ((kv, h), "dense"),  # kv = Hkv·D
        "self_attn.k_proj.bias": ((kv,), "bias"),
        "self_attn.v_proj.weight": ((kv, h), "dense"),
        "self_attn.v_proj.bias": ((kv,), "bias"),
        "self_attn.o_proj.weight": ((h, q), "dense"),
        "self_attn.o_proj.bias": ((h,), "bias"),
        "self_attn.sinks": ((config.num_attention_heads,), "sinks"),
        "post_attention_layernorm.weight": ((h,), "norm"),
        "mlp.router.weight": ((e, h), "router"),
        "mlp.router.bias": ((e,), "router_bias"),
        # Rows of gate and up alternate.
        "mlp.experts.gate_up_proj_blocks": ((e, 2 * i, h // block, block // 2), "blocks"),
        "mlp.experts.gate_up_proj_scales": ((e, 2 * i, h // block), "scales"),
        "mlp.experts.gate_up_proj_bias": ((e, 2 * i), "bias"),
        "mlp.experts.down_proj_blocks": ((e, h, i // block, block // 2), "blocks"),
        "mlp.experts.down_proj_scales": ((e, h, i // block), "scales"),
        "mlp.experts.down_proj_bias": ((e, h), "bias"),
    }
    return [
        Tensor(prefix + name, shape, role, absent=_is_absent(config, name, role))
        for name, (shape, role) in shapes.items()
    ]


def _is_absent(config: GptOssConfig, name: str, role: TensorRole) -> bool:
    return role == "bias" and name.startswith("self_attn.") and not config.attention_bias


def expected_tensors(config: GptOssConfig) -> dict[str, Tensor]:
    """Every tensor of a checkpoint with this config: `tensors` less the absent ones."""
    return {name: tensor for name, tensor in tensors(config).items() if not tensor.absent}


# -- what is packed -------------------------------------------------------------------------------

_QKV = ("q_proj", "k_proj", "v_proj")


def _mxfp4(name: str) -> tuple[str, ...]:
    return tuple(f"{name}_{part}" for part in ("blocks", "scales", "bias"))


# Of one layer, in the order of the library's arguments: name, role, and the tensors that it is made
# of where it is not the tensor of that name.
_LAYER_WEIGHTS: tuple[tuple[str, WeightRole, tuple[str, ...]], ...] = (
    ("input_layernorm.weight", "norm", ()),
    ("self_attn.qkv_proj.weight", "dense", tuple(f"self_attn.{name}.weight" for name in _QKV)),
    ("self_attn.qkv_proj.bias", "bias", tuple(f"self_attn.{name}.bias" for name in _QKV)),
    ("self_attn.sinks", "sinks", ()),
    ("self_attn.o_proj.weight", "dense", ()),
    ("self_attn.o_proj.bias", "bias", ()),
    ("post_attention_layernorm.weight", "norm", ()),
    ("mlp.router.weight", "router", ()),
    ("mlp.router.bias", "router_bias", ()),
    ("mlp.experts.gate_up_proj", "gate_up", _mxfp4("mlp.experts.gate_up_proj")),
    ("mlp.experts.down_proj", "down", _mxfp4("mlp.experts.down_proj")),
)


def kernel_arguments(config: GptOssConfig) -> dict[str, dict[str, Any]]:
    """Static arguments of the kernels that read weights, by the weight's name within the layer."""
    hidden, queries = config.hidden_size, config.q_size
    experts = config.expert_sizes

    def dense(rows: int, k: int, bias: bool = False, residual: bool = False) -> dict[str, Any]:
        return {"rows": rows, "k": k, "with_bias": bias, "with_residual": residual}

    return {
        "self_attn.qkv_proj.weight": dense(config.qkv_rows, hidden, bias=True),
        "self_attn.o_proj.weight": dense(hidden, queries, bias=True, residual=True),
        "mlp.router.weight": dense(config.num_local_experts, hidden, bias=True),
        "mlp.experts.gate_up_proj": {**experts, "limit": config.swiglu_limit},
        "mlp.experts.down_proj": experts,
        LM_HEAD: dense(config.vocab_size, hidden),
    }


def attention_arguments(config: GptOssConfig, kv: str) -> dict[str, Any]:
    """Static arguments that all kernels of attention have, with a cache in the format `kv`."""
    return {
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "kv_dtype": kv,
    }


def fused(config: GptOssConfig) -> dict[str, Fused]:
    """What may read a weight in one launch with what stands around it, by the weight's name within
    the layer."""
    normed = {"hidden": config.hidden_size, "eps": config.rms_norm_eps}
    routing = {"experts": config.num_local_experts, "top_k": config.num_experts_per_tok}
    return {
        "self_attn.qkv_proj.weight": Fused(
            QKV_INSERT,
            lambda precision: precision.dense_of(config.hidden_size).name,
            lambda precision: {**normed, **attention_arguments(config, precision.kv)},
        ),
        "mlp.router.weight": Fused(
            ROUTE,
            lambda precision: ACTIVATIONS[precision.activations].results.name,
            lambda _precision: normed | routing,
        ),
    }


def weights(config: GptOssConfig) -> list[Weight]:
    """Every weight in the order of the library's arguments; see `compile.weights` for packing."""
    known, static, together = tensors(config), kernel_arguments(config), fused(config)

    def weight(name: str, role: WeightRole, *parts: str, within: str = "") -> Weight:
        made_of = tuple(known[part] for part in parts or (name,))
        key = within or name
        return Weight(name, role, made_of, static=static.get(key, {}), fused=together.get(key))

    listed = [
        Weight(INV_FREQ, "constant", values=config.rope_inv_freq()),
        weight(EMBEDDING, "embedding"),
    ]
    for layer in range(config.num_hidden_layers):
        prefix = layer_prefix(layer)
        listed += [
            weight(prefix + name, role, *(prefix + part for part in parts), within=name)
            for name, role, parts in _LAYER_WEIGHTS
        ]
    return [*listed, weight(FINAL_NORM, "norm"), weight(LM_HEAD, "dense")]


def piece_weights(piece: str | int, names: Iterable[str]) -> list[str]:
    """Which of the library's weights a piece of the model takes: "embed", "head", or a layer.

    A packed weight may have more than one argument, whose names begin with the weight's.
    """
    wanted: tuple[str, ...]
    if isinstance(piece, int):
        wanted = (INV_FREQ, layer_prefix(piece))
    else:
        wanted = {"embed": (EMBEDDING,), "head": (FINAL_NORM, LM_HEAD)}[piece]
    return [name for name in names if name.startswith(wanted)]


# -- OpenAI's original files ----------------------------------------------------------------------

# Of one layer: name in the files -> the canonical tensors whose rows it holds, in this order.
_OPENAI_LAYER: dict[str, tuple[str, ...]] = {
    "attn.norm.scale": ("input_layernorm.weight",),
    **{
        f"attn.qkv.{kind}": tuple(f"self_attn.{name}.{kind}" for name in _QKV)
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


def stored_names(config: GptOssConfig, layout: Layout) -> dict[str, tuple[str, ...]]:
    """Names in the files of a layout -> the canonical tensors whose rows each holds."""
    if layout == "huggingface":
        return {name: (name,) for name in expected_tensors(config)}
    names: dict[str, tuple[str, ...]] = {"embedding.weight": (EMBEDDING,)}
    for layer in range(config.num_hidden_layers):
        prefix = layer_prefix(layer)
        for name, parts in _OPENAI_LAYER.items():
            names[f"block.{layer}.{name}"] = tuple(prefix + part for part in parts)
    return {**names, "norm.scale": (FINAL_NORM,), "unembedding.weight": (LM_HEAD,)}
