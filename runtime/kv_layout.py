"""How large the cache of keys and values is: what runtime and compiler have to agree on."""

from __future__ import annotations

import math

PAGE_TOKENS = 16
KV_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}  # of an element


def row_elements(head_dim: int, kv_dtype: str) -> int:
    """Elements of a page's keys, or values, of one KV head; int8 has its scales among them.

    The layout is told in schedules/formats/kv.py.
    """
    if kv_dtype == "int8":
        return 4 * PAGE_TOKENS * (-(-head_dim // 4) + 1)
    return PAGE_TOKENS * head_dim


def pages_needed(window: int | None, context: int, batch: int, step_tokens: int) -> int:
    """Pages of a KV group that never run out: for `batch` sequences of `context` tokens.

    `step_tokens` bounds the tokens of one step, all sequences together.
    """
    whole = batch * -(-context // PAGE_TOKENS)
    if window is None:
        return whole
    # So many pages can the windows of the last and the next position touch. A chunk adds its own
    # length, and a page more for each sequence, because it need not begin where a page does.
    each = (window + PAGE_TOKENS - 1) // PAGE_TOKENS + 1
    return min(whole, batch * (each + 1) + -(-step_tokens // PAGE_TOKENS))


def page_shape(kv_heads: int, head_dim: int, kv_dtype: str) -> tuple[int, int, int]:
    """Elements of a page of one layer: keys and values, heads, and a row."""
    return (2, kv_heads, row_elements(head_dim, kv_dtype))


def page_bytes(kv_heads: int, head_dim: int, kv_dtype: str) -> int:
    """Bytes of a page of one layer."""
    return math.prod(page_shape(kv_heads, head_dim, kv_dtype)) * KV_BYTES[kv_dtype]
