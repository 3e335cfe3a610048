"""Checkpoint readers: a canonical tensor name in, a lazy, memory-mapped tensor out."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np

from ..config import ModelConfig
from .hf import (
    GenerationConfig,
    HFCheckpoint,
    TensorSpec,
    check_scales,
    expected_tensors,
    layer_prefix,
)


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


__all__ = [
    "Checkpoint",
    "GenerationConfig",
    "HFCheckpoint",
    "TensorSpec",
    "check_scales",
    "expected_tensors",
    "layer_prefix",
]
