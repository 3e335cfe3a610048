"""Attention and the paged cache of keys and values."""

from __future__ import annotations

from .kv_copy import KV_COPY_PAGES
from .kv_insert import ROPE_KV_INSERT
from .paged_attention import PAGED_ATTENTION
from .qkv_insert import QKV_INSERT

__all__ = ["KV_COPY_PAGES", "PAGED_ATTENTION", "QKV_INSERT", "ROPE_KV_INSERT"]
