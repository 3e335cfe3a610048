"""OpenAI's original layout of a gpt-oss checkpoint, read under the canonical names.

    config.json   16 keys of its own, see `GptOssConfig.from_openai`
    dtypes.json   not read: the .safetensors headers say as much
    model.safetensors, or shards like model--00001-of-00007.safetensors, with an index or without

Tensors are those of the Hugging Face layout under other names, with two differences. The rows of
q, k and v follow each other in one tensor attn.qkv, so these three are views of its rows. Rows of
gate and up alternate in both layouts, and MXFP4 blocks are the same bytes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from mxforge.errors import CheckpointError, TensorMissingError
from mxforge.safetensors import Safetensors

from ..config import Layout
from .folder import FolderCheckpoint, open_shard

SHARD_NAME = "model--{number:05}-of-{count:05}.safetensors"

_SHARD = re.compile(r"(.*-)(\d{1,9})-of-(\d{1,9})\.safetensors")


@dataclass(frozen=True)
class _Rows:
    """Where a canonical tensor is: rows [begin, end) of the stored tensor `name`."""

    name: str
    begin: int
    end: int


class OpenAICheckpoint(FolderCheckpoint):
    """A checkpoint folder in OpenAI's original layout."""

    layout: ClassVar[Layout] = "openai"
    title = "OpenAI's original layout"

    def __init__(self, path: str | Path) -> None:
        super().__init__(path)
        canonical = self.family.tensors(self.config)
        self._rows: dict[str, _Rows] = {}
        for name, stored in self.stored_tensors().items():
            end = 0
            for part in stored.parts:
                begin, end = end, end + canonical[part].shape[0]
                self._rows[part] = _Rows(name, begin, end)

    def tensor(self, name: str) -> np.ndarray:
        """A read-only view of the mapped file, bf16 as ml_dtypes.bfloat16; TensorMissingError."""
        rows = self._find(name)
        stored = self._shard(rows.name).array(rows.name)
        view: np.ndarray = stored[rows.begin : rows.end]
        return view

    def drop(self, name: str) -> None:
        """Let go of the tensor's resident pages, and of those of its neighbours in the file."""
        stored = self._find(name).name
        self._shard(stored).drop(stored)

    def _find(self, name: str) -> _Rows:
        if name not in self._rows:
            raise TensorMissingError(
                f"{self.path}: tensor {name!r:.120} is none of this architecture; "
                "ask for a name of the Hugging Face layout."
            )
        return self._rows[name]

    def _open_without_index(self) -> dict[str, Safetensors]:
        """Every .safetensors file of the folder."""
        files = sorted(
            path
            for path in self.path.glob("*.safetensors")
            if not path.name.startswith(".")  # what macOS leaves on foreign disks
        )
        if not files:
            raise CheckpointError(
                f"Expected .safetensors files in {self.path}, found none; "
                "fetch the checkpoint's weights."
            )
        _check_complete([path.name for path in files], self)
        shard_of: dict[str, Safetensors] = {}
        for shard in map(open_shard, files):
            for name in shard.tensors:
                if name in shard_of:
                    raise CheckpointError(
                        f"{self.path}: tensor {name!r:.120} is in {shard_of[name].path.name} and "
                        f"in {shard.path.name}; keep the files of one checkpoint in a folder."
                    )
                shard_of[name] = shard
        return shard_of


def _check_complete(files: list[str], checkpoint: OpenAICheckpoint) -> None:
    """CheckpointError where the names of the files number more shards than there are."""
    for file in files:
        numbered = _SHARD.fullmatch(file)
        if numbered is None:
            continue
        prefix, number, count = numbered.groups()
        for other in range(1, min(int(count), len(files) + 1) + 1):
            expected = f"{prefix}{other:0{len(number)}}-of-{count}.safetensors"
            if expected not in files:
                raise CheckpointError(
                    f"{checkpoint.path / expected} is missing, {file} is there; fetch the "
                    "checkpoint's weights again."
                )


__all__ = ["SHARD_NAME", "OpenAICheckpoint"]
