"""A hash of what a model is made of, the same for every file layout that holds it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..config import ModelConfig

if TYPE_CHECKING:
    from . import Checkpoint

_CHUNK = 1 << 24


class Fingerprint:
    """SHA-256 over config, stop ids and every tensor's name, dtype, shape and bytes.

    Tensors may come in any order, each once: the compiler adds them as it packs them, while their
    pages are still in memory, so that no file is read twice.
    """

    def __init__(self, config: ModelConfig, stop_token_ids: Sequence[int]) -> None:
        self._about = {"config": config.to_dict(), "stop_token_ids": list(stop_token_ids)}
        self._tensors: dict[str, str] = {}

    def add(self, name: str, tensor: np.ndarray) -> None:
        """Take in one tensor."""
        digest = hashlib.sha256(f"{tensor.dtype} {tensor.shape}".encode())
        content = np.ascontiguousarray(tensor).reshape(-1).view(np.uint8)
        for start in range(0, content.size, _CHUNK):
            digest.update(content[start : start + _CHUNK].data)
        self._tensors[name] = digest.hexdigest()

    def hexdigest(self) -> str:
        content = {**self._about, "tensors": self._tensors}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def fingerprint(checkpoint: Checkpoint) -> str:
    """The fingerprint of a whole checkpoint; reads every tensor that the model uses."""
    result = Fingerprint(checkpoint.config, checkpoint.generation_config.eos_token_ids)
    for name in checkpoint.family.tensors(checkpoint.config):
        result.add(name, checkpoint.tensor(name))
        checkpoint.drop(name)
    return result.hexdigest()
