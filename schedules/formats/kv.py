"""Formats of the paged cache of keys and values: where an element lies, and how it is kept.

A page holds 16 positions of one layer, for every KV head a row of keys and a row of values:

    kv [2, Hkv, pages, row]: keys at [0], values at [1]

A head is read by itself, its keys before its values: of pages that follow each other, as those of a
sequence mostly do, either is one stream of memory.

Attention sums products of keys over d, and of values over slots. p neighbours in that direction
lie side by side, as many as fill the 32 bits that a dot product takes: 16 slots of a
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

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from mxforge.kv_layout import KV_BYTES, PAGE_TOKENS, row_elements

from ..kernel import Size, T, Tensor
from ..math import add_half
from . import bf16
from .blocks import TINY
from .table import FormatTable

F16_MAX = 65504.0
I8_MAX = 127


@dataclass(frozen=True, eq=False)
class KVFormat:
    """How a layer's keys and values are kept.

    name: the cache's dtype
    word: p above
    load_element(element) -> float32, and store(float32, scale) -> element: expressions, in
        TensorIR; the scale is None where there is none
    scaled: each head of a position has a scale, and elements are multiples of it
    largest: numbers beyond it are kept as it
    attention_tolerance, insert_tolerance: ‖error‖ / ‖result‖ that rounding to it costs the kernels
    """

    name: str
    option: str
    word: int
    load_element: Callable[[Any], Any]
    store: Callable[[Any, Any], Any]
    attention_tolerance: float
    insert_tolerance: float
    scaled: bool = False
    largest: float | None = None

    @property
    def element_bytes(self) -> int:
        return KV_BYTES[self.name]

    def shape(self, pages: Any, kv_heads: int, head_dim: int) -> tuple[int, int, Any, int]:
        """Shape of one layer's cache of `pages` pages."""
        return (2, kv_heads, pages, row_elements(head_dim, self.name))

    def tensor(self, name: str, kv_heads: int, head_dim: int) -> Tensor:
        """The argument that holds one layer's cache."""
        return Tensor(name, self.shape(Size("pages"), kv_heads, head_dim), self.name)

    def key_at(self, d: Any, slot: Any) -> Any:
        """Where element d of the key of `slot` is in its row; integers, arrays, expressions."""
        p = self.word
        return d // p * (PAGE_TOKENS * p) + slot * p + d % p

    def value_at(self, head_dim: int, d: Any, slot: Any) -> Any:
        """Where element d of the value of `slot` is in its row."""
        p = self.word
        return slot // p * (head_dim * p) + d * p + slot % p

    def load(self, kv: Any, head_dim: int, row: tuple[Any, Any, Any], at: Any, slot: Any) -> Any:
        """float32 element `at` of a row, (0 or 1, KV head, page), which belongs to `slot`."""
        value = self.load_element(kv[(*row, at)])
        return value * scale(kv, head_dim, row, slot) if self.scaled else value

    # -- the same on arrays, for references and cases ----------------------------------------------

    def _indices(self, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
        """[D, 16] and [16, D]: where a row's keys are, and its values."""
        d, slot = np.arange(head_dim), np.arange(PAGE_TOKENS)
        keys = self.key_at(d[:, None], slot[None])
        return keys, self.value_at(head_dim, d[None], slot[:, None])

    def slot_elements(self, head_dim: int, slot: int) -> tuple[np.ndarray, np.ndarray]:
        """Where a row's elements of one slot are: of a key, of a value."""
        key_index, value_index = self._indices(head_dim)
        keys, values = key_index[:, slot], value_index[slot]
        if self.scaled:
            places = scale_at(head_dim, slot) + np.arange(2)
            keys, values = np.append(keys, places), np.append(values, places)
        return keys, values

    def random_cache(
        self, rng: np.random.Generator, pages: int, kv_heads: int, head_dim: int
    ) -> np.ndarray:
        """A cache of normal numbers."""
        keys, values = rng.standard_normal((2, kv_heads, pages, head_dim, PAGE_TOKENS))
        return self.packed(keys, values.swapaxes(2, 3))

    def unpacked(self, kv: np.ndarray, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
        """float64 keys [Hkv, pages, D, 16] and values [Hkv, pages, 16, D] of a cache."""
        key_index, value_index = self._indices(head_dim)
        keys = kv[0][..., key_index].astype(np.float64)
        values = kv[1][..., value_index].astype(np.float64)
        if self.scaled:
            scales = _scales(kv, head_dim)
            keys, values = keys * scales[0, :, :, None], values * scales[1, ..., None]
        return keys, values

    def packed(self, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
        """The cache of keys [Hkv, pages, D, 16] and values [Hkv, pages, 16, D], float.

        NaN where there are scales: the scale of its slot is NaN.
        """
        kv_heads, pages, head_dim, _ = keys.shape
        indices = self._indices(head_dim)
        kv = np.zeros(self.shape(pages, kv_heads, head_dim), self.name)
        if not self.scaled:
            for part, x, index in zip(kv, (keys, values), indices, strict=True):
                clipped = x if self.largest is None else np.clip(x, -self.largest, self.largest)
                part[..., index] = clipped
            return kv
        begin = int(scale_at(head_dim, 0))
        for part, x, index, axis in zip(kv, (keys, values), indices, (2, 3), strict=True):
            peak = np.abs(x).max(axis=axis).astype(np.float32) * np.float32(1 / I8_MAX)
            bits = ((peak.view(np.uint32).astype(np.uint64) + 0xFFFF) >> 16).astype(np.uint16)
            bits = np.where(np.isnan(peak), np.uint16(0x7FC0), bits)
            wide = np.expand_dims(bits.view(ml_dtypes.bfloat16).astype(np.float32), axis)
            with np.errstate(divide="ignore", invalid="ignore"):
                multiples = np.where(wide > TINY, x.astype(np.float32) / wide, np.float32(0))
            whole = np.trunc(np.clip(multiples + np.copysign(0.5, multiples), -I8_MAX, I8_MAX))
            part[..., index] = np.nan_to_num(whole).astype(np.int8)
            part[..., begin : begin + 2 * PAGE_TOKENS] = bits.view(np.int8)
        return kv


def scale_at(head_dim: int, slot: Any) -> Any:
    """Where the scale of `slot` begins, in a row of int8."""
    return row_elements(head_dim, "int8") - 4 * PAGE_TOKENS + 2 * slot


def scale(kv: Any, head_dim: int, row: tuple[Any, Any, Any], slot: Any) -> Any:
    """float32 scale of a slot of an int8 row."""
    at = scale_at(head_dim, slot)
    low, high = (T.Cast("uint16", T.Cast("uint8", kv[(*row, at + byte)])) for byte in (0, 1))
    return bf16.widened(T.bitwise_or(low, T.shift_left(high, T.uint16(8))))


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
    multiples = T.if_then_else(scale > T.float32(TINY), value / scale, T.float32(0))
    limit = T.float32(I8_MAX)
    return T.Cast("int8", T.max(T.min(add_half(multiples), limit), -limit))


def _scales(kv: np.ndarray, head_dim: int) -> np.ndarray:
    """float64 [2, Hkv, pages, 16] of an int8 cache."""
    begin = int(scale_at(head_dim, 0))
    bits = np.ascontiguousarray(kv[..., begin : begin + 2 * PAGE_TOKENS])
    return bits.view(ml_dtypes.bfloat16).astype(np.float64)


def _bf16(element: Any) -> Any:
    # A cast would be bound to a name, and TVM 0.27 then casts the bits.
    return bf16.widened(T.reinterpret("uint16", element))


def _f16(value: Any, _scale: Any) -> Any:
    """Saturated."""
    return T.Cast("float16", T.max(T.min(value, T.float32(F16_MAX)), T.float32(-F16_MAX)))


def _widened(element: Any) -> Any:
    return T.Cast("float32", element)


KV: FormatTable[KVFormat] = FormatTable("KV cache")

F32 = KV.add(
    KVFormat(
        "float32", "f32", 1, _widened, lambda value, _scale: value,
        attention_tolerance=1e-5, insert_tolerance=1e-6,
    )
)  # fmt: skip
F16 = KV.add(
    KVFormat(
        "float16", "f16", 1, _widened, _f16,
        attention_tolerance=1e-5, insert_tolerance=5e-4, largest=F16_MAX,
    )
)  # fmt: skip
BF16 = KV.add(
    KVFormat(
        "bfloat16", "bf16", 2, _bf16, lambda value, _scale: T.Cast("bfloat16", value),
        attention_tolerance=4e-3, insert_tolerance=4e-3,
    )
)  # fmt: skip
# Inserted: a rounding that falls the other way now and then.
INT8 = KV.add(
    KVFormat(
        "int8", "int8", 4, _widened, quantized,
        attention_tolerance=1.5e-2, insert_tolerance=2e-3, scaled=True,
    )
)  # fmt: skip
