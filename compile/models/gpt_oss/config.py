"""GptOssConfig: every number of a gpt-oss model, parsed once, checked, frozen.

Nothing is assumed about the shape beyond what the architecture and the MXFP4 format themselves
demand; whatever follows from the numbers is a property here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from mxforge.errors import ConfigError

from ...config import (
    FULL,
    MODEL_INTEGERS,
    SLIDING,
    LayerType,
    Layout,
    ModelConfig,
    check_integer,
    check_real,
    named,
    nullable,
    required,
    wrong,
)

MXFP4_BLOCK = 32  # elements that share one scale byte
MXFP4_BLOCK_BYTES = 17  # 16 of nibbles, one of scale
SWIGLU_ALPHA = 1.702
DEFAULT_ROPE_THETA = 150000.0

_INTEGERS: dict[str, tuple[int, int]] = {
    **MODEL_INTEGERS,
    "num_local_experts": (1, 4096),
    "num_experts_per_tok": (1, 4096),
    "intermediate_size": (32, 1 << 17),
    "num_attention_heads": (1, 4096),
    "original_max_position_embeddings": (1, 1 << 24),
}
_REALS: dict[str, tuple[float, float]] = {
    "rms_norm_eps": (0.0, 1.0),
    "rope_theta": (1.0001, 1e12),
    "yarn_factor": (1e-3, 1e6),
    "beta_fast": (1e-6, 1e6),
    "beta_slow": (1e-6, 1e6),
    "swiglu_limit": (1e-3, 1e6),
    "swiglu_alpha": (SWIGLU_ALPHA, SWIGLU_ALPHA),
}
_BOOLEANS = ("truncate", "attention_bias")
_MULTIPLES = {"hidden_size": MXFP4_BLOCK, "intermediate_size": MXFP4_BLOCK, "head_dim": 2}


@dataclass(frozen=True)
class GptOssConfig(ModelConfig):
    """A model's numbers. Constructing one checks all of them; ConfigError names the wrong one."""

    integers: ClassVar[Mapping[str, tuple[int, int]]] = _INTEGERS

    intermediate_size: int
    num_attention_heads: int
    num_experts_per_tok: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = DEFAULT_ROPE_THETA
    rope_type: Literal["default", "yarn"] = "yarn"
    yarn_factor: float = 32.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    yarn_attention_factor: float | None = None  # None: 0.1·ln(yarn_factor) + 1
    swiglu_limit: float = 7.0
    swiglu_alpha: float = SWIGLU_ALPHA
    attention_bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, bounds in _REALS.items():
            object.__setattr__(self, name, check_real(name, getattr(self, name), bounds))
        if self.yarn_attention_factor is not None:
            factor = check_real("attention_factor", self.yarn_attention_factor, (1e-3, 1e3))
            object.__setattr__(self, "yarn_attention_factor", factor)
        for name in _BOOLEANS:
            if type(getattr(self, name)) is not bool:
                raise wrong(name, "true or false", getattr(self, name))
        for name, multiple in _MULTIPLES.items():
            if getattr(self, name) % multiple:
                raise wrong(name, f"a multiple of {multiple}", getattr(self, name))
        if self.rope_type not in ("default", "yarn"):
            raise wrong("rope_type", "'default' or 'yarn'", self.rope_type)
        if self.num_attention_heads % self.num_key_value_heads:
            raise wrong(
                "num_attention_heads",
                f"a multiple of num_key_value_heads ({self.num_key_value_heads})",
                self.num_attention_heads,
            )
        if self.num_experts_per_tok > self.num_local_experts:
            raise wrong(
                "num_experts_per_tok",
                f"at most num_local_experts ({self.num_local_experts})",
                self.num_experts_per_tok,
            )

    # -- parsing ------------------------------------------------------------------------------

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> GptOssConfig:
        """Parse the content of a Hugging Face config.json (transformers 4 and 5 spellings).

        ConfigError where a number is absent, of the wrong type, out of range, or in contradiction
        to another.
        """
        if not isinstance(raw, Mapping):
            raise wrong("config.json", "a JSON object", raw)
        _check_fixed(raw)
        layers = required(raw, "num_hidden_layers")
        layer_types: Any = raw.get("layer_types")
        if layer_types is None and type(layers) is int and 0 < layers <= 1024:
            layer_types = _alternating(layers)
        heads = required(raw, "num_attention_heads")
        hidden = required(raw, "hidden_size")
        head_dim = nullable(raw, "head_dim")
        if head_dim is None and type(heads) is int and type(hidden) is int and heads > 0:
            head_dim = hidden // heads
        kv_heads = nullable(raw, "num_key_value_heads")
        positions = required(raw, "max_position_embeddings")
        window: Any = raw.get("sliding_window")
        if window is None and isinstance(layer_types, list) and SLIDING not in layer_types:
            window = positions  # no layer uses it
        optional = {
            name: raw[name]
            for name in ("rms_norm_eps", "swiglu_limit", "swiglu_alpha", "attention_bias")
            if raw.get(name) is not None
        }
        return cls(
            num_hidden_layers=layers,
            hidden_size=hidden,
            intermediate_size=required(raw, "intermediate_size"),
            num_attention_heads=heads,
            num_key_value_heads=heads if kv_heads is None else kv_heads,
            head_dim=head_dim,
            num_local_experts=required(raw, "num_local_experts", "num_experts"),
            num_experts_per_tok=required(raw, "num_experts_per_tok", "experts_per_token"),
            vocab_size=required(raw, "vocab_size"),
            sliding_window=window,
            layer_types=layer_types,
            max_position_embeddings=positions,
            **_rope(raw, positions),
            **optional,
        )

    @classmethod
    def from_openai(cls, raw: Mapping[str, Any]) -> GptOssConfig:
        """Parse the content of the config.json of OpenAI's original checkpoints.

        It has no key for what the original code fixes: layers alternate from a sliding one on,
        YaRN's bounds are not truncated, and a rope_scaling_factor of at most 1 means plain RoPE.
        The context is initial_context_length · rope_scaling_factor. The original code knows no
        other keys, so another key may mean another model. ConfigError names what is wrong.
        """
        if not isinstance(raw, Mapping):
            raise wrong("config.json", "a JSON object", raw)
        if unknown := sorted(map(str, raw.keys() - _OPENAI_KEYS)):
            raise ConfigError(
                f"config.json has keys that OpenAI's layout does not know: "
                f"{named(unknown)}; remove them, or give a gpt-oss checkpoint."
            )
        # Checked under the names that the file has, so that an error finds its line.
        parsed: dict[str, Any] = {
            ours: check_integer(theirs, required(raw, theirs), _INTEGERS[ours])
            for theirs, ours in _OPENAI_INTEGERS.items()
        }
        parsed |= {
            ours: check_real(theirs, raw[theirs], _REALS[ours])
            for theirs, ours in _OPENAI_REALS.items()
            if raw.get(theirs) is not None
        }
        experts, chosen = parsed["num_local_experts"], parsed["num_experts_per_tok"]
        if chosen > experts:
            raise wrong("experts_per_token", f"at most num_experts ({experts})", chosen)
        context = check_integer(
            "initial_context_length",
            required(raw, "initial_context_length"),
            _INTEGERS["original_max_position_embeddings"],
        )
        factor = check_real(
            "rope_scaling_factor", required(raw, "rope_scaling_factor"), _REALS["yarn_factor"]
        )
        parsed["max_position_embeddings"] = check_integer(
            "initial_context_length · rope_scaling_factor",
            int(context * max(factor, 1.0)),
            _INTEGERS["max_position_embeddings"],
        )
        parsed["layer_types"] = _alternating(parsed["num_hidden_layers"])
        if factor > 1:
            return cls(
                **parsed,
                rope_type="yarn",
                yarn_factor=factor,
                original_max_position_embeddings=context,
                truncate=False,
            )
        unused = {name: default for name, default in _BETAS.items() if name in parsed}
        return cls(**{**parsed, **unused}, rope_type="default")

    # -- layers and heads ---------------------------------------------------------------------

    @property
    def queries_per_kv(self) -> int:
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def q_size(self) -> int:
        """Rows of q_proj, columns of o_proj: Hq·D."""
        return self.num_attention_heads * self.head_dim

    @property
    def qkv_rows(self) -> int:
        """Rows of q, k and v stacked: (Hq + 2·Hkv)·D."""
        return self.q_size + 2 * self.kv_size

    # -- rotary embedding ---------------------------------------------------------------------

    @property
    def rope_attention_factor(self) -> float:
        """What cos and sin are multiplied by: 0.1·ln(factor) + 1 for YaRN, 1 otherwise."""
        if self.rope_type == "default":
            return 1.0
        if self.yarn_attention_factor is not None:
            return self.yarn_attention_factor
        return _yarn_mscale(self.yarn_factor)

    def rope_inv_freq(self) -> np.ndarray:
        """Angle per position of each rotated pair, f32 [head_dim / 2].

        YaRN (arXiv 2309.00071, section 3.2): pairs that turn more than `beta_fast` times within
        the original context keep their frequency, those below `beta_slow` turns are slowed by
        `yarn_factor`, a linear ramp lies between. The order of float32 roundings is that of
        transformers' modeling_rope_utils, because at position 131,071 one unit in the last
        place of a frequency turns its pair by up to 0.008 rad. Powers are rounded correctly,
        as torch's are on plain CPUs; its AVX code is one unit off in a few pairs.
        """
        dim = self.head_dim
        exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
        base = np.float64(np.float32(self.rope_theta))
        wavelength = (base ** exponents.astype(np.float64)).astype(np.float32)
        fast = np.float32(1) / wavelength
        if self.rope_type == "default":
            return fast
        slow = np.float32(1) / (np.float32(self.yarn_factor) * wavelength)
        low, high = self._yarn_range()
        ramp = (np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
        keep = np.float32(1) - np.clip(ramp, np.float32(0), np.float32(1))
        mixed: np.ndarray = slow * (np.float32(1) - keep) + fast * keep
        return mixed

    def _yarn_range(self) -> tuple[float, float]:
        """Between which pairs the ramp lies; the outer bounds are 0 and head_dim - 1."""

        def pair_turning(times: float) -> float:
            turns = self.original_max_position_embeddings / (times * 2 * math.pi)
            return self.head_dim * math.log(turns) / (2 * math.log(self.rope_theta))

        low, high = pair_turning(self.beta_fast), pair_turning(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.head_dim - 1)
        return low, high + 0.001 if low == high else high

    # -- sizes and costs ----------------------------------------------------------------------

    @property
    def expert_sizes(self) -> dict[str, int]:
        return {
            "experts": self.num_local_experts,
            "top_k": self.num_experts_per_tok,
            "hidden": self.hidden_size,
            "intermediate": self.intermediate_size,
        }

    @property
    def expert_matrix_parameters(self) -> int:
        """Weights of one expert's two matrices, without biases."""
        return 3 * self.intermediate_size * self.hidden_size

    @property
    def expert_bytes(self) -> int:
        """One expert as stored: MXFP4 matrices and bf16 biases."""
        matrices = self.expert_matrix_parameters // MXFP4_BLOCK * MXFP4_BLOCK_BYTES
        return matrices + 2 * (2 * self.intermediate_size + self.hidden_size)

    @property
    def layer_dense_parameters(self) -> int:
        """One layer's attention, sinks, norms and router."""
        h = self.hidden_size
        biases = self.qkv_rows + h if self.attention_bias else 0
        attention = self.qkv_rows * h + h * self.q_size + biases + self.num_attention_heads
        return attention + 2 * h + self.num_local_experts * (h + 1)

    @property
    def parameter_count(self) -> int:
        expert = self.expert_matrix_parameters + 2 * self.intermediate_size + self.hidden_size
        layer = self.layer_dense_parameters + self.num_local_experts * expert
        ends = 2 * self.vocab_size * self.hidden_size + self.hidden_size
        return self.num_hidden_layers * layer + ends

    @property
    def active_parameter_count(self) -> int:
        """Parameters that take part in one token: chosen experts, lm_head, one embedding row."""
        expert = self.expert_matrix_parameters + 2 * self.intermediate_size + self.hidden_size
        layer = self.layer_dense_parameters + self.num_experts_per_tok * expert
        return self.num_hidden_layers * layer + (self.vocab_size + 2) * self.hidden_size

    @property
    def weight_bytes(self) -> int:
        """The checkpoint's tensors as published: bf16, with MXFP4 expert matrices."""
        layer = 2 * self.layer_dense_parameters + self.num_local_experts * self.expert_bytes
        ends = 2 * self.vocab_size * self.hidden_size + self.hidden_size
        return self.num_hidden_layers * layer + 2 * ends

    @property
    def active_bytes_per_token(self) -> int:
        """Weight bytes that decoding one token reads, as published: the floor of a decode step."""
        layer = 2 * self.layer_dense_parameters + self.num_experts_per_tok * self.expert_bytes
        return self.num_hidden_layers * layer + 2 * (self.vocab_size + 2) * self.hidden_size

    def decode_bytes(self, context: int, kv_element_bytes: int = 2) -> int:
        """Bytes that one decode step of one sequence cannot do without."""
        return self.active_bytes_per_token + self.kv_bytes_read(context, kv_element_bytes)


def config_layout(raw: Mapping[str, Any]) -> Layout | None:
    """Whose keys a gpt-oss config.json has, None where neither layout's; ConfigError where both."""
    hf = [key for key in raw if key in _HF_ONLY]
    openai = [key for key in raw if key in _OPENAI_ONLY]
    if hf and openai:
        raise ConfigError(
            f"config.json mixes two layouts: {hf[0]} is a key of Hugging Face's, {openai[0]} of "
            "OpenAI's original; keep the keys of one."
        )
    if hf:
        return "huggingface"
    return "openai" if openai or raw.keys() & _OPENAI_SIGNS else None


# Keys that a config may hold with one value only, since the formulas have no other.
_FIXED: dict[str, tuple[Any, str]] = {
    "hidden_act": ("silu", "the experts' activation is SwiGLU"),
    "tie_word_embeddings": (False, "lm_head is a tensor of its own"),
    "partial_rotary_factor": (1.0, "all of a head is rotated"),
}


def _check_fixed(raw: Mapping[str, Any]) -> None:
    for name, (value, why) in _FIXED.items():
        found = raw.get(name)
        if found is not None and (found != value or isinstance(found, bool) != (value is False)):
            raise ConfigError(
                f"{name} must be {value!r} in this architecture ({why}), "
                f"found {str(found)[:80]!r}; such a checkpoint cannot be compiled."
            )
    quantization = raw.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, Mapping) else None
        if method != "mxfp4":
            raise ConfigError(
                f"quantization_config.quant_method must be 'mxfp4', found {str(method)[:80]!r}; "
                "only MXFP4 experts can be compiled."
            )


