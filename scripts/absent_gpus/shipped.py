"""The GPU code of gpt-oss-20b as an artifact has it: what is judged here is what runs elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import tvm  # noqa: F401 (imports mxforge.compile.spirv itself, which must not be half done)
from checkpoints.shapes import hf_config

from mxforge import compile_model
from mxforge.compile.spirv import KernelCode, unpack

ROOT = Path(__file__).resolve().parents[2]
MODEL, NUMERICS = "20b", "fast"
# Number formats; kernels of both are judged. The first are those of fast numerics.
FORMATS = ({"dense": "int8"}, {"dense": "bf16", "activations": "f32"})


def artifacts(target: str, scratch: Path) -> list[Path]:
    """gpt-oss-20b compiled for `target`, without weights, into folders below `scratch`."""
    config = scratch / "config.json"
    config.write_text(json.dumps(hf_config(MODEL)))
    return [
        compile_model(
            config, target, scratch / f"{target.replace(':', '-')}-{formats['dense']}", NUMERICS,
            random_weights=True, **formats,
        )
        for formats in FORMATS
    ]  # fmt: skip


def spirv_kernels(artifact: Path) -> list[KernelCode]:
    """The kernels in an artifact's library, by name."""
    kernels = unpack((artifact / "model.spirv").read_bytes())
    return sorted(kernels, key=lambda kernel: kernel.name)


def short(function: str) -> str:
    """A kernel's name from that of its device function: f32_rms_norm_kernel -> f32_rms_norm."""
    return function.replace("_kernel", "")
