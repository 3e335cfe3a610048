"""gpt-oss in Relax, from token ids to logits.

`GptOss` says what a layer is; read it from top to bottom. Weights have their official names, those
of q, k and v as one. See `..emit` for the functions of the library around it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tvm.relax import Expr

from mxforge.schedules.attention import (
    COMBINE_ATTENTION,
    PAGED_ATTENTION,
    ROPE_KV_INSERT,
    SPLIT_ATTENTION,
)
from mxforge.schedules.embedding import EMBED
from mxforge.schedules.formats import ACTIVATIONS, DENSE
from mxforge.schedules.kernel import Target
from mxforge.schedules.moe import DOWN, GATE_UP, MOE_PLAN, ROUTER_TOPK
from mxforge.schedules.rope import ROPE_TABLE

from ...config import Kind
from ...formats import Precision
from ...weights import PackedWeight
from ..emit import Emitter, Limits, Step, Weights
from . import tensors
from .config import GptOssConfig


class GptOss(Emitter[GptOssConfig]):
    """Emits the model's functions into one IRModule."""

    def __init__(
        self,
        config: GptOssConfig,
        target: Target,
        precision: Precision,
        limits: Limits,
        weights: Sequence[PackedWeight],
    ) -> None:
        super().__init__(config, target, precision, limits, weights)
        self._static = tensors.kernel_arguments(config)
        self._attention_shape = tensors.attention_arguments(config, precision.kv)
        self._fused = {
            name: fused.on(target, precision) for name, fused in tensors.fused(config).items()
        }

    def rotary(self, positions: Expr, w: Weights) -> Expr:
        return self.call(
            ROPE_TABLE,
            {"positions": positions, "inv_freq": w[tensors.INV_FREQ]},
            head_dim=self.config.head_dim,
            attention_factor=self.config.rope_attention_factor,
        )

    def embed(self, tokens: Expr, w: Weights) -> Expr:
        inputs = {"tokens": tokens, "table": w[tensors.EMBEDDING]}  # bf16 [vocab, hidden]
        return self.call(EMBED, inputs, hidden=self.config.hidden_size)

    def layer(self, kind: Kind, x: Expr, step: Step, kv: Expr, w: Weights) -> tuple[Expr, ...]:
        """One layer on x f32 [n, hidden]; returns its stages, the layer's output last."""
        x = attended = self.attention_block(kind, x, step, kv, w)
        ids, expert_weights, x = self.moe_block(x, w)
        return attended, ids, expert_weights, x

    def attention_block(self, kind: Kind, x: Expr, step: Step, kv: Expr, w: Weights) -> Expr:
        places = {
            "positions": step.positions,
            "token_seq": step.token_seq,
            "page_table": step.tables[kind].pages,
            "first_page": step.tables[kind].first,
        }
        q, kv = self.queries(x, {**places, "cos_sin": step.cos_sin, "kv": kv}, w)
        a = self.attend(kind, step, {"q": q, "kv": kv, **places}, w["self_attn.sinks"])
        # weight [hidden, heads·head_dim], bias f32 [hidden]
        return self.layer_dense("self_attn.o_proj", a, w, residual=x)

    def queries(self, x: Expr, cache: dict[str, Expr], w: Weights) -> tuple[Expr, Expr]:
        """Rotated queries f32 [n, heads·head_dim] and the cache with the tokens' keys and values.

        x f32 [n, hidden]; qkv_proj's weight [(heads + 2 kv_heads)·head_dim, hidden], bias f32.
        """
        name, norm = "self_attn.qkv_proj", w["input_layernorm.weight"]  # [hidden]
        if fused := self._fused[f"{name}.weight"]:
            kernel, static = fused
            parts = self.weight_parts(w, name, self.precision.dense_of(self.config.hidden_size))
            inputs = {"x": x, "norm_weight": norm, **parts, "bias": w[f"{name}.bias"], **cache}
            q, kv = self.call(kernel, inputs, **static)
            return q, kv
        qkv = self.layer_dense(name, self.norm(x, norm, self.config.rms_norm_eps), w)
        q, kv = self.call(ROPE_KV_INSERT, {"qkv": qkv, **cache}, **self._attention_shape)
        return q, kv

    def attend(self, kind: Kind, step: Step, inputs: dict[str, Expr], sinks: Expr) -> Expr:
        """f32 [n, heads·head_dim], of sinks f32 [heads].

        Where each sequence has one token, the keys without a window are split among blocks, if
        there are schedules for it.
        """
        shape = self._attention_shape
        window = self.config.sliding_window if kind == "sliding" else 0
        if step.decoding and not window and SPLIT_ATTENTION.fits(self.target, **shape):
            partial, stats = self.call(SPLIT_ATTENTION, inputs, **shape)
            parts = {"partial": partial, "stats": stats, "sinks": sinks}
            whole = {"heads": shape["heads"], "head_dim": shape["head_dim"]}
            return self.call(COMBINE_ATTENTION, parts, **whole)
        return self.call(PAGED_ATTENTION, {**inputs, "sinks": sinks}, **shape, window=window)

    def moe_block(self, x: Expr, w: Weights) -> tuple[Expr, Expr, Expr]:
        c, precision = self.config, self.precision
        gate_up, down = GATE_UP[precision.activations], DOWN[precision.activations]
        h, ids, expert_weights = self.route(x, w)
        offsets, order = self.call(
            MOE_PLAN, {"ids": ids}, experts=c.num_local_experts, top_k=c.num_experts_per_tok
        )
        plan = {"ids": ids, "offsets": offsets, "order": order}
        between = self.call(
            gate_up,
            # [experts, 2·intermediate, hidden]
            {**h, **plan, **_mxfp4(w, "mlp.experts.gate_up_proj")},
            **self._static["mlp.experts.gate_up_proj"],
        )
        x = self.call(
            down,
            {
                **self.experts_inputs("h", (between,), c.intermediate_size),
                **plan,
                "weights": expert_weights,
                **_mxfp4(w, "mlp.experts.down_proj"),  # [experts, hidden, intermediate]
                "residual": x,
            },
            **self._static["mlp.experts.down_proj"],
        )
        return ids, expert_weights, x

    def route(self, x: Expr, w: Weights) -> tuple[dict[str, Expr], Expr, Expr]:
        """The normed x as the experts take it, ids i32 [n, top_k] and weights f32 [n, top_k].

        router's weight bf16 [experts, hidden], bias f32 [experts].
        """
        c, norm = self.config, w["post_attention_layernorm.weight"]  # [hidden]
        if fused := self._fused["mlp.router.weight"]:
            kernel, static = fused
            parts = self.weight_parts(w, "mlp.router", DENSE["bf16"])
            inputs = {"x": x, "norm_weight": norm, **parts, "bias": w["mlp.router.bias"]}
            *h, ids, weights = self.call(kernel, inputs, **static)
            return self.experts_inputs("x", h, c.hidden_size), ids, weights
        normed = self.norm(x, norm, c.rms_norm_eps)
        static = self._static["mlp.router.weight"]
        logits = self.dense(normed, w, "mlp.router", DENSE["bf16"], **static)
        ids, weights = self.call(
            ROUTER_TOPK,
            {"logits": logits},
            experts=c.num_local_experts,
            top_k=c.num_experts_per_tok,
        )
        format_ = ACTIVATIONS[self.precision.activations]
        return self.activations("x", normed, c.hidden_size, format_), ids, weights

    def experts_inputs(self, name: str, made: Sequence[Expr], k: int) -> dict[str, Expr]:
        """What a kernel wrote for the experts, [n, k], as their arguments called `name`."""
        format_ = ACTIVATIONS[self.precision.activations]
        if format_.results is not format_:
            (x,) = made
            return self.activations(name, x, k, format_)
        names = [tensor.name for tensor in format_.tensors(name, 0, k)]
        return dict(zip(names, made, strict=True))

    def head(self, x: Expr, w: Weights) -> Expr:
        h = self.norm(x, w[tensors.FINAL_NORM], self.config.rms_norm_eps)  # [hidden]
        return self.layer_dense("lm_head", h, w)  # weight [vocab, hidden]

    def layer_dense(self, name: str, x: Expr, w: Weights, residual: Expr | None = None) -> Expr:
        """A dense layer in the precision's format."""
        static = self._static[f"{name}.weight"]
        return self.dense(x, w, name, self.precision.dense_of(static["k"]), residual, **static)

    def piece_weights(self, piece: str | int, names: Iterable[str]) -> list[str]:
        return tensors.piece_weights(piece, names)


def _mxfp4(w: Weights, name: str) -> dict[str, Expr]:
    """The arguments of experts' kernels that a matrix becomes."""
    return {part: w[f"{name}_{part}"] for part in ("blocks", "scales", "bias")}


__all__ = ["GptOss"]
