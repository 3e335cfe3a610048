"""Dot products of pairs of bfloat16 on CPUs: x86 has an instruction for them, AVX512_BF16.

A word is two neighbours as 32 bits, the first one low. TVM widens vectors of bfloat16 to float32
before LLVM sees them: here they are integers, and the instruction is reached through a function in
LLVM's own language, which LLVM inlines. Without it, a word is taken apart and multiplied in
float32. The results differ in the last bits, and in denormals, which the instruction takes for 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from ..kernel import TileConfig, cpu
from . import isa as isas
from .vectors import LANES

_NAME = "mxforge_dot_pairs"
_VPDPBF16PS = f"""\
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
define private <16 x float> @{_NAME}(<16 x float> %sum, <16 x i32> %a, <16 x i32> %b)
    alwaysinline {{
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(
    <16 x float> %sum, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %r
}}
"""


@dataclass(frozen=True)
class PairTile(TileConfig):
    tokens: int  # tokens that share a weight in registers
    rows: int  # at a time, of a group that has more; the rest waits for another pass over x

    def rows_beside(self, tokens: int, group: int) -> int:
        """Rows of a group at a time where the tokens are fewer: no more sums in all."""
        return min(group, self.rows * (self.tokens // tokens))


@dataclass(frozen=True, eq=False)
class PairIsa:
    """One instruction set for products of pairs.

    `multiplies`: it has the instruction. `permutes`: it looks 16-bit values up in a register.
    """

    name: str
    needs: frozenset[str]  # of the target's features; see `kernel.Schedule`
    tile: PairTile
    multiplies: bool = False
    permutes: bool = False


# As many sums as leave registers for operands: AVX2 and SSE have 16, the others 32. On EPYC
# (Zen 4, 2 cores), 2026-11, 6 tokens, or 8 by 32 rows, were within noise of the first line.
_TILES = {
    isas.AVX512_VNNI: PairTile(tokens=4, rows=64),
    isas.AVX512: PairTile(tokens=4, rows=64),
    isas.AVX2: PairTile(tokens=4, rows=16),
    isas.SSSE3: PairTile(tokens=2, rows=16),
    isas.NEON_I8MM: PairTile(tokens=4, rows=16),
    isas.NEON_DOTPROD: PairTile(tokens=4, rows=16),
    isas.NEON: PairTile(tokens=4, rows=16),
    isas.PLAIN: PairTile(tokens=2, rows=16),
}

# Best first.
PAIR_ISAS = (
    PairIsa(
        "AVX-512 BF16",
        cpu("avx512bf16", "avx512bw"),
        PairTile(tokens=4, rows=64),
        multiplies=True,
        permutes=True,
    ),
    *(
        PairIsa(isa.name, isa.needs, _TILES[isa], permutes="avx512bw" in isa.needs)
        for isa in isas.ISAS
    ),
)


def imported(isa: PairIsa) -> Any:
    """The scope, around all of a PrimFunc's body, in which `dot_pairs` may be called."""
    text = _VPDPBF16PS if isa.multiplies else ""
    return T.attr(T.int32(0), "pragma_import_llvm", text)


def dot_pairs(isa: PairIsa, sums: Any, words: Any, word: Any, lanes: int = LANES) -> Any:
    """f32 sums, each more by both products of its i32 word with the i32 scalar `word`."""
    if isa.multiplies and lanes == LANES:
        return T.call_pure_extern("float32x16", _NAME, sums, words, T.broadcast(word, LANES))
    for half in (first_of, second_of):
        sums = sums + half(words, lanes) * T.broadcast(half(word), lanes)
    return sums


def first_of(words: Any, lanes: int = 1) -> Any:
    """f32, the low halves of i32 words."""
    return T.reinterpret(_f32(lanes), T.shift_left(words, _i32(16, lanes)))


def second_of(words: Any, lanes: int = 1) -> Any:
    """f32, the high halves of i32 words."""
    return T.reinterpret(_f32(lanes), T.bitwise_and(words, _i32(-65536, lanes)))


def word_at(buffer: Any, *at: Any) -> Any:
    """The i32 word of u16 buffer[..., start : start + 2], where `start` is the last of `at`."""
    *leading, start = at
    return T.reinterpret("int32", buffer[(*leading, T.ramp(start, 1, 2))])


def _f32(lanes: int) -> str:
    return "float32" if lanes == 1 else f"float32x{lanes}"


def _i32(value: int, lanes: int) -> Any:
    return T.int32(value) if lanes == 1 else T.broadcast(T.int32(value), lanes)
