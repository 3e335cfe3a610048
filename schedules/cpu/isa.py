"""CPU instruction sets as a table: what the 8-bit kernels are written with.

Their inner step adds, to each 32-bit lane of a register, four products of neighbouring bytes:
weights times 8-bit activations. Sets differ in the width of a register, in whether the weights
have a sign, and in how a table of 16 bytes is looked up. Where weights have none, a bias is added
to them, and `bias·Σq` is taken off the sum.

Weights are packed alike for all sets, so that one file of weights serves them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from tvm.script import tirx as T

from ..kernel import cpu

Dot4 = Callable[[Any, Any, Any], Any]

NIBBLE_BIAS = 12  # makes doubled e2m1 values, -12 to 12, unsigned
BYTE_BIAS = 128


@dataclass(frozen=True, eq=False)
class Isa:
    """One instruction set.

    A register has `lanes` lanes of 32 bits. Operands of the products are u8 and i8 registers of
    4·lanes bytes, of activations -127 to 127:

      dot_values(sum, weights, x)   weights: doubled e2m1 values, plus `value_bias`
      dot_bytes(sum, weights, x)    weights: the bits of i8 -127 to 127, taken as `byte_bias` more
      value_of(nibbles)             u8 register of bytes below 16 -> of doubled e2m1 values, biased

    Where products of 2×8 by 8×2 matrices are one instruction, of unbiased weights, `dot_pairs`
    multiplies eight inputs of two rows by those of two tokens; see `zipped`, `eight`, `unzipped`.
    """

    name: str
    needs: frozenset[str]  # of the target's features; see `kernel.Schedule`
    lanes: int
    dot_values: Dot4
    dot_bytes: Dot4
    value_of: Callable[[Any], Any]
    value_bias: int = 0
    byte_bias: int = 0
    dot_pairs: Dot4 | None = None


def four(x: Any, row: Any, start: Any, lanes: int) -> Any:
    """Four neighbouring i8 activations, x[row, start : start + 4], in every lane."""
    word = T.reinterpret("int32", x[row, T.ramp(start, 1, 4)])
    return T.reinterpret(f"int8x{4 * lanes}", T.broadcast(word, lanes))


# What `dot_pairs` takes and gives, on four lanes.


def zipped(half: int, first: Any, second: Any) -> Any:
    """Eight inputs of two rows out of two operands of four inputs of four: the rows 2·half and
    2·half + 1."""
    words = [T.reinterpret("int32x4", operand) for operand in (first, second)]
    lanes = [2 * half, 2 * half + 4, 2 * half + 1, 2 * half + 5]
    return T.reinterpret("uint8x16", T.Shuffle(words, lanes))


def eight(x: Any, rows: tuple[Any, Any], start: Any) -> Any:
    """Eight neighbouring i8 activations of each of two tokens."""
    return T.Shuffle([x[row, T.ramp(start, 1, 8)] for row in rows], list(range(16)))


def unzipped(token: int, first: Any, second: Any) -> Any:
    """One of two tokens' sums of four rows, out of the sums of two rows with both, twice."""
    return T.Shuffle([first, second], [token, token + 2, token + 4, token + 6])


def _llvm(dtype: str, name: str, *arguments: Any) -> Any:
    return T.call_llvm_pure_intrin(dtype, f"llvm.{name}", *arguments)


def _signed(weights: Any, lanes: int) -> Any:
    return T.reinterpret(f"int8x{4 * lanes}", weights)


def _unsigned(weights: Any, lanes: int) -> Any:
    return T.reinterpret(f"uint8x{4 * lanes}", weights)


def _table(lanes: int, bias: int) -> Any:
    """The 16 doubled e2m1 values and a bias, in every 128 bits of a register."""
    magnitudes = (0, 1, 2, 3, 4, 6, 8, 12)
    entries = bytes((v + bias) % 256 for v in (*magnitudes, *(-m for m in magnitudes)))
    halves = [int.from_bytes(entries[i : i + 8], "little", signed=True) for i in (0, 8)]
    count = lanes // 2
    odd = T.bitwise_and(T.ramp(T.int32(0), 1, count), T.broadcast(T.int32(1), count))
    low, high = (T.broadcast(T.int64(half), count) for half in halves)
    return T.reinterpret(
        f"uint8x{4 * lanes}", T.Select(odd == T.broadcast(T.int32(0), count), low, high)
    )