def _alternating(layers: int) -> tuple[LayerType, ...]:
    return tuple(FULL if i % 2 else SLIDING for i in range(layers))


def _yarn_mscale(scale: float, weight: float = 1.0) -> float:
    return 1.0 if scale <= 1 else 0.1 * weight * math.log(scale) + 1.0


def _rope(raw: Mapping[str, Any], positions: Any) -> dict[str, Any]:
    """The rope_* and yarn fields from `rope_scaling` + `rope_theta` or `rope_parameters`.

    Without either, transformers gives this model YaRN with factor 32 and no truncation.
    """
    rope = raw.get("rope_scaling") or raw.get("rope_parameters")
    if rope is None:
        rope = {
            "rope_type": "yarn",
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        }
    if not isinstance(rope, Mapping):
        raise wrong("rope_scaling", "a JSON object", rope)
    if rope.keys() & {SLIDING, FULL}:
        raise ConfigError(
            "rope_parameters must be one set for all layers, found one per layer type; "
            "such a checkpoint cannot be compiled."
        )
    _check_fixed({"partial_rotary_factor": rope.get("partial_rotary_factor")})
    theta = rope.get("rope_theta")
    theta = raw.get("rope_theta") if theta is None else theta
    parsed: dict[str, Any] = {"rope_theta": DEFAULT_ROPE_THETA if theta is None else theta}
    parsed["rope_type"] = kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "yarn":
        return parsed
    original = rope.get("original_max_position_embeddings")
    original = positions if original is None else original
    factor = rope.get("factor")
    if factor is None and _in_range("max_position_embeddings", positions, original):
        factor = positions / original
    parsed |= {"yarn_factor": factor, "original_max_position_embeddings": original}
    parsed |= {name: rope.get(name) or default for name, default in _BETAS.items()}
    parsed["truncate"] = rope.get("truncate", True)
    parsed["yarn_attention_factor"] = rope.get("attention_factor")
    mscale, mscale_all = rope.get("mscale"), rope.get("mscale_all_dim")
    if parsed["yarn_attention_factor"] is None and mscale and mscale_all:
        bounds = _REALS["yarn_factor"]
        factor = check_real("yarn_factor", factor, bounds)
        parsed["yarn_attention_factor"] = _yarn_mscale(
            factor, check_real("mscale", mscale, bounds)
        ) / _yarn_mscale(factor, check_real("mscale_all_dim", mscale_all, bounds))
    return parsed


