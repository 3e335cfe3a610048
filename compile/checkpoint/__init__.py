"""Checkpoint readers: a canonical tensor name in, a lazy, memory-mapped tensor out."""

from .hf import (
    GenerationConfig,
    HFCheckpoint,
    TensorSpec,
    check_scales,
    expected_tensors,
    layer_prefix,
)

__all__ = [
    "GenerationConfig",
    "HFCheckpoint",
    "TensorSpec",
    "check_scales",
    "expected_tensors",
    "layer_prefix",
]
