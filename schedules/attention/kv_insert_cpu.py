"""`kv_insert` on CPUs: tokens in parallel."""

from __future__ import annotations

from functools import partial

import tvm

from mxforge.kv_layout import PAGE_TOKENS

from ..cpu.vectors import LANES
from ..formats import bf16
from ..formats.kv import KV, scale_at, scale_bits, scale_byte
from ..kernel import Schedule, T, Tensor, cpu, prim_func
from .pages import physical_page


def _build(
    arguments: tuple[Tensor, ...], *, heads: int, kv_heads: int, head_dim: int, kv_dtype: str
) -> tvm.tirx.PrimFunc:
    kv_format = KV[kv_dtype]
    half = head_dim // 2
    vectors, tail = divmod(half, LANES)
    key, value = kv_format.key_at, partial(kv_format.value_at, head_dim)

    @T.inline
    def rotate(out, qkv, cos_sin, t, h, i):
        """out[i], out[D/2 + i]: head h rotated."""
        out[i] = (
            qkv[t, h * head_dim + i] * cos_sin[t, i]
            - qkv[t, h * head_dim + half + i] * cos_sin[t, half + i]
        )
        out[half + i] = (
            qkv[t, h * head_dim + half + i] * cos_sin[t, i]
            + qkv[t, h * head_dim + i] * cos_sin[t, half + i]
        )

    @T.inline
    def rotate_head(out, qkv, cos_sin, t, h):
        for v in T.serial(vectors):
            for lane in T.vectorized(LANES):
                rotate(out, qkv, cos_sin, t, h, v * LANES + lane)
        for i in T.serial(tail):
            rotate(out, qkv, cos_sin, t, h, vectors * LANES + i)

    @T.inline
    def store(kv, head, page, part, h, at, slot):
        if kv_format.scaled:
            head[head_dim] = T.float32(0)
            for i in T.serial(head_dim):
                head[head_dim] = T.max(head[head_dim], T.fabs(head[i]))
            bits: T.let = scale_bits(head[head_dim])
            scale: T.let = bf16.widened(bits)
            for byte in T.unroll(2):
                kv[part, h, page, scale_at(head_dim, slot) + byte] = scale_byte(bits, byte)
            for i in T.serial(head_dim):
                kv[part, h, page, at(i, slot)] = kv_format.store(head[i], scale)
        else:
            for i in T.serial(head_dim):
                kv[part, h, page, at(i, slot)] = kv_format.store(head[i], None)

    @T.inline
    def body(n, qkv, cos_sin, positions, token_seq, page_table, first_page, kv, q):
        for token in T.parallel(n):
            with T.sblock("item"):
                t = T.axis.spatial(n, token)
                head = T.sblock_alloc_buffer((head_dim + 1,), "float32")
                slot: T.let = positions[t] % PAGE_TOKENS
                page: T.let = physical_page(
                    page_table, first_page, token_seq[t], positions[t] // PAGE_TOKENS
                )
                for h in T.serial(heads):
                    rotate_head(head, qkv, cos_sin, t, h)
                    for i in T.serial(head_dim):
                        q[t, h * head_dim + i] = head[i]
                for h in T.serial(kv_heads):
                    rotate_head(head, qkv, cos_sin, t, heads + h)
                    store(kv, head, page, 0, h, key, slot)
                    for i in T.serial(head_dim):
                        head[i] = qkv[t, (heads + kv_heads + h) * head_dim + i]
                    store(kv, head, page, 1, h, value, slot)

    return prim_func(arguments, body)


SCHEDULES = (Schedule("tokens in parallel, pairs in vectors", cpu(), _build),)
