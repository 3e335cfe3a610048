"""How a model family tells of its tensors: those of a checkpoint, and the weights made of them.

A family has one list of each, in its own `tensors` module. Readers, packing, reference, ONNX
export and random checkpoints look names, shapes and roles up there. Names are those of the Hugging
Face layout, called canonical.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import numpy as np

from mxforge.schedules.kernel import Kernel, Target

from ..formats import Precision

# In safetensors' words. The published checkpoints store dense tensors as bf16; f16 and f32 occur in
# fine-tunes.
DENSE_DTYPES = ("BF16", "F16", "F32")
PACKED_DTYPES = ("U8",)

# What a tensor is for: `blocks` and `scales` are the two parts of MXFP4 matrices.
TensorRole = Literal[
    "embedding", "norm", "dense", "bias", "sinks", "router", "router_bias", "blocks", "scales"
]
# How a weight is packed: as its tensors' role says, or
#   gate_up, down  the experts' matrices: blocks, scales and biases; rows of gate and up alternate
#   constant       values that follow from the config
WeightRole = Literal[
    "embedding",
    "norm",
    "dense",
    "bias",
    "sinks",
    "router",
    "router_bias",
    "gate_up",
    "down",
    "constant",
]

_PACKED_ROLES: tuple[TensorRole, ...] = ("blocks", "scales")
_LAYERS = "model.layers."

T = TypeVar("T")


@dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint.

    `absent` says that a model of this config has none and computes as with zeros.
    """

    name: str
    shape: tuple[int, ...]
    role: TensorRole
    absent: bool = False

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The safetensors dtypes that may hold it."""
        return PACKED_DTYPES if self.role in _PACKED_ROLES else DENSE_DTYPES


@dataclass(frozen=True)
class Fused:
    """Kernels that read a weight in one launch with the operations around it.

    kernels            by the name of a number format
    format(precision)  the name of that format
    static(precision)  the kernel's static arguments
    """

    kernels: Mapping[str, Kernel]
    format: Callable[[Precision], str]
    static: Callable[[Precision], dict[str, Any]]

    def on(self, target: Target, precision: Precision) -> tuple[Kernel, dict[str, Any]] | None:
        """The kernel and its static arguments; None where it has no schedule for the target."""
        kernel, static = self.kernels.get(self.format(precision)), self.static(precision)
        return (kernel, static) if kernel and kernel.fits(target, **static) else None


@dataclass(frozen=True)
class Weight:
    """A weight as the compiler packs it, for a target, into one or more of the library's arguments.

    tensors  what it is made of, their rows one below the other; an expert matrix's blocks, scales
             and biases
    values   f32, of a constant, which is made of no tensors
    static   the static arguments of the kernel that reads it, of a dense layer's or of experts'
    fused    what reads it instead where it can
    """

    name: str
    role: WeightRole
    tensors: tuple[Tensor, ...] = ()
    values: np.ndarray | None = None
    static: Mapping[str, Any] = field(default_factory=dict)
    fused: Fused | None = None

    @property
    def sources(self) -> tuple[str, ...]:
        """The names of the checkpoint's tensors that it is made of."""
        return tuple(tensor.name for tensor in self.tensors if not tensor.absent)

    @property
    def rows(self) -> int:
        """Rows of all its tensors, or the length of a vector."""
        return sum(tensor.shape[0] for tensor in self.tensors)

    @property
    def columns(self) -> int:
        """Numbers in a row: the inputs of a dense layer."""
        return self.tensors[0].shape[-1]


def layer_prefix(layer: int) -> str:
    """What the names of a layer's tensors begin with."""
    return f"{_LAYERS}{layer}."


def layer_number(name: str) -> int | None:
    """The layer that a tensor of this name belongs to; None where to none."""
    return int(name.split(".")[2]) if name.startswith(_LAYERS) else None


def layer_of(weights: Mapping[str, T], layer: int) -> dict[str, T]:
    """A layer's weights by their names within the layer."""
    prefix = layer_prefix(layer)
    return {
        name.removeprefix(prefix): weight
        for name, weight in weights.items()
        if name.startswith(prefix)
    }
