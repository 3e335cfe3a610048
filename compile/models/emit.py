"""What the graphs of all families have in common: `Emitter`, which a family's graph derives from.

It emits calls of scheduled kernels from `mxforge.schedules` into one IRModule, and the functions of
the finished library (ABI 2) around the model. Weights are arguments, with official names, in the
order of the family's list.

    forward   tokens i32[n], positions i32[n], token_seq i32[n], logit_indices i32[m], tables, KV,
              weights -> logits f32 [m, vocab]: a flat list of tokens from several sequences;
              `logit_indices` are the tokens whose logits are asked for
    decode    tokens i32[b], positions i32[b], token_seq i32[b], tables, KV, weights
              -> logits f32 [b, vocab]: one token a sequence
    sample, logprobs, next_tokens, kv_copy_pages_{sliding,full}
    embed, layer_{sliding,full}, head: the model in pieces, for `mxforge diff`

tables = sliding_table i32[b, ps], sliding_first i32[b], full_table i32[b, pf], full_first i32[b]:
the physical page of every logical page of each sequence, and the logical page of column 0. KV is
one tensor a layer, updated in place, in the layout of `schedules.formats.kv`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic

import tvm
from tvm import relax
from tvm.relax import BlockBuilder, Expr, TensorType, Var

from mxforge.errors import SignatureError
from mxforge.schedules.attention import KV_COPY_PAGES
from mxforge.schedules.formats import KV, ActivationFormat, DenseFormat
from mxforge.schedules.gather import GATHER_ROWS
from mxforge.schedules.kernel import Kernel, Size, Target
from mxforge.schedules.rms_norm import RMS_NORM
from mxforge.schedules.sample import ADJUST_LOGITS, NEXT_TOKENS, SAMPLE_TOKEN, TOKEN_LOGPROBS

from ..config import KINDS, Config, Kind
from ..formats import Precision
from ..weights import PackedWeight
from .tensors import layer_of

Weights = Mapping[str, Expr]  # by name
ARGUMENTS = "mxforge.arguments"  # attribute of a function: role and name of each of its arguments


@dataclass(frozen=True)
class Limits:
    """Upper bounds that memory is planned for at compile time."""

    max_batch: int
    prefill_chunk: int

    @property
    def max_tokens(self) -> int:
        """Most tokens of one call of `forward`."""
        return self.prefill_chunk + self.max_batch


@dataclass(frozen=True)
class Tables:
    """Where the keys and values of a kind of layers lie."""

    pages: Expr  # i32 [b, p]
    first: Expr  # i32 [b]


@dataclass(frozen=True)
class Step:
    """What every layer needs to know about the tokens of one call."""

    positions: Expr  # i32 [n]
    token_seq: Expr  # i32 [n]
    cos_sin: Expr  # f32 [n, head_dim]
    tables: dict[Kind, Tables]
    decoding: bool = False  # one token a sequence


class Emitter(ABC, Generic[Config]):
    """Emits a model's functions into one IRModule; a family says what the model is.

    rotary, embed, layer, head  the model's parts
    piece_weights               which weights each part takes
    """

    def __init__(
        self,
        config: Config,
        target: Target,
        precision: Precision,
        limits: Limits,
        weights: Sequence[PackedWeight],
    ) -> None:
        self.config = config
        self.target = target
        self.precision = precision
        self.limits = limits
        self.weights = weights
        self.builder = BlockBuilder()
        self._kernels: dict[Any, tvm.ir.GlobalVar] = {}
        self._arguments: dict[Var, str] = {}  # that are no inputs of a call: role and name

    # -- what a family says --------------------------------------------------------------------

    @abstractmethod
    def rotary(self, positions: Expr, w: Weights) -> Expr:
        """positions i32 [n] -> cos and sin f32 [n, head_dim]."""

    @abstractmethod
    def embed(self, tokens: Expr, w: Weights) -> Expr:
        """tokens i32 [n] -> f32 [n, hidden]."""

    @abstractmethod
    def layer(self, kind: Kind, x: Expr, step: Step, kv: Expr, w: Weights) -> tuple[Expr, ...]:
        """One layer on x f32 [n, hidden], its weights by their names within the layer; returns its
        stages, the layer's output last."""

    @abstractmethod
    def head(self, x: Expr, w: Weights) -> Expr:
        """x f32 [n, hidden] -> logits f32 [n, vocab]."""

    @abstractmethod
    def piece_weights(self, piece: str | int, names: Iterable[str]) -> list[str]:
        """See `Family.piece_weights`."""

    # -- the model in parts -------------------------------------------------------------------

    def forward(
        self, tokens: Expr, step: Step, logit_indices: Expr | None, kv: Sequence[Expr], w: Weights
    ) -> Expr:
        """tokens i32 [n] -> logits f32 [m, vocab] of the tokens `logit_indices` i32 [m], or of all
        where it is None."""
        kinds = self.config.kinds
        x = self.embed(tokens, w)
        for layer in range(self.config.num_hidden_layers):
            *_stages, x = self.layer(kinds[layer], x, step, kv[layer], layer_of(w, layer))
        if logit_indices is not None:
            taken = {"x": x, "rows": logit_indices}
            x = self.call(GATHER_ROWS, taken, hidden=self.config.hidden_size)
        return self.head(x, w)

    def dense(
        self,
        x: Expr,
        w: Weights,
        name: str,
        format_: DenseFormat,
        residual: Expr | None = None,
        **static: Any,
    ) -> Expr:
        """A dense layer f32 [n, k] -> f32 [n, rows] in one format; see `linear` for static."""
        parts = self.weight_parts(w, name, format_)
        inputs = {**self.activations("x", x, static["k"], format_.inputs), **parts}
        if static["with_bias"]:
            inputs["bias"] = w[f"{name}.bias"]
        if residual is not None:
            inputs["residual"] = residual
        return self.call(format_.kernel, inputs, **static)

    @staticmethod
    def weight_parts(w: Weights, name: str, format_: DenseFormat) -> dict[str, Expr]:
        """The arguments that a dense layer's weight becomes in a format."""
        suffixes = [part.suffix for part in format_.weight.parts]
        return {f"weight{suffix}": w[f"{name}.weight{suffix}"] for suffix in suffixes}

    def norm(self, x: Expr, weight: Expr, eps: float) -> Expr:
        return self.call(
            RMS_NORM, {"x": x, "weight": weight}, hidden=self.config.hidden_size, eps=eps
        )

    def activations(self, name: str, x: Expr, k: int, format_: ActivationFormat) -> dict[str, Expr]:
        """f32 [n, k] as the arguments that an input called `name` becomes in a format."""
        if format_.kernel is None:
            return {name: x}
        made = self.call(format_.kernel, {"x": x}, k=k)
        parts = made if isinstance(made, tuple) else (made,)
        return {t.name: part for t, part in zip(format_.tensors(name, 0, k), parts, strict=True)}

    # -- the library's functions ---------------------------------------------------------------

    def module(self) -> tvm.IRModule:
        """All functions of the library, unlowered."""
        self._emit_forward()
        self._emit_decode()
        self._emit_sample()
        self._emit_logprobs()
        self._emit_next_tokens()
        self._emit_copy_pages()
        self._emit_pieces()
        return self.builder.finalize()

    def _emit_forward(self) -> None:
        n, m = _symbol("n"), _symbol("m")
        tokens = Var("tokens", self.i32(n))
        inputs, indices = self._step_inputs(n), Var("logit_indices", self.i32(m))
        kv, weights = self._kv_inputs(), self._weight_inputs(self.weights)
        params = [tokens, *inputs[:2], indices, *inputs[2:], *kv, *weights.values()]
        # m is left unbounded: logits of a whole chunk are large, and wanted only for evaluation.
        bounds = {"n": self.limits.max_tokens, "b": self.limits.max_batch}
        with self._function("forward", params, bounds):
            step = self._step(inputs, weights)
            self._output(self.forward(tokens, step, indices, kv, weights))

    def _emit_decode(self) -> None:
        b = _symbol("b")
        tokens = Var("tokens", self.i32(b))
        inputs = self._step_inputs(b, b)
        kv, weights = self._kv_inputs(), self._weight_inputs(self.weights)
        params = [tokens, *inputs, *kv, *weights.values()]
        with self._function("decode", params, {"b": self.limits.max_batch}):
            step = replace(self._step(inputs, weights), decoding=True)
            self._output(self.forward(tokens, step, None, kv, weights))

    def _emit_sample(self) -> None:
        vocab, m = self.config.vocab_size, _symbol("m")
        # The logits are an input of both kernels; their other inputs have names of their own.
        edits = self._inputs_of(ADJUST_LOGITS, {"m": m}, vocab=vocab)
        draw = self._inputs_of(SAMPLE_TOKEN, {"m": m}, vocab=vocab) | {"logits": edits["logits"]}
        inputs = list((draw | edits).values())
        with self._function("sample", inputs, {"m": self.limits.max_batch}):
            adjusted = self.call(ADJUST_LOGITS, edits, vocab=vocab)
            ids, _weights = self.call(SAMPLE_TOKEN, draw | {"logits": adjusted}, vocab=vocab)
            self._output(ids)

    def _emit_logprobs(self) -> None:
        vocab = self.config.vocab_size
        inputs = self._inputs_of(TOKEN_LOGPROBS, {"m": _symbol("m")}, vocab=vocab)
        with self._function("logprobs", list(inputs.values()), {"m": self.limits.max_batch}):
            results = self.call(TOKEN_LOGPROBS, inputs, vocab=vocab)
            self._output(relax.Tuple(list(results)))

    def _emit_next_tokens(self) -> None:
        inputs = self._inputs_of(NEXT_TOKENS, {"n": _symbol("n"), "m": _symbol("m")})
        bounds = {"n": self.limits.max_batch, "m": self.limits.max_tokens}
        with self._function("next_tokens", list(inputs.values()), bounds):
            self._output(self.call(NEXT_TOKENS, inputs))

    def _emit_copy_pages(self) -> None:
        for kind in KINDS:
            c = _symbol("c")
            kv = [
                tensor
                for tensor, its in zip(self._kv_inputs(), self.config.kinds, strict=True)
                if its == kind
            ]
            source, destination = Var("source", self.i32(c)), Var("destination", self.i32(c))
            with self._function(f"kv_copy_pages_{kind}", [source, destination, *kv], {}):
                copied = [
                    self.call(
                        KV_COPY_PAGES,
                        {"kv": tensor, "source": source, "destination": destination},
                        kv_heads=self.config.num_key_value_heads,
                        head_dim=self.config.head_dim,
                        kv_dtype=self.precision.kv,
                    )
                    for tensor in kv
                ]
                self._output(relax.Tuple(copied))

    def _emit_pieces(self) -> None:
        n = _symbol("n")
        tokens, weights = Var("tokens", self.i32(n)), self._piece_inputs("embed")
        with self._function("embed", [tokens, *weights.values()], {}):
            self._output(self.embed(tokens, weights))

        for kind in KINDS:
            if kind in self.config.kinds:
                self._emit_layer(kind, self.config.kinds.index(kind))

        n = _symbol("n")
        x, weights = Var("x", self.f32(n, self.config.hidden_size)), self._piece_inputs("head")
        with self._function("head", [x, *weights.values()], {}):
            self._output(self.head(x, weights))

    def _emit_layer(self, kind: Kind, layer: int) -> None:
        n = _symbol("n")
        x, inputs = Var("x", self.f32(n, self.config.hidden_size)), self._step_inputs(n)
        kv, weights = self._kv_inputs()[layer], self._piece_inputs(layer)
        with self._function(f"layer_{kind}", [x, *inputs, kv, *weights.values()], {}):
            step = self._step(inputs, weights)
            stages = self.layer(kind, x, step, kv, layer_of(weights, layer))
            self._output(relax.Tuple(list(stages)))

    def _piece_inputs(self, piece: str | int) -> dict[str, Var]:
        """The weights of a piece of the model, as arguments."""
        named = {weight.name: weight for weight in self.weights}
        return self._weight_inputs([named[name] for name in self.piece_weights(piece, named)])

    # -- plumbing ------------------------------------------------------------------------------

    def _step_inputs(self, n: Any, b: Any = None) -> list[Var]:
        b = _symbol("b") if b is None else b
        inputs = [Var("positions", self.i32(n)), Var("token_seq", self.i32(n))]
        for kind in KINDS:
            inputs.append(Var(f"{kind}_table", self.i32(b, _symbol(f"{kind}_columns"))))
            inputs.append(Var(f"{kind}_first", self.i32(b)))
        return inputs

    def _step(self, inputs: list[Var], weights: Weights) -> Step:
        positions, token_seq, *tables = inputs
        rotary = self.rotary(positions, weights)
        by_kind = {kind: Tables(*tables[2 * i : 2 * i + 2]) for i, kind in enumerate(KINDS)}
        return Step(positions, token_seq, rotary, by_kind)

    def _kv_inputs(self) -> list[Var]:
        pages = {kind: _symbol(f"{kind}_pages") for kind in KINDS}
        c, kv = self.config, KV[self.precision.kv]
        shapes = (kv.shape(pages[kind], c.num_key_value_heads, c.head_dim) for kind in c.kinds)
        return [
            self._argument("kv", f"kv_{layer}", TensorType(shape, kv.name))
            for layer, shape in enumerate(shapes)
        ]

    def _inputs_of(self, kernel: Kernel, sizes: Mapping[str, Any], **static: Any) -> dict[str, Var]:
        """A kernel's inputs as arguments of a function; sizes that are not given are its own."""
        names = {
            size.name
            for tensor in kernel.signature(**static).inputs
            for size in tensor.shape
            if isinstance(size, Size)
        }
        known = {name: sizes[name] if name in sizes else _symbol(name) for name in sorted(names)}
        return {
            tensor.name: Var(tensor.name, TensorType(tensor.sizes(known), tensor.dtype))
            for tensor in kernel.signature(**static).inputs
        }

    def _weight_inputs(self, weights: Sequence[PackedWeight]) -> dict[str, Var]:
        return {
            weight.name: self._argument(
                "weight", weight.name, TensorType(weight.shape, weight.dtype)
            )
            for weight in weights
        }

    def _argument(self, role: str, name: str, type_: TensorType) -> Var:
        var = Var(name.replace(".", "_"), type_)
        self._arguments[var] = f"{role} {name}"
        return var

    def _function(self, name: str, params: list[Var], bounds: dict[str, int]) -> Any:
        arguments = [self._arguments.get(var, f"input {var.name}") for var in params]
        attributes: dict[str, Any] = {ARGUMENTS: arguments}
        if bounds:
            attributes["tir_var_upper_bound"] = bounds
        return self.builder.function(name, params, attrs=attributes, private=False)

    def _output(self, value: Expr) -> None:
        self.builder.emit_func_output(value)

    def call(self, kernel: Kernel, inputs: Mapping[str, Expr], **static: Any) -> Any:
        """Emit the target's schedule of a kernel on inputs by name.

        Returns its outputs, and then the new values of the inputs that it updates: one value, or a
        tuple. An updated input must be used by its new value, or the call is dropped as dead code.
        An input that the schedule does without is dropped, and with it the calls that made it.
        SignatureError where the inputs are others than the kernel's.
        """
        schedule = kernel.choose(self.target, **static)
        function = kernel.build(self.target, schedule, **static)
        known = [tensor.name for tensor in kernel.signature(**static).inputs]
        if set(inputs) != set(known):
            raise SignatureError(
                f"{kernel.name} takes {', '.join(known)}, but was called with "
                f"{', '.join(inputs)}; pass each input by its name in the signature."
            )
        signature = kernel.packed_signature(schedule, **static)
        names = [tensor.name for tensor in signature.inputs]
        arguments = [inputs[name] for name in names]
        sizes = signature.solve([argument.ty.shape for argument in arguments])
        made = (*signature.outputs, *signature.scratch)
        fresh = [TensorType(tensor.sizes(sizes), tensor.dtype) for tensor in made]
        updated = [names.index(name) for name in signature.updated]
        if updated:
            called = relax.op.call_tir_inplace(
                self._add(function),
                relax.Tuple(arguments),
                [*(-1 for _ in fresh), *updated],
                _one_or_all([*fresh, *(arguments[index].ty for index in updated)]),
            )
        else:
            called = relax.call_tir(self._add(function), arguments, fresh)
        emitted = self.builder.emit(called)
        if len(fresh) + len(updated) == 1:
            return emitted
        scratch = range(len(signature.outputs), len(fresh))
        results = tuple(
            self.builder.emit(relax.TupleGetItem(emitted, i))
            for i in range(len(fresh) + len(updated))
            if i not in scratch
        )
        return results[0] if len(results) == 1 else results

    def _add(self, kernel: tvm.tirx.PrimFunc) -> tvm.ir.GlobalVar:
        # `Kernel.build` is cached, so that equal calls of a kernel are one function.
        if id(kernel) not in self._kernels:
            name = str(kernel.attrs["mxforge.kernel"])
            self._kernels[id(kernel)] = self.builder.add_func(kernel, name)
        return self._kernels[id(kernel)]

    @staticmethod
    def f32(*shape: Any) -> TensorType:
        return TensorType(shape, "float32")

    @staticmethod
    def i32(*shape: Any) -> TensorType:
        return TensorType(shape, "int32")


def _one_or_all(types: list[Any]) -> Any:
    return types[0] if len(types) == 1 else types


def _symbol(name: str) -> Any:
    return tvm.tirx.Var(name, "int64")


__all__ = ["Emitter", "Limits", "Step", "Tables", "Weights"]
