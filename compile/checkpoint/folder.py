"""What all layouts of a checkpoint folder have in common: JSON files beside .safetensors files.

    config.json              → its family and ModelConfig, by the layout's own keys
    generation_config.json   → GenerationConfig (optional)
    tokenizer.json           its path (optional)
    model.safetensors, or shards named by model.safetensors.index.json

Dense tensors may be stored as bf16, f16 or f32: converting is the packer's work.
"""

from __future__ import annotations

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mxforge.errors import (
    CheckpointError,
    ConfigError,
    NaNScaleError,
    SafetensorsError,
    TensorDtypeError,
    TensorMissingError,
    TensorShapeError,
)
from mxforge.safetensors import Safetensors, TensorInfo, open_safetensors

from ..config import Layout, ModelConfig, read_json_object
from ..models.family import Family
from ..models.registry import claim
from ..models.tensors import DENSE_DTYPES

CONFIG_FILE = "config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
NAN_SCALE = 255


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the files: its shape, the safetensors dtypes that may hold it, and the canonical
    tensors whose rows it is made of."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]
    parts: tuple[str, ...]


def stored_tensors(
    family: Family[Any], config: ModelConfig, layout: Layout
) -> dict[str, StoredTensor]:
    """What the files of a layout must hold, by their own names, in the order of use."""
    canonical = family.tensors(config)
    stored = {}
    for name, parts in family.stored_names(config, layout).items():
        tensors = [canonical[part] for part in parts]
        rows = sum(tensor.shape[0] for tensor in tensors)
        stored[name] = StoredTensor((rows, *tensors[0].shape[1:]), tensors[0].dtypes, parts)
    return stored


@dataclass(frozen=True)
class GenerationConfig:
    """Which token ids end a generation; ids outside the vocabulary cannot occur and are left out.

    They come from generation_config.json, else from config.json's eos_token_id; a checkpoint with
    neither has those of its family's chat format, if its vocabulary is that format's.
    """

    eos_token_ids: tuple[int, ...]


class FolderCheckpoint(ABC):
    """A checkpoint folder. Opening reads the JSON files and every shard's header, no tensor.

    path               the folder
    family             Family
    config             ModelConfig, of the family's own class
    generation_config  GenerationConfig
    tokenizer_path     Path of tokenizer.json, or None
    files              the .safetensors files, sorted by name
    tensors            name in the files -> TensorInfo of all tensors found

    `tensor` and `drop` take canonical names, those of the Hugging Face layout.

    Raises CheckpointError (or a subclass; UnknownArchitectureError where no family claims the
    model) and ConfigError, each naming the file.
    """

    layout: ClassVar[Layout]
    title: ClassVar[str]  # of the layout, in messages

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        check_is_folder(self.path)
        raw = read_json_object(self.path / CONFIG_FILE)
        self.family, layout = claim(raw)
        if layout != self.layout:
            raise CheckpointError(
                f"Expected a checkpoint in {self.title} at {self.path}, but its config.json is of "
                f"the layout {layout!r}; `open_checkpoint` finds the reader."
            )
        self.config: ModelConfig = self.family.parse(raw, layout)
        self.generation_config = _generation_config(self.path, raw, self.family, self.config)
        tokenizer = self.path / "tokenizer.json"
        self.tokenizer_path = tokenizer if tokenizer.is_file() else None
        self._shard_of = self._open_shards()
        self.files = sorted({shard.path for shard in self._shard_of.values()})
        self.tensors: dict[str, TensorInfo] = {
            name: shard.tensors[name] for name, shard in self._shard_of.items()
        }
        self._check_layout()

    def stored_tensors(self) -> dict[str, StoredTensor]:
        """What the files must hold, by their own names."""
        return stored_tensors(self.family, self.config, self.layout)

    @abstractmethod
    def tensor(self, name: str) -> np.ndarray:
        """A read-only view of the mapped file, bf16 as ml_dtypes.bfloat16; TensorMissingError."""

    @abstractmethod
    def drop(self, name: str) -> None:
        """Let go of the tensor's resident pages once it has been packed."""

    def check(self) -> None:
        """Compare every tensor's presence, shape and dtype with what the config calls for."""
        expected = self.stored_tensors()
        missing = [name for name in expected if name not in self.tensors]
        if missing:
            raise TensorMissingError(self._missing_message(missing))
        for name, spec in expected.items():
            info = self.tensors[name]
            where = f"{self._shard_of[name].path}: tensor {name}"
            if info.shape != spec.shape:
                raise TensorShapeError(
                    f"{where} must have the shape {list(spec.shape)} by config.json, "
                    f"found {list(info.shape)}; the two are not of one model."
                )
            if info.dtype not in spec.dtypes:
                raise TensorDtypeError(
                    f"{where} must be {' or '.join(spec.dtypes)}, found {info.dtype}; "
                    "convert the checkpoint to the published layout."
                )

    def unexpected(self) -> list[str]:
        """Names of tensors that the model does not use (they are ignored)."""
        expected = self.stored_tensors()
        return [name for name in self.tensors if name not in expected]

    def dense_dtypes(self) -> set[str]:
        """The safetensors dtypes in which this checkpoint's dense tensors are stored."""
        return {
            self.tensors[name].dtype
            for name, spec in self.stored_tensors().items()
            if spec.dtypes == DENSE_DTYPES and name in self.tensors
        }

    def sha256(self) -> str:
        """Hash of config.json, generation_config.json and every shard: 13.8 GB take ~10 s."""
        digest = hashlib.sha256()
        for file in (self.path / CONFIG_FILE, self.path / "generation_config.json", *self.files):
            if not file.is_file():
                continue
            # Length first, so that no content can pass for a boundary between files.
            digest.update(f"{file.name} {file.stat().st_size}\n".encode())
            for chunk in _chunks(file):
                digest.update(chunk)
        return digest.hexdigest()

    def _shard(self, name: str) -> Safetensors:
        """The file that holds the tensor of this name in the files."""
        if name not in self._shard_of:
            raise TensorMissingError(self._missing_message([name]))
        return self._shard_of[name]

    def _missing_message(self, names: list[str]) -> str:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        message = f"{self.path}: tensor {names[0]}{more} is missing; the checkpoint is incomplete."
        unpacked = re.sub(r"[._]blocks$", "", names[0])
        if unpacked in self.tensors:
            message = (
                f"{self.path}: tensor {names[0]}{more} is missing, {unpacked} is there: expected "
                "MXFP4 experts, found unquantized ones; use the published MXFP4 checkpoint."
            )
        return message

    def _check_layout(self) -> None:
        first_words = {
            layout: {name.split(".")[0] for name in self.family.stored_names(self.config, layout)}
            for layout in self.family.layouts
        }
        theirs = set().union(*first_words.values()) - first_words[self.layout]
        foreign = [name for name in self.tensors if name.split(".")[0] in theirs]
        if foreign:
            raise CheckpointError(
                f"{self.path} mixes two layouts: config.json is of {self.title}, tensor "
                f"{foreign[0]:.100} in {self._shard_of[foreign[0]].path.name} is not; keep the "
                "files of one layout in a folder."
            )

    def _open_shards(self) -> dict[str, Safetensors]:
        single, index = self.path / SINGLE_FILE, self.path / INDEX_FILE
        if single.is_file():
            shard = open_shard(single)
            return dict.fromkeys(shard.tensors, shard)
        if not index.is_file():
            return self._open_without_index()
        weight_map = _weight_map(index)
        shards = {file: open_shard(self.path / file) for file in sorted(set(weight_map.values()))}
        for name, file in weight_map.items():
            if name not in shards[file]:
                raise TensorMissingError(
                    f"{index} promises tensor {name!r:.120} in {file}, which lacks it; "
                    "fetch the checkpoint again."
                )
        return {name: shards[file] for name, file in weight_map.items()}

    def _open_without_index(self) -> dict[str, Safetensors]:
        raise CheckpointError(
            f"Expected {SINGLE_FILE} or {INDEX_FILE} in {self.path}, found neither; "
            "fetch the checkpoint's weights."
        )


