"""The packed weights: what each is made of, its shape for a target, and how it is streamed.

A family lists its weights with a role each (`models.tensors`); how a role is packed for a target is
told here. The packed list is in the order of the library's arguments. A weight is
packed in pieces along its first axis, so that packing never holds more than a few tens of MB
beyond the page cache, whatever the model's size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from mxforge.schedules import linear, linear_bf16, linear_i8, mxfp4
from mxforge.schedules.int8 import GROUP
from mxforge.schedules.kernel import Target

from .checkpoint import Checkpoint, check_scales
from .models.tensors import Weight, WeightRole, layer_number
from .targets import Precision

PIECE_BYTES = 64 << 20

Pieces = Callable[[Checkpoint], Iterator[np.ndarray]]


@dataclass(frozen=True)
class PackedWeight:
    """One argument of the library.

    `sources` are the checkpoint's tensors that it is made of; `pieces(checkpoint)` yields arrays
    whose concatenation along axis 0 has `shape`. `fill` tells the runtime what random content
    keeps activations near 1 (see `mxforge.random_weights`).
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    sources: tuple[str, ...]
    pieces: Pieces
    fill: dict[str, Any]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _DTYPES[self.dtype].bytes

    @property
    def safetensors_dtype(self) -> str:
        return _DTYPES[self.dtype].safetensors


class _Dtype(NamedTuple):
    safetensors: str
    bytes: int


_DTYPES = {
    "bfloat16": _Dtype("BF16", 2),
    "float16": _Dtype("F16", 2),
    "float32": _Dtype("F32", 4),
    "uint8": _Dtype("U8", 1),
}


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

    All are compared by what they declare. Bytes are compared of the first piece, and not of layers
    after the first, which are packed by the same functions as that; none without a checkpoint.
    """
    for a, b in zip_longest(ours, theirs):
        if a is None or b is None or _declared(a) != _declared(b):
            return (a or b).name
        if checkpoint is None or layer_number(a.name) not in (None, 0):
            continue
        if next(a.pieces(checkpoint)).tobytes() != next(b.pieces(checkpoint)).tobytes():
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

    def pieces(checkpoint: Checkpoint) -> Iterator[np.ndarray]:
        if not sources:
            yield np.zeros(size, np.float32)
            return
        for source in sources:
            yield checkpoint.tensor(source).astype(np.float32)

    return PackedWeight(name, (size,), "float32", sources, pieces, {"normal": 0.02})


def _dense(
    target: Target, precision: Precision, name: str, sources: tuple[str, ...], rows: int, k: int
) -> list[PackedWeight]:
    """A large dense weight [rows, k], the sources stacked, as `precision` wants it."""
    dense = precision.dense_of(k)
    if dense == "bf16":
        return [_bf16(target, name, sources, rows, k)]
    if dense == "bf16xbf16":
        return [_bf16_pairs(name, sources, rows, k)]
    # An eighth of a piece: what is rounded passes through several float32 copies.
    stacked = _stacked(sources, rows, GROUP, k, PIECE_BYTES // 8)

    def weight(checkpoint: Checkpoint) -> Iterator[np.ndarray]:
        return map(linear_i8.pack_weight, stacked(checkpoint))

    def scales(checkpoint: Checkpoint) -> Iterator[np.ndarray]:
        return map(linear_i8.pack_scales, stacked(checkpoint))

    shape, scales_shape = linear_i8.packed_shapes(rows, k)
    # A random byte has a root mean square of 74.
    scale = {"constant": k**-0.5 / 74}
    return [  # sources are let go of with the last weight made of them
        PackedWeight(f"{name}_scale", scales_shape, "float16", (), scales, scale),
        PackedWeight(name, shape, "uint8", sources, weight, {"bytes": [0, 255]}),
    ]


def _bf16(target: Target, name: str, sources: tuple[str, ...], rows: int, k: int) -> PackedWeight:
    """bf16 [rows, k], the sources stacked, in linear.py's layout."""
    stacked = _stacked(sources, rows, linear.CPU_TILE.rows, k, PIECE_BYTES)

    def pieces(checkpoint: Checkpoint) -> Iterator[np.ndarray]:
        for piece in stacked(checkpoint):
            yield linear.pack_weight(target, piece.astype(ml_dtypes.bfloat16, copy=False))

    shape = linear.packed_shape(target, rows, k)
    return PackedWeight(name, shape, "bfloat16", sources, pieces, {"normal": k**-0.5})


