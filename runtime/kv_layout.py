"""How large the cache of keys and values is: what runtime and compiler have to agree on."""

from __future__ import annotations

PAGE_TOKENS = 16
KV_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}  # of an element


def row_elements(head_dim: int, kv_dtype: str) -> int:
    """Elements of a page's keys, or values, of one KV head; int8 has its scales among them.

    The layout is told in schedules/formats/kv.py.
    """
    if kv_dtype == "int8":
        return 4 * PAGE_TOKENS * (-(-head_dim // 4) + 1)
    return PAGE_TOKENS * head_dim


def page_bytes(kv_heads: int, head_dim: int, kv_dtype: str) -> int:
    """Bytes of a page of one layer."""
    return 2 * kv_heads * row_elements(head_dim, kv_dtype) * KV_BYTES[kv_dtype]
