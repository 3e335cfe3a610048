"""Random gpt-oss checkpoints of any shape, in the Hugging Face layout or OpenAI's original one.

Weights are scaled so that activations stay of order one, routing stays spread and some SwiGLU
inputs reach their limit. Values come from raw PCG64 bits through integer arithmetic, not from a
distribution whose stream NumPy may change, so a seed gives the same bytes on every machine.
Tensors are slices of one random pool (each from an offset of its own), which makes the 13.8 GB
of the 20b shapes a matter of disk speed; the pool and one buffer are all the memory it takes.
"""

from __future__ import annotations

import argparse
import copy
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

from mxforge.errors import MxforgeError, OutputError, UsageError
from mxforge.safetensors import SafetensorsWriter

from .checkpoint import openai
from .checkpoint.folder import (
    HARMONY_STOP_IDS,
    HARMONY_VOCABULARY,
    INDEX_FILE,
    PACKED_DTYPES,
    SINGLE_FILE,
    TensorSpec,
)
from .checkpoint.hf import expected_tensors
from .checkpoint.openai import StoredTensor
from .config import Layout, ModelConfig

MAX_SHARD_BYTES = 5_000_000_000
_SHARD_NAME = "model-{number:05}-of-{count:05}.safetensors"

# Primes, so that rows of no length begin at the same place of a pool twice in a row.
_REAL_POOL = 4_194_301
_BYTE_POOL = 16_777_213

_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
}


@dataclass(frozen=True)
class Shape:
    """A config.json, as changes to the published one, and what a random checkpoint adds to it.

    idle_experts      experts that no token takes: their router bias is -100
    max_shard_bytes   a new file begins where this would be exceeded
    """

    why: str
    config: Mapping[str, Any]
    idle_experts: tuple[int, ...] = ()
    max_shard_bytes: int = MAX_SHARD_BYTES


# The published 20b config.json; the others say what they change (None removes a key).
_PUBLISHED: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2880,
    "initial_context_length": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 2880,
    "max_position_embeddings": 131072,
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "output_router_logits": False,
    "pad_token_id": 199999,
    "quantization_config": {
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05,
    "rope_scaling": _YARN,
    "rope_theta": 150000,
    "router_aux_loss_coef": 0.9,
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": HARMONY_VOCABULARY,
}


def _alternating(layers: int) -> list[str]:
    return ["full_attention" if i % 2 else "sliding_attention" for i in range(layers)]


def _types(letters: str) -> list[str]:
    return [{"s": "sliding_attention", "f": "full_attention"}[letter] for letter in letters]


SHAPES: dict[str, Shape] = {
    "20b": Shape("gpt-oss-20b as published", {}),
    "20b-4layers": Shape("gpt-oss-20b with four of its 24 layers", {"num_hidden_layers": 4}),
    "120b-2layers": Shape(
        "gpt-oss-120b with two of its 36 layers", {"num_hidden_layers": 2, "num_local_experts": 128}
    ),
    "tiny": Shape(
        "small enough for a demo, with the real vocabulary so that it takes text",
        {
            "num_hidden_layers": 4,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "num_local_experts": 8,
        },
    ),
    "odd-1": Shape(
        "three queries a KV head, window 5, an expert without tokens",
        {
            "num_hidden_layers": 3,
            "hidden_size": 96,
            "intermediate_size": 160,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "num_local_experts": 5,
            "num_experts_per_tok": 3,
            "vocab_size": 1003,
            "sliding_window": 5,
        },
        idle_experts=(2,),
    ),
    "odd-2": Shape(
        "ungrouped heads of 40, window 20, two experts and one a token, plain RoPE, "
        "full layers first",
        {
            "num_hidden_layers": 4,
            "hidden_size": 160,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 40,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "vocab_size": 777,
            "sliding_window": 20,
            "layer_types": _types("ffss"),
            "rope_scaling": {"rope_type": "default"},
            "rope_theta": 10000.0,
            "max_position_embeddings": 4096,
        },
    ),
    "odd-3": Shape(
        "window 17 (one key into a second page), head_dim 24, one MXFP4 block a row, truncated "
        "YaRN past its original context, several shards",
        {
            "num_hidden_layers": 5,
            "hidden_size": 224,
            "intermediate_size": 32,
            "num_attention_heads": 10,
            "num_key_value_heads": 5,
            "head_dim": 24,
            "num_local_experts": 9,
            "vocab_size": 513,
            "sliding_window": 17,
            "layer_types": _types("ssfsf"),
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 16.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 8.0,
                "beta_slow": 1.0,
                "truncate": True,
            },
            "rope_theta": 5000.0,
            "swiglu_limit": 2.5,
            "max_position_embeddings": 1024,
        },
        idle_experts=(0, 8),
        max_shard_bytes=300_000,
    ),
    "odd-4": Shape(
        "one KV head for eight queries, head_dim 80, 33 experts, window 128, "
        "config in the spelling of transformers 5 and without layer_types",
        {
            "num_hidden_layers": 3,
            "hidden_size": 64,
            "intermediate_size": 224,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "head_dim": 80,
            "num_local_experts": 33,
            "vocab_size": 2049,
            "layer_types": None,
            "experts_per_token": None,
            "rope_scaling": None,
            "rope_theta": None,
            "rope_parameters": {**_YARN, "rope_theta": 150000.0},
            "rms_norm_eps": 1e-6,
        },
    ),
    "odd-5": Shape(
        "the smallest everything: one layer of window 1, one expert, one MXFP4 block, a head of 2",
        {
            "num_hidden_layers": 1,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_attention_heads": 1,
            "num_key_value_heads": 1,
            "head_dim": 2,
            "num_local_experts": 1,
            "num_experts_per_tok": 1,
            "vocab_size": 17,
            "sliding_window": 1,
            "layer_types": _types("s"),
            "rope_scaling": {"rope_type": "default"},
            "max_position_embeddings": 512,
        },
    ),
}
ODD_SHAPES = tuple(name for name in SHAPES if name.startswith("odd-"))