def _in_range(name: str, *values: object) -> bool:
    low, high = _INTEGERS[name]
    return all(type(value) is int and low <= value <= high for value in values)


_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}

# Keys of OpenAI's original config.json, and what they are called here.
_OPENAI_INTEGERS = {
    "num_hidden_layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "num_experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
    "vocab_size": "vocab_size",
    "sliding_window": "sliding_window",
}
_OPENAI_REALS = {
    "swiglu_limit": "swiglu_limit",
    "rope_theta": "rope_theta",
    "rope_ntk_beta": "beta_fast",
    "rope_ntk_alpha": "beta_slow",
}
_OPENAI_KEYS = frozenset(
    {*_OPENAI_INTEGERS, *_OPENAI_REALS, "initial_context_length", "rope_scaling_factor"}
)

# What tells the layouts apart: keys that only one of them has. The published Hugging Face files
# say experts_per_token and initial_context_length, too, so these only count without such a key.
_OPENAI_ONLY = frozenset({"rope_scaling_factor", "rope_ntk_beta", "rope_ntk_alpha"})
_OPENAI_SIGNS = frozenset({"num_experts", "experts_per_token", "initial_context_length"})
_HF_ONLY = frozenset(
    {
        "architectures",
        "layer_types",
        "max_position_embeddings",
        "model_type",
        "num_experts_per_tok",
        "num_local_experts",
        "rope_parameters",
        "rope_scaling",
    }
)