def _lookup(intrinsic: str, lanes: int, bias: int, nibbles: Any) -> Any:
    return _llvm(f"uint8x{4 * lanes}", intrinsic, _table(lanes, bias), nibbles)


# x86: dpbusd adds u8·i8 products; before there was that, maddubs adds two neighbours as saturated
# 16 bits, which magnitudes up to 127 do not reach, and madd with ones adds two of these.


def _dpbusd(sum_: Any, weights: Any, x: Any) -> Any:
    return _llvm("int32x16", "x86.avx512.vpdpbusd.512", sum_, weights, x)


def _dpbusd_bytes(sum_: Any, weights: Any, x: Any) -> Any:
    return _dpbusd(sum_, T.bitwise_xor(weights, T.broadcast(T.uint8(BYTE_BIAS), 64)), x)


def _madd(maddubs: str, madd: str, lanes: int, sum_: Any, weights: Any, x: Any) -> Any:
    pairs = _llvm(f"int16x{2 * lanes}", maddubs, weights, x)
    return sum_ + _llvm(f"int32x{lanes}", madd, pairs, T.broadcast(T.int16(1), 2 * lanes))


def _madd_sign(
    sign: str, maddubs: str, madd: str, lanes: int, sum_: Any, weights: Any, x: Any
) -> Any:
    """|w| · (x with the sign of w)."""
    weights = _signed(weights, lanes)
    magnitude = _llvm(f"int8x{4 * lanes}", sign, weights, weights)
    x = _llvm(f"int8x{4 * lanes}", sign, x, weights)
    return _madd(maddubs, madd, lanes, sum_, _unsigned(magnitude, lanes), x)


def _madd_512(sum_: Any, weights: Any, x: Any) -> Any:
    """The same, where there is no sign instruction."""
    weights, zero = _signed(weights, 16), T.broadcast(T.int8(0), 64)
    negative = weights < zero
    magnitude = T.Select(negative, zero - weights, weights)
    x = T.Select(negative, zero - x, x)
    return _MADD_512(sum_, _unsigned(magnitude, 16), x)


_MADD_512 = partial(_madd, "x86.avx512.pmaddubs.w.512", "x86.avx512.pmaddw.d.512", 16)
_AVX2_PRODUCTS = ("x86.avx2.pmadd.ub.sw", "x86.avx2.pmadd.wd", 8)
_SSSE3_PRODUCTS = ("x86.ssse3.pmadd.ub.sw.128", "x86.sse2.pmadd.wd", 4)


# aarch64: sdot adds i8·i8 products; before there was that, products of 16 bits are added in pairs.
# smmla adds twice as many as sdot, of two rows and two tokens.


def _sdot(sum_: Any, weights: Any, x: Any) -> Any:
    return _llvm("int32x4", "aarch64.neon.sdot.v4i32.v16i8", sum_, _signed(weights, 4), x)


def _smmla(sums: Any, weights: Any, x: Any) -> Any:
    return _llvm("int32x4", "aarch64.neon.smmla.v4i32.v16i8", sums, _signed(weights, 4), x)


def _smull(sum_: Any, weights: Any, x: Any) -> Any:
    products = T.Cast("int16x16", _signed(weights, 4)) * T.Cast("int16x16", x)
    pairs = [
        _llvm("int32x4", "aarch64.neon.saddlp.v4i32.v8i16", half("int16x8", products))
        for half in (T.vectorlow, T.vectorhigh)
    ]
    return sum_ + _llvm("int32x4", "aarch64.neon.addp.v4i32", *pairs)


# Any CPU: byte j of every lane, moved to the top and back with its sign.