def _bf16_pairs(name: str, sources: tuple[str, ...], rows: int, k: int) -> PackedWeight:
    """bf16 [rows, k], the sources stacked, in linear_bf16.py's layout."""
    stacked = _stacked(sources, rows, linear_bf16.GROUP, k, PIECE_BYTES)

    def pieces(checkpoint: Checkpoint) -> Iterator[np.ndarray]:
        for piece in stacked(checkpoint):
            yield linear_bf16.pack_weight(piece.astype(ml_dtypes.bfloat16, copy=False))

    shape = linear_bf16.packed_shape(rows, k)
    return PackedWeight(name, shape, "bfloat16", sources, pieces, {"normal": k**-0.5})


def _stacked(sources: tuple[str, ...], rows: int, group: int, k: int, piece_bytes: int) -> Pieces:
    """[rows, k] of the sources one below the other, in pieces of whole groups of rows."""

    def pieces(checkpoint: Checkpoint) -> Iterator[np.ndarray]:
        tensors = [checkpoint.tensor(source) for source in sources]
        stacked = tensors[0] if len(tensors) == 1 else np.concatenate(tensors)
        step = group * max(1, piece_bytes // (2 * k * group))
        for start in range(0, rows, step):
            yield stacked[start : start + step]

    return pieces


def _expert_half(
    target: Target,
    precision: Precision,
    name: str,
    experts: int,
    rows: int,
    k: int,
    gate_up: bool,
) -> list[PackedWeight]:
    """Blocks, scales and bias of all experts' gate_up_proj or down_proj."""
    interleaved = gate_up and not target.is_gpu
    order = mxfp4.gate_up_row_order(rows) if interleaved else None
    stored = mxfp4.stored_shapes(experts, rows, k)
    blocks_shape, scales_shape = (
        stored if target.is_gpu else mxfp4.packed_shapes(experts, rows, k, precision.experts)
    )

    def blocks(checkpoint: Checkpoint) -> Iterator[np.ndarray]:
        tensor = checkpoint.tensor(f"{name}_blocks")
        for expert in range(experts):
            piece = tensor[expert : expert + 1]
            yield piece if target.is_gpu else mxfp4.pack_blocks(piece, precision.experts, order)

    def scales(checkpoint: Checkpoint) -> Iterator[np.ndarray]:
        tensor = checkpoint.tensor(f"{name}_scales")
        check_scales(f"{name}_scales", tensor)
        yield tensor if target.is_gpu else mxfp4.pack_scales(tensor, order)

    def bias(checkpoint: Checkpoint) -> Iterator[np.ndarray]:
        tensor = checkpoint.tensor(f"{name}_bias").astype(np.float32)
        yield tensor if order is None else tensor[:, order]

    # A random e2m1 nibble has a root mean square of 2.6.
    scale = 127 - round(float(np.log2(2.6 * np.sqrt(k))))
    parts: list[tuple[str, tuple[int, ...], str, Pieces, dict[str, Any]]] = [
        (f"{name}_blocks", blocks_shape, "uint8", blocks, {"bytes": [0, 255]}),
        (f"{name}_scales", scales_shape, "uint8", scales, {"bytes": [scale, scale]}),
        (f"{name}_bias", (experts, rows), "float32", bias, {"normal": 0.02}),
    ]
    return [
        PackedWeight(part, shape, dtype, (part,), pieces, fill)
        for part, shape, dtype, pieces, fill in parts
    ]


def _rows(tensor: np.ndarray) -> Iterator[np.ndarray]:
    step = max(1, PIECE_BYTES // (2 * tensor.shape[1]))
    for start in range(0, len(tensor), step):
        yield np.ascontiguousarray(
            tensor[start : start + step].astype(ml_dtypes.bfloat16, copy=False)
        )


def _experts(weight: Weight, target: Target, precision: Precision) -> list[PackedWeight]:
    blocks, _scales, _bias = weight.tensors
    experts, rows, groups, pairs = blocks.shape
    columns, gate_up = groups * pairs * 2, weight.role == "gate_up"
    return _expert_half(target, precision, weight.name, experts, rows, columns, gate_up)


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
        target, precision, w.name, w.sources, w.rows, w.columns
    ),
    # Small, and an error here is another expert: bf16 whatever the precision.
    "router": lambda w, target, _precision: [_bf16(target, w.name, w.sources, w.rows, w.columns)],
    "gate_up": _experts,
    "down": _experts,
}
