"""`kv_insert` on GPUs: one thread a rotated pair; and what other GPU kernels do with such a pair.

A pair is f32 [3]: elements i and i + D/2 of a head, and where the cache has scales, the largest
magnitude of the head.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import tvm

from mxforge.kv_layout import PAGE_TOKENS

from ..formats import bf16
from ..formats.kv import KV, scale_at, scale_bits, scale_byte
from ..kernel import T, Tensor, prim_func
from .pages import physical_page


def rotation(head_dim: int) -> Any:
    """The T.inline rotate(pair, cos_sin, t, i): elements i and i + D/2 by token t's position."""
    half = head_dim // 2

    @T.inline
    def rotate(pair, cos_sin, t, i):
        x1: T.let = pair[0]
        x2: T.let = pair[1]
        pair[0] = x1 * cos_sin[t, i] - x2 * cos_sin[t, half + i]
        pair[1] = x2 * cos_sin[t, i] + x1 * cos_sin[t, half + i]

    return rotate


def insertion(kv_dtype: str, head_dim: int) -> Any:
    """The T.inline insert(pair, kv, page, slot, part, h, i): of head h's keys (part 0) or values
    (1), elements i and i + D/2."""
    kv_format, half = KV[kv_dtype], head_dim // 2

    @T.inline
    def put(pair, kv, page, slot, part, h, at, i):
        if kv_format.scaled:
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
    def insert(pair, kv, page, slot, part, h, i):
        if part == 0:
            put(pair, kv, page, slot, 0, h, kv_format.key_at, i)
        else:
            put(pair, kv, page, slot, 1, h, partial(kv_format.value_at, head_dim), i)

    return insert


def pairs(
    arguments: tuple[Tensor, ...], *, heads: int, kv_heads: int, head_dim: int, kv_dtype: str
) -> tvm.tirx.PrimFunc:
    """One item is a (token, head of q, k or v, rotated pair)."""
    scaled, half = KV[kv_dtype].scaled, head_dim // 2
    all_heads = heads + 2 * kv_heads
    rotate, insert = rotation(head_dim), insertion(kv_dtype, head_dim)

    @T.inline
    def take(pair, qkv, cos_sin, t, h, i):
        """Keys and queries rotated."""
        pair[0] = qkv[t, h * head_dim + i]
        pair[1] = qkv[t, h * head_dim + half + i]
        if h < heads + kv_heads:
            rotate(pair, cos_sin, t, i)

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
                if scaled:  # every item finds it for itself
                    pair[2] = T.float32(0)
                    for j in T.serial(half):
                        take(pair, qkv, cos_sin, vt, vh, j)
                        pair[2] = T.max(pair[2], T.max(T.fabs(pair[0]), T.fabs(pair[1])))
                take(pair, qkv, cos_sin, vt, vh, vi)
                if vh < heads:
                    q[vt, vh * head_dim + vi] = pair[0]
                    q[vt, vh * head_dim + half + vi] = pair[1]
                elif vh < heads + kv_heads:
                    insert(pair, kv, page, slot, 0, vh - heads, vi)
                else:
                    insert(pair, kv, page, slot, 1, vh - heads - kv_heads, vi)

    return prim_func(arguments, body)
