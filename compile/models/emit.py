"""What the graphs of all families have in common: `Emitter`, which a family's graph derives from.

It emits calls of scheduled kernels from `mxforge.schedules` into one IRModule, and the functions of
the finished library (ABI 2) around the model. Weights are arguments, with official names, in the
order of the family's list.

    forward   tokens i32[n], positions i32[n], token_seq i32[n], rows i32[m], tables, KV, weights
              -> logits f32 [m, vocab]: a flat list of tokens from several sequences; `rows` are the
              tokens whose logits are asked for
    decode    tokens i32[b], positions i32[b], token_seq i32[b], tables, KV, weights
              -> logits f32 [b, vocab]: one token a sequence
    sample, logprobs, kv_copy_pages_{sliding,full}
    embed, layer_{sliding,full}, head: the model in pieces, for `mxforge diff`

tables = sliding_table i32[b, ps], sliding_first i32[b], full_table i32[b, pf], full_first i32[b]:
the physical page of every logical page of each sequence, and the logical page of column 0. KV is
one tensor a layer, updated in place, in the layout of `schedules.kv_cache`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic

import tvm
from tvm import relax
from tvm.relax import BlockBuilder, Expr, TensorType, Var

from mxforge.schedules import (
    adjust_logits,
    gather,
    kv_cache,
    kv_copy,
    linear,
    linear_bf16,
    linear_i8,
    quantize,
    rms_norm,
    round_bf16,
    sample_token,
    token_logprobs,
)
from mxforge.schedules.kernel import Target

from ..config import KINDS, Config, Kind
from ..targets import Precision
from ..weights import PackedWeight
from .tensors import layer_of

Weights = Mapping[str, Expr]  # by name
TOP_LOGPROBS = token_logprobs.TOP


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

    count: Any  # n
    positions: Expr  # i32 [n]
    token_seq: Expr  # i32 [n]
    cos_sin: Expr  # f32 [n, head_dim]
    tables: dict[Kind, Tables]


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

    # -- what a family says --------------------------------------------------------------------

    @abstractmethod
    def rotary(self, positions: Expr, n: Any, w: Weights) -> Expr:
        """positions i32 [n] -> cos and sin f32 [n, head_dim]."""

    @abstractmethod
    def embed(self, tokens: Expr, n: Any, w: Weights) -> Expr:
        """tokens i32 [n] -> f32 [n, hidden]."""

    @abstractmethod
    def layer(self, kind: Kind, x: Expr, step: Step, kv: Expr, w: Weights) -> tuple[Expr, ...]:
        """One layer on x f32 [n, hidden], its weights by their names within the layer; returns its
        stages, the layer's output last."""

    @abstractmethod
    def head(self, x: Expr, n: Any, w: Weights) -> Expr:
        """x f32 [n, hidden] -> logits f32 [n, vocab]."""

    @abstractmethod
    def piece_weights(self, piece: str | int, names: Iterable[str]) -> list[str]:
        """See `Family.piece_weights`."""

    # -- the model in parts -------------------------------------------------------------------

    def forward(
        self, tokens: Expr, step: Step, rows: Expr | None, kv: Sequence[Expr], w: Weights
    ) -> Expr:
        """tokens i32 [n] -> logits f32 [m, vocab] of the tokens `rows` i32 [m]; None: of all."""
        kinds = self.config.kinds
        x = self.embed(tokens, step.count, w)
        for layer in range(self.config.num_hidden_layers):
            *_stages, x = self.layer(kinds[layer], x, step, kv[layer], layer_of(w, layer))
        if rows is not None:
            asked = rows.ty.shape[0]
            x = self.call(
                gather.gather_rows(self.target, hidden=self.config.hidden_size),
                [x, rows],
                self.f32(asked, self.config.hidden_size),
            )
            return self.head(x, asked, w)
        return self.head(x, step.count, w)

    def dense(
        self,
        x: Expr,
        n: Any,
        w: Weights,
        name: str,
        shape: tuple[int, int],
        residual: Expr | None = None,
    ) -> Expr:
        """A large dense layer f32 [n, k] -> f32 [n, rows], computed as `precision` says."""
        rows, k = shape
        weight, bias = f"{name}.weight", f"{name}.bias"
        static = dict(rows=rows, k=k, with_bias=bias in w, with_residual=residual is not None)
        dense = self.precision.dense_of(k)
        if dense == "i8":
            kernel = linear_i8.linear_i8(self.target, **static)
            operands = [*self.quantized(x, n, k, linear_i8.PLANES), w[weight], w[f"{weight}_scale"]]
        elif dense == "bf16xbf16":
            kernel = linear_bf16.linear_bf16(self.target, **static)
            operands = [self.rounded(x, n, k), w[weight]]
        else:
            kernel = linear.linear(self.target, **static)
            operands = [x, w[weight]]
        if bias in w:
            operands.append(w[bias])
        if residual is not None:
            operands.append(residual)
        return self.call(kernel, operands, self.f32(n, rows))

    def norm(self, x: Expr, weight: Expr, n: Any, eps: float) -> Expr:
        hidden = self.config.hidden_size
        kernel = rms_norm.rms_norm(self.target, hidden=hidden, eps=eps)
        return self.call(kernel, [x, weight], self.f32(n, hidden))

    def expert_input(self, x: Expr, n: Any, k: int) -> list[Expr]:
        """Activations as the expert kernels take them: f32, rounded to bf16, or quantized to i8."""
        if self.precision.experts == "i8":
            return self.quantized(x, n, k)
        return [self.rounded(x, n, k) if self.precision.experts == "bf16" else x]

    def rounded(self, x: Expr, n: Any, k: int) -> Expr:
        """f32 [n, k] rounded to bf16, as bits u16; an odd k grows by a zero."""
        kernel = round_bf16.round_bf16(self.target, k=k)
        return self.call(kernel, [x], TensorType((n, round_bf16.width(k)), "uint16"))

    def quantized(self, x: Expr, n: Any, k: int, planes: int = 1) -> list[Expr]:
        """f32 [n, k] as planes of 8-bit digits, their steps and totals."""
        return list(
            self.call(
                quantize.quantize(self.target, k=k, planes=planes),
                [x],
                TensorType((n, planes * k), "int8"),
                self.f32(n, k // 32),
                self.i32(n, k // 32),
            )
        )

    # -- the library's functions ---------------------------------------------------------------

    def module(self) -> tvm.IRModule:
        """All functions of the library, unlowered."""
        self._emit_forward()
        self._emit_decode()
        self._emit_sample()
        self._emit_logprobs()
        self._emit_copy_pages()
        self._emit_pieces()
        return self.builder.finalize()

    def _emit_forward(self) -> None:
        n, m = _symbol("n"), _symbol("m")
        tokens = Var("tokens", self.i32(n))
        inputs, rows = self._step_inputs(n), Var("rows", self.i32(m))
        kv, weights = self._kv_inputs(), self._weight_inputs(self.weights)
        params = [tokens, *inputs[:2], rows, *inputs[2:], *kv, *weights.values()]
        # m is left unbounded: logits of a whole chunk are large, and wanted only for evaluation.
        bounds = {"n": self.limits.max_tokens, "b": self.limits.max_batch}
        with self._function("forward", params, bounds):
            step = self._step(n, inputs, weights)
            self._output(self.forward(tokens, step, rows, kv, weights))

    def _emit_decode(self) -> None:
        b = _symbol("b")
        tokens = Var("tokens", self.i32(b))
        inputs = self._step_inputs(b, b)
        kv, weights = self._kv_inputs(), self._weight_inputs(self.weights)
        params = [tokens, *inputs, *kv, *weights.values()]
        with self._function("decode", params, {"b": self.limits.max_batch}):
            step = self._step(b, inputs, weights)
            self._output(self.forward(tokens, step, None, kv, weights))

    def _emit_sample(self) -> None:
        m, e, g = _symbol("m"), _symbol("e"), _symbol("g")
        vocab = self.config.vocab_size
        words = -(-vocab // 32)
        logits = Var("logits", self.f32(m, vocab))
        draw = [
            Var("temperature", self.f32(m)),
            Var("top_k", self.i32(m)),
            Var("top_p", self.f32(m)),
            Var("min_p", self.f32(m)),
            Var("seed", self.i32(m, 2)),
            Var("step", self.i32(m)),
        ]
        edits = [
            Var("edit_row", self.i32(e)),
            Var("edit_token", self.i32(e)),
            Var("edit_seen", self.i32(e)),
            Var("edit_count", self.i32(e)),
            Var("edit_bias", self.f32(e)),
            Var("penalties", self.f32(m, 3)),
            Var("mask_row", self.i32(m)),
            Var("bitmask", self.i32(g, words)),
        ]
        with self._function("sample", [logits, *draw, *edits], {"m": self.limits.max_batch}):
            adjusted = self.call(
                adjust_logits.adjust_logits(self.target, vocab=vocab),
                [logits, *edits],
                self.f32(m, vocab),
            )
            ids, _scratch = self.call(
                sample_token.sample_token(self.target, vocab=vocab),
                [adjusted, *draw],
                self.i32(m),
                self.f32(m, vocab),
            )
            self._output(ids)

    def _emit_logprobs(self) -> None:
        m, vocab = _symbol("m"), self.config.vocab_size
        logits, ids = Var("logits", self.f32(m, vocab)), Var("ids", self.i32(m))
        with self._function("logprobs", [logits, ids], {"m": self.limits.max_batch}):
            results = self.call(
                token_logprobs.token_logprobs(self.target, vocab=vocab),
                [logits, ids],
                self.f32(m),
                self.i32(m, TOP_LOGPROBS),
                self.f32(m, TOP_LOGPROBS),
            )
            self._output(relax.Tuple(list(results)))

    def _emit_copy_pages(self) -> None:
        for kind in KINDS:
            c = _symbol("c")
            kv = [
                tensor
                for tensor, its in zip(self._kv_inputs(), self.config.kinds, strict=True)
                if its == kind
            ]
            source, destination = Var("source", self.i32(c)), Var("destination", self.i32(c))
            kernel = kv_copy.kv_copy_pages(
                self.target,
                kv_heads=self.config.num_key_value_heads,
                head_dim=self.config.head_dim,
                kv_dtype=self.precision.kv_dtype,
            )
            with self._function(f"kv_copy_pages_{kind}", [source, destination, *kv], {}):
                copied = [
                    self.call_inplace(kernel, [tensor, source, destination], updated=0)
                    for tensor in kv
                ]
                self._output(relax.Tuple(copied))

    def _emit_pieces(self) -> None:
        n = _symbol("n")
        tokens, weights = Var("tokens", self.i32(n)), self._piece_inputs("embed")
        with self._function("embed", [tokens, *weights.values()], {}):
            self._output(self.embed(tokens, n, weights))

        for kind in KINDS:
            if kind in self.config.kinds:
                self._emit_layer(kind, self.config.kinds.index(kind))

        n = _symbol("n")
        x, weights = Var("x", self.f32(n, self.config.hidden_size)), self._piece_inputs("head")
        with self._function("head", [x, *weights.values()], {}):
            self._output(self.head(x, n, weights))

    def _emit_layer(self, kind: Kind, layer: int) -> None:
        n = _symbol("n")
        x, inputs = Var("x", self.f32(n, self.config.hidden_size)), self._step_inputs(n)
        kv, weights = self._kv_inputs()[layer], self._piece_inputs(layer)
        with self._function(f"layer_{kind}", [x, *inputs, kv, *weights.values()], {}):
            step = self._step(n, inputs, weights)
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

    def _step(self, n: Any, inputs: list[Var], weights: Weights) -> Step:
        positions, token_seq, *tables = inputs
        rotary = self.rotary(positions, n, weights)
        by_kind = {kind: Tables(*tables[2 * i : 2 * i + 2]) for i, kind in enumerate(KINDS)}
        return Step(n, positions, token_seq, rotary, by_kind)

    def _kv_inputs(self) -> list[Var]:
        pages = {kind: _symbol(f"{kind}_pages") for kind in KINDS}
        c = self.config
        return [
            Var(
                f"kv_{layer}",
                TensorType(
                    kv_cache.kv_shape(
                        pages[kind],
                        c.num_key_value_heads,
                        c.head_dim,
                        self.precision.kv_dtype,
                    ),
                    self.precision.kv_dtype,
                ),
            )
            for layer, kind in enumerate(c.kinds)
        ]

    def _weight_inputs(self, weights: Sequence[PackedWeight]) -> dict[str, Var]:
        return {
            weight.name: Var(weight.name.replace(".", "_"), TensorType(weight.shape, weight.dtype))
            for weight in weights
        }

    def _function(self, name: str, params: list[Var], bounds: dict[str, int]) -> Any:
        attributes = {"tir_var_upper_bound": bounds} if bounds else {}
        return self.builder.function(name, params, attrs=attributes, private=False)

    def _output(self, value: Expr) -> None:
        self.builder.emit_func_output(value)

    def call(self, kernel: tvm.tirx.PrimFunc, args: Sequence[Expr], *out: TensorType) -> Any:
        """Emit one kernel; a tuple of outputs where there are several."""
        emitted = self.builder.emit(relax.call_tir(self._add(kernel), args, list(out)))
        if len(out) == 1:
            return emitted
        return tuple(self.builder.emit(relax.TupleGetItem(emitted, i)) for i in range(len(out)))

    def call_inplace(
        self,
        kernel: tvm.tirx.PrimFunc,
        args: Sequence[Expr],
        updated: int,
        out: TensorType | None = None,
    ) -> Any:
        """Emit a kernel that updates argument `updated`; returns that, or (fresh output, that).

        The updated tensor must be used afterwards, or the call is dropped as dead code.
        """
        fresh = [] if out is None else [out]
        indices = [-1] * len(fresh) + [updated]
        types = [*fresh, args[updated].ty]
        call = relax.op.call_tir_inplace(
            self._add(kernel), relax.Tuple(args), indices, types if out is not None else types[0]
        )
        emitted = self.builder.emit(call)
        if out is None:
            return emitted
        return tuple(self.builder.emit(relax.TupleGetItem(emitted, i)) for i in range(2))

    def _add(self, kernel: tvm.tirx.PrimFunc) -> tvm.ir.GlobalVar:
        # Kernel factories are cached, so that one object stands for one kernel.
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


def _symbol(name: str) -> Any:
    return tvm.tirx.Var(name, "int64")


__all__ = ["Emitter", "Limits", "Step", "Tables", "Weights"]
