"""The paged cache of keys and values: where an element lies, and how it is kept.

A page holds 16 positions of one layer, for every KV head a row of keys and a row of values:

    kv [2, Hkv, pages, row]: keys at [0], values at [1]

A head is read by itself, its keys before its values: of pages that follow each other, as those of a
sequence mostly do, either is one stream of memory.

Position j of sequence s is slot j % 16 of page page_table[s, j // 16 - first_page[s]]; first_page
is the logical number of the first page that the table's row still holds.

Attention sums products of keys over d, and of values over slots. p neighbours in that direction
lie side by side, as many as fill the 32 bits that a dot product takes (see WORD): 16 slots of a
key, or 16 elements of a value, are one vector of words.

    key (d, slot)     at  d // p · 16p + slot·p + d % p
    value (slot, d)   at  slot // p · D·p + d·p + slot % p

float32, float16, bfloat16: rows of 16·D. In float16, values beyond ±65504 are kept as ±65504: an
infinity would poison every later query of the sequence.

int8: q = round(x / scale), with a scale for each head of a position, the largest |x| over 127,
rounded up to a bfloat16. A row is 64·⌈D/4⌉ elements, then the 16 slots' scales, low byte first,
and as many bytes again that nobody reads, which keep rows at the start of a cache line.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from mxforge.kv_layout import PAGE_TOKENS, row_elements

from . import bf16
from .kernel import T

KV_DTYPES = ("float32", "float16", "bfloat16", "int8")
WORD = {"float32": 1, "float16": 1, "bfloat16": 2, "int8": 4}  # p
F16_MAX = 65504.0
I8_MAX = 127


def kv_shape(pages: Any, kv_heads: int, head_dim: int, kv_dtype: str) -> tuple[int, int, Any, int]:
    """Shape of one layer's cache of `pages` pages."""
    return (2, kv_heads, pages, row_elements(head_dim, kv_dtype))


def physical_page(page_table: Any, first_page: Any, sequence: Any, page: Any) -> Any:
    """Index into kv of a sequence's logical page, in 64 bits: pools exceed 2³¹ elements."""
    return T.Cast("int64", page_table[sequence, page - first_page[sequence]])


def first_visible(position: Any, window: int) -> Any:
    """The first position that a query at `position` sees; window 0 means all."""
    return T.max(position - T.int32(window - 1), T.int32(0)) if window else T.int32(0)


def key_at(kv_dtype: str, d: Any, slot: Any) -> Any:
    """Where element d of the key of `slot` is, within its row; integers, arrays or expressions."""
    p = WORD[kv_dtype]
    return d // p * (PAGE_TOKENS * p) + slot * p + d % p


def value_at(kv_dtype: str, head_dim: int, d: Any, slot: Any) -> Any:
    """Where element d of the value of `slot` is, within its row."""
    p = WORD[kv_dtype]
    return slot // p * (head_dim * p) + d * p + slot % p


def scale_at(head_dim: int, slot: Any) -> Any:
    """Where the scale of `slot` begins, in a row of int8."""
    return row_elements(head_dim, "int8") - 4 * PAGE_TOKENS + 2 * slot


def load(
    kv: Any, kv_dtype: str, head_dim: int, row: tuple[Any, Any, Any], at: Any, slot: Any
) -> Any:
    """float32 element `at` of a row, (page, 0 or 1, KV head), which belongs to `slot`."""
    if kv_dtype == "bfloat16":
        # A cast would be bound to a name, and TVM 0.27 then casts the bits.
        return bf16.widened(T.reinterpret("uint16", kv[(*row, at)]))
    value = T.Cast("float32", kv[(*row, at)])
    if kv_dtype != "int8":
        return value
    return value * scale(kv, head_dim, row, slot)


def scale(kv: Any, head_dim: int, row: tuple[Any, Any, Any], slot: Any) -> Any:
    """float32 scale of a slot of an int8 row."""
    at = scale_at(head_dim, slot)
    low, high = (T.Cast("uint16", T.Cast("uint8", kv[(*row, at + byte)])) for byte in (0, 1))
    return bf16.widened(T.bitwise_or(low, T.shift_left(high, T.uint16(8))))


def stored(value: Any, kv_dtype: str) -> Any:
    """A float32 expression as the cache's type, saturated; not for int8."""
    if kv_dtype == "float32":
        return value
    if kv_dtype == "float16":
        value = T.max(T.min(value, T.float32(F16_MAX)), T.float32(-F16_MAX))
    return T.Cast(kv_dtype, value)


def scale_bits(peak: Any) -> Any:
    """Bits, u16, of the scale of a head whose largest magnitude is `peak`, float32."""
    bits = T.reinterpret("uint32", peak * T.float32(1 / I8_MAX))
    return T.Cast("uint16", T.shift_right(bits + T.uint32(0xFFFF), T.uint32(16)))


def scale_byte(bits: Any, byte: Any) -> Any:
    """Byte 0 or 1 of the bits of a scale, as the cache's int8."""
    shift = T.Cast("uint16", byte * 8)
    return T.Cast("int8", T.bitwise_and(T.shift_right(bits, shift), T.uint16(0xFF)))


