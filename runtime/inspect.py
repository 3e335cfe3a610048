"""What a folder is: an artifact's manifest, or a checkpoint's config, in short."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import core
from .artifact import choose_library, read_manifest
from .errors import ArtifactCorruptError, ArtifactTargetError, UsageError, needs_compiler
from .manifest import LibraryInfo, Manifest
from .plan import Feature, Plan


def describe(path: str | Path) -> dict[str, Any]:
    """A JSON-able description of the artifact or checkpoint at `path`.

    Raises ArtifactError, CheckpointError or ConfigError where it is neither.
    """
    path = Path(path)
    configs = (path / "config.json", path / "original" / "config.json")
    if any(file.is_file() for file in configs) and not (path / "manifest.json").is_file():
        return _checkpoint(path)
    return _artifact(path, read_manifest(path))


def _artifact(path: Path, manifest: Manifest) -> dict[str, Any]:
    here, problem = None, ""
    try:
        here = choose_library(manifest).target
    except (ArtifactTargetError, UsageError) as error:
        problem = str(error)
    return {
        "kind": "artifact",
        "name": manifest.name,
        "target": asdict(manifest.target),
        "numerics": manifest.numerics,
        "runs_here": here,  # the target of the library that would be loaded
        "problem": problem,
        "precision": asdict(manifest.precision),
        "limits": asdict(manifest.limits),
        "memory": asdict(manifest.memory),
        "kv_groups": [asdict(group) for group in manifest.kv_groups],
        "tokenizer": manifest.tokenizer.kind,
        "random_weights": manifest.random_seed is not None,
        "config": dict(manifest.config),
        "versions": {
            "mxforge": manifest.mxforge_version,
            "format": manifest.format_version,
            "abi": manifest.abi_version,
        },
        "libraries": [asdict(library) for library in manifest.libraries],
        "kernels": [asdict(kernel) for kernel in manifest.kernels],
        "matrices": _matrices(path, manifest) if manifest.target.kind == "vulkan" else [],
    }


def plan_text(path: str | Path) -> Iterator[str]:
    """The lines of the launch plan of the library that would be loaded here.

    Raises ArtifactError.
    """
    from .plan_text import described

    path = Path(path)
    return described(_plan(path, choose_library(read_manifest(path))))


def _plan(path: Path, library: LibraryInfo) -> Plan:
    try:
        data = (path / library.plan).read_bytes()
    except OSError as error:
        raise ArtifactCorruptError(f"{error.filename} cannot be read ({error.strerror}).") from None
    return Plan.from_bytes(data, str(path / library.plan))


def _matrices(path: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """The products of matrices that kernels are written for, and which of them the first device
    here has; where it has none of a kernel's, another kernel runs."""
    features = {
        value.name
        for library in manifest.libraries
        for function in _plan(path, library).functions
        for value in function.values
        if isinstance(value, Feature)
    }
    told = []
    for feature in sorted(features):
        _name, *product, size = feature.split()
        try:
            here = core.device_has(manifest.target.kind, feature)
            runs = "runs here" if here else "not on the device here"
        except ArtifactTargetError as error:
            runs = f"unknown: {error}"
        matrices = (" ".join(product), f"by subgroups of {size}")
        told.append({"matrices": matrices, "runs_here": runs})
    return told


def _checkpoint(path: Path) -> dict[str, Any]:
    with needs_compiler("Reading a checkpoint"):
        from .compile.checkpoint import open_checkpoint
    checkpoint = open_checkpoint(path)
    checkpoint.check()
    config = checkpoint.config
    return {
        "kind": "checkpoint",
        "name": path.resolve().name,
        "format": checkpoint.layout,
        "files": [{"file": file.name, "bytes": file.stat().st_size} for file in checkpoint.files],
        "tokenizer": checkpoint.tokenizer_path is not None,
        "config": config.to_dict(),
    }
