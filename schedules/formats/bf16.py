"""bfloat16 as bits: TVM widens vectors of bfloat16 to float32, so kernels hold it as integers."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T


def rounded(value: Any) -> Any:
    """The bits, u16, of a float32 expression rounded to the nearest bfloat16, ties to even."""
    bits = T.reinterpret("uint32", value)
    odd = T.bitwise_and(T.shift_right(bits, T.uint32(16)), T.uint32(1))
    return T.Cast("uint16", T.shift_right(bits + T.uint32(0x7FFF) + odd, T.uint32(16)))


def widened(bits: Any) -> Any:
    """float32 of u16 bits."""
    return T.reinterpret("float32", T.shift_left(T.Cast("uint32", bits), T.uint32(16)))
