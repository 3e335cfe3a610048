"""The Hugging Face layout of a checkpoint, whose tensor names the whole compiler uses."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from ..config import Layout
from .folder import FolderCheckpoint


class HFCheckpoint(FolderCheckpoint):
    """A checkpoint folder in the Hugging Face layout; shards need their index."""

    layout: ClassVar[Layout] = "huggingface"
    title = "the Hugging Face layout"

    def tensor(self, name: str) -> np.ndarray:
        """A read-only view of the mapped file, bf16 as ml_dtypes.bfloat16; TensorMissingError."""
        return self._shard(name).array(name)

    def drop(self, name: str) -> None:
        """Let go of the tensor's resident pages once it has been packed."""
        self._shard(name).drop(name)
