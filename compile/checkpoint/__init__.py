"""Checkpoint readers: a canonical tensor name in, a lazy, memory-mapped tensor out."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np

from ..config import ModelConfig, config_layout, read_json_object
from .folder import (
    CONFIG_FILE,
    FolderCheckpoint,
    GenerationConfig,
    TensorSpec,
    check_is_folder,
    check_scales,
)
from .hf import HFCheckpoint, expected_tensors, layer_prefix
from .openai import OpenAICheckpoint

ORIGINAL = "original"  # where the published repositories keep OpenAI's layout


class Checkpoint(Protocol):
    """What a reader of any layout offers; tensor names are those of the Hugging Face layout."""

    path: Path
    config: ModelConfig
    generation_config: GenerationConfig
    tokenizer_path: Path | None

    def tensor(self, name: str) -> np.ndarray:
        """A read-only array, mapped where the layout allows it; TensorMissingError."""
        ...

    def drop(self, name: str) -> None:
        """The tensor is not needed any more: its memory may go."""
        ...

    def check(self) -> None:
        """Compare all names, shapes and dtypes with the config; CheckpointError's subclasses."""
        ...


def open_checkpoint(path: str | Path) -> FolderCheckpoint:
    """The reader of the layout that the folder's config.json is of.

    A folder that lacks config.json or weights stands for a checkpoint in its subfolder
    `original`, as the published repository does where only the original files were fetched.

    Raises what the readers raise; UnknownArchitectureError where config.json is of neither
    layout, ConfigError or CheckpointError where two are mixed.
    """
    folder = Path(path)
    check_is_folder(folder)
    original = folder / ORIGINAL
    if not _is_checkpoint(folder) and (original / CONFIG_FILE).is_file():
        folder = original
    layout = config_layout(read_json_object(folder / CONFIG_FILE))
    return OpenAICheckpoint(folder) if layout == "openai" else HFCheckpoint(folder)


def _is_checkpoint(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file() and any(folder.glob("*.safetensors"))


__all__ = [
    "Checkpoint",
    "FolderCheckpoint",
    "GenerationConfig",
    "HFCheckpoint",
    "OpenAICheckpoint",
    "TensorSpec",
    "check_scales",
    "expected_tensors",
    "layer_prefix",
    "open_checkpoint",
]
