"""Which family a model is of.

A new family is a package beside this file and an entry in `FAMILIES`; see docs/adding-a-model.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mxforge.errors import UnknownArchitectureError

from ..config import Layout, ModelConfig, named, read_json_object, wrong
from .family import Family
from .gpt_oss import GPT_OSS

FAMILIES: tuple[Family[Any], ...] = (GPT_OSS,)


class ParsedConfig(NamedTuple):
    """A config.json: whose model it is, in which layout it says so, and its numbers."""

    family: Family[Any]
    layout: Layout
    config: ModelConfig


def claim(raw: Mapping[str, Any]) -> tuple[Family[Any], Layout]:
    """The family that a config.json is of, and the layout whose keys it has.

    `model_type` and `architectures` decide where either is there; else the keys. Raises
    UnknownArchitectureError, which lists the known families, where no family claims it, and
    ConfigError where it mixes two layouts.
    """
    if not isinstance(raw, Mapping):
        raise wrong("config.json", "a JSON object", raw)
    anonymous = raw.get("model_type") is None and raw.get("architectures") is None
    for family in FAMILIES:
        if not anonymous and not family.is_named_by(raw):
            continue
        layout = family.layout(raw)
        # Hugging Face's layout says whose it is.
        if layout is not None and not (anonymous and layout == "huggingface"):
            return family, layout
    raise UnknownArchitectureError(_unknown(raw))


def parse_config(raw: Mapping[str, Any]) -> ParsedConfig:
    """Parse the content of a config.json of any family and layout; raises as `claim`.

    ConfigError where a number is absent or wrong, too.
    """
    family, layout = claim(raw)
    return ParsedConfig(family, layout, family.parse(raw, layout))


def read_config(path: str | Path) -> ParsedConfig:
    """`parse_config` of a file; ConfigError where it cannot be read, too."""
    return parse_config(read_json_object(Path(path)))


def _unknown(raw: Mapping[str, Any]) -> str:
    found = {key: raw[key] for key in ("model_type", "architectures") if key in raw}
    shown = ", ".join(f"{key} {value!r}" for key, value in found.items())[:160]
    if not any(value is not None for value in found.values()):
        shown = f"neither, but {named(raw) or 'no keys'}"
    known = "; ".join(
        f"{family.name} (model_type {family.model_type!r}, architecture {family.architecture!r}"
        + (", or OpenAI's original layout)" if "openai" in family.layouts else ")")
        for family in FAMILIES
    )
    return (
        "Expected model_type and architectures of a known model family in config.json, found "
        f"{shown}; the families that can be compiled are {known}."
    )
