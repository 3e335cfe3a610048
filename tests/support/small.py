"""Small things that tests of several folders make: checkpoints, and artifacts without a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints.random_checkpoint import write_checkpoint

from mxforge.compile.artifact_writer import ArtifactWriter
from mxforge.machine import host_system
from mxforge.manifest import (
    MANIFEST,
    KernelInfo,
    KvGroup,
    LibraryInfo,
    Limits,
    Manifest,
    MemoryPlan,
    PrecisionInfo,
    SourceInfo,
    TargetInfo,
    TokenizerInfo,
    WeightInfo,
)
from mxforge.safetensors import SafetensorsWriter, dtype_name, open_safetensors

SMALL_SHAPE = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "sliding_window": 20,
    "vocab_size": 100,
}
MAX_BATCH, PREFILL_CHUNK = 4, 32  # of artifacts that several tests share
SPECIAL_TOKENS = ("<|endoftext|>", "<|start|>", "<|message|>", "<|end|>")
MERGES = (("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("a", "b"))
TEXT_VOCAB = 256 + len(MERGES) + len(SPECIAL_TOKENS) + 3  # padded beyond the tokenizer
SMALL_MANIFEST = Manifest(
    name="tiny",
    config={
        "vocab_size": 100,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "rope_theta": 150000.0,
    },
    target=TargetInfo("cpu", "cpu:x86-64", host_system()),
    numerics="exact",
    precision=PrecisionInfo("float32", "float32", "f32", "bf16"),
    limits=Limits(4, 64, 1024),
    stop_token_ids=(2, 12),
    memory=MemoryPlan(320, 4096),
    libraries=(LibraryInfo("cpu:x86-64", "model.so", "model.plan", ()),),
    kernels=(KernelInfo("f32_rms_norm", "cpu:x86-64", "parallel items", "rows=1", ("norm",)),),
    kv_groups=(
        KvGroup("sliding", 20, (), "float32", (2, 1, 128)),
        KvGroup("full", None, (0,), "float32", (2, 1, 128)),
    ),
    weights=(
        WeightInfo("a.weight", (4, 16), "float32", "weights-00001.safetensors", "mapped"),
        WeightInfo("b.scales", (64,), "uint8", "weights-00001.safetensors", "mapped"),
    ),
    source=SourceInfo("huggingface", "0" * 64),
    tokenizer=TokenizerInfo(None),
)


def small_checkpoint(folder: Path, **overrides: Any) -> Path:
    """A random checkpoint of `SMALL_SHAPE` and no tokenizer, in `folder`/small."""
    return write_checkpoint(folder / "small", "tiny", overrides=SMALL_SHAPE | overrides)


def write_tokenizer(path: Path) -> None:
    """A byte-level tokenizer.json: 256 bytes, `MERGES`, `SPECIAL_TOKENS`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in MERGES)]
    vocab = {word: token for token, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=list(MERGES)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL_TOKENS])
    tokenizer.save(str(path))


def fill_artifact(writer: ArtifactWriter, manifest: Manifest = SMALL_MANIFEST) -> None:
    """Write the files that go with a variation of `SMALL_MANIFEST`; its libraries are none."""
    with writer.weights(
        "weights-00001.safetensors", [("a.weight", "F32", (4, 16)), ("b.scales", "U8", (64,))]
    ) as weights:
        weights.write("a.weight", np.arange(64, dtype=np.float32).reshape(4, 16))
        weights.write("b.scales", np.arange(64, dtype=np.uint8))
    writer.write("tokenizer/special_tokens.json", b"{}\n")
    for library in manifest.libraries:
        writer.write(library.file, b"library")
        if library.plan is not None:
            writer.write(library.plan, b"plan")


def make_artifact(path: Path, force: bool = False, manifest: Manifest = SMALL_MANIFEST) -> Path:
    with ArtifactWriter(path, force) as writer:
        fill_artifact(writer, manifest)
        writer.finish(manifest)
    return path


def edit_manifest(artifact: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest's JSON in place."""
    content = json.loads((artifact / MANIFEST).read_text())
    change(content)
    (artifact / MANIFEST).write_text(json.dumps(content))


def rewrite(folder: Path, changes: Mapping[str, np.ndarray | None]) -> None:
    """Replace, add or (None) remove tensors of a one-file checkpoint."""
    path = folder / "model.safetensors"
    source = open_safetensors(path)
    arrays: dict[str, Any] = {name: source.array(name) for name in source.tensors}
    arrays = {name: array for name, array in {**arrays, **changes}.items() if array is not None}
    infos = [(name, dtype_name(a.dtype), a.shape) for name, a in arrays.items()]
    with SafetensorsWriter(path.with_suffix(".new"), infos) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    path.with_suffix(".new").replace(path)


def edit_json(path: Path, **changes: Any) -> None:
    """Replace or add keys of the JSON object in a file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
