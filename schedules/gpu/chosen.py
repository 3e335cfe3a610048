"""MXFP4 experts that some tokens chose: each is read and unpacked once for several of its tokens.

A block of threads takes some rows of all experts, and a window of tokens. First it links the slots
of the window that chose the same expert. Then it goes through these experts: a thread unpacks its
part of the rows (mxfp4.py has their layout) for a few tokens at a time, and multiplies each weight
with the input of every one of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..formats.mxfp4 import scale_value
from ..kernel import T
from .barriers import barrier
from .lanes import BlockSums
from .mxfp4 import (
    EIGHT,
    PAIR,
    QUAD,
    WORDS,
    ExpertRows,
    ExpertsTile,
    scaled,
    unpack,
)

# Not measured: by what compilers say for eight GPUs. With eight rows, or eight tokens at a time,
# those of Adreno and M1 spill.
ROWS = 4  # of a block: their scales of a block of inputs are a word
WINDOW = 16  # tokens of a block


@dataclass(frozen=True)
class ChosenExperts:
    """A block's part of the products of all experts that a window of tokens chose.

    rows: of an expert   tile: whose layout the weights have

    visit(finish, ids, first, count, chosen, heads, next, parts, x, row, blocks, scales, group, tx)
        every thread of the block, in uniform control flow. It calls finish(slots, here, expert)
        for some slots of an expert at a time, until it has been through all of them.

            ids i32 [n, top_k]    first: slot of the window (token · top_k + choice), of `count`
            chosen, heads, next   i32 [slots], parts f32 [sums.elements]: shared memory that
                                  nothing else uses
            x f32 [.., k]         row(slot): which of them a slot of the window multiplies
            blocks, scales        as packed; the block's rows are ROWS · group …
            slots i32 [..]        of the window, `here` of them; UNIT times sum t·ROWS + r of
                                  `parts` is that of slots[t] and row r. So no scale takes it
                                  beyond float32
    """

    family: str
    k: int
    rows: int
    top_k: int
    tile: ExpertsTile

    @property
    def slots(self) -> int:
        """Of a window."""
        return WINDOW * self.top_k

    @property
    def threads(self) -> int:
        return self._of.threads

    @property
    def sums(self) -> BlockSums:
        """Of as many slots as share weights."""
        return BlockSums(self.family, self.threads, max(self.tile.together) * ROWS)

    @property
    def groups(self) -> int:
        """Of rows, each a block's."""
        return self.rows // ROWS

    @property
    def _of(self) -> ExpertRows:
        return ExpertRows(self.k, self.tile)

    @property
    def _link(self) -> Any:
        threads, slots = self.threads, self.slots
        steps = -(-slots // threads)

        @T.inline
        def link(ids, top_k, first, count, chosen, heads, next, tx):
            """Of slot s: chosen[s] is its expert; heads[s] the same if no slot before has this
            expert, -1 otherwise; next[s] the next slot that has it, or -1."""
            own = T.sblock_alloc_buffer((4,), "int32", scope="local")
            for i in T.serial(steps):
                if i * threads + tx < count:
                    chosen[i * threads + tx] = ids[
                        (first + i * threads + tx) // top_k, (first + i * threads + tx) % top_k
                    ]
            barrier()
            for i in T.serial(steps):
                if i * threads + tx < count:
                    s: T.let = i * threads + tx
                    own[0] = chosen[s]
                    own[1] = own[0]
                    own[2] = -1
                    for o in T.serial(count):
                        own[3] = chosen[o]
                        own[1] = T.Select(T.And(own[3] == own[0], o < s), -1, own[1])
                        own[2] = T.Select(
                            T.And(T.And(own[3] == own[0], o > s), own[2] < 0), o, own[2]
                        )
                    heads[s] = own[1]
                    next[s] = own[2]
            barrier()

        return link

    def _times(self, tokens: int) -> Any:
        of, threads, layout = self._of, self.threads, self.tile.rows
        lanes, steps, first_input = of.lanes, of.steps, of.first_input
        quads = layout // ROWS  # of a group of the layout

        @T.inline
        def load(word, scale, blocks, scales, expert, group, lane):
            for r in T.unroll(ROWS):
                word[T.ramp(r * WORDS, 1, WORDS)] = blocks[
                    expert, group // quads, group % quads * ROWS + r, lane, T.ramp(0, 1, WORDS)
                ]
            for i in T.unroll(PAIR):
                scale[i] = scales[expert, group // quads, lane // PAIR, i * quads + group % quads]

        @T.inline
        def times(acc, x, row, slots, blocks, scales, expert, group, tx):
            word = T.sblock_alloc_buffer((ROWS * WORDS,), "uint32", scope="local")
            scale = T.sblock_alloc_buffer((PAIR,), "uint32", scope="local")
            factor = T.sblock_alloc_buffer((ROWS,), "float32", scope="local")
            inputs = T.sblock_alloc_buffer((tokens * EIGHT,), "float32", scope="local")
            four = T.sblock_alloc_buffer((2,), "uint32", scope="local")
            weight = T.sblock_alloc_buffer((EIGHT,), "float32", scope="local")
            for a in T.unroll(tokens * ROWS):
                acc[a] = T.float32(0)
            for s in T.serial(steps):
                if s * threads + tx < lanes:
                    lane: T.let = s * threads + tx
                    load(word, scale, blocks, scales, expert, group, lane)
                    # Not unrolled: Adreno's compiler would fetch all inputs first, and spill.
                    for i in T.serial(PAIR):
                        for r in T.unroll(ROWS):
                            factor[r] = scale_value(
                                (T.Select(i == 0, scale[0], scale[1]) >> T.uint32(r * 8))
                                & T.uint32(255)
                            )
                        for v in T.unroll(WORDS // PAIR):
                            for t in T.unroll(tokens):
                                for q in T.unroll(EIGHT // QUAD):
                                    inputs[T.ramp(t * EIGHT + q * QUAD, 1, QUAD)] = x[
                                        row(slots[t]),
                                        T.ramp(
                                            first_input(lane, i) + (v * 2 + q) * PAIR * QUAD,
                                            1, QUAD,
                                        ),
                                    ]  # fmt: skip
                            for r in T.unroll(ROWS):
                                unpack(
                                    T.Select(
                                        i == 0,
                                        word[r * WORDS + v],
                                        word[r * WORDS + WORDS // PAIR + v],
                                    ),
                                    four,
                                )
                                scaled(weight, four, factor[r])
                                for t in T.unroll(tokens):
                                    for e in T.unroll(EIGHT):
                                        acc[t * ROWS + r] = (
                                            acc[t * ROWS + r] + weight[e] * inputs[t * EIGHT + e]
                                        )

        return times

    @property
    def visit(self) -> Any:
        top_k, sums, (few, most) = self.top_k, self.sums, self.tile.together
        link, times_few, times = self._link, self._times(few), self._times(most)

        @T.inline
        def visit(
            finish, ids, first, count, chosen, heads, next, parts, x, row, blocks, scales, group, tx
        ):
            own = T.sblock_alloc_buffer((most,), "int32", scope="local")
            expert = T.sblock_alloc_buffer((1,), "int32", scope="local")
            here = T.sblock_alloc_buffer((1,), "int32", scope="local")
            slot = T.sblock_alloc_buffer((1,), "int32", scope="local")
            acc = T.sblock_alloc_buffer((most * ROWS,), "float32", scope="local")
            link(ids, top_k, first, count, chosen, heads, next, tx)
            for s in T.serial(count):
                expert[0] = heads[s]
                slot[0] = T.Select(expert[0] < 0, -1, s)
                while slot[0] >= 0:
                    here[0] = 0
                    for t in T.unroll(most):
                        own[t] = T.Select(slot[0] < 0, own[T.max(t - 1, 0)], slot[0])
                        here[0] = here[0] + T.Select(slot[0] < 0, 0, 1)
                        slot[0] = T.Select(slot[0] < 0, -1, next[T.max(slot[0], 0)])
                    if here[0] <= few:
                        times_few(acc, x, row, own, blocks, scales, expert[0], group, tx)
                        sums.put(acc, parts, tx, few * ROWS)
                    else:
                        times(acc, x, row, own, blocks, scales, expert[0], group, tx)
                        sums.put(acc, parts, tx, most * ROWS)
                    barrier()
                    finish(own, here[0], expert[0])
                    barrier()

        return visit
