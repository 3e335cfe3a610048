"""What is known of every model: `ModelConfig`, and what the families' own configs are read with.

A family's config is a frozen dataclass derived from ModelConfig, parsed once and checked. Field
names are Hugging Face's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

from mxforge.errors import ConfigError

Layout = Literal["huggingface", "openai"]
LayerType = Literal["sliding_attention", "full_attention"]
SLIDING: LayerType = "sliding_attention"
FULL: LayerType = "full_attention"
# What the library's functions, tables and pages of each type are called by.
Kind = Literal["sliding", "full"]
KINDS: tuple[Kind, ...] = ("sliding", "full")
_KIND_OF: dict[LayerType, Kind] = {SLIDING: "sliding", FULL: "full"}

# Ranges keep every product of two sizes inside 64 bits and every position exact in float32.
MODEL_INTEGERS: dict[str, tuple[int, int]] = {
    "num_hidden_layers": (1, 1024),
    "hidden_size": (32, 1 << 17),
    "num_key_value_heads": (1, 4096),
    "head_dim": (2, 1024),
    "num_local_experts": (0, 4096),
    "vocab_size": (1, 1 << 24),
    "sliding_window": (1, 1 << 24),
    "max_position_embeddings": (1, 1 << 24),
}

Config = TypeVar("Config", bound="ModelConfig")


@dataclass(frozen=True)
class ModelConfig:
    """The numbers that job, targets and runtime need of any model; a family's config adds its own.

    num_local_experts  experts of a layer; 0 where no layer has any
    sliding_window     keys that a query of a sliding layer may see, its own included

    Constructing one checks all of them; ConfigError names the wrong one. `integers` are the ranges
    of whole numbers, to which a family adds those of its own.
    """

    integers: ClassVar[Mapping[str, tuple[int, int]]] = MODEL_INTEGERS

    num_hidden_layers: int
    hidden_size: int
    num_key_value_heads: int
    head_dim: int
    num_local_experts: int
    vocab_size: int
    sliding_window: int
    layer_types: tuple[LayerType, ...]
    max_position_embeddings: int

    def __post_init__(self) -> None:
        for name, bounds in self.integers.items():
            check_integer(name, getattr(self, name), bounds)
        self._check_layer_types()

    def _check_layer_types(self) -> None:
        types = self.layer_types
        if isinstance(types, str) or not isinstance(types, Sequence):
            raise wrong("layer_types", "a list of layer types", types)
        if len(types) != self.num_hidden_layers:
            raise ConfigError(
                f"layer_types must name all {self.num_hidden_layers} layers "
                f"(num_hidden_layers), found {len(types)} names; correct config.json."
            )
        for kind in types:
            if kind not in (SLIDING, FULL):
                raise wrong("layer_types", f"made of {SLIDING!r} and {FULL!r}", kind)
        object.__setattr__(self, "layer_types", tuple(types))

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON values; `from_dict` takes them back."""
        return {**asdict(self), "layer_types": list(self.layer_types)}

    @classmethod
    def from_dict(cls: type[Config], raw: Mapping[str, Any]) -> Config:
        """The inverse of `to_dict`; ConfigError where a field is unknown, missing or wrong."""
        if not isinstance(raw, Mapping):
            raise wrong("config", "a JSON object", raw)
        known = {field.name: field for field in fields(cls)}
        needed = {name for name, field in known.items() if field.default is MISSING}
        if unknown := sorted(map(str, raw.keys() - known.keys())):
            raise ConfigError(f"Unknown config fields: {named(unknown)}; remove them.")
        if absent := sorted(needed - raw.keys()):
            raise ConfigError(f"Missing config fields: {', '.join(absent)}; add them.")
        return cls(**raw)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Of every layer: which pages, tables and functions of the library it uses."""
        return tuple(_KIND_OF[layer_type] for layer_type in self.layer_types)

    @property
    def expert_sizes(self) -> Mapping[str, int]:
        """Static arguments of the kernels that read experts; none where no layer has any."""
        return {}

    @property
    def kv_size(self) -> int:
        """Numbers in a token's keys, and as many in its values, of one layer: Hkv·D."""
        return self.num_key_value_heads * self.head_dim

    @property
    def sliding_layers(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == SLIDING)

    @property
    def full_layers(self) -> tuple[int, ...]:
        return tuple(i for i, kind in enumerate(self.layer_types) if kind == FULL)

    def window(self, layer: int) -> int:
        """How many keys a query of this layer may see, its own included; 0 on full layers."""
        return self.sliding_window if self.layer_types[layer] == SLIDING else 0

    def kv_bytes_per_token(self, kind: LayerType = FULL, element_bytes: int = 2) -> int:
        """Bytes of keys and values that one token adds, over all layers of `kind`."""
        return self.layer_types.count(kind) * 2 * self.kv_size * element_bytes

    def kv_bytes_read(self, context: int, element_bytes: int = 2) -> int:
        """Bytes of keys and values that a token at position `context` - 1 reads, window heeded."""
        sliding = min(context, self.sliding_window)
        return context * self.kv_bytes_per_token(FULL, element_bytes) + (
            sliding * self.kv_bytes_per_token(SLIDING, element_bytes)
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
        raise wrong(str(path), "a JSON object", value)
    return value


_NESTING = 64


def _deeper(value: object, most: int) -> bool:
    if not isinstance(value, (dict, list)):
        return False
    entries = value.values() if isinstance(value, dict) else value
    return most == 0 or any(_deeper(entry, most - 1) for entry in entries)


# -- for the families' parsers -------------------------------------------------------------------


def named(keys: Iterable[str]) -> str:
    """Foreign keys, as a terminal can show them."""
    return ", ".join(ascii(key)[1:-1] for key in keys)[:160]


def wrong(name: str, expected: str, found: object) -> ConfigError:
    """The error that a value of config.json is not what it must be."""
    shown = repr(found)
    shown = shown if len(shown) <= 80 else shown[:77] + "…"
    return ConfigError(f"{name} must be {expected}, found {shown}; correct config.json.")


def check_integer(name: str, value: Any, bounds: tuple[int, int]) -> int:
    """`value`, an integer within the bounds; ConfigError."""
    low, high = bounds
    if type(value) is not int or not low <= value <= high:
        raise wrong(name, f"an integer from {low} to {high}", value)
    return value


def check_real(name: str, value: object, bounds: tuple[float, float]) -> float:
    """`value` as a float within the bounds; ConfigError."""
    low, high = bounds
    # NaN fails the comparison, infinities the bounds.
    if type(value) not in (int, float) or not low <= value <= high:  # type: ignore[operator]
        expected = f"{low:g}" if low == high else f"a number from {low:g} to {high:g}"
        raise wrong(name, expected, value)
    return float(value)  # type: ignore[arg-type]


def required(raw: Mapping[str, Any], *names: str) -> Any:
    """The value under the first of `names`, the others being aliases that must agree.

    ConfigError.
    """
    found = {name: raw[name] for name in names if raw.get(name) is not None}
    if not found:
        raise ConfigError(f"{names[0]} is missing; add it to config.json.")
    values = list(found.values())
    if any(value != values[0] for value in values):
        raise ConfigError(f"{' and '.join(found)} contradict each other; correct config.json.")
    return values[0]


def nullable(raw: Mapping[str, Any], name: str) -> Any:
    """The value of a key that must be there, but may be null; ConfigError."""
    if name not in raw:
        raise ConfigError(f"{name} is missing; add it to config.json (null for the default).")
    return raw[name]
