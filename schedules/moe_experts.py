"""What the two expert kernels share: the tile table, the CPU's walk over experts, case data."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from . import bf16
from .int8 import BLOCK, GROUP, Int8Tile, dot_i8
from .isa import isa_of
from .kernel import Case, T, Target, TileConfig, parameter
from .mxfp4 import LANES, Activations, dot_bf16, dot_f32, int8_weights
from .quantize import dequantize, quantize_ref
from .round_bf16 import round_ref
from .vectors import in_tiles, sizes


@dataclass(frozen=True)
class MoeTile(TileConfig):
    tokens: int  # tokens of one expert that share an unpacked weight


# 32 vector registers: 2 sums and 2 partial sums a token, the rest unpacks.
F32_TILE = MoeTile(tokens=4)
# AVX2 and SSSE3 have 16 registers, the others 32.
I8_TILES = {
    "AVX-512 VNNI": Int8Tile(tokens=4, rows=32),
    "AVX-512": Int8Tile(tokens=4, rows=32),
    "AVX2": Int8Tile(tokens=2, rows=16),
    "SSSE3": Int8Tile(tokens=2, rows=8),
    "NEON i8mm": Int8Tile(tokens=4, rows=16),
    "NEON dotprod": Int8Tile(tokens=2, rows=16),
    "NEON": Int8Tile(tokens=2, rows=16),
    "plain": Int8Tile(tokens=1, rows=4),
}


@dataclass(frozen=True)
class ExpertDot:
    """A tile's product, what it is called, what it holds besides its sums, and what it calls."""

    schedule: str
    tile: MoeTile | bf16.PairTile | Int8Tile
    dot: Any
    part: tuple[int, str]
    value: tuple[int, str]
    imported: Callable[[], Any] = nullcontext


@dataclass(frozen=True)
class ActivationFormat:
    """How x f32 [n, k] reaches the CPU's kernels.

    `arrays(x)` are their arguments and `values(x)` what these stand for, [n, k]; `shapes(k)` has
    name, size along the second axis and dtype of each.
    """

    arrays: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    values: Callable[[np.ndarray], np.ndarray]
    shapes: Callable[[int], tuple[tuple[str, int, str], ...]]

    def parameters(self, n: Any, k: int) -> tuple[Any, ...]:
        """The next parameters of a PrimFunc, as `walk` takes them."""
        return tuple(parameter(name, (n, size), dtype) for name, size, dtype in self.shapes(k))


FORMATS: dict[Activations, ActivationFormat] = {
    "f32": ActivationFormat(
        arrays=lambda x: (x,),
        values=lambda x: x,
        shapes=lambda k: (("x", k, "float32"),),
    ),
    "bf16": ActivationFormat(
        arrays=round_ref,
        values=lambda x: x.astype(ml_dtypes.bfloat16),
        shapes=lambda k: (("x", k, "uint16"),),
    ),
    "i8": ActivationFormat(
        arrays=quantize_ref,
        values=lambda x: dequantize(*quantize_ref(x)[:2]),
        shapes=lambda k: (
            ("q", k, "int8"),
            ("q_step", k // BLOCK, "float32"),
            ("q_total", k // BLOCK, "int32"),
        ),
    ),
}


def expert_dot(target: Target, activations: Activations, k: int) -> ExpertDot:
    """The CPU's product of a group of rows with `activations` of k inputs."""
    if activations == "f32":
        tokens = F32_TILE.tokens
        return ExpertDot(
            "rows interleaved",
            F32_TILE,
            dot_f32(k),
            part=(tokens * GROUP, "float32"),
            value=(LANES, "float32"),
        )
    if activations == "bf16":
        pairs = bf16.tile_of(target)
        return ExpertDot(
            f"rows interleaved, {bf16.instructions(target)}",
            pairs,
            dot_bf16(target, k, pairs),
            part=(pairs.tokens * GROUP, "float32"),
            value=(LANES, "int32"),
            imported=partial(bf16.imported, target),
        )
    isa = isa_of(target)
    tile = I8_TILES[isa.name]
    return ExpertDot(
        f"rows interleaved, {isa.name}",
        tile,
        dot_i8(isa, k, tile, int8_weights(isa)),
        part=(tile.tokens * tile.rows, "int32"),
        value=(4 * isa.lanes, "uint8"),
    )


def expert_walk(
    expert_dot: ExpertDot,
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
    tile, dot = expert_dot.tile, expert_dot.dot
    part_size, part_dtype = expert_dot.part
    value_size, value_dtype = expert_dot.value

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
                    # Said, as detection gives up on vector loads; nothing schedules further.
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
        with expert_dot.imported(), one_launch():
            begin_all(out, operands)
            items(x, offsets, order, w, s, out, operands)

    return walk


def routing(
    rng: np.random.Generator, n: int, experts: int, top_k: int, choose: range | None
) -> dict[str, np.ndarray]:
    """Distinct random experts for each token, from `choose`, and the plan sorted by expert."""
    pool = np.arange(experts) if choose is None else np.asarray(choose)
    ids = np.stack([rng.permutation(pool)[:top_k] for _ in range(n)]).astype(np.int32)
    order = np.argsort(ids.ravel(), kind="stable").astype(np.int32)
    offsets = np.searchsorted(ids.ravel()[order], np.arange(experts + 1)).astype(np.int32)
    return {"ids": ids, "offsets": offsets, "order": order}


def expert_arrays(
    rng: np.random.Generator, experts: int, rows: int, k: int
) -> dict[str, np.ndarray]:
    """Random MXFP4 experts whose outputs stay near 1, and their bias, as stored."""
    center = 127 - round(np.log2(2.5 * np.sqrt(k)))
    return {
        "blocks": rng.integers(0, 256, (experts, rows, k // BLOCK, 16), dtype=np.uint8),
        "scales": rng.integers(center - 2, center + 2, (experts, rows, k // BLOCK), dtype=np.uint8),
        "bias": rng.standard_normal((experts, rows), dtype=np.float32),
    }


def cases(case: Callable[..., Case]) -> tuple[Case, ...]:
    """What both kernels are tested with, whatever their activations.

    `case(name, tokens, **shape)` makes one.
    """
    return (
        case("one token", 1),
        case("partial token tile, experts without tokens", 7, choose=range(2, 5)),
        case("all tokens on one expert", 9, top_k=1, choose=range(3, 4)),
        case("one expert in all", 3, experts=1, top_k=1, hidden=32, units=32),
        case("one channel 1000 times the others", 6, spike=1000),
        case("120b's 128 experts", 5, experts=128, top_k=4),
        case("20b shapes, four experts", 1, experts=4, top_k=4, hidden=2880, units=2880),
    )
