"""Attention and the paged cache of keys and values."""

from __future__ import annotations

from .combine_attention import COMBINE_ATTENTION
from .kv_copy import KV_COPY_PAGES
from .kv_insert import ROPE_KV_INSERT
from .paged_attention import PAGED_ATTENTION
from .qkv_insert import QKV_INSERT
from .split_attention import SPLIT_ATTENTION
from .splits import SPLITS

__all__ = [
    "COMBINE_ATTENTION",
    "KV_COPY_PAGES",
    "PAGED_ATTENTION",
    "QKV_INSERT",
    "ROPE_KV_INSERT",
    "SPLITS",
    "SPLIT_ATTENTION",
]
