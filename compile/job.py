"""One compilation, step by step: read, lower, generate, link, pack, describe."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mxforge.errors import TargetError
from mxforge.kv_layout import page_shape
from mxforge.manifest import (
    KernelInfo,
    KvGroup,
    LibraryInfo,
    Manifest,
    MemoryPlan,
    PrecisionInfo,
    SourceInfo,
    TargetInfo,
    TokenizerInfo,
    WeightInfo,
)
from mxforge.manifest import Limits as ArtifactLimits
from mxforge.tokenizer import tokenizer_files

from . import kernels, linker, pipeline, targets
from .artifact_writer import ArtifactWriter
from .checkpoint import FolderCheckpoint, open_checkpoint
from .checkpoint.fingerprint import Fingerprint
from .config import KINDS, Kind, ModelConfig
from .formats import Formats, Precision
from .models.emit import Limits
from .models.family import Family
from .models.registry import read_config
from .plan import plan_of
from .targets import CompileTarget, Numerics
from .weights import PackedWeight, first_difference, packed_weights

WEIGHT_FILE = "weights-00001.safetensors"
LIBRARY_ROOM = 64 << 20  # what a library and its part of the manifest may take on disk


@dataclass(frozen=True)
class _Library:
    """A compiled library, its kernels, and the workspace in bytes that was planned for it."""

    info: LibraryInfo
    kernels: tuple[KernelInfo, ...]
    workspace: int


@dataclass
class Job:
    """What was asked of `compile_model`; `run` does it. Reading the config already may raise."""

    name: str
    source: Path
    target_name: str
    numerics: Numerics
    formats: Formats
    max_batch: int
    prefill_chunk: int
    random_weights: bool
    dump: Path | None
    announce: Callable[[str], None]
    progress: bool
    host: str | None = None  # of linker.HOSTS; None: the target's own
    checkpoint: FolderCheckpoint | None = field(init=False, default=None)
    family: Family[Any] = field(init=False)
    config: ModelConfig = field(init=False)
    targets: tuple[CompileTarget, ...] = field(init=False)  # a library for each, best first
    precision: Precision = field(init=False)
    weights: list[PackedWeight] = field(init=False)
    fingerprint: Fingerprint = field(init=False)

    def __post_init__(self) -> None:
        self.targets = targets.resolve_all(self.target_name, self.host)
        if self.source.is_dir():
            self.announce("checking the checkpoint")
            self.checkpoint = open_checkpoint(self.source)
            self.family, self.config = self.checkpoint.family, self.checkpoint.config
            if not self.random_weights:
                self.checkpoint.check()
        else:
            self.family, _layout, self.config = read_config(self.source)
        self.precision = self._precision_of(self.targets[0])
        self.weights = self._weights_of(self.targets[0])
        self.fingerprint = Fingerprint(self.config, self._stop_token_ids())

    def run(self, folder: Path, force: bool) -> None:
        """Compile into `folder`, which appears complete or not at all."""
        with ArtifactWriter(folder, force=force) as writer:
            packed = 0 if self.random_weights else self._weights_bytes()
            writer.reserve(packed + LIBRARY_ROOM * len(self.targets))
            tokenizer = self._tokenizer(writer)  # first: what cannot be read shows at once
            self._check_shared()
            libraries = [self._compile(writer, number) for number in range(len(self.targets))]
            weights = self._pack(writer)
            writer.finish(
                Manifest(
                    name=self.name,
                    config=self.config.to_dict(),
                    target=TargetInfo(
                        self.targets[0].kernels.kind,
                        self.targets[0].name if len(self.targets) == 1 else self.target_name,
                        self.targets[0].host,
                    ),
                    numerics=self.numerics,
                    precision=PrecisionInfo(
                        "f32",
                        self.precision.kv,
                        self.precision.activations,
                        self.precision.dense,
                    ),
                    limits=ArtifactLimits(
                        self.max_batch, self.prefill_chunk, self.config.max_position_embeddings
                    ),
                    stop_token_ids=self._stop_token_ids(),
                    memory=MemoryPlan(
                        self._weights_bytes(), max(made.workspace for made in libraries)
                    ),
                    kv_groups=self._kv_groups(),
                    libraries=tuple(made.info for made in libraries),
                    kernels=tuple(kernel for made in libraries for kernel in made.kernels),
                    weights=weights,
                    source=self._source(),
                    tokenizer=tokenizer,
                    random_seed=0 if self.random_weights else None,
                )
            )

    def _weights_of(self, target: CompileTarget) -> list[PackedWeight]:
        weights = self.family.weights(self.config)
        return packed_weights(weights, target.kernels, self._precision_of(target))

    def _precision_of(self, target: CompileTarget) -> Precision:
        return target.precision(self.numerics, self.config, self.formats)

    def _check_shared(self) -> None:
        """TargetError where the libraries could not share the weights or the cache's layout."""
        first, *others = self.targets
        checkpoint = None if self.random_weights else self.checkpoint
        for target in others:
            precision = self._precision_of(target)
            if precision != self.precision:
                raise TargetError(
                    f"Libraries of one artifact should compute alike, but {first.name} has "
                    f"{self.precision} and {target.name} {precision}; compile for one of them."
                )
            weight = first_difference(self.weights, self._weights_of(target), checkpoint)
            if weight is not None:
                raise TargetError(
                    f"Libraries of one artifact should read the same weights, but {first.name} and "
                    f"{target.name} have {weight} packed differently; compile for one of them."
                )

    def _compile(self, writer: ArtifactWriter, number: int) -> _Library:
        """The library for the target of this number: kernels and launch plan."""
        started = time.perf_counter()
        target, count = self.targets[number], len(self.targets)
        level = target.name.partition(":")[2]
        prefix = f"{target.name} ({number + 1} of {count}): " if count > 1 else ""
        dump = self.dump / level if count > 1 and self.dump is not None else self.dump

        def announce(text: str) -> None:
            self.announce(prefix + text)

        announce("building the model")
        limits = Limits(self.max_batch, self.prefill_chunk)
        module = self.family.module(
            self.config, target.kernels, self.precision, limits, self.weights
        )
        module = pipeline.lower(module, target, dump, lambda name: announce(f"phase {name}"))
        announce("generating code")
        stem = f"model-{level}" if count > 1 else "model"
        if target.host is not None:
            built = kernels.of_cpu(module, target, dump)
            plan = plan_of(module)
            file = stem + linker.known_host(target.host).suffix
            announce("linking")
            kernels.write_library(built, writer.path(file), target.host)
            writer.add(file)
        else:
            on_device = kernels.of_gpu(module, target)
            plan = plan_of(module, on_device.hosts)
            file = f"{stem}.{kernels.device_suffix(target)}"
            folder = writer.path(file).parent
            writer.write(file, kernels.device_code(on_device, target, folder, dump))
        writer.write(f"{stem}.plan", plan.to_bytes())
        announce(f"library compiled in {time.perf_counter() - started:.1f} s")
        return _Library(
            LibraryInfo(target.name, file, f"{stem}.plan", target.required_features),
            pipeline.kernel_table(module, target),
            plan.workspace,
        )

    def _tokenizer(self, writer: ArtifactWriter) -> TokenizerInfo:
        path = self.checkpoint.tokenizer_path if self.checkpoint is not None else None
        kind, files = tokenizer_files(path, self.config.vocab_size)
        for name, data in files.items():
            writer.write(f"tokenizer/{name}", data)
        if kind is None:
            chat, size = self.family.chat, self.config.vocab_size
            known = f"{chat.tokenizer}'s {chat.vocab_size}" if chat else "a known tokenizer's"
            self.announce(
                f"warning: there is no tokenizer.json, and a vocabulary of {size} is not {known}: "
                "the model will take token ids only"
            )
        return TokenizerInfo(kind)

    def _pack(self, writer: ArtifactWriter) -> tuple[WeightInfo, ...]:
        """Stream every weight into the artifact, or only describe them for --random-weights."""
        file = None
        if not self.random_weights:
            assert self.checkpoint is not None
            file = WEIGHT_FILE
            self.announce("packing the weights")
            tensors = [(w.name, w.safetensors_dtype, w.shape) for w in self.weights]
            with (
                tqdm(
                    total=self._weights_bytes(),
                    unit="B",
                    unit_scale=True,
                    disable=not self.progress,
                ) as bar,
                writer.weights(file, tensors) as out,
            ):
                for weight in self.weights:
                    for chunk in weight.chunks(self.checkpoint):
                        out.write(weight.name, chunk)
                        bar.update(chunk.nbytes)
                    for source in weight.sources:
                        self.fingerprint.add(source, self.checkpoint.tensor(source))
                        self.checkpoint.drop(source)
        on_cpu = self.targets[0].kernels.kind == "cpu"
        return tuple(
            WeightInfo(
                w.name, w.shape, w.dtype, file,
                "uploaded" if not on_cpu else "sparse" if w.sparse else "mapped", w.fill,
            )
            for w in self.weights
        )  # fmt: skip

    def _kv_groups(self) -> tuple[KvGroup, ...]:
        c = self.config
        shape = page_shape(c.num_key_value_heads, c.head_dim, self.precision.kv)
        windows: dict[Kind, int | None] = {"sliding": c.sliding_window, "full": None}
        return tuple(
            KvGroup(
                kind,
                windows[kind],
                tuple(layer for layer, its in enumerate(c.kinds) if its == kind),
                self.precision.kv,
                shape,
            )
            for kind in KINDS
        )

    def _stop_token_ids(self) -> tuple[int, ...]:
        if self.checkpoint is not None:
            return self.checkpoint.generation_config.eos_token_ids
        return self.family.stop_token_ids(self.config)

    def _source(self) -> SourceInfo:
        layout = "config" if self.checkpoint is None else self.checkpoint.layout
        kind = "config" if self.random_weights else layout
        return SourceInfo(kind, self.fingerprint.hexdigest())

    def _weights_bytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights)
