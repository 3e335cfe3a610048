"""gpt-oss in Relax, from token ids to logits.

`GptOss` says what a layer is; read it from top to bottom. Weights have their official names, those
of q, k and v as one. See `..emit` for the functions of the library around it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tvm.relax import Expr

from mxforge.schedules import (
    attention,
    embedding,
    kv_append,
    linear,
    moe_down,
    moe_gate_up,
    moe_plan,
    rope,
    router_topk,
)
from mxforge.schedules.kernel import Target

from ...config import Kind
from ...targets import Precision
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
        self._attention_shape = dict(
            heads=c.num_attention_heads, kv_heads=c.num_key_value_heads, head_dim=c.head_dim
        )
        self._expert_shape = dict(
            experts=c.num_local_experts,
            top_k=c.num_experts_per_tok,
            hidden=c.hidden_size,
            units=c.intermediate_size,
            activations=precision.experts,
        )

    def rotary(self, positions: Expr, n: Any, w: Weights) -> Expr:
        c = self.config
        table = rope.rope_table(
            self.target, head_dim=c.head_dim, attention_factor=c.rope_attention_factor
        )
        return self.call(table, [positions, w[tensors.INV_FREQ]], self.f32(n, c.head_dim))

    def embed(self, tokens: Expr, n: Any, w: Weights) -> Expr:
        hidden = self.config.hidden_size
        return self.call(
            embedding.embed(self.target, hidden=hidden),
            [tokens, w[tensors.EMBEDDING]],  # bf16 [vocab, hidden]
            self.f32(n, hidden),
        )

    def layer(self, kind: Kind, x: Expr, step: Step, kv: Expr, w: Weights) -> tuple[Expr, ...]:
        """One layer on x f32 [n, hidden]; returns its stages, the layer's output last."""
        x = attended = self.attention_block(kind, x, step, kv, w)
        ids, expert_weights, x = self.moe_block(x, step, w)
        return attended, ids, expert_weights, x

    def attention_block(self, kind: Kind, x: Expr, step: Step, kv: Expr, w: Weights) -> Expr:
        c, n = self.config, step.count
        queries = c.num_attention_heads * c.head_dim
        tables = step.tables[kind]
        where = [step.positions, step.token_seq, tables.pages, tables.first]

        h = self.norm(x, w["input_layernorm.weight"], n, c.rms_norm_eps)  # [hidden]
        qkv = self.dense(
            h,
            n,
            w,
            "self_attn.qkv_proj",  # weight [(heads + 2 kv_heads)·head_dim, hidden], bias f32
            (c.qkv_rows, c.hidden_size),
        )
        q, kv = self.call_inplace(
            kv_append.rope_kv_append(
                self.target, **self._attention_shape, kv_dtype=self.precision.kv_dtype
            ),
            [qkv, step.cos_sin, *where, kv],
            updated=6,
            out=self.f32(n, queries),
        )
        a = self.call(
            attention.paged_attention(
                self.target,
                **self._attention_shape,
                window=c.sliding_window if kind == "sliding" else 0,
                kv_dtype=self.precision.kv_dtype,
            ),
            [q, kv, *where, w["self_attn.sinks"]],  # f32 [heads]
            self.f32(n, queries),
        )
        return self.dense(
            a,
            n,
            w,
            "self_attn.o_proj",  # weight [hidden, heads·head_dim], bias f32 [hidden]
            (c.hidden_size, queries),
            residual=x,
        )

    def moe_block(self, x: Expr, step: Step, w: Weights) -> tuple[Expr, Expr, Expr]:
        c, n = self.config, step.count
        top_k = c.num_experts_per_tok
        h = self.norm(x, w["post_attention_layernorm.weight"], n, c.rms_norm_eps)  # [hidden]
        logits = self.call(
            linear.linear(self.target, rows=c.num_local_experts, k=c.hidden_size, with_bias=True),
            [
                h,
                w["mlp.router.weight"],  # bf16 [experts, hidden]
                w["mlp.router.bias"],  # f32 [experts]
            ],
            self.f32(n, c.num_local_experts),
        )
        ids, expert_weights = self.call(
            router_topk.router_topk(self.target, experts=c.num_local_experts, top_k=top_k),
            [logits],
            self.i32(n, top_k),
            self.f32(n, top_k),
        )
        offsets, order = self.call(
            moe_plan.moe_plan(self.target, experts=c.num_local_experts, top_k=top_k),
            [ids],
            self.i32(c.num_local_experts + 1),
            self.i32(n * top_k),
        )
        h = self.call(
            moe_gate_up.gate_up(self.target, **self._expert_shape, limit=c.swiglu_limit),
            [
                *self.expert_input(h, n, c.hidden_size),
                ids,
                offsets,
                order,
                w["mlp.experts.gate_up_proj_blocks"],  # u8 [experts, 2·units, hidden/32, 16]
                w["mlp.experts.gate_up_proj_scales"],  # u8 [experts, 2·units, hidden/32]
                w["mlp.experts.gate_up_proj_bias"],  # f32 [experts, 2·units]
            ],
            self.f32(n * top_k, c.intermediate_size),
        )
        x = self.call(
            moe_down.down(self.target, **self._expert_shape),
            [
                *self.expert_input(h, n * top_k, c.intermediate_size),
                ids,
                expert_weights,
                offsets,
                order,
                w["mlp.experts.down_proj_blocks"],  # u8 [experts, hidden, units/32, 16]
                w["mlp.experts.down_proj_scales"],  # u8 [experts, hidden, units/32]
                w["mlp.experts.down_proj_bias"],  # f32 [experts, hidden]
                x,
            ],
            self.f32(n, c.hidden_size),
        )
        return ids, expert_weights, x

    def head(self, x: Expr, n: Any, w: Weights) -> Expr:
        c = self.config
        return self.dense(
            self.norm(x, w[tensors.FINAL_NORM], n, c.rms_norm_eps),  # [hidden]
            n,
            w,
            "lm_head",  # weight [vocab, hidden]
            (c.vocab_size, c.hidden_size),
        )

    def piece_weights(self, piece: str | int, names: Iterable[str]) -> list[str]:
        return tensors.piece_weights(piece, names)


__all__ = ["GptOss"]
