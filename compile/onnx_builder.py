"""Building an ONNX graph over the tensors of a checkpoint, which lie in a data file beside it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

ONNX_DTYPES = {
    "bfloat16": TensorProto.BFLOAT16,
    "float16": TensorProto.FLOAT16,
    "float32": TensorProto.FLOAT,
    "uint8": TensorProto.UINT8,
}


@dataclass(frozen=True)
class Stored:
    """Where a tensor of the checkpoint lies in the data file: bytes [begin, end)."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Weights:
    """The graph's initializers: the checkpoint's tensors as they are used, and constants.

    float4  the opset reads MXFP4 tensors as they are: FLOAT4E2M1 with FLOAT8E8M0 scales
    """

    def __init__(self, stored: dict[str, Stored], location: str, float4: bool) -> None:
        self.float4 = float4
        self._stored = stored
        self._location = location
        self._tensors: dict[str, TensorProto] = {}
        self._names: dict[str, int] = {}

    @property
    def initializers(self) -> list[TensorProto]:
        return list(self._tensors.values())

    def new(self, name: str) -> str:
        """`name`, with a number where it was given before."""
        number = self._names[name] = self._names.get(name, -1) + 1
        return f"{name}_{number}" if number else name

    def stored(self, name: str) -> str:
        """A tensor of the checkpoint as it is."""
        entry = self._stored[name]
        return self._external(name, ONNX_DTYPES[entry.dtype], entry.shape, entry.begin, entry.end)

    def is_f32(self, name: str) -> bool:
        return name in self._tensors and self._tensors[name].data_type == TensorProto.FLOAT

    def float4_blocks(self, name: str, expert: int) -> str:
        """One expert's matrix as FLOAT4E2M1 [out, in]: the low nibble is the even element."""
        _, out, groups, pairs = self._stored[f"{name}_blocks"].shape
        shape = (out, groups * pairs * 2)
        return self._rows(f"{name}_blocks", expert, 1, TensorProto.FLOAT4E2M1, shape)

    def float4_scales(self, name: str, expert: int) -> str:
        """Its scales as FLOAT8E8M0 [out, in/32]: 2^(byte - 127)."""
        shape = self._stored[f"{name}_scales"].shape[1:]
        return self._rows(f"{name}_scales", expert, 1, TensorProto.FLOAT8E8M0, shape)

    def rows(self, name: str, first: int, count: int) -> str:
        """Up to `count` rows of a dense tensor from row `first` on, as stored."""
        entry = self._stored[name]
        count = min(count, entry.shape[0] - first)
        shape = (count, *entry.shape[1:])
        return self._rows(name, first, count, ONNX_DTYPES[entry.dtype], shape)

    def constant(self, array: np.ndarray) -> str:
        """A small tensor within the graph, once for equal values."""
        name = f"const.{array.dtype}.{'x'.join(map(str, array.shape))}."
        name += hashlib.sha256(array.tobytes()).hexdigest()[:16]
        if name not in self._tensors:
            self._tensors[name] = onnx.numpy_helper.from_array(array, name)
        return name

    def _rows(self, name: str, first: int, count: int, dtype: int, shape: Sequence[int]) -> str:
        """Part of a tensor along its first axis, as a tensor of its own over the same bytes."""
        entry = self._stored[name]
        size = (entry.end - entry.begin) // entry.shape[0]
        begin = entry.begin + first * size
        return self._external(f"{name}.{first}", dtype, shape, begin, begin + count * size)

    def _external(self, name: str, dtype: int, shape: Sequence[int], begin: int, end: int) -> str:
        if name not in self._tensors:
            tensor = TensorProto(
                name=name,
                data_type=dtype,
                dims=shape,
                data_location=TensorProto.EXTERNAL,
            )
            place = {"location": self._location, "offset": begin, "length": end - begin}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            self._tensors[name] = tensor
        return name


class Graph:
    """The nodes of a graph in order; each call adds one and returns what its output is called.

    An inner graph (a loop's body) has nodes of its own, and sees everything outside.
    """

    def __init__(self, weights: Weights, scope: str = "") -> None:
        self.weights = weights
        self.scope = scope  # begins the names of what is computed
        self.nodes: list[onnx.NodeProto] = []

    def inner(self) -> Graph:
        return Graph(self.weights, self.scope)

    def new(self, name: str) -> str:
        return self.weights.new(self.scope + name)

    def node(
        self, kind: str, inputs: list[str], outputs: list[str], **attributes: Any
    ) -> list[str]:
        self.nodes.append(helper.make_node(kind, inputs, outputs, outputs[0], **attributes))
        return outputs

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """A node with one output."""
        return self.node(kind, list(inputs), [self.new(kind)], **attributes)[0]

    def stored(self, name: str) -> str:
        return self.weights.stored(name)

    def weight(self, name: str) -> str:
        """A dense tensor of the checkpoint in f32."""
        return self.to_f32(self.stored(name))

    def to_f32(self, x: str) -> str:
        return x if self.weights.is_f32(x) else self.op("Cast", x, to=TensorProto.FLOAT)

    def i64(self, values: int | list[int]) -> str:
        return self.weights.constant(np.array(values, np.int64))

    def f32(self, values: float | np.ndarray) -> str:
        return self.weights.constant(np.array(values, np.float32))
