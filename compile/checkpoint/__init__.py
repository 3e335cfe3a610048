"""Checkpoint readers: a canonical tensor name in, a lazy, memory-mapped tensor out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..config import Layout, ModelConfig, read_json_object
from ..models.family import Family
from ..models.registry import claim
from .folder import (
    CONFIG_FILE,
    FolderCheckpoint,
    GenerationConfig,
    StoredTensor,
    check_is_folder,
    check_scales,
    stored_tensors,
)
from .hf import HFCheckpoint
from .openai import OpenAICheckpoint

READERS: dict[Layout, type[FolderCheckpoint]] = {
    reader.layout: reader for reader in (HFCheckpoint, OpenAICheckpoint)
}
ORIGINAL = "original"  # where the published repositories keep OpenAI's layout


class Checkpoint(Protocol):
    """What a reader of any layout offers; tensor names are those of the Hugging Face layout."""

    path: Path
    family: Family[Any]
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

    Raises what the readers raise; UnknownArchitectureError where no model family claims
    config.json, ConfigError or CheckpointError where two layouts are mixed.
    """
    folder = Path(path)
    check_is_folder(folder)
    original = folder / ORIGINAL
    if not _is_checkpoint(folder) and (original / CONFIG_FILE).is_file():
        folder = original
    _family, layout = claim(read_json_object(folder / CONFIG_FILE))
    return READERS[layout](folder)


def _is_checkpoint(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file() and any(folder.glob("*.safetensors"))


__all__ = [
    "Checkpoint",
    "FolderCheckpoint",
    "GenerationConfig",
    "HFCheckpoint",
    "OpenAICheckpoint",
    "StoredTensor",
    "check_scales",
    "open_checkpoint",
    "stored_tensors",
]
