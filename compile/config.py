"""ModelConfig: every number of a gpt-oss model, parsed once, checked, frozen.

Field names are Hugging Face's. Nothing is assumed about the shape beyond what the architecture
and the MXFP4 format themselves demand; whatever follows from the numbers is a property here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mxforge.errors import ConfigError, UnknownArchitectureError

Layout = Literal["huggingface", "openai"]
LayerType = Literal["sliding_attention", "full_attention"]
SLIDING: LayerType = "sliding_attention"
FULL: LayerType = "full_attention"

MXFP4_BLOCK = 32  # elements that share one scale byte
MXFP4_BLOCK_BYTES = 17  # 16 of nibbles, one of scale
SWIGLU_ALPHA = 1.702
DEFAULT_ROPE_THETA = 150000.0

# Ranges keep every product of two sizes inside 64 bits and every position exact in float32.
_INTEGERS: dict[str, tuple[int, int]] = {
    "num_hidden_layers": (1, 1024),
    "hidden_size": (32, 1 << 17),
    "intermediate_size": (32, 1 << 17),
    "num_attention_heads": (1, 4096),
    "num_key_value_heads": (1, 4096),
    "head_dim": (2, 1024),
    "num_local_experts": (1, 4096),
    "num_experts_per_tok": (1, 4096),
    "vocab_size": (1, 1 << 24),
    "sliding_window": (1, 1 << 24),
    "max_position_embeddings": (1, 1 << 24),
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
class ModelConfig:
    """A model's numbers. Constructing one checks all of them; ConfigError names the wrong one."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_local_experts: int
    num_experts_per_tok: int
    vocab_size: int
    sliding_window: int
    layer_types: tuple[LayerType, ...]
    max_position_embeddings: int
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
        for name, between in _INTEGERS.items():
            _integer(name, getattr(self, name), between)
        for name, bounds in _REALS.items():
            object.__setattr__(self, name, _real(name, getattr(self, name), bounds))
        if self.yarn_attention_factor is not None:
            factor = _real("attention_factor", self.yarn_attention_factor, (1e-3, 1e3))
            object.__setattr__(self, "yarn_attention_factor", factor)
        for name in _BOOLEANS:
            if type(getattr(self, name)) is not bool:
                raise _wrong(name, "true or false", getattr(self, name))
        for name, multiple in _MULTIPLES.items():
            if getattr(self, name) % multiple:
                raise _wrong(name, f"a multiple of {multiple}", getattr(self, name))
        if self.rope_type not in ("default", "yarn"):
            raise _wrong("rope_type", "'default' or 'yarn'", self.rope_type)
        if self.num_attention_heads % self.num_key_value_heads:
            raise _wrong(
                "num_attention_heads",
                f"a multiple of num_key_value_heads ({self.num_key_value_heads})",
                self.num_attention_heads,
            )
        if self.num_experts_per_tok > self.num_local_experts:
            raise _wrong(
                "num_experts_per_tok",
                f"at most num_local_experts ({self.num_local_experts})",
                self.num_experts_per_tok,
            )
        self._check_layer_types()

    def _check_layer_types(self) -> None:
        types = self.layer_types
        if isinstance(types, str) or not isinstance(types, Sequence):
            raise _wrong("layer_types", "a list of layer types", types)
        if len(types) != self.num_hidden_layers:
            raise ConfigError(
                f"layer_types must name all {self.num_hidden_layers} layers "
                f"(num_hidden_layers), found {len(types)} names; correct config.json."
            )
        for kind in types:
            if kind not in (SLIDING, FULL):
                raise _wrong("layer_types", f"made of {SLIDING!r} and {FULL!r}", kind)
        object.__setattr__(self, "layer_types", tuple(types))

    # -- parsing ------------------------------------------------------------------------------

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Parse the content of a Hugging Face config.json (transformers 4 and 5 spellings).

        UnknownArchitectureError where it is another model; ConfigError where a number is
        absent, of the wrong type, out of range, or in contradiction to another.
        """
        if not isinstance(raw, Mapping):
            raise _wrong("config.json", "a JSON object", raw)
        _check_architecture(raw)
        _check_fixed(raw)
        layers = _required(raw, "num_hidden_layers")
        layer_types: Any = raw.get("layer_types")
        if layer_types is None and type(layers) is int and 0 < layers <= 1024:
            layer_types = _alternating(layers)
        heads = _required(raw, "num_attention_heads")
        hidden = _required(raw, "hidden_size")
        head_dim = _nullable(raw, "head_dim")
        if head_dim is None and type(heads) is int and type(hidden) is int and heads > 0:
            head_dim = hidden // heads
        kv_heads = _nullable(raw, "num_key_value_heads")
        positions = _required(raw, "max_position_embeddings")
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
            intermediate_size=_required(raw, "intermediate_size"),
            num_attention_heads=heads,
            num_key_value_heads=heads if kv_heads is None else kv_heads,
            head_dim=head_dim,
            num_local_experts=_required(raw, "num_local_experts", "num_experts"),
            num_experts_per_tok=_required(raw, "num_experts_per_tok", "experts_per_token"),
            vocab_size=_required(raw, "vocab_size"),
            sliding_window=window,
            layer_types=layer_types,
            max_position_embeddings=positions,
            **_rope(raw, positions),
            **optional,
        )

    @classmethod
    def from_openai(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Parse the content of the config.json of OpenAI's original checkpoints.

        It has no key for what the original code fixes: layers alternate from a sliding one on,
        YaRN's bounds are not truncated, and a rope_scaling_factor of at most 1 means plain RoPE.
        The context is initial_context_length · rope_scaling_factor. The original code knows no
        other keys, so another key may mean another model. ConfigError names what is wrong.
        """
        if not isinstance(raw, Mapping):
            raise _wrong("config.json", "a JSON object", raw)
        if unknown := sorted(map(str, raw.keys() - _OPENAI_KEYS)):
            raise ConfigError(
                f"config.json has keys that OpenAI's layout does not know: "
                f"{_named(unknown)}; remove them, or give a gpt-oss checkpoint."
            )
        # Checked under the names that the file has, so that an error finds its line.
        parsed: dict[str, Any] = {
            ours: _integer(theirs, _required(raw, theirs), _INTEGERS[ours])
            for theirs, ours in _OPENAI_INTEGERS.items()
        }
        parsed |= {
            ours: _real(theirs, raw[theirs], _REALS[ours])
            for theirs, ours in _OPENAI_REALS.items()
            if raw.get(theirs) is not None
        }
        experts, chosen = parsed["num_local_experts"], parsed["num_experts_per_tok"]
        if chosen > experts:
            raise _wrong("experts_per_token", f"at most num_experts ({experts})", chosen)
        context = _integer(
            "initial_context_length",
            _required(raw, "initial_context_length"),
            _INTEGERS["original_max_position_embeddings"],
        )
        factor = _real(
            "rope_scaling_factor", _required(raw, "rope_scaling_factor"), _REALS["yarn_factor"]
        )
        parsed["max_position_embeddings"] = _integer(
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

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Parse the content of a config.json of either layout; see `config_layout`."""
        return cls.from_openai(raw) if config_layout(raw) == "openai" else cls.from_hf(raw)

    @classmethod
    def from_file(cls, path: str | Path) -> ModelConfig:
        """`from_json` of a config.json on disk; ConfigError where it cannot be read."""
        return cls.from_json(read_json_object(Path(path)))

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values; `from_dict` takes them back."""
        return {**asdict(self), "layer_types": list(self.layer_types)}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`; ConfigError where a field is unknown, missing or wrong."""
        if not isinstance(raw, Mapping):
            raise _wrong("config", "a JSON object", raw)
        known = {field.name: field for field in fields(cls)}
        needed = {name for name, field in known.items() if field.default is MISSING}
        if unknown := sorted(map(str, raw.keys() - known.keys())):
            raise ConfigError(f"Unknown config fields: {_named(unknown)}; remove them.")
        if absent := sorted(needed - raw.keys()):
            raise ConfigError(f"Missing config fields: {', '.join(absent)}; add them.")
        return cls(**raw)

    # -- layers and heads ---------------------------------------------------------------------

    @property
    def queries_per_kv(self) -> int:
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def q_size(self) -> int:
        """Rows of q_proj, columns of o_proj: Hq·D."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of k_proj and of v_proj: Hkv·D."""
        return self.num_key_value_heads * self.head_dim

    @property
    def qkv_rows(self) -> int:
        """Rows of q, k and v stacked: (Hq + 2·Hkv)·D."""
        return self.q_size + 2 * self.kv_size

    @property
    def sliding_layers(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == SLIDING)

    @property
    def full_layers(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == FULL)

    def window(self, layer: int) -> int:
        """How many keys a query of this layer may see, its own included; 0 on full layers."""
        return self.sliding_window if self.layer_types[layer] == SLIDING else 0

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

    def kv_bytes_per_token(self, kind: LayerType = FULL, element_bytes: int = 2) -> int:
        """Bytes of keys and values that one token adds, over all layers of `kind`."""
        return self.layer_types.count(kind) * 2 * self.kv_size * element_bytes

    def kv_bytes_read(self, context: int, element_bytes: int = 2) -> int:
        """Bytes of keys and values that a token at position `context` - 1 reads, window heeded."""
        sliding = min(context, self.sliding_window)
        return context * self.kv_bytes_per_token(FULL, element_bytes) + (
            sliding * self.kv_bytes_per_token(SLIDING, element_bytes)
        )

    def decode_bytes(self, context: int, kv_element_bytes: int = 2) -> int:
        """Bytes that one decode step of one sequence cannot do without."""
        return self.active_bytes_per_token + self.kv_bytes_read(context, kv_element_bytes)


def config_layout(raw: Mapping[str, Any]) -> Layout:
    """Whose keys a config.json has; ConfigError where it has both layouts'.

    Where it has neither's, UnknownArchitectureError.
    """
    hf = [key for key in raw if key in _HF_ONLY]
    openai = [key for key in raw if key in _OPENAI_ONLY]
    if hf and openai:
        _check_architecture({"model_type": "gpt_oss", **raw})
        raise ConfigError(
            f"config.json mixes two layouts: {hf[0]} is a key of Hugging Face's, {openai[0]} of "
            "OpenAI's original; keep the keys of one."
        )
    if hf:
        return "huggingface"
    if openai or raw.keys() & _OPENAI_SIGNS:
        return "openai"
    raise UnknownArchitectureError(
        "Expected the config.json of a gpt-oss checkpoint, in Hugging Face's layout (model_type "
        "'gpt_oss') or OpenAI's original (num_experts, rope_scaling_factor), found "
        f"{_named(raw) or 'no keys'}; no other architecture can be compiled."
    )


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a small file of a checkpoint; ConfigError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror or error}. Check the path and permissions."
        ) from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:100]
        raise ConfigError(f"{path} is not valid JSON ({reason}). Fetch it again.") from error
    if _deeper(value, _NESTING):  # close to Python's limit it could be read, but not shown
        raise ConfigError(f"{path} is not valid JSON (nested too deeply). Fetch it again.")
    if not isinstance(value, dict):
        raise _wrong(str(path), "a JSON object", value)
    return value


_NESTING = 64


def _deeper(value: object, most: int) -> bool:
    if not isinstance(value, (dict, list)):
        return False
    entries = value.values() if isinstance(value, dict) else value
    return most == 0 or any(_deeper(entry, most - 1) for entry in entries)


def _named(keys: Iterable[str]) -> str:
    """Foreign keys, as a terminal can show them."""
    return ", ".join(ascii(key)[1:-1] for key in keys)[:160]


def _wrong(name: str, expected: str, found: object) -> ConfigError:
    shown = repr(found)
    shown = shown if len(shown) <= 80 else shown[:77] + "…"
    return ConfigError(f"{name} must be {expected}, found {shown}; correct config.json.")


def _integer(name: str, value: Any, bounds: tuple[int, int]) -> int:
    low, high = bounds
    if type(value) is not int or not low <= value <= high:
        raise _wrong(name, f"an integer from {low} to {high}", value)
    return value


def _real(name: str, value: object, bounds: tuple[float, float]) -> float:
    low, high = bounds
    # NaN fails the comparison, infinities the bounds.
    if type(value) not in (int, float) or not low <= value <= high:  # type: ignore[operator]
        expected = f"{low:g}" if low == high else f"a number from {low:g} to {high:g}"
        raise _wrong(name, expected, value)
    return float(value)  # type: ignore[arg-type]


def _check_architecture(raw: Mapping[str, Any]) -> None:
    model_type, architectures = raw.get("model_type"), raw.get("architectures")
    named = architectures if isinstance(architectures, list) else []
    if model_type == "gpt_oss" and (not named or "GptOssForCausalLM" in named):
        return
    if model_type is None and "GptOssForCausalLM" in named:
        return
    found = f"model_type {model_type!r}, architectures {architectures!r}"
    raise UnknownArchitectureError(
        f"Expected a gpt-oss checkpoint (model_type 'gpt_oss', architecture 'GptOssForCausalLM'), "
        f"found {found[:160]}; no other architecture can be compiled."
    )


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


def _required(raw: Mapping[str, Any], *names: str) -> Any:
    """The value under the first of `names` (the others are aliases that must agree)."""
    found = {name: raw[name] for name in names if raw.get(name) is not None}
    if not found:
        raise ConfigError(f"{names[0]} is missing; add it to config.json.")
    values = list(found.values())
    if any(value != values[0] for value in values):
        raise ConfigError(f"{' and '.join(found)} contradict each other; correct config.json.")
    return values[0]


def _nullable(raw: Mapping[str, Any], name: str) -> Any:
    if name not in raw:
        raise ConfigError(f"{name} is missing; add it to config.json (null for the default).")
    return raw[name]


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
        raise _wrong("rope_scaling", "a JSON object", rope)
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
        factor = _real("yarn_factor", factor, bounds)
        parsed["yarn_attention_factor"] = _yarn_mscale(
            factor, _real("mscale", mscale, bounds)
        ) / _yarn_mscale(factor, _real("mscale_all_dim", mscale_all, bounds))
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
