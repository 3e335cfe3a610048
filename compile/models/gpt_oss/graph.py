"""gpt-oss in Relax, from token ids to logits.

`GptOss` says what a layer is; read it from top to bottom. Weights have their official names, those
of q, k and v as one. See `..emit` for the functions of the library around it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tvm.relax import Expr

from mxforge.schedules.attention import PAGED_ATTENTION, ROPE_KV_INSERT
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
        c = config
        self._static = tensors.kernel_arguments(config)
        self._attention_shape = dict(
            heads=c.num_attention_heads,
            kv_heads=c.num_key_value_heads,
            head_dim=c.head_dim,
            kv_dtype=precision.kv,
        )

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
        tables = {
            "positions": step.positions,
            "token_seq": step.token_seq,
            "page_table": step.tables[kind].pages,
            "first_page": step.tables[kind].first,
        }
        h = self.norm(x, w["input_layernorm.weight"], self.config.rms_norm_eps)  # [hidden]
        # weight [(heads + 2 kv_heads)·head_dim, hidden], bias f32
        qkv = self.layer_dense("self_attn.qkv_proj", h, w)
        q, kv = self.call(
            ROPE_KV_INSERT,
            {"qkv": qkv, "cos_sin": step.cos_sin, **tables, "kv": kv},
            **self._attention_shape,
        )
        a = self.call(
            PAGED_ATTENTION,
            {"q": q, "kv": kv, **tables, "sinks": w["self_attn.sinks"]},  # f32 [heads]
            **self._attention_shape,
            window=self.config.sliding_window if kind == "sliding" else 0,
        )
        # weight [hidden, heads·head_dim], bias f32 [hidden]
        return self.layer_dense("self_attn.o_proj", a, w, residual=x)

    def moe_block(self, x: Expr, w: Weights) -> tuple[Expr, Expr, Expr]:
        c, precision = self.config, self.precision
        routing = dict(experts=c.num_local_experts, top_k=c.num_experts_per_tok)
        gate_up, down = GATE_UP[precision.activations], DOWN[precision.activations]
        format_ = ACTIVATIONS[precision.activations]

        h = self.norm(x, w["post_attention_layernorm.weight"], c.rms_norm_eps)  # [hidden]
        # weight bf16 [experts, hidden], bias f32 [experts]
        logits = self.dense(h, w, "mlp.router", DENSE["bf16"], **self._static["mlp.router.weight"])
        ids, expert_weights = self.call(ROUTER_TOPK, {"logits": logits}, **routing)
        offsets, order = self.call(MOE_PLAN, {"ids": ids}, **routing)
        plan = {"ids": ids, "offsets": offsets, "order": order}
        h = self.call(
            gate_up,
            {
                **self.activations("x", h, c.hidden_size, format_),
                **plan,
                **_mxfp4(w, "mlp.experts.gate_up_proj"),  # [experts, 2·intermediate, hidden]
            },
            **self._static["mlp.experts.gate_up_proj"],
        )
        x = self.call(
            down,
            {
                **self.activations("h", h, c.intermediate_size, format_),
                **plan,
                "weights": expert_weights,
                **_mxfp4(w, "mlp.experts.down_proj"),  # [experts, hidden, intermediate]
                "residual": x,
            },
            **self._static["mlp.experts.down_proj"],
        )
        return ids, expert_weights, x

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
