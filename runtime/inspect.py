"""What a folder is: an artifact's manifest, or a checkpoint's config, in short."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import vulkan
from .artifact import choose_library, read_manifest
from .errors import ArtifactTargetError, UsageError, VulkanError, needs_compiler
from .manifest import Manifest


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
        "variants": _variants(path, manifest),
    }


def _variants(path: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """Kernels of cooperative matrices, and which of them the first Vulkan device here runs."""
    if manifest.target.kind != "vulkan":
        return []
    try:
        library = path / choose_library(manifest).file
        found = vulkan.variants(library)
    except (ArtifactTargetError, UsageError, VulkanError) as error:
        return [{"kernel": "all", "matrices": (), "runs_here": f"unknown: {error}"}]
    return [
        {
            "kernel": variant.kernel,
            "matrices": (*variant.matrices, f"by subgroups of {variant.subgroup_size}"),
            "runs_here": variant.why_not or "runs here",
        }
        for variant in found
    ]


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