def quantized(value: Any, scale: Any) -> Any:
    """A float32 expression as int8, by a scale that may be zero or beyond all bounds."""
    steps = T.if_then_else(scale > T.float32(1e-30), value / scale, T.float32(0))
    half = T.Select(steps < T.float32(0), T.float32(-0.5), T.float32(0.5))
    limit = T.float32(I8_MAX)
    return T.Cast("int8", T.max(T.min(steps + half, limit), -limit))


# -- the same on arrays, for references and cases --------------------------------------------------


def _indices(kv_dtype: str, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """[D, 16] and [16, D]: where a row's keys are, and its values."""
    d, slot = np.arange(head_dim), np.arange(PAGE_TOKENS)
    keys = key_at(kv_dtype, d[:, None], slot[None])
    return keys, value_at(kv_dtype, head_dim, d[None], slot[:, None])


def slot_elements(head_dim: int, kv_dtype: str, slot: int) -> tuple[np.ndarray, np.ndarray]:
    """Where a row's elements of one slot are: of a key, of a value."""
    keys, values = (
        index[..., slot]
        for index in (_indices(kv_dtype, head_dim)[0], _indices(kv_dtype, head_dim)[1].T)
    )
    if kv_dtype == "int8":
        scale = scale_at(head_dim, slot) + np.arange(2)
        keys, values = np.append(keys, scale), np.append(values, scale)
    return keys, values


def random_cache(
    rng: np.random.Generator, pages: int, kv_heads: int, head_dim: int, kv_dtype: str
) -> np.ndarray:
    """A cache of normal numbers."""
    keys, values = rng.standard_normal((2, kv_heads, pages, head_dim, PAGE_TOKENS))
    return packed(keys, values.swapaxes(2, 3), kv_dtype)


def _scales(kv: np.ndarray, head_dim: int) -> np.ndarray:
    """float64 [2, Hkv, pages, 16] of an int8 cache."""
    begin = int(scale_at(head_dim, 0))
    bits = np.ascontiguousarray(kv[..., begin : begin + 2 * PAGE_TOKENS])
    return bits.view(ml_dtypes.bfloat16).astype(np.float64)


def unpacked(kv: np.ndarray, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """float64 keys [Hkv, pages, D, 16] and values [Hkv, pages, 16, D] of a cache."""
    key_index, value_index = _indices(kv.dtype.name, head_dim)
    keys = kv[0][..., key_index].astype(np.float64)
    values = kv[1][..., value_index].astype(np.float64)
    if kv.dtype == np.int8:
        scales = _scales(kv, head_dim)
        keys, values = keys * scales[0, :, :, None], values * scales[1, ..., None]
    return keys, values


def packed(keys: np.ndarray, values: np.ndarray, kv_dtype: str) -> np.ndarray:
    """The cache of keys [Hkv, pages, D, 16] and values [Hkv, pages, 16, D], float.

    NaN in int8: the scale of its slot is NaN.
    """
    kv_heads, pages, head_dim, _ = keys.shape
    key_index, value_index = _indices(kv_dtype, head_dim)
    kv = np.zeros(kv_shape(pages, kv_heads, head_dim, kv_dtype), kv_dtype)
    if kv_dtype != "int8":
        if kv_dtype == "float16":
            keys, values = (np.clip(part, -F16_MAX, F16_MAX) for part in (keys, values))
        kv[0][..., key_index], kv[1][..., value_index] = keys, values
        return kv
    begin = int(scale_at(head_dim, 0))
    for part, (x, index, axis) in enumerate(((keys, key_index, 2), (values, value_index, 3))):
        peak = np.abs(x).max(axis=axis).astype(np.float32) * np.float32(1 / I8_MAX)
        bits = ((peak.view(np.uint32).astype(np.uint64) + 0xFFFF) >> 16).astype(np.uint16)
        bits = np.where(np.isnan(peak), np.uint16(0x7FC0), bits)
        scale = np.expand_dims(bits.view(ml_dtypes.bfloat16).astype(np.float32), axis)
        with np.errstate(divide="ignore", invalid="ignore"):
            steps = np.where(scale > 1e-30, x.astype(np.float32) / scale, np.float32(0))
        whole = np.trunc(np.clip(steps + np.copysign(0.5, steps), -I8_MAX, I8_MAX))
        kv[part][..., index] = np.nan_to_num(whole).astype(np.int8)
        kv[part, ..., begin : begin + 2 * PAGE_TOKENS] = bits.view(np.int8)
    return kv


def paged_layout(
    rng: np.random.Generator, ranges: list[tuple[int, int]]
) -> tuple[np.ndarray, np.ndarray, int]:
    """(page_table, first_page, pages) for sequences that hold positions [begin, end).

    Physical pages are shuffled, and one in the pool belongs to nobody; the table's unused
    entries point at it.
    """
    first = [begin // PAGE_TOKENS for begin, _ in ranges]
    counts = [(end - 1) // PAGE_TOKENS + 1 - f for f, (_, end) in zip(first, ranges, strict=True)]
    pages = sum(counts) + 1
    order = iter(rng.permutation(pages))
    spare = next(order)
    table = np.full((len(ranges), max(counts)), spare, np.int32)
    for row, count in enumerate(counts):
        table[row, :count] = [next(order) for _ in range(count)]
    return table, np.array(first, np.int32), pages
