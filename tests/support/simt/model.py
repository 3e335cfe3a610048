"""A whole model in the harness: the library's functions, called kernel by kernel.

The graph is what the compiler makes of a model, down to calls of kernels; every call runs on the
CPU as CUDA or Metal text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax

from mxforge.compile.checkpoint import Checkpoint
from mxforge.compile.config import KINDS
from mxforge.compile.formats import Precision
from mxforge.compile.models.emit import Limits
from mxforge.compile.models.gpt_oss import GPT_OSS
from mxforge.compile.weights import packed_weights
from mxforge.kv_layout import PAGE_TOKENS
from mxforge.schedules.formats import KV
from mxforge.schedules.kernel import Target

from .harness import Program, Simt
from .kernels import TARGETS


class SimtModel:
    """gpt-oss compiled for `kind`, with exact numerics or another precision, and a cache of
    `pages` pages a sequence. `target` is a GPU other than the one that the tests have of a kind."""

    def __init__(
        self,
        simt: Simt,
        kind: str,
        checkpoint: Checkpoint,
        config: Any,
        precision: Precision,
        sequences: int,
        pages: int,
        target: Target | None = None,
    ) -> None:
        self._simt, self._kind = simt, kind
        target = target or TARGETS[kind]
        weights = packed_weights(GPT_OSS.weights(config), target, precision)
        module = GPT_OSS.module(config, target, precision, Limits(4, 64), weights)
        self._module = relax.transform.DeadCodeElimination()(module)
        self._programs: dict[str, Program] = {}
        kv = KV[precision.kv]
        shape = kv.shape(sequences * pages, config.num_key_value_heads, config.head_dim)
        self._values: dict[str, np.ndarray] = {
            w.name.replace(".", "_"): np.concatenate(list(w.chunks(checkpoint))) for w in weights
        }
        for layer in range(config.num_hidden_layers):
            self._values[f"kv_{layer}"] = np.full(shape, 0, kv.name)
        table = np.arange(sequences * pages, dtype=np.int32).reshape(sequences, pages)
        for kind_ in KINDS:
            self._values[f"{kind_}_table"] = table
            self._values[f"{kind_}_first"] = np.zeros(sequences, np.int32)
        self._room = pages * PAGE_TOKENS
        self.called: set[str] = set()  # kernels

    def forward(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        token_seq: Sequence[int],
        rows: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Logits f32 [n, vocab] of all these tokens, or of those of these numbers."""
        indices = range(len(tokens)) if rows is None else rows
        return self._call(
            "forward",
            tokens=tokens, positions=positions, token_seq=token_seq, logit_indices=indices,
        )  # fmt: skip

    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> np.ndarray:
        """Logits f32 [b, vocab] of one token of each sequence."""
        sequences = np.arange(len(tokens), dtype=np.int32)
        return self._call("decode", tokens=tokens, positions=positions, token_seq=sequences)

    def layer(self, kind: str, x: np.ndarray) -> tuple[np.ndarray, ...]:
        """The stages of the first layer of a kind on x f32 [n, hidden], one sequence from its
        beginning; see `GptOss.layer`."""
        positions = np.arange(len(x))
        return self._call(
            f"layer_{kind}", x=x, positions=positions, token_seq=np.zeros_like(positions)
        )

    def arguments(self, name: str, **inputs: Any) -> dict[str, np.ndarray]:
        """What a function is called with next, by its parameters."""
        given = {
            key: np.asarray(value, np.float32 if key == "x" else np.int32)
            for key, value in inputs.items()
        }
        known = {**self._values, **given}
        return {parameter.name: known[parameter.name] for parameter in self._module[name].params}

    def _call(self, name: str, **inputs: Any) -> Any:
        assert max(inputs["positions"]) < self._room
        function = self._module[name]
        arguments = self.arguments(name, **inputs)
        values: dict[Any, Any] = {p: arguments[p.name] for p in function.params}
        sizes: dict[str, int] = {}
        for parameter in function.params:
            for extent, size in zip(parameter.ty.shape, values[parameter].shape, strict=True):
                if not isinstance(extent, tvm.tirx.IntImm):
                    sizes[extent.name] = size
        for block in function.body.blocks:
            for binding in block.bindings:
                values[binding.var] = self._value(binding.value, values, sizes)
        for parameter in function.params:
            if parameter.name.startswith("kv_"):
                self._values[parameter.name] = values[parameter]
        return self._value(function.body.body, values, sizes)

    def _value(self, value: Any, values: dict[Any, Any], sizes: Mapping[str, int]) -> Any:
        if isinstance(value, relax.TupleGetItem):
            return values[value.tuple_value][value.index]
        if isinstance(value, relax.Var):
            return values[value]
        if isinstance(value, relax.Tuple):
            return tuple(values[field] for field in value.fields)
        kernel, passed = value.args[0].name_hint, list(value.args[1].fields)
        types = value.ty_args[0]
        types = list(types.fields) if isinstance(types, relax.TupleType) else [types]
        places = [int(index) for index in getattr(value.attrs, "inplace_indices", [])]
        updated = [index for index in places if index >= 0]
        fresh = [_unset(type_, sizes) for type_ in types[: len(types) - len(updated)]]
        arrays = [*(values[each] for each in passed), *fresh]
        written = [*range(len(passed), len(arrays)), *updated]
        results = self._simt.run(self._program(kernel), arrays, written)
        for index in updated:
            values[passed[index]] = results[index]
        given_back = [results[index] for index in written]
        return given_back[0] if len(given_back) == 1 else tuple(given_back)

    def _program(self, kernel: str) -> Program:
        if kernel not in self._programs:
            function = self._module[kernel]
            self._programs[kernel] = self._simt.compile(function, self._kind)
            self.called.add(str(function.attrs["mxforge.schedule"]))
        return self._programs[kernel]


def _unset(type_: Any, sizes: Mapping[str, int]) -> np.ndarray:
    shape = [_size(extent, sizes) for extent in type_.shape]
    array = np.empty(shape, str(type_.dtype))
    array.view(np.uint8)[...] = 0xFF  # NaN, or -1
    return array


def _size(extent: Any, sizes: Mapping[str, int]) -> int:
    kind = type(extent).__name__
    if kind == "IntImm":
        return int(extent.value)
    if kind == "Var":
        return sizes[extent.name]
    assert kind == "Mul", extent
    return _size(extent.a, sizes) * _size(extent.b, sizes)
