"""Experts' products for many tokens on CUDA, sm_80 and later.

The launches:

    prepare   sorts the slots by expert, as moe_plan does, and splits f32 inputs into two bfloat16
    product   a block takes some rows of an expert's weights and some of its tokens
    mixture   of the second half: a token's weighted outputs

On Hopper the first of them makes columns of the sorted slots' inputs, for bulk copies
(cuda/product_wgmma.py). On sm_120a it makes MXFP8 again of inputs that are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..cuda import mxfp8, product_wgmma
from ..cuda.instructions import LANES, MMA_COLUMNS, MMA_ROWS
from ..cuda.mxfp4 import Inputs, load_pair, load_word, load_words, split_floats
from ..cuda.mxfp4 import rows as product_rows
from ..cuda.product import (
    ProductColumns,
    ProductTile,
    product,
)
from ..cuda.warps import (
    added,
    count_below,
    lane_value,
    lanes_where,
    largest,
    value_before,
)
from ..gpu.barriers import barrier
from ..kernel import Size, T, Tensor, TileConfig, i32
from .experts_cuda import read_id, whole

SORTERS = 16  # warps of a block that prepares
MIXERS = 128  # threads of a block that mixes
SHARE = 512  # slots of an expert, at most, of which a block makes columns


@dataclass(frozen=True)
class Grouped(TileConfig):
    """Products of many tokens, by how many an expert has on average. On Hopper a weight is unpacked
    in the time that wgmma takes for 64 columns; and a block is alone on its SM."""

    least: int = 16
    wide: int = 48  # from so many on the large tiles
    small: ProductTile = field(default_factory=lambda: ProductTile(groups=4))
    large: ProductTile = field(default_factory=ProductTile)
    hopper_small: ProductTile = field(default_factory=lambda: ProductTile(groups=8, stages=6))
    hopper_large: ProductTile = field(default_factory=lambda: ProductTile(stages=6))
    scaled_small: ProductTile = field(default_factory=lambda: ProductTile(groups=4, stages=4))
    scaled_large: ProductTile = field(default_factory=lambda: ProductTile(stages=2))


def scratch(
    inputs: Inputs, n: Size, experts: int, rows: Size, k: int, *, hopper: bool
) -> tuple[Tensor, ...]:
    """What a product of inputs [rows, k] needs: `begins` and `by_expert` are moe_plan's offsets and
    order, `parts` the two bfloat16 of each input, or rows of MXFP8; on Hopper the columns of the
    sorted slots."""
    plan = (i32("begins", experts + 1), i32("by_expert", n))
    if hopper:
        return (*plan, product_wgmma.columns_of("parts", n * inputs.parts, k))
    if inputs.scaled:
        return (*plan, Tensor("parts", (rows, mxfp8.words(k)), "uint32"))
    if inputs.parts == 1:
        return plan
    return (*plan, Tensor("parts", (Size(rows.name, rows.factor * inputs.parts), k // 2), "uint32"))


# -- preparation ----------------------------------------------------------------------------------


def prepare(
    inputs: Inputs, experts: int, top_k: int, k: int, *, share: int, hopper: bool
) -> Callable[..., Any]:
    """The T.inline launch(n, rows, ids, x, begins, by_expert, parts).

    A block for each expert sorts: it counts and places its slots, of which a warp takes some that
    follow each other. Where inputs are f32, further blocks split x [rows, k] into parts u32
    [2·rows, k/2]: the bfloat16 of each, then of what that leaves; where they are MXFP8, into rows
    as cuda/mxfp8.py says.

    On Hopper several blocks sort for each expert, and each makes the columns of some of its slots;
    `share` slots have the same row of x.
    """
    threads = SORTERS * LANES
    splits = (inputs.parts == 2 or inputs.scaled) and not hopper
    own_pieces = mxfp8.pieces(k) if inputs.scaled else k // 4  # 16 bytes each, a thread's
    pieces = product_wgmma.pieces(k)

    @T.inline
    def make_piece(x, parts, slots, slot, place, piece):
        """16 bytes of each column of the slot that is number `place` of those sorted."""
        word = T.sblock_alloc_buffer((4,), "uint32", scope="local")
        pairs = T.sblock_alloc_buffer((4,), "uint32", scope="local")
        out = T.sblock_alloc_buffer((4 * inputs.parts,), "uint32", scope="local")
        for i in T.unroll(4 * inputs.parts):
            out[i] = T.uint32(0)
        if product_wgmma.is_filled(piece, k):
            for i in T.unroll(2):
                for j in T.unroll(2):
                    at = T.meta_var(product_wgmma.piece_inputs(piece, 2 * i + j))
                    if inputs.parts == 2:
                        load_pair(word, 2 * j, T.address_of(x[slot // share, at]))
                    else:
                        load_word(out, 2 * i + j, T.address_of(x[slot // share, at]))
                if inputs.parts == 2:
                    split_floats(word, 0, 1, pairs)
                    for part in T.unroll(2):
                        out[T.ramp(4 * part + 2 * i, 1, 2)] = pairs[T.ramp(2 * part, 1, 2)]
        for part in T.unroll(inputs.parts):
            product_wgmma.store_piece(
                parts, slots * inputs.parts, place * inputs.parts + part, piece, out, 4 * part
            )

    @T.inline
    def sort(expert, number, of, tx, slots, ids, x, begins, by_expert, parts):
        """As block `number` of so many of an expert; the first writes the plan."""
        # Of each warp: slots of experts before this one, and slots of this one.
        before = T.sblock_alloc_buffer((SORTERS,), "int32", scope="shared")
        same = T.sblock_alloc_buffer((SORTERS,), "int32", scope="shared")
        count = T.sblock_alloc_buffer((2,), "int32", scope="local")
        id_ = T.sblock_alloc_buffer((1,), "int32", scope="local")
        at = T.sblock_alloc_buffer((1,), "int32", scope="local")
        warp: T.let = tx // LANES
        lane: T.let = tx % LANES
        chunks: T.let = T.ceildiv(slots, threads)  # of a warp
        first: T.let = warp * chunks * LANES + lane
        count[0] = 0
        count[1] = 0
        for i in T.serial(chunks):
            read_id(ids, top_k, slots, first + i * LANES, id_)
            count[0] = count[0] + T.Cast("int32", T.And(id_[0] >= 0, id_[0] < expert))
            count[1] = count[1] + T.Cast("int32", id_[0] == expert)
        count[0] = added(count[0])
        count[1] = added(count[1])
        if lane == 0:
            before[warp] = count[0]
            same[warp] = count[1]
        barrier()
        count[0] = 0
        if hopper:
            count[1] = 0
        at[0] = 0
        for w in T.unroll(SORTERS):
            count[0] = count[0] + before[w]
            if hopper:
                count[1] = count[1] + same[w]
            at[0] = at[0] + before[w] + T.Select(w < warp, same[w], 0)
        if T.And(tx == 0, number == 0) if hopper else tx == 0:
            begins[expert] = count[0]
            if expert == experts - 1:
                begins[experts] = slots
        if hopper:
            mine = T.sblock_alloc_buffer((SHARE,), "int32", scope="shared")
            own: T.let = T.ceildiv(count[1], of)
            begin: T.let = number * own
            here: T.let = T.min(own, count[1] - begin)
            for i in T.serial(chunks):
                read_id(ids, top_k, slots, first + i * LANES, id_)
                lanes: T.let = lanes_where(id_[0] == expert)
                if id_[0] == expert:
                    place: T.let = at[0] + count_below(lanes, lane)
                    rank: T.let = place - count[0] - begin
                    if number == 0:
                        by_expert[place] = first + i * LANES
                    if T.And(rank >= 0, rank < here):
                        mine[rank] = first + i * LANES
                at[0] = at[0] + T.Cast("int32", T.popcount(lanes))
            barrier()
            for i in T.serial(T.ceildiv(T.max(here, 0) * pieces, threads), unroll=False):
                item: T.let = i * threads + tx
                if item < here * pieces:
                    make_piece(
                        x, parts, slots, mine[item // pieces],
                        count[0] + begin + item // pieces, item % pieces,
                    )  # fmt: skip
        else:
            for i in T.serial(chunks):
                read_id(ids, top_k, slots, first + i * LANES, id_)
                lanes: T.let = lanes_where(id_[0] == expert)
                if id_[0] == expert:
                    by_expert[at[0] + count_below(lanes, lane)] = first + i * LANES
                at[0] = at[0] + T.Cast("int32", T.popcount(lanes))

    @T.inline
    def split(piece, rows, x, parts):
        word = T.sblock_alloc_buffer((4,), "uint32", scope="local")
        pairs = T.sblock_alloc_buffer((4,), "uint32", scope="local")
        row: T.let = piece // own_pieces
        at: T.let = piece % own_pieces
        if row < rows:
            load_words(word, 0, T.address_of(x[row, at * 4]))
            split_floats(word, 0, 1, pairs)
            for part in T.unroll(2):
                parts[2 * row + part, T.ramp(at * 2, 1, 2)] = pairs[T.ramp(2 * part, 1, 2)]

    def blocks(rows: Any) -> Any:
        return experts + T.ceildiv(rows * own_pieces, threads) if splits else experts

    def sorting(n: Any) -> Any:
        """Blocks that sort for an expert, on Hopper."""
        return T.ceildiv(n * top_k, SHARE)

    @T.inline
    def launch(n, rows, ids, x, begins, by_expert, parts):
        for block in T.thread_binding(blocks(rows), thread="blockIdx.x"):
            for thread in T.thread_binding(threads, thread="threadIdx.x"):
                with T.sblock("prepare"):
                    vb, tx = T.axis.remap("SS", [block, thread])
                    T.reads(whole(ids), whole(x))
                    T.writes(whole(begins), whole(by_expert))
                    if vb < experts:
                        sort(
                            T.Cast("int32", vb), 0, 1, tx, T.Cast("int32", n * top_k), ids, x,
                            begins, by_expert, parts,
                        )  # fmt: skip
                    elif inputs.scaled:
                        mxfp8.make_piece(k, (vb - experts) * threads + tx, rows, x, parts)
                    elif splits:
                        split((vb - experts) * threads + tx, rows, x, parts)

    @T.inline
    def launch_on_hopper(n, rows, ids, x, begins, by_expert, parts):
        for expert in T.thread_binding(experts, thread="blockIdx.x"):
            for number in T.thread_binding(sorting(n), thread="blockIdx.y"):
                for thread in T.thread_binding(threads, thread="threadIdx.x"):
                    with T.sblock("prepare"):
                        ve, vn, tx = T.axis.remap("SSS", [expert, number, thread])
                        T.reads(whole(ids), whole(x))
                        T.writes(whole(begins), whole(by_expert), whole(parts))
                        sort(
                            ve, T.Cast("int32", vn), T.Cast("int32", sorting(n)), tx,
                            T.Cast("int32", n * top_k), ids, x, begins, by_expert, parts,
                        )  # fmt: skip

    return launch_on_hopper if hopper else launch


# -- product --------------------------------------------------------------------------------------


def _columns(
    inputs: Inputs, experts: int, share: int, store: Any, together: int = 1
) -> ProductColumns:
    """A block's tokens are slots of one expert, sorted; `share` of them have the same inputs.

    given: begins, by_expert, and what store(given, expert, slot, tile, g, sums) takes
    together: so many slots belong together: a block begins with a multiple of it, but for an
        expert's first
    """

    @T.inline
    def choose(given, by, tokens, lane, span):
        word = T.sblock_alloc_buffer((2,), "uint32", scope="local")
        upto = T.sblock_alloc_buffer((1,), "int32", scope="local")
        left = T.sblock_alloc_buffer((1,), "int32", scope="local")
        left[0] = by
        for i in T.unroll(3):
            span[i] = -1
        for w in T.unroll(-(-experts // LANES)):
            e: T.let = w * LANES + lane
            for i in T.unroll(2):
                load_word(word, i, T.address_of(given[0][T.min(e + i, experts)]))
            begin: T.let = T.reinterpret("int32", word[0])
            end: T.let = T.reinterpret("int32", word[1])
            before = T.meta_var(begin % together if together > 1 else 0)
            have: T.let = (
                T.ceildiv(end - begin, tokens)
                if together == 1
                else T.Select(end > begin, T.ceildiv(end - begin + before, tokens), 0)
            )
            upto[0] = have
            for i in T.unroll(5):
                others: T.let = value_before(upto[0], 1 << i)
                upto[0] = upto[0] + T.Select(lane >= 1 << i, others, 0)
            number: T.let = left[0] - (upto[0] - have)
            mine: T.let = T.And(number >= 0, left[0] < upto[0])
            # The first block of an expert has as many fewer as others are before it.
            fewer = T.meta_var(T.max(before - number * tokens, 0) if together > 1 else 0)
            first: T.let = begin - before + number * tokens + fewer
            span[0] = T.max(span[0], largest(T.Select(mine, e, -1)))
            span[1] = T.max(span[1], largest(T.Select(mine, first, -1)))
            span[2] = T.max(
                span[2], largest(T.Select(mine, T.min(end - first, tokens - fewer), -1))
            )
            left[0] = left[0] - lane_value(upto[0], LANES - 1)

    @T.inline
    def stored(given, expert, number, tile, g, sums):
        store(given, expert, given[1][number], tile, g, sums)

    return ProductColumns(
        parts=inputs.parts,
        width=4 if inputs.parts == 2 or inputs.scaled else 8,
        choose=choose,
        source=lambda given, number: given[1][number] // share * inputs.parts,
        store=stored,
        scaled=inputs.scaled,
    )


def grouped_products(
    inputs: Inputs, grouped: Grouped, *, experts: int, top_k: int, share: int, rows: int, k: int,
    store: Any, hopper: bool,
) -> Callable[..., Any]:  # fmt: skip
    """The T.inline launch(n, x, ids, weights, given, parts): `prepare` and the product, given as
    `_columns` says. `share` slots have the same inputs."""
    if hopper:
        return _hopper_products(
            inputs, grouped, experts=experts, top_k=top_k, share=share, rows=rows, k=k, store=store
        )
    columns = _columns(inputs, experts, share, store)

    def blocks(n: Any, tokens: int) -> Any:
        return T.min(n * top_k, n * top_k // tokens + experts)

    tiles = (grouped.small, grouped.large)
    if inputs.scaled:
        tiles = (grouped.scaled_small, grouped.scaled_large)
    of = mxfp8.rows(k) if inputs.scaled else product_rows(k)
    small, large = (
        product(of, columns, tile, all_tiles=rows // MMA_ROWS, k=k, blocks=blocks) for tile in tiles
    )
    ready = prepare(inputs, experts, top_k, k, share=share, hopper=False)

    @T.inline
    def launch(n, x, ids, weights, given, parts):
        ready(n, n * top_k // share, ids, x, given[0], given[1], parts)
        source = T.meta_var(x if parts is None else parts)
        if n * top_k < grouped.wide * experts:
            small(n, None, source, weights, given)
        else:
            large(n, None, source, weights, given)

    return launch


def _hopper_products(
    inputs: Inputs, grouped: Grouped, *, experts: int, top_k: int, share: int, rows: int, k: int,
    store: Any,
) -> Callable[..., Any]:  # fmt: skip
    """The same by wgmma."""
    together = MMA_COLUMNS // inputs.parts
    columns = _columns(inputs, experts, share, store, together)

    def blocks(n: Any, tokens: int) -> Any:
        """Enough of them: an expert may begin with up to together - 1 slots of another one."""
        slots = n * top_k
        return T.min(slots, (slots + experts * (tokens + together - 2)) // tokens)

    small, large = (
        product_wgmma.product(
            product_rows(k), columns, tile, all_tiles=rows // MMA_ROWS, k=k, blocks=blocks
        )
        for tile in (grouped.hopper_small, grouped.hopper_large)
    )
    ready = prepare(inputs, experts, top_k, k, share=share, hopper=True)

    @T.inline
    def launch(n, x, ids, weights, given, parts):
        ready(n, None, ids, x, given[0], given[1], parts)
        if n * top_k < grouped.wide * experts:
            small(n, n * (top_k * inputs.parts), parts, weights, given)
        else:
            large(n, n * (top_k * inputs.parts), parts, weights, given)

    return launch


# -- mixture --------------------------------------------------------------------------------------


def mixture(top_k: int, hidden: int) -> Callable[..., Any]:
    """The T.inline launch(n, out, weights, residual, y): y = residual + a token's weighted outputs,
    out f32 [n·top_k, hidden]. A thread takes four rows of a token."""

    @T.inline
    def work(piece, n, out, weights, residual, y):
        word = T.sblock_alloc_buffer((4,), "uint32", scope="local")
        factor = T.sblock_alloc_buffer((1,), "uint32", scope="local")
        sums = T.sblock_alloc_buffer((4,), "float32", scope="local")
        token: T.let = piece // (hidden // 4)
        row: T.let = piece % (hidden // 4) * 4
        if token < n:
            load_words(word, 0, T.address_of(residual[token, row]))
            for i in T.unroll(4):
                sums[i] = T.reinterpret("float32", word[i])
            for j in T.serial(top_k):
                load_words(word, 0, T.address_of(out[token * top_k + j, row]))
                load_word(factor, 0, T.address_of(weights[token, j]))
                for i in T.unroll(4):
                    weight: T.let = T.reinterpret("float32", factor[0])
                    sums[i] = sums[i] + weight * T.reinterpret("float32", word[i])
            y[token, T.ramp(row, 1, 4)] = sums[T.ramp(0, 1, 4)]

    @T.inline
    def launch(n, out, weights, residual, y):
        for block in T.thread_binding(T.ceildiv(n * (hidden // 4), MIXERS), thread="blockIdx.x"):
            for thread in T.thread_binding(MIXERS, thread="threadIdx.x"):
                with T.sblock("mixture"):
                    vb, tx = T.axis.remap("SS", [block, thread])
                    T.reads(whole(out), whole(weights), whole(residual))
                    T.writes(whole(y))
                    work(vb * MIXERS + tx, n, out, weights, residual, y)

    return launch