def _plain_dot(sum_: Any, weights: Any, x: Any) -> Any:
    weights, x = (T.reinterpret("int32x4", operand) for operand in (weights, x))
    for shift in (24, 16, 8, 0):
        up, down = T.broadcast(T.int32(shift), 4), T.broadcast(T.int32(24), 4)
        bytes_ = [T.shift_right(T.shift_left(operand, up), down) for operand in (weights, x)]
        sum_ = sum_ + bytes_[0] * bytes_[1]
    return sum_


def _plain_value(nibbles: Any) -> Any:
    """0 to 4 stand for themselves, 5 for 6, 6 for 8, 7 for 12; the fourth bit is the sign."""

    def every(value: int) -> Any:
        return T.broadcast(T.uint8(value), 16)

    code = T.bitwise_and(nibbles, every(7))
    value = code
    for special, more in ((5, 1), (6, 2), (7, 5)):
        value = value + T.Select(code == every(special), every(more), every(0))
    return T.Select(nibbles > every(7), every(0) - value, value)


AVX512_VNNI = Isa(
    "AVX-512 VNNI",
    cpu("avx512bw", "avx512vnni"),
    lanes=16,
    dot_values=_dpbusd,
    dot_bytes=_dpbusd_bytes,
    value_of=partial(_lookup, "x86.avx512.pshuf.b.512", 16, NIBBLE_BIAS),
    value_bias=NIBBLE_BIAS,
    byte_bias=BYTE_BIAS,
)
AVX512 = Isa(
    "AVX-512",
    cpu("avx512bw"),
    lanes=16,
    dot_values=_MADD_512,
    dot_bytes=_madd_512,
    value_of=partial(_lookup, "x86.avx512.pshuf.b.512", 16, NIBBLE_BIAS),
    value_bias=NIBBLE_BIAS,
)
AVX2 = Isa(
    "AVX2",
    cpu("avx2"),
    lanes=8,
    dot_values=partial(_madd, *_AVX2_PRODUCTS),
    dot_bytes=partial(_madd_sign, "x86.avx2.psign.b", *_AVX2_PRODUCTS),
    value_of=partial(_lookup, "x86.avx2.pshuf.b", 8, NIBBLE_BIAS),
    value_bias=NIBBLE_BIAS,
)
SSSE3 = Isa(
    "SSSE3",
    cpu("ssse3"),
    lanes=4,
    dot_values=partial(_madd, *_SSSE3_PRODUCTS),
    dot_bytes=partial(_madd_sign, "x86.ssse3.psign.b.128", *_SSSE3_PRODUCTS),
    value_of=partial(_lookup, "x86.ssse3.pshuf.b.128", 4, NIBBLE_BIAS),
    value_bias=NIBBLE_BIAS,
)
# For every 4 rows, 8 inputs and 4 tokens: 2 zips and 4 smmla, where sdot takes 8. One token
# alone takes sdot. Counted, not measured: no such CPU was at hand.
NEON_I8MM = Isa(
    "NEON i8mm",
    cpu("neon", "dotprod", "i8mm"),
    lanes=4,
    dot_values=_sdot,
    dot_bytes=_sdot,
    value_of=partial(_lookup, "aarch64.neon.tbl1.v16i8", 4, 0),
    dot_pairs=_smmla,
)
NEON_DOTPROD = Isa(
    "NEON dotprod",
    cpu("neon", "dotprod"),
    lanes=4,
    dot_values=_sdot,
    dot_bytes=_sdot,
    value_of=partial(_lookup, "aarch64.neon.tbl1.v16i8", 4, 0),
)
NEON = Isa(
    "NEON",
    cpu("neon"),
    lanes=4,
    dot_values=_smull,
    dot_bytes=_smull,
    value_of=partial(_lookup, "aarch64.neon.tbl1.v16i8", 4, 0),
)
PLAIN = Isa(
    "plain", cpu(), lanes=4, dot_values=_plain_dot, dot_bytes=_plain_dot, value_of=_plain_value
)

# Best first.
ISAS = (AVX512_VNNI, AVX512, AVX2, SSSE3, NEON_I8MM, NEON_DOTPROD, NEON, PLAIN)
