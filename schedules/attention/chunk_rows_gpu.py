"""What the threads of a chunk's rows do between products of matrices, for attend_chunk_gpu.py.

A row is a token and a head. Two threads have it, beside each other, each four of every eight
columns. What one of them has for the other goes through shared memory (own.exchange).

Units that take float16 get queries and weights in two parts where a result should be as good as
those of float32: a row of queries times a power of two, weights up to 2^14. Scales of an int8 cache
are no part of the products: those of keys are multiplied with scores, those of values with weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..formats.kv import KV
from ..gpu.matrices import Matrices
from ..gpu.product import power_of_two
from ..kernel import T
from ..math import LOG2_E, LOWEST
from .attend import HEADS, is_alone
from .chunk_pages_gpu import FOUR, TURN
from .pages import first_visible, is_hidden

OF_ROW = 2  # threads
PIECE = OF_ROW * FOUR  # columns of a row, of which each of its threads has four
OWN = TURN // PIECE  # pieces of a turn's keys, or of as many columns, in each of its threads
EXACT = 1e-4  # formats with less tolerance have queries and weights in two parts
NOT_SEEN = -(2.0**80)  # a score
FAR = 1 << 30  # behind all positions


class ChunkRows(NamedTuple):
    """Of one format and one kind of matrix units. T.inline functions, that all threads call.

    ask(own, condition)              own.answer = 1 where it is so, or else 0
    find_run(own, …)                 the tokens run[0] … run[1] - 1 of a block are those from run[0]
                                     on that are of its sequence, and see own.seen; own.answer: some
                                     of them are not alone in it
    read_query(own, …)               acc: a row's queries; unit
    put_query(own, to, panel, tx)    a part of columns panel · TURN … of acc; the rest stays there
    begin(own)                       there is no key yet
    take_scores(own, key0, tx)       weight = the row's scores in units of log 2, NOT_SEEN where it
                                     does not see the key; the largest to own.exchange
    weigh(own, tx)                   then: weight = 2^(score - top + bias), to own.kept with the
                                     value's scale; older sums corrected
    add(own, panel, tx)              acc += columns of sums, in own.score
    put_result(own, …)               the row's part of out
    """

    parts: int  # of queries and weights
    pitch: int  # numbers from a row of own.score, of own.kept or of queries to the next
    ask: Any
    find_run: Any
    read_query: Any
    put_query: Any
    begin: Any
    take_scores: Any
    weigh: Any
    add: Any
    put_result: Any


def chunk_rows(
    units: Matrices, rows: int, *, head_dim: int, kv_dtype: str, window: int
) -> ChunkRows:
    scaled, halves = KV[kv_dtype].scaled, units.dtype == "float16"
    parts = 2 if halves and KV[kv_dtype].attention_tolerance < EXACT else 1
    bias = 14.0 if halves else 0.0  # weights up to 2^14: float16 has its full precision from 2^-14
    scale = LOG2_E * head_dim**-0.5
    pitch = TURN + units.pads[0]
    part_size = rows * pitch  # of weights
    own_pieces = head_dim // PIECE

    def column(i: Any, tx: Any) -> Any:
        """The first of the thread's piece number i."""
        return i * PIECE + tx % OF_ROW * FOUR

    def place(i: Any, tx: Any) -> Any:
        return tx // OF_ROW * pitch + column(i, tx)

    @T.inline
    def ask(own, condition):
        # TVM looks at a condition again for each access of an array below it, which takes long if
        # there is much in it.
        own.answer[0] = T.Select(condition, 1, 0)

    @T.inline
    def find_run(own, token0, count, n, heads_left, positions, token_seq, tx):
        sequence: T.let = token_seq[token0 + own.run[0]]
        own.run[1] = own.run[0]
        own.seen[0] = FAR
        own.seen[1] = -1
        own.seen[2] = -1
        own.seen[3] = FAR
        own.last[0] = -1
        for i in T.serial(rows // HEADS):
            t: T.let = T.min(token0 + i, n - 1)
            ask(own, T.And(T.And(i == own.run[1], i < count), token_seq[t] == sequence))
            if own.answer[0] > 0:
                position: T.let = positions[t]
                first: T.let = first_visible(position, window)
                own.run[1] = i + 1
                own.seen[0] = T.min(own.seen[0], first)
                own.seen[1] = T.max(own.seen[1], position)
                own.seen[2] = T.max(own.seen[2], first)
                own.seen[3] = T.min(own.seen[3], position)
                own.last[0] = T.Select(
                    T.And(tx // (HEADS * OF_ROW) == i, tx // OF_ROW % HEADS < heads_left),
                    position, own.last[0],
                )  # fmt: skip
        token: T.let = token0 + own.run[0]
        ask(own, T.Or(own.run[1] - own.run[0] > 1, T.Not(is_alone(token, n, token_seq))))

    @T.inline
    def read_query(own, q, token0, n, head0, heads_left, tx):
        row: T.let = tx // OF_ROW
        t: T.let = T.min(token0 + row // HEADS, n - 1)
        first: T.let = (head0 + T.min(row % HEADS, heads_left - 1)) * head_dim
        own.unit[0] = T.float32(scale)
        own.power[0] = T.float32(1)
        if halves:
            own.running[0] = T.float32(0)
            for i in T.unroll(head_dim // FOUR):
                own.four[T.ramp(0, 1, FOUR)] = q[t, T.ramp(first + i * FOUR, 1, FOUR)]
                for e in T.unroll(FOUR):
                    own.running[0] = T.max(own.running[0], T.fabs(own.four[e]))
            power_of_two(own.running[0], own.power)
            own.unit[0] = own.power[1] * T.float32(scale)
        for i in T.unroll(own_pieces):
            own.four[T.ramp(0, 1, FOUR)] = q[t, T.ramp(first + column(i, tx), 1, FOUR)]
            for e in T.unroll(FOUR):
                own.acc[i * FOUR + e] = own.four[e] * own.power[0]

    @T.inline
    def round_four(own, numbers, at):
        """rounded = four numbers from `at` on, which keep what is left of them."""
        for e in T.unroll(FOUR):
            own.rounded[e] = T.Cast(units.dtype, numbers[at + e])
            numbers[at + e] = numbers[at + e] - T.Cast("float32", own.rounded[e])

    @T.inline
    def put_query(own, to, panel, tx):
        for i in T.unroll(OWN):
            round_four(own, own.acc, (panel * OWN + i) * FOUR)
            to[T.ramp(place(i, tx), 1, FOUR)] = own.rounded[T.ramp(0, 1, FOUR)]

    @T.inline
    def begin(own):
        for i in T.unroll(own_pieces * FOUR):
            own.acc[i] = T.float32(0)
        own.total[0] = T.float32(0)
        own.top[0] = T.float32(NOT_SEEN)

    @T.inline
    def take_scores(own, key0, tx):
        own.running[0] = T.float32(NOT_SEEN)
        for i in T.unroll(OWN):
            own.four[T.ramp(0, 1, FOUR)] = own.score[T.ramp(place(i, tx), 1, FOUR)]
            for e in T.unroll(FOUR):
                own.weight[i * FOUR + e] = own.four[e] * own.unit[0]
            if scaled:
                own.four[T.ramp(0, 1, FOUR)] = own.key_scale[T.ramp(column(i, tx), 1, FOUR)]
                for e in T.unroll(FOUR):
                    own.weight[i * FOUR + e] = own.weight[i * FOUR + e] * own.four[e]
        ask(own, T.Or(key0 < own.seen[2], key0 + TURN - 1 > own.seen[3]))
        if own.answer[0] > 0:
            for i in T.unroll(OWN):
                for e in T.unroll(FOUR):
                    own.weight[i * FOUR + e] = T.Select(
                        is_hidden(key0 + column(i, tx) + e, own.last[0], window),
                        T.float32(NOT_SEEN),
                        own.weight[i * FOUR + e],
                    )
        for i in T.unroll(OWN * FOUR):
            own.running[0] = T.max(own.running[0], own.weight[i])
        own.exchange[tx] = own.running[0]

    @T.inline
    def multiply_scales(own, tx):
        if halves:  # weights have 2^14 already
            own.running[0] = T.float32(0)
            for i in T.unroll(TURN // FOUR):
                own.four[T.ramp(0, 1, FOUR)] = own.value_scale[T.ramp(i * FOUR, 1, FOUR)]
                for e in T.unroll(FOUR):
                    own.running[0] = T.max(own.running[0], own.four[e])
            power_of_two(own.running[0], own.power)
            own.power[0] = own.power[0] * T.float32(2**-bias)
            own.undo[0] = own.power[1] * T.float32(2**bias)
        for i in T.unroll(OWN):
            own.four[T.ramp(0, 1, FOUR)] = own.value_scale[T.ramp(column(i, tx), 1, FOUR)]
            for e in T.unroll(FOUR):
                if halves:
                    own.four[e] = own.four[e] * own.power[0]
                own.weight[i * FOUR + e] = own.weight[i * FOUR + e] * own.four[e]

    @T.inline
    def weigh(own, tx):
        own.running[0] = T.max(
            own.top[0], T.max(own.running[0], own.exchange[T.bitwise_xor(tx, 1)])
        )
        factor: T.let = T.exp2(own.top[0] - own.running[0])
        own.total[0] = own.total[0] * factor
        for i in T.unroll(own_pieces * FOUR):
            own.acc[i] = own.acc[i] * factor
        own.top[0] = own.running[0]
        for i in T.unroll(OWN * FOUR):
            own.weight[i] = T.exp2(own.weight[i] - own.top[0] + T.float32(bias))
            own.total[0] = own.total[0] + own.weight[i]
        if scaled:
            multiply_scales(own, tx)
        for part in T.unroll(parts):
            for i in T.unroll(OWN):
                round_four(own, own.weight, i * FOUR)
                own.kept[T.ramp(part * part_size + place(i, tx), 1, FOUR)] = own.rounded[
                    T.ramp(0, 1, FOUR)
                ]

    @T.inline
    def add(own, panel, tx):
        for i in T.unroll(OWN):
            own.four[T.ramp(0, 1, FOUR)] = own.score[T.ramp(place(i, tx), 1, FOUR)]
            for e in T.unroll(FOUR):
                if scaled and halves:
                    own.four[e] = own.four[e] * own.undo[0]
                own.acc[(panel * OWN + i) * FOUR + e] = (
                    own.acc[(panel * OWN + i) * FOUR + e] + own.four[e]
                )

    @T.inline
    def put_result(own, sinks, out, token0, head0, tx):
        if own.last[0] >= 0:
            head: T.let = head0 + tx // OF_ROW % HEADS
            sink: T.let = T.max(sinks[head] * T.float32(LOG2_E), T.float32(LOWEST))
            own.running[0] = T.max(own.top[0], sink)
            factor: T.let = T.exp2(own.top[0] - own.running[0] - T.float32(bias))
            total: T.let = own.exchange[tx] + own.exchange[T.bitwise_xor(tx, 1)]
            by: T.let = factor / (total * factor + T.exp2(sink - own.running[0]))
            for i in T.unroll(own_pieces):
                out[
                    token0 + tx // OF_ROW // HEADS,
                    T.ramp(head * head_dim + column(i, tx), 1, FOUR),
                ] = own.acc[T.ramp(i * FOUR, 1, FOUR)] * T.broadcast(by, FOUR)

    return ChunkRows(
        parts, pitch, ask, find_run, read_query, put_query, begin, take_scores, weigh, add,
        put_result,
    )  # fmt: skip
