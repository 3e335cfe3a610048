"""The packed weights: what each is made of, its shape for a target, and how it is streamed.

A family lists its weights with a role each (`models.tensors`); how a role is packed is told here. A
weight that a kernel reads is laid out as the kernel's schedule for the target says. The packed list
is in the order of the library's arguments. A weight is packed in chunks along its first axis, so
that packing never holds more than a few tens of MB beyond the page cache, whatever the model's
size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import ml_dtypes
import numpy as np

from mxforge.safetensors import dtype_name
from mxforge.schedules.formats import DENSE, DenseFormat
from mxforge.schedules.kernel import Kernel, Layout, Target
from mxforge.schedules.moe import DOWN, GATE_UP

from .checkpoint import Checkpoint, check_scales
from .formats import Precision
from .models.tensors import Weight, WeightRole, layer_number

CHUNK_BYTES = 64 << 20

Chunks = Callable[[Checkpoint], Iterator[np.ndarray]]


@dataclass(frozen=True)
class PackedWeight:
    """One argument of the library.

    `sources` are the checkpoint's tensors that it is made of; `chunks(checkpoint)` yields arrays
    whose concatenation along axis 0 has `shape`. `fill` tells the runtime what random content
    keeps activations near 1 (see runtime/native/core/weights.cc). Of a `sparse` one, a step reads
    only some rows.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    sources: tuple[str, ...]
    chunks: Chunks
    fill: dict[str, Any]
    sparse: bool = False

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    @property
    def safetensors_dtype(self) -> str:
        return dtype_name(self.dtype)


def packed_weights(
    weights: Iterable[Weight], target: Target, precision: Precision
) -> list[PackedWeight]:
    """A model's weights as a target's library takes them, in argument order."""
    return [
        packed for weight in weights for packed in _PACKERS[weight.role](weight, target, precision)
    ]


def first_difference(
    ours: Sequence[PackedWeight], theirs: Sequence[PackedWeight], checkpoint: Checkpoint | None
) -> str | None:
    """The first weight that two lists of one model's weights pack differently, if there is one.

    All are compared by what they declare. Bytes are compared of the first chunk, and not of layers
    after the first, which are packed by the same functions as that; none without a checkpoint.
    """
    for a, b in zip_longest(ours, theirs):
        if a is None or b is None or _declared(a) != _declared(b):
            return (a or b).name
        if checkpoint is None or layer_number(a.name) not in (None, 0):
            continue
        if next(a.chunks(checkpoint)).tobytes() != next(b.chunks(checkpoint)).tobytes():
            return a.name
    return None


def _declared(weight: PackedWeight) -> tuple[object, ...]:
    return (weight.name, weight.shape, weight.dtype, weight.sources, weight.fill)


def _constant(weight: Weight) -> PackedWeight:
    """Values that follow from the config, in float32."""
    values = weight.values
    assert values is not None
    fill = {"values": [float(value) for value in values]}
    return PackedWeight(
        weight.name, values.shape, "float32", (), lambda _checkpoint: iter([values]), fill
    )


def _embedding(weight: Weight) -> PackedWeight:
    """bf16 [rows, columns] as stored."""
    (source,) = weight.sources
    return PackedWeight(
        weight.name,
        (weight.rows, weight.columns),
        "bfloat16",
        (source,),
        lambda checkpoint: _rows(checkpoint.tensor(source)),
        {"normal": 1.0},
        sparse=True,
    )


def _vector(name: str, size: int, fill: dict[str, Any]) -> PackedWeight:
    """A small vector, kept in float32."""
    return PackedWeight(
        name,
        (size,),
        "float32",
        (name,),
        lambda checkpoint: iter([checkpoint.tensor(name).astype(np.float32)]),
        fill,
    )


def _bias(name: str, sources: tuple[str, ...], size: int) -> PackedWeight:
    """The bias of a dense layer, the sources stacked; zeros where there are none."""

    def chunks(checkpoint: Checkpoint) -> Iterator[np.ndarray]:
        if not sources:
            yield np.zeros(size, np.float32)
            return
        for source in sources:
            yield checkpoint.tensor(source).astype(np.float32)

    return PackedWeight(name, (size,), "float32", sources, chunks, {"normal": 0.02})


def _dense(
    weight: Weight, target: Target, precision: Precision, format_: DenseFormat
) -> list[PackedWeight]:
    """A dense weight [rows, k], its tensors stacked, in the parts of a format."""
    rows, k = weight.rows, weight.columns
    fused = weight.fused and weight.fused.on(target, precision)
    kernel, static = fused or (format_.kernel, weight.static)
    schedule = kernel.choose(target, **static)
    tensors = format_.weight.tensors("weight", rows, k)
    packed = []
    for index, part in reversed([*enumerate(format_.weight.parts)]):
        layout = schedule.layout(tensors[index].name)
        tensor = layout.packed(tensors[index])
        packed.append(
            PackedWeight(
                weight.name + part.suffix,
                tensor.static_shape,
                tensor.dtype,
                # They are let go of with the last weight that is made of them.
                weight.sources if index == 0 else (),
                _rounded(weight, format_, index, layout),
                _filled_with(part.fill(k), part.dtype, tensor.dtype),
            )
        )
    return packed


