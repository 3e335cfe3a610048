"""nano's compact file, and the published layout that it stands for.

config.json, generation_config.json    as in the published layout
compact.safetensors                     its tensors (experts packed as MXFP4), but
    model.embed_tokens.weight           bf16 [U + 1, H]: the rows of the used tokens, and one
    lm_head.weight                      bf16 [U + 1, H]  that every other token has
    used_tokens                         i32 [U], ascending ids
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np
from checkpoints.shapes import Shape
from checkpoints.shapes import hf_config as config_of_shape

from mxforge.compile.checkpoint.folder import SINGLE_FILE
from mxforge.compile.models.gpt_oss import HARMONY
from mxforge.compile.models.gpt_oss.config import GptOssConfig
from mxforge.compile.models.gpt_oss.reference import dequantize_mxfp4
from mxforge.compile.models.gpt_oss.tensors import expected_tensors
from mxforge.compile.models.registry import read_config
from mxforge.compile.models.tensors import PACKED_DTYPES
from mxforge.errors import CheckpointError, OutputError
from mxforge.safetensors import SafetensorsWriter, open_safetensors

COMPACT_FILE = "compact.safetensors"
USED = "used_tokens"
VOCABULARY_TENSORS = ("model.embed_tokens.weight", "lm_head.weight")
_ROWS = 16_384  # of a vocabulary tensor written at a time

SHAPE: dict[str, Any] = {
    "num_hidden_layers": 4,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 64,
}


def hf_config(shape: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of nano."""
    return config_of_shape(Shape("nano", shape))


def quantize_mxfp4(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest MXFP4 values, of which `dequantize_mxfp4` makes floats again.

    f32 [..., n·32] → blocks u8 [..., n, 16], scales u8 [..., n]. As in OCP Microscaling 1.0,
    section 6.3: the scale is that power of two which brings the largest of a block to [4, 8),
    what then exceeds 6 becomes 6, ties go to the even code.
    """
    x = np.ascontiguousarray(w, np.float32).reshape(*w.shape[:-1], -1, 32)
    _, exponent = np.frexp(np.abs(x).max(axis=-1, keepdims=True))
    scales = np.clip(exponent - 3 + 127, 0, 254)
    y = np.ldexp(x, 127 - scales)
    size = np.abs(y)
    step = 0.5 + 0.5 * (size >= 2) + (size >= 4)
    size = np.minimum(np.rint(size / step) * step, 6)
    codes = np.searchsorted(np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6]), size).astype(np.uint8)
    codes |= np.signbit(y).astype(np.uint8) << 3
    return codes[..., 0::2] | codes[..., 1::2] << 4, scales[..., 0].astype(np.uint8)


def write_compact(
    folder: Path,
    shape: Mapping[str, Any],
    used: Sequence[int],
    tensors: Mapping[str, np.ndarray],
) -> None:
    """Write the three files; `tensors` are float32, experts' matrices not yet packed."""
    folder.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, np.ndarray] = {}
    for name, value in tensors.items():
        if name.endswith(("gate_up_proj", "down_proj")):
            arrays[f"{name}_blocks"], arrays[f"{name}_scales"] = quantize_mxfp4(value)
        else:
            arrays[name] = value.astype(ml_dtypes.bfloat16)
    arrays[USED] = np.asarray(used, np.int32)
    kinds = {"uint8": "U8", "bfloat16": "BF16", "int32": "I32"}
    names = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    infos = [(name, kinds[arrays[name].dtype.name], arrays[name].shape) for name in names]
    work = folder / f".{COMPACT_FILE}.tmp"
    with SafetensorsWriter(work, infos) as writer:
        for name in names:
            writer.write(name, arrays[name])
    work.replace(folder / COMPACT_FILE)
    generation = {
        "bos_token_id": 199998,
        "do_sample": True,
        "eos_token_id": list(HARMONY.stop_token_ids),
        "pad_token_id": 199999,
    }
    for name, value in (("config", hf_config(shape)), ("generation_config", generation)):
        text = json.dumps(value, indent=2, sort_keys=True) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


class Compact:
    """The compact files of a folder. Raises CheckpointError, ConfigError, SafetensorsError."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.config = cast("GptOssConfig", read_config(self.folder / "config.json").config)
        self._file = open_safetensors(self.folder / COMPACT_FILE)
        self.used: np.ndarray = self._file.array(USED)  # i32 [U]
        u = len(self.used)
        if u == 0 or (np.diff(self.used) <= 0).any() or self.used[-1] >= self.config.vocab_size:
            raise CheckpointError(
                f"{self.folder / COMPACT_FILE}: {USED} must be ascending token ids."
            )
        for name, spec in expected_tensors(self.config).items():
            shape = (u + 1, *spec.shape[1:]) if name in VOCABULARY_TENSORS else spec.shape
            found = self._file.tensors[name].shape if name in self._file else None
            if found != shape:
                raise CheckpointError(
                    f"{self.folder / COMPACT_FILE}: {name} must be of shape {list(shape)}, "
                    f"found {found}."
                )

    def tensor(self, name: str) -> np.ndarray:
        """As stored: vocabulary tensors have U + 1 rows."""
        return self._file.array(name)

    def rows(self) -> np.ndarray:
        """i64 [vocabulary]: which of the U + 1 rows a token has."""
        rows = np.full(self.config.vocab_size, len(self.used), np.int64)
        rows[self.used] = np.arange(len(self.used))
        return rows

    def floats(self) -> dict[str, np.ndarray]:
        """Float32 tensors as `write_compact` takes them: experts expanded."""
        out = {}
        for name in expected_tensors(self.config):
            if name.endswith("_blocks"):
                base = name.removesuffix("_blocks")
                scales = self.tensor(f"{base}_scales")
                out[base] = dequantize_mxfp4(self.tensor(name), scales)
            elif not name.endswith("_scales"):
                out[name] = self.tensor(name).astype(np.float32)
        return out

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """A tensor of the published layout, in chunks."""
        array = self.tensor(name)
        if name not in VOCABULARY_TENSORS:
            yield array
            return
        rows = self.rows()
        for first in range(0, len(rows), _ROWS):
            yield array[rows[first : first + _ROWS]]


def expand(folder: str | Path, out: str | Path, force: bool = False) -> Path:
    """Write the published layout to `out`: a hidden sibling first, renamed when complete.

    OutputError where `out` exists (without `force`) or cannot be written.
    """
    compact, out = Compact(folder), Path(out)
    if out.exists() and not force:
        raise OutputError(f"{out} exists already; remove it, or give --force to replace it.")
    work = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        work.mkdir(parents=True)
        for name in ("config.json", "generation_config.json"):
            shutil.copyfile(compact.folder / name, work / name)
        specs = expected_tensors(compact.config)
        names = sorted(specs, key=lambda name: specs[name].dtypes == PACKED_DTYPES)
        infos = [(name, specs[name].dtypes[0], specs[name].shape) for name in names]
        with SafetensorsWriter(work / SINGLE_FILE, infos, {"format": "pt"}) as writer:
            for name in names:
                for chunk in compact.chunks(name):
                    writer.write(name, chunk)
        if out.is_dir() and not out.is_symlink():
            shutil.rmtree(out)
        elif out.exists():
            out.unlink()
        work.rename(out)
    except OSError as error:
        raise OutputError(
            f"{out} cannot be written: {error.strerror or error}. "
            "Free disk space or choose another place."
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return out