def check_is_folder(path: Path) -> None:
    """CheckpointError where there is no folder."""
    if not path.is_dir():
        raise CheckpointError(
            f"Expected a checkpoint folder at {path}, found "
            f"{'a file' if path.exists() else 'nothing'}; "
            "give the folder that holds config.json."
        )


def check_scales(name: str, scales: np.ndarray) -> None:
    """NaNScaleError if a uint8 MXFP4 scale tensor, or a part of it, of any shape, holds 255."""
    if scales.size and scales.max() == NAN_SCALE:
        at = np.unravel_index(int(np.argmax(scales == NAN_SCALE)), scales.shape)
        raise NaNScaleError(
            f"Tensor {name} has the scale byte 255 (NaN) at {[int(v) for v in at]}; expected 0 to "
            "254: the checkpoint is damaged, fetch it again."
        )


def open_shard(path: Path) -> Safetensors:
    """Map one of a checkpoint's files; CheckpointError."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; fetch the checkpoint's weights again.")
    try:
        return open_safetensors(path)
    except SafetensorsError as error:
        raise CheckpointError(str(error)) from error


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = read_json_object(index).get("weight_map")
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"{index} must map tensor names to files under 'weight_map'; fetch it again."
        )
    for file in weight_map.values():
        # A bare file name, so that an index cannot point out of its folder.
        if (
            not isinstance(file, str)
            or not file.endswith(".safetensors")
            or not file.isprintable()
            or any(c in file for c in "/\\:")
        ):
            raise CheckpointError(
                f"{index} must name .safetensors files of its own folder, found {file!r:.120}; "
                "fetch it again."
            )
    return weight_map


def _generation_config(
    path: Path, raw: Mapping[str, Any], family: Family[Any], config: ModelConfig
) -> GenerationConfig:
    file = path / "generation_config.json"
    eos = read_json_object(file).get("eos_token_id") if file.is_file() else None
    eos = raw.get("eos_token_id") if eos is None and not file.is_file() else eos
    if eos is None:
        eos = list(family.stop_token_ids(config))
    ids = eos if isinstance(eos, list) else [eos]
    if not all(type(v) is int and v >= 0 for v in ids):
        raise ConfigError(
            f"eos_token_id must be a token id or a list of them, found {eos!r:.80}; "
            f"correct {file if file.is_file() else path / CONFIG_FILE}."
        )
    return GenerationConfig(tuple(v for v in dict.fromkeys(ids) if v < config.vocab_size))


def _chunks(file: Path, size: int = 1 << 22) -> Iterator[bytes]:
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(size):
                yield chunk
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}.") from error