def _filled_with(fill: dict[str, Any], dtype: str, packed: str) -> dict[str, Any]:
    """A part's random content, where its elements may be packed as words."""
    words = np.dtype(packed).itemsize != np.dtype(dtype).itemsize
    return {**fill, "of": dtype} if words else fill


def _rounded(weight: Weight, format_: DenseFormat, part: int, layout: Layout) -> Chunks:
    def chunks(checkpoint: Checkpoint) -> Iterator[np.ndarray]:
        tensors = [checkpoint.tensor(source) for source in weight.sources]
        stacked = tensors[0] if len(tensors) == 1 else np.concatenate(tensors)
        # An eighth of a chunk: what is rounded passes through several float32 copies.
        groups = max(1, CHUNK_BYTES // 8 // (2 * weight.columns * layout.rows))
        rows = groups * layout.rows
        for start in range(0, weight.rows, rows):
            yield layout.pack(format_.weight.quantize(stacked[start : start + rows])[part])

    return chunks


def _experts(
    weight: Weight, target: Target, precision: Precision, kernels: Mapping[str, Kernel]
) -> list[PackedWeight]:
    """Blocks, scales and biases of one half of all experts."""
    kernel = kernels[precision.activations]
    schedule = kernel.choose(target, **weight.static)
    arguments = {tensor.name: tensor for tensor in kernel.signature(**weight.static).inputs}
    blocks, scales, bias = weight.tensors
    # A random e2m1 nibble has a root mean square of 2.6.
    inputs = blocks.shape[2] * blocks.shape[3] * 2
    scale = 127 - round(float(np.log2(2.6 * np.sqrt(inputs))))

    def one_by_one(checkpoint: Checkpoint) -> Iterator[np.ndarray]:
        tensor = checkpoint.tensor(blocks.name)
        return (tensor[expert : expert + 1] for expert in range(len(tensor)))

    def checked(checkpoint: Checkpoint) -> Iterator[np.ndarray]:
        tensor = checkpoint.tensor(scales.name)
        check_scales(scales.name, tensor)
        yield tensor

    def widened(checkpoint: Checkpoint) -> Iterator[np.ndarray]:
        yield checkpoint.tensor(bias.name).astype(np.float32)

    def packed(argument: str, name: str, stored: Chunks, fill: dict[str, Any]) -> PackedWeight:
        layout = schedule.layout(argument)
        tensor = layout.packed(arguments[argument])

        def chunks(checkpoint: Checkpoint) -> Iterator[np.ndarray]:
            return map(layout.pack, stored(checkpoint))

        return PackedWeight(name, tensor.static_shape, tensor.dtype, (name,), chunks, fill)

    return [
        packed("blocks", blocks.name, one_by_one, {"bytes": [0, 255]}),
        packed("scales", scales.name, checked, {"bytes": [scale, scale]}),
        packed("bias", bias.name, widened, {"normal": 0.02}),
    ]


def _rows(tensor: np.ndarray) -> Iterator[np.ndarray]:
    rows = max(1, CHUNK_BYTES // (2 * tensor.shape[1]))
    for start in range(0, len(tensor), rows):
        yield np.ascontiguousarray(
            tensor[start : start + rows].astype(ml_dtypes.bfloat16, copy=False)
        )


_Packer = Callable[[Weight, Target, Precision], list[PackedWeight]]


def _vector_packer(fill: dict[str, Any]) -> _Packer:
    return lambda weight, _target, _precision: [_vector(weight.name, weight.rows, fill)]


# How each role is packed for a target and a precision.
_PACKERS: dict[WeightRole, _Packer] = {
    "constant": lambda w, _target, _precision: [_constant(w)],
    "embedding": lambda w, _target, _precision: [_embedding(w)],
    "norm": _vector_packer({"constant": 1.0}),
    "sinks": _vector_packer({"normal": 1.0}),
    "router_bias": _vector_packer({"normal": 0.1}),
    "bias": lambda w, _target, _precision: [_bias(w.name, w.sources, w.rows)],
    "dense": lambda w, target, precision: _dense(
        w, target, precision, precision.dense_of(w.columns)
    ),
    # Small, and an error here is another expert: bf16 whatever the precision.
    "router": lambda w, target, precision: _dense(w, target, precision, DENSE["bf16"]),
    "gate_up": lambda w, target, precision: _experts(w, target, precision, GATE_UP),
    "down": lambda w, target, precision: _experts(w, target, precision, DOWN),
}
