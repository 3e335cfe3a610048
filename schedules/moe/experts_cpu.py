"""The walk over experts that both halves share on CPUs, and its products by activation format."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..cpu import isa as isas
from ..cpu.bf16 import PAIR_ISAS, PairIsa, PairTile, imported
from ..cpu.int8 import GROUP, Int8Tile, dot_i8
from ..cpu.isa import Isa
from ..cpu.mxfp4 import PAIRS, QUADS, Places, dot_bf16, dot_f32, int8_weights
from ..cpu.vectors import LANES, in_tiles, sizes
from ..kernel import T, TileConfig, cpu


@dataclass(frozen=True)
class MoeTile(TileConfig):
    tokens: int  # tokens of one expert that share an unpacked weight


@dataclass(frozen=True)
class ExpertDot:
    """A tile's product of k inputs, what it holds besides its sums, and what it calls."""

    tile: MoeTile | PairTile | Int8Tile
    dot: Any
    part: tuple[int, str]
    value: tuple[int, str]
    imported: Callable[[], Any] = nullcontext


@dataclass(frozen=True)
class Product:
    """One way to multiply a group of 32 rows: what a schedule of either half is made of.

    places: which inputs share a word of the packed weight, None for bytes (cpu/mxfp4.py)
    dot(k, tile) -> ExpertDot
    """

    name: str
    needs: frozenset[str]
    tile: MoeTile | PairTile | Int8Tile
    places: Places | None
    dot: Callable[[int, Any], ExpertDot]


def _f32(k: int, tile: MoeTile) -> ExpertDot:
    return ExpertDot(
        tile, dot_f32(k), part=(tile.tokens * GROUP, "float32"), value=(LANES, "float32")
    )


def _bf16(isa: PairIsa, k: int, tile: PairTile) -> ExpertDot:
    return ExpertDot(
        tile,
        dot_bf16(isa, k, tile),
        part=(tile.tokens * GROUP, "float32"),
        value=(LANES, "int32"),
        imported=partial(imported, isa),
    )


def _i8(isa: Isa, k: int, tile: Int8Tile) -> ExpertDot:
    return ExpertDot(
        tile,
        dot_i8(isa, k, tile, int8_weights(isa)),
        part=(tile.tokens * tile.rows, "int32"),
        value=(4 * isa.lanes, "uint8"),
    )


# AVX2 and SSSE3 have 16 registers, the others 32.
_I8_TILES = {
    isas.AVX512_VNNI: Int8Tile(tokens=4, rows=32),
    isas.AVX512: Int8Tile(tokens=4, rows=32),
    isas.AVX2: Int8Tile(tokens=2, rows=16),
    isas.SSSE3: Int8Tile(tokens=2, rows=8),
    isas.NEON_I8MM: Int8Tile(tokens=4, rows=16),
    isas.NEON_DOTPROD: Int8Tile(tokens=2, rows=16),
    isas.NEON: Int8Tile(tokens=2, rows=16),
    isas.PLAIN: Int8Tile(tokens=1, rows=4),
}

# By activation format, best first.
PRODUCTS: dict[str, tuple[Product, ...]] = {
    # 32 vector registers: 2 sums and 2 partial sums a token, the rest unpacks.
    "f32": (Product("rows interleaved", cpu(), MoeTile(tokens=4), None, _f32),),
    "bf16": tuple(
        Product(f"rows interleaved, {isa.name}", isa.needs, isa.tile, PAIRS, partial(_bf16, isa))
        for isa in PAIR_ISAS
    ),
    "i8": tuple(
        Product(
            f"rows interleaved, {isa.name}", isa.needs, _I8_TILES[isa], QUADS, partial(_i8, isa)
        )
        for isa in isas.ISAS
    ),
}


def expert_walk(
    product: ExpertDot,
    *,
    k: int,
    experts: int,
    groups: int,
    row_of: Callable[[Any], Any],
    begin: Any,
    store: Any,
) -> Any:
    """The CPU schedule of both halves: expert after expert, a work item being 32 rows of one.

    All threads are launched once. Each takes the same part of the rows in `begin` and in every
    expert, without waiting for the others in between, and so reads one stream of weights an
    expert: streams as short as an item keep the memory waiting. An item walks the expert's slots
    in tiles, so that a weight is read once however many tokens share it.

    Returns the T.inline `walk(x, offsets, order, blocks, scales, out, operands)` with
    x as the product takes it. The kernel says what differs:

      row_of(slot)                              the row of x that a slot multiplies
      begin(group, out, operands)               T.inline, before the first expert
      store(acc, t, slot, expert, group, out, operands)
                                                T.inline: acc[32·t : 32·t + 32] is the product
    """
    tile, dot = product.tile, product.dot
    part_size, part_dtype = product.part
    value_size, value_dtype = product.value

    @T.inline
    def tokens_tile(
        start, tokens, acc, part, value, slot, row, x, order, w, s, expert, group, out, operands
    ):
        for t in T.unroll(tokens):
            slot[t] = order[start + t]
            row[t] = row_of(slot[t])
        dot(acc, part, value, row, tokens, x, w, s, (expert, group))
        for t in T.unroll(tokens):
            store(acc, t, slot[t], expert, group, out, operands)

    # Batches give experts few tokens: those left over share a read too, where they are two.
    tiles = in_tiles(sizes(tile.tokens, 2), tokens_tile)

    @T.inline
    def begin_all(out, operands):
        for gi in T.parallel(groups):
            with T.sblock("begin"):
                group = T.axis.spatial(groups, gi)
                begin(group, out, operands)

    @T.inline
    def items(x, offsets, order, w, s, out, operands):
        for e in T.serial(experts):
            for gi in T.parallel(groups):
                with T.sblock("item"):
                    expert = T.axis.opaque(experts, e)
                    group = T.axis.spatial(groups, gi)
                    # Stated, as detection gives up on vector loads; nothing schedules further.
                    T.reads(x[0][0 : x[0].shape[0], 0:k])
                    T.writes(out[0 : out.shape[0], 0 : out.shape[1]])
                    # In the default scope, which LLVM keeps in registers; `local` is the heap.
                    acc = T.sblock_alloc_buffer((tile.tokens * GROUP,), "float32")
                    part = T.sblock_alloc_buffer((part_size,), part_dtype)
                    value = T.sblock_alloc_buffer((value_size,), value_dtype)
                    slot = T.sblock_alloc_buffer((tile.tokens,), "int32")
                    row = T.sblock_alloc_buffer((tile.tokens,), "int32")
                    tiles(
                        offsets[expert], offsets[expert + 1] - offsets[expert],
                        (acc, part, value, slot, row, x, order, w, s, expert, group, out, operands),
                    )  # fmt: skip

    def one_launch() -> Any:
        """All loops in parallel inside are launched together, split alike, without a barrier."""
        if groups == 1:  # such loops do not stay, and TVM refuses a launch without any
            return nullcontext()
        return T.attr(T.int32(0), "pragma_parallel_launch_point", T.int32(1))

    @T.inline
    def walk(x, offsets, order, w, s, out, operands):
        with product.imported(), one_launch():
            begin_all(out, operands)
            items(x, offsets, order, w, s, out, operands)

    return walk
