"""Splits: how the keys of a token are spread over blocks of a GPU, in decoding on full layers."""

from __future__ import annotations

from typing import Any

from mxforge.kv_layout import PAGE_TOKENS

from ..kernel import T

# Of a token: its 8 KV heads are 256 blocks, about two for each part of the largest GPUs. What 64
# sequences leave for the combination is 34 MB, of heads of 64 · 64 numbers.
SPLITS = 32
FEWEST_KEYS = 128  # of a split: fewer are not worth starting a block


def split_pages(length: Any) -> Any:
    """Pages of a split, of a token that sees `length` keys."""
    pages = (length + (SPLITS * PAGE_TOKENS - 1)) // (SPLITS * PAGE_TOKENS)
    return T.max(pages, T.int32(FEWEST_KEYS // PAGE_TOKENS))