@dataclass(frozen=True)
class _Fill:
    """Distribution of one kind of dense tensor: mean, and gain / √fan_in (fan_in: last axis)."""

    gain: float
    mean: float = 0.0
    per_input: bool = False


# Suffix of the name -> distribution; the first match counts.
_FILLS: tuple[tuple[str, _Fill], ...] = (
    ("norm.weight", _Fill(0.1, mean=1.0)),
    ("embed_tokens.weight", _Fill(1.0)),
    ("sinks", _Fill(1.0)),
    ("router.bias", _Fill(0.25)),
    ("bias", _Fill(0.1)),
    ("weight", _Fill(1.0, per_input=True)),
)
# Gate and up inputs of twice the unit size, so that some reach the limit; down undoes it.
_EXPERT_GAINS = {"gate_up_proj_scales": 2.0, "down_proj_scales": 0.5}
# Root mean square of uniform e2m1 codes; times that of the scales' spread over c-1, c, c, c+1.
_E2M1_RMS = math.sqrt(8.5625 * 1.5625)


def hf_config(shape: str | Shape, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config.json of a shape; `overrides` replace keys (None removes one).

    A changed num_hidden_layers alternates layer types unless they are given too.
    """
    shape = named_shape(shape) if isinstance(shape, str) else shape
    overrides = dict(overrides or {})
    raw = {**_PUBLISHED, **shape.config}
    if "num_hidden_layers" in overrides and overrides["num_hidden_layers"] != len(
        raw.get("layer_types") or ()
    ):
        raw.pop("layer_types", None)
    raw |= overrides
    if "num_experts_per_tok" in raw and raw.get("experts_per_token") is not None:
        raw["experts_per_token"] = raw["num_experts_per_tok"]
    if raw["vocab_size"] != HARMONY_VOCABULARY:
        raw |= {"eos_token_id": 0, "pad_token_id": 0}
    if "layer_types" not in raw and type(raw["num_hidden_layers"]) is int:
        raw["layer_types"] = _alternating(raw["num_hidden_layers"])
    # A copy: transformers writes into the nested objects that it is given.
    return copy.deepcopy({key: value for key, value in raw.items() if value is not None})


def openai_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json of OpenAI's layout; UsageError where it has no key to say the same."""
    yarn = config.rope_type == "yarn"
    context = config.original_max_position_embeddings if yarn else config.max_position_embeddings
    raw = {
        "num_hidden_layers": config.num_hidden_layers,
        "num_experts": config.num_local_experts,
        "experts_per_token": config.num_experts_per_tok,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "swiglu_limit": config.swiglu_limit,
        "head_dim": config.head_dim,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "sliding_window": config.sliding_window,
        "initial_context_length": context,
        "rope_theta": config.rope_theta,
        "rope_scaling_factor": config.yarn_factor if yarn else 1.0,
        "rope_ntk_alpha": config.beta_slow,
        "rope_ntk_beta": config.beta_fast,
    }
    said, wanted = ModelConfig.from_openai(raw).to_dict(), config.to_dict()
    for name, value in wanted.items():
        if said[name] != value:
            raise UsageError(
                f"OpenAI's layout cannot say {name} = {json.dumps(value)}, it means "
                f"{json.dumps(said[name])}; override it or choose another shape."
            )
    return raw


def named_shape(name: str) -> Shape:
    if name not in SHAPES:
        raise UsageError(f"Expected a shape out of {', '.join(SHAPES)}, found {name!r}.")
    return SHAPES[name]


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
    config = ModelConfig.from_hf(raw)
    original = openai_config(config) if layout == "openai" else None
    if out.exists() and not force:
        raise OutputError(f"{out} exists already; remove it, or give --force to replace it.")
    work = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        work.mkdir(parents=True)
        source = _Source(shape, config, seed)
        limit = max_shard_bytes or shape.max_shard_bytes
        if original is not None:
            tensors = openai.stored_tensors(config)
            _write_json(work / "config.json", original)
            _write_json(work / "dtypes.json", _published_dtypes(tensors))
            _write_shards(work, source, tensors, limit, openai.SHARD_NAME, progress)
        else:
            tensors = {n: StoredTensor(s, (n,)) for n, s in expected_tensors(config).items()}
            _write_json(work / "config.json", raw)
            _write_json(work / "generation_config.json", _generation_config(raw))
            weight_map = _write_shards(work, source, tensors, limit, _SHARD_NAME, progress)
            if len(set(weight_map.values())) > 1:
                size = sum(_nbytes(tensor.spec) for tensor in tensors.values())
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


def _generation_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    if raw["vocab_size"] != HARMONY_VOCABULARY:
        return {"do_sample": True, "eos_token_id": [raw["eos_token_id"]]}
    return {
        "bos_token_id": 199998,
        "do_sample": True,
        "eos_token_id": list(HARMONY_STOP_IDS),
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
    specs = {name: tensor.spec for name, tensor in tensors.items()}
    shards: list[list[str]] = [[]]
    filled = 0
    sizes = {name: _nbytes(spec) for name, spec in specs.items()}
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
        sorted(names, key=lambda name: specs[name].dtypes == PACKED_DTYPES) for names in shards
    ]
    total = sum(sizes.values())
    with tqdm(total=total, unit="B", unit_scale=True, disable=not progress) as bar:
        for file, names in zip(files, shards, strict=True):
            infos = [(name, _dtype(specs[name]), specs[name].shape) for name in names]
            with SafetensorsWriter(folder / file, infos, {"format": "pt"}) as writer:
                for name in names:
                    for part in tensors[name].parts:
                        for piece in source.pieces(part):
                            writer.write(name, piece)
                            bar.update(piece.nbytes)
    return {name: file for file, names in zip(files, shards, strict=True) for name in names}


def _dtype(spec: TensorSpec) -> str:
    return spec.dtypes[0]


def _nbytes(spec: TensorSpec) -> int:
    return math.prod(spec.shape) * (1 if spec.dtypes == PACKED_DTYPES else 2)


@dataclass
class _Source:
    """The bytes of every tensor, as slices of pools made from the seed."""

    shape: Shape
    config: ModelConfig
    seed: int
    _specs: dict[str, TensorSpec] = field(init=False)
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
        self._specs = expected_tensors(self.config)
        self._offsets = {name: int(bits.random_raw()) for name in self._specs}

    def pieces(self, name: str) -> Iterator[np.ndarray]:
        """The tensor of this canonical name in flat pieces."""
        spec = self._specs[name]
        if name.endswith("mlp.router.bias") and self.shape.idle_experts:
            bias = self._pool(name, spec)[: self.config.num_local_experts].copy()
            idle = [e for e in self.shape.idle_experts if e < len(bias)]
            bias[idle] = -100
            yield bias
            return
        pool = self._pool(name, spec)
        left, at = math.prod(spec.shape), self._offsets[name] % len(pool)
        while left:
            piece = pool[at : at + left]
            yield piece
            left -= len(piece)
            at = 0

    def _pool(self, name: str, spec: TensorSpec) -> np.ndarray:
        if name.endswith("_blocks"):
            return self._bytes
        if name.endswith("_scales"):
            gain = _EXPERT_GAINS[name.rpartition(".")[2]]
            deviation = gain / math.sqrt(spec.shape[-1] * 32)
            center = 127 + round(math.log2(deviation / _E2M1_RMS))
            return self._cached(("scales", center), lambda: self._scale_pool(center))
        fill = next(fill for suffix, fill in _FILLS if name.endswith(suffix))
        gain = fill.gain / math.sqrt(spec.shape[-1]) if fill.per_input else fill.gain
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


def random_tokens(vocab_size: int, count: int, seed: int = 0) -> np.ndarray:
    """Token ids i32 [count], the same for a seed on every machine."""
    drawn = np.asarray(np.random.PCG64(seed).random_raw(count), np.uint64)
    tokens: np.ndarray = (drawn % np.uint64(vocab_size)).astype(np.int32)
    return tokens


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
    parser.add_argument("--shape", default="tiny", choices=SHAPES, metavar="NAME")
    parser.add_argument(
        "--layout",
        default="huggingface",
        choices=get_args(Layout),
        help="names of files, tensors and config keys (default: huggingface)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", type=int, help="short for --set num_hidden_layers=N")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=JSON",
        help="replace a key of Hugging Face's config.json, as in --set vocab_size=1000",
    )
    parser.add_argument("--shard-bytes", type=int, help="begin a new file past this size")
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


__all__ = [
    "ODD_SHAPES",
    "SHAPES",
    "Shape",
    "hf_config",
    "main",
    "named_shape",
    "openai_config",
    "random_tokens",
    "write_checkpoint",
]
