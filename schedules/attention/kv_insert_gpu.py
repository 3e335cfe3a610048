"""`kv_insert` on GPUs: one thread a rotated pair."""

from __future__ import annotations

from functools import partial

import tvm

from mxforge.kv_layout import PAGE_TOKENS

from ..formats import bf16
from ..formats.kv import KV, scale_at, scale_bits, scale_byte
from ..kernel import T, Tensor, prim_func
from .pages import physical_page


def pairs(
    arguments: tuple[Tensor, ...], *, heads: int, kv_heads: int, head_dim: int, kv_dtype: str
) -> tvm.tirx.PrimFunc:
    """One item is a (token, head of q, k or v, rotated pair)."""
    kv_format = KV[kv_dtype]
    half = head_dim // 2
    all_heads = heads + 2 * kv_heads
    key, value = kv_format.key_at, partial(kv_format.value_at, head_dim)

    @T.inline
    def rotated(pair, qkv, cos_sin, t, h, i):
        """pair = elements i and i + D/2 of a head, keys and queries rotated."""
        x1: T.let = qkv[t, h * head_dim + i]
        x2: T.let = qkv[t, h * head_dim + half + i]
        if h < heads + kv_heads:
            pair[0] = x1 * cos_sin[t, i] - x2 * cos_sin[t, half + i]
            pair[1] = x2 * cos_sin[t, i] + x1 * cos_sin[t, half + i]
        else:
            pair[0] = x1
            pair[1] = x2

    @T.inline
    def store(kv, pair, page, part, h, at, i, slot):
        if kv_format.scaled:
            # pair[2] is the head's largest magnitude, which every item finds for itself.
            bits: T.let = scale_bits(pair[2])
            scale: T.let = bf16.widened(bits)
            kv[part, h, page, at(i, slot)] = kv_format.store(pair[0], scale)
            kv[part, h, page, at(half + i, slot)] = kv_format.store(pair[1], scale)
            if i == 0:
                for byte in T.unroll(2):
                    kv[part, h, page, scale_at(head_dim, slot) + byte] = scale_byte(bits, byte)
        else:
            kv[part, h, page, at(i, slot)] = kv_format.store(pair[0], None)
            kv[part, h, page, at(half + i, slot)] = kv_format.store(pair[1], None)

    @T.inline
    def body(n, qkv, cos_sin, positions, token_seq, page_table, first_page, kv, q):
        for t, h, i in T.grid(n, all_heads, half):
            with T.sblock("item"):
                vt, vh, vi = T.axis.remap("SSS", [t, h, i])
                pair = T.sblock_alloc_buffer((3,), "float32", scope="local")
                slot: T.let = positions[vt] % PAGE_TOKENS
                page: T.let = physical_page(
                    page_table, first_page, token_seq[vt], positions[vt] // PAGE_TOKENS
                )
                if kv_format.scaled:
                    pair[2] = T.float32(0)
                    for j in T.serial(half):
                        rotated(pair, qkv, cos_sin, vt, vh, j)
                        pair[2] = T.max(pair[2], T.max(T.fabs(pair[0]), T.fabs(pair[1])))
                rotated(pair, qkv, cos_sin, vt, vh, vi)
                if vh < heads:
                    q[vt, vh * head_dim + vi] = pair[0]
                    q[vt, vh * head_dim + half + vi] = pair[1]
                elif vh < heads + kv_heads:
                    store(kv, pair, page, 0, vh - heads, key, vi, slot)
                else:
                    store(kv, pair, page, 1, vh - heads - kv_heads, value, vi, slot)

    return prim_func(arguments, body)
