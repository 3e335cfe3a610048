"""Random gpt-oss checkpoints of any shape, in the Hugging Face layout or OpenAI's original one.

Weights are scaled so that activations stay of order one, routing stays spread and some SwiGLU
inputs reach their limit. Values come from raw PCG64 bits through integer arithmetic, not from a
distribution whose stream NumPy may change, so a seed gives the same bytes on every machine.
Tensors are slices of one random pool (each from an offset of its own), which makes the 13.8 GB
of the 20b shapes a matter of disk speed; the pool and one buffer are all the memory it takes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import ml_dtypes
import numpy as np
from tqdm import tqdm

from mxforge.compile.checkpoint import StoredTensor, stored_tensors
from mxforge.compile.checkpoint.folder import INDEX_FILE, SINGLE_FILE
from mxforge.compile.checkpoint.openai import SHARD_NAME as OPENAI_SHARD_NAME
from mxforge.compile.config import Layout, ModelConfig
from mxforge.compile.models.family import Family
from mxforge.compile.models.registry import parse_config
from mxforge.compile.models.tensors import PACKED_DTYPES, Tensor
from mxforge.errors import MxforgeError, OutputError, UsageError
from mxforge.safetensors import SafetensorsWriter

from .shapes import SHAPES, Shape, hf_config, named_shape, openai_config

_SHARD_NAME = "model-{number:05}-of-{count:05}.safetensors"

# Primes, so that rows of no length begin at the same place of a pool twice in a row.
_REAL_POOL = 4_194_301
_BYTE_POOL = 16_777_213


@dataclass(frozen=True)
class _Fill:
    """Distribution of one kind of dense tensor: mean, and gain / √fan_in (fan_in: last axis)."""

    gain: float
    mean: float = 0.0
    per_input: bool = False


_FILLS: dict[str, _Fill] = {
    "norm": _Fill(0.1, mean=1.0),
    "embedding": _Fill(1.0),
    "sinks": _Fill(1.0),
    "router_bias": _Fill(0.25),
    "bias": _Fill(0.1),
    "dense": _Fill(1.0, per_input=True),
    "router": _Fill(1.0, per_input=True),
}
# Gate and up inputs of twice the unit size, so that some reach the limit; down undoes it.
_EXPERT_GAINS = {"gate_up_proj_scales": 2.0, "down_proj_scales": 0.5}
# Root mean square of uniform e2m1 codes; times that of the scales' spread over c-1, c, c, c+1.
_E2M1_RMS = math.sqrt(8.5625 * 1.5625)


def write_checkpoint(
    out: str | Path,
    shape: str | Shape,
    *,
    layout: Layout = "huggingface",
    seed: int = 0,
    overrides: Mapping[str, Any] | None = None,
    max_shard_bytes: int | None = None,
    force: bool = False,
    progress: bool = False,
) -> Path:
    """Write a checkpoint folder: a hidden sibling first, renamed when it is complete.

    layout: the same seed gives the same model in both; seed ≥ 0; overrides: keys of Hugging
    Face's config.json to replace; max_shard_bytes: by default the shape's. OutputError where
    `out` exists (without `force`) or the disk is full, ConfigError where the overrides make no
    model, UsageError where the layout cannot say it.
    """
    out = Path(out)
    shape = named_shape(shape) if isinstance(shape, str) else shape
    raw = hf_config(shape, overrides)
    family, _layout, config = parse_config(raw)
    original = openai_config(config) if layout == "openai" else None
    if out.exists() and not force:
        raise OutputError(f"{out} exists already; remove it, or give --force to replace it.")
    work = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        work.mkdir(parents=True)
        source = _Source(shape, family, config, seed)
        limit = max_shard_bytes or shape.max_shard_bytes
        tensors = stored_tensors(family, config, layout)
        if original is not None:
            _write_json(work / "config.json", original)
            _write_json(work / "dtypes.json", _published_dtypes(tensors))
            _write_shards(work, source, tensors, limit, OPENAI_SHARD_NAME, progress)
        else:
            _write_json(work / "config.json", raw)
            _write_json(work / "generation_config.json", _generation_config(raw, family, config))
            weight_map = _write_shards(work, source, tensors, limit, _SHARD_NAME, progress)
            if len(set(weight_map.values())) > 1:
                size = sum(_nbytes(tensor) for tensor in tensors.values())
                index = {"metadata": {"total_size": size}, "weight_map": weight_map}
                _write_json(work / INDEX_FILE, index)
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


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _published_dtypes(tensors: Mapping[str, StoredTensor]) -> dict[str, str]:
    """What dtypes.json of the published original checkpoints says."""
    packed = {"blocks": "FP4", "scales": "UE8"}
    return {name: packed.get(name.rpartition(".")[2], "BF16") for name in tensors}


def _generation_config(
    raw: Mapping[str, Any], family: Family[Any], config: ModelConfig
) -> dict[str, Any]:
    stop = family.stop_token_ids(config)
    if not stop:
        return {"do_sample": True, "eos_token_id": [raw["eos_token_id"]]}
    return {
        "bos_token_id": 199998,
        "do_sample": True,
        "eos_token_id": list(stop),
        "pad_token_id": 199999,
    }


def _write_shards(
    folder: Path,
    source: _Source,
    tensors: Mapping[str, StoredTensor],
    max_bytes: int,
    shard_name: str,
    progress: bool,
) -> dict[str, str]:
    """Write the tensors; returns which file each is in."""
    shards: list[list[str]] = [[]]
    filled = 0
    sizes = {name: _nbytes(tensor) for name, tensor in tensors.items()}
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    count = len(shards)
    files = (
        [SINGLE_FILE]
        if count == 1
        else [shard_name.format(number=i + 1, count=count) for i in range(count)]
    )
    # Wide elements first within a file, as the safetensors library writes: keeps all aligned.
    shards = [
        sorted(names, key=lambda name: tensors[name].dtypes == PACKED_DTYPES) for names in shards
    ]
    total = sum(sizes.values())
    with tqdm(total=total, unit="B", unit_scale=True, disable=not progress) as bar:
        for file, names in zip(files, shards, strict=True):
            infos = [(name, tensors[name].dtypes[0], tensors[name].shape) for name in names]
            with SafetensorsWriter(folder / file, infos, {"format": "pt"}) as writer:
                for name in names:
                    for part in tensors[name].parts:
                        for chunk in source.chunks(part):
                            writer.write(name, chunk)
                            bar.update(chunk.nbytes)
    return {name: file for file, names in zip(files, shards, strict=True) for name in names}


def _nbytes(tensor: StoredTensor) -> int:
    return math.prod(tensor.shape) * (1 if tensor.dtypes == PACKED_DTYPES else 2)


@dataclass
class _Source:
    """The bytes of every tensor, as slices of pools made from the seed."""

    shape: Shape
    family: Family[Any]
    config: ModelConfig
    seed: int
    _tensors: dict[str, Tensor] = field(init=False)
    _offsets: dict[str, int] = field(init=False)  # where in its pool each tensor begins
    _unit: np.ndarray = field(init=False)  # f32, mean 0, variance 1, bell-shaped
    _bytes: np.ndarray = field(init=False)  # u8, uniform
    _pools: dict[Any, np.ndarray] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        bits = np.random.PCG64(self.seed)
        words = (_REAL_POOL * 4 + 7) // 8
        # Sum of four uniform bytes, variance 4·(256² - 1)/12: exact integers on every machine.
        four = _raw_bytes(bits, words)[: _REAL_POOL * 4].reshape(-1, 4)
        total = four.sum(axis=1, dtype=np.int32) * 2 - 4 * 255
        self._unit = total.astype(np.float32) / np.float32(2 * math.sqrt((256**2 - 1) / 3))
        self._bytes = _raw_bytes(bits, (_BYTE_POOL + 7) // 8)[:_BYTE_POOL]
        self._tensors = self.family.tensors(self.config)
        self._offsets = {name: int(bits.random_raw()) for name in self._tensors}

    def chunks(self, name: str) -> Iterator[np.ndarray]:
        """The tensor of this canonical name in flat chunks."""
        tensor = self._tensors[name]
        pool = self._pool(tensor)
        if tensor.role == "router_bias" and self.shape.idle_experts:
            bias = pool[: self.config.num_local_experts].copy()
            idle = [e for e in self.shape.idle_experts if e < len(bias)]
            bias[idle] = -100
            yield bias
            return
        left, at = math.prod(tensor.shape), self._offsets[name] % len(pool)
        while left:
            chunk = pool[at : at + left]
            yield chunk
            left -= len(chunk)
            at = 0

    def _pool(self, tensor: Tensor) -> np.ndarray:
        if tensor.role == "blocks":
            return self._bytes
        if tensor.role == "scales":
            gain = _EXPERT_GAINS[tensor.name.rpartition(".")[2]]
            deviation = gain / math.sqrt(tensor.shape[-1] * 32)
            center = 127 + round(math.log2(deviation / _E2M1_RMS))
            return self._cached(("scales", center), lambda: self._scale_pool(center))
        fill = _FILLS[tensor.role]
        gain = fill.gain / math.sqrt(tensor.shape[-1]) if fill.per_input else fill.gain
        return self._cached(
            (gain, fill.mean),
            lambda: (self._unit * np.float32(gain) + np.float32(fill.mean)).astype(
                ml_dtypes.bfloat16
            ),
        )

    def _scale_pool(self, center: int) -> np.ndarray:
        # One scale in 256 is 0, as blocks of zeros have it; the rest spread over three octaves.
        table = center + np.array([-1, 0, 0, 1], np.int64)[np.arange(256) % 4]
        table[17] = 0
        pool: np.ndarray = table.astype(np.uint8)[self._bytes]
        return pool

    def _cached(self, key: Any, make: Any) -> np.ndarray:
        if key not in self._pools:
            self._pools[key] = make()
        return self._pools[key]


def _raw_bytes(bits: np.random.PCG64, words: int) -> np.ndarray:
    drawn: np.ndarray = np.asarray(bits.random_raw(words), "<u8").view(np.uint8)
    return drawn


def main(arguments: Sequence[str] | None = None) -> int:
    """The command scripts/make_checkpoint; returns its exit code."""
    shapes = "\n".join(f"  {name:13} {shape.why}" for name, shape in SHAPES.items())
    parser = argparse.ArgumentParser(
        prog="make_checkpoint",
        description="Write a random gpt-oss checkpoint, laid out as the published ones are.",
        epilog=f"shapes:\n{shapes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to make")
    parser.add_argument(
        "--shape", default="tiny", choices=SHAPES, metavar="NAME",
        help="sizes of the model, one of those below (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--layout",
        default="huggingface",
        choices=get_args(Layout),
        help="names of files, tensors and config keys (default: huggingface)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="seed of the weights (default: %(default)s)",
    )
    parser.add_argument(
        "--layers", type=int, metavar="N", help="short for --set num_hidden_layers=N"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=JSON",
        help="replace a key of Hugging Face's config.json, as in --set vocab_size=1000",
    )
    parser.add_argument(
        "--shard-bytes",
        type=int,
        metavar="N",
        help="begin a new file past this size (default: one file)",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT where it exists")
    options = parser.parse_args(arguments)
    try:
        overrides = dict(_override(text) for text in options.set)
        if options.layers is not None:
            overrides["num_hidden_layers"] = options.layers
        if options.seed < 0:
            raise UsageError(f"--seed must be 0 or more, found {options.seed}.")
        path = write_checkpoint(
            options.out,
            options.shape,
            layout=options.layout,
            seed=options.seed,
            overrides=overrides,
            max_shard_bytes=options.shard_bytes,
            force=options.force,
            progress=sys.stderr.isatty(),
        )
    except MxforgeError as error:
        print(f"make_checkpoint: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    print(path)
    return 0


def _override(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise UsageError(f"--set takes KEY=JSON, found {text!r}.")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value  # a bare word is a string


__all__ = ["main", "write_checkpoint"]
