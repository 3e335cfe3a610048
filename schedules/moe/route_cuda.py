"""`route` on CUDA: a block of many warps works on one token, by mma.sync; sm_80 and later.

The router is small and one block reads it all, so what counts is how long a load takes, not how
many bytes pass. All of 20b's 184 KB are on the way at once, to registers, before x is known: each
warp has a run of steps (cuda/dense.py) of two tiles of rows. 120b's four times as many follow as
registers come free.

    logits = Σ_i W[:, i]·(x[i]·norm_weight[i]) / rms(x) + bias

so that sums and squares meet once, at a barrier.
"""

# ruff: noqa: B023 (T.inline functions are expanded where they are called, not closures)

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import tvm

from ..cuda.dense import AT_ONCE, QUADS, STEP, Tiling
from ..cuda.instructions import LANES as WARP
from ..cuda.instructions import (
    MMA_ROWS,
    copies_done,
    copy_async,
    load_floats,
    shared_words,
    wait_for_launch_before,
)
from ..cuda.mxfp4 import bf16_pair
from ..formats.activations import F32, ActivationFormat
from ..gpu.lanes import LANES
from ..kernel import Schedule, T, Tensor, TileConfig, gpu, prim_func
from ..linear.bf16_cuda import BF16, layouts
from ..math import order_key
from .router_topk_gpu import chooser

TILING = Tiling()
MOST_READS = 2  # their numbers stay in registers
SHARED_BYTES = 48 << 10  # of a block, on every GPU


@dataclass(frozen=True)
class MatrixTile(TileConfig):
    warps: int  # of a block, at most
    loads: int  # of 16 bytes that a lane has in flight, at most


# 32 loads are 128 of the 168 registers that each of 384 threads may have: more warps would have
# fewer to spare. Not measured.
TILE = MatrixTile(warps=12, loads=32)


@dataclass(frozen=True)
class Shares:
    """How the block of a router shares it out."""

    experts: int
    hidden: int
    tile: MatrixTile

    @property
    def steps(self) -> int:
        return self.hidden // STEP

    @property
    def each(self) -> int:
        """Steps of a warp, at most."""
        return -(-self.steps // self.tile.warps)

    @property
    def reads(self) -> int:
        """Of four inputs, by a lane: a warp's come to AT_ONCE steps."""
        return -(-self.each // AT_ONCE)

    @property
    def warps(self) -> int:
        return -(-self.steps // self.each)

    @property
    def tiles(self) -> int:
        return TILING.tiles(self.experts)

    @property
    def together(self) -> int:
        """Tiles of rows in flight."""
        return min(self.tiles, max(1, self.tile.loads // (self.each * BF16.mmas)))

    @property
    def sums_at(self) -> int:
        """In shared memory, behind the parts of inputs: a warp's sums; behind them its squares."""
        return self.warps * self.reads * AT_ONCE * BF16.words

    @property
    def squares_at(self) -> int:
        return self.sums_at + self.warps * self.experts

    @property
    def bias_at(self) -> int:
        return self.squares_at + -(-self.warps // 4) * 4  # 16 bytes are copied at once

    @property
    def words(self) -> int:
        return self.bias_at + self.experts


def _fits(*, experts: int, top_k: int, hidden: int, eps: float) -> bool:
    """A thread is an expert in the end, and brings four inputs in the beginning."""
    if hidden % STEP or experts % MMA_ROWS:
        return False
    shares = Shares(experts, hidden, TILE)
    threads, numbers = shares.warps * WARP, shares.words + 2 * experts + top_k
    return shares.reads <= MOST_READS and experts <= threads and 4 * numbers <= SHARED_BYTES


def _build(
    activations: ActivationFormat,
    arguments: tuple[Tensor, ...],
    *,
    experts: int,
    top_k: int,
    hidden: int,
    eps: float,
    tile: MatrixTile,
) -> tvm.tirx.PrimFunc:
    shares = Shares(experts, hidden, tile)
    steps, each, reads, warps = shares.steps, shares.each, shares.reads, shares.warps
    tiles, together = shares.tiles, shares.together
    sums_at, squares_at, bias_at = shares.sums_at, shares.squares_at, shares.bias_at
    rounds, threads, sums = -(-tiles // together), warps * WARP, 2 * BF16.sums
    lanes, choose = LANES["cuda"], chooser(experts, top_k, threads)

    def count_of(warp: Any) -> Any:
        """Steps of a warp."""
        if steps % warps == 0:
            return T.int32(each)
        return (warp + 1) * steps // warps - warp * steps // warps

    def step(i: Any, lane: Any) -> Any:
        """Of a lane's i-th four inputs, the warp's step."""
        return i * AT_ONCE + lane // QUADS

    def first(i: Any, warp: Any, lane: Any) -> Any:
        """The first of them."""
        known = T.min(step(i, lane), count_of(warp) - 1)
        return (warp * steps // warps + known) * STEP + lane % QUADS * 4

    @T.inline
    def put(h, n, token, at, four, i, pairs):
        """Four numbers of h."""
        if activations is F32:
            h[token, T.ramp(at, 1, 4)] = four[T.ramp(i, 1, 4)]
        else:
            words = T.decl_buffer((n, hidden // 2), "uint32", data=h.data)
            for j in T.unroll(2):
                pairs[j] = bf16_pair(four[i + 2 * j], four[i + 2 * j + 1])
            words[token, T.ramp(at // 2, 1, 2)] = pairs[T.ramp(0, 1, 2)]

    @T.inline
    def body(n, x, norm_weight, weight, bias, h, ids, weights):
        for token_block in T.thread_binding(n, thread="blockIdx.x"):
            for thread in T.thread_binding(threads, thread="threadIdx.x"):
                with T.sblock("token"):
                    vt, tx = T.axis.remap("SS", [token_block, thread])
                    T.reads(
                        x[vt, 0:hidden], norm_weight[0:hidden],
                        weight[0 : tiles * steps, 0 : weight.shape[1]], bias[0:experts],
                    )  # fmt: skip
                    T.writes(h[vt, 0:hidden], ids[vt, 0:top_k], weights[vt, 0:top_k])
                    shared = T.sblock_alloc_buffer((shares.words,), "uint32", scope="shared")
                    logits = T.sblock_alloc_buffer((experts,), "float32", scope="shared")
                    keys = T.sblock_alloc_buffer((experts,), "int32", scope="shared")
                    chosen = T.sblock_alloc_buffer((top_k,), "float32", scope="shared")
                    w = T.sblock_alloc_buffer(
                        (each * together * BF16.mmas * 4,), "uint32", scope="local"
                    )
                    four = T.sblock_alloc_buffer((reads * 4,), "float32", scope="local")
                    parts = T.sblock_alloc_buffer((4,), "uint32", scope="local")
                    acc = T.sblock_alloc_buffer((together * sums,), "float32", scope="local")
                    square = T.sblock_alloc_buffer((1,), "float32", scope="local")
                    rank = T.sblock_alloc_buffer((1,), "int32", scope="local")
                    total = T.sblock_alloc_buffer((1,), "float32", scope="local")
                    largest = T.sblock_alloc_buffer((1,), "float32", scope="local")
                    warp: T.let = tx // WARP
                    lane: T.let = tx % WARP
                    begin: T.let = warp * steps // warps
                    count: T.let = count_of(warp)
                    items: T.let = warp * (reads * AT_ONCE * BF16.words)

                    @T.inline
                    def load(of_round, s):
                        # Steps and tiles too many are others again: their inputs are zero, or
                        # their sums are left out.
                        for m in T.unroll(together):
                            BF16.load(
                                (weight,), s * together + m,
                                T.min(of_round * together + m, tiles - 1) * steps
                                + begin + T.min(s, count - 1),
                                lane, w, None,
                            )  # fmt: skip

                    @T.inline
                    def stage():
                        square[0] = T.float32(0)
                        for i in T.unroll(reads):
                            T.evaluate(
                                shared_words(
                                    (parts[0], parts[1], parts[2], parts[3]),
                                    shared[items + (i * WARP + lane) * 4],
                                )
                            )
                            for j in T.unroll(4):
                                square[0] = square[0] + four[i * 4 + j] * four[i * 4 + j]
                                four[i * 4 + j] = four[i * 4 + j] * T.reinterpret(
                                    "float32", parts[j]
                                )
                        T.cuda.warp_sync()
                        for i in T.unroll(reads):
                            BF16.stage(
                                shared, items, step(i, lane), lane % QUADS, AT_ONCE, True,
                                four, i * 4, parts,
                            )  # fmt: skip
                        square[0] = lanes.total(square[0])
                        if lane == 0:
                            shared[squares_at + warp] = T.reinterpret("uint32", square[0])

                    @T.inline
                    def multiply(of_round):
                        for i in T.unroll(together * sums):
                            acc[i] = T.float32(0)
                        for s in T.unroll(each):
                            BF16.fetch(
                                shared, items, s, lane // 4 % BF16.columns, s, AT_ONCE, s,
                                lane % 4, parts,
                            )  # fmt: skip
                            for m in T.unroll(together):
                                BF16.multiply(
                                    parts, lane % 4, w, None, s * together + m, AT_ONCE, s, acc,
                                    m * sums,
                                )  # fmt: skip
                            if of_round + 1 < rounds:
                                load(of_round + 1, s)

                    @T.inline
                    def leave_sums(of_round):
                        for m in T.unroll(together):
                            for second in T.unroll(2):
                                sum: T.let = BF16.total(acc, m * sums + second * BF16.sums, 0)
                                row: T.let = TILING.row(of_round * together + m, lane // 4, second)
                                if lane % 4 == 0 and row < experts:
                                    shared[sums_at + warp * experts + row] = T.reinterpret(
                                        "uint32", sum
                                    )

                    @T.inline
                    def take_factor():
                        """square[0] = 1 / rms(x), of what the warps left."""
                        square[0] = T.float32(0)
                        if lane < warps:
                            square[0] = T.reinterpret("float32", shared[squares_at + lane])
                        square[0] = lanes.total(square[0])
                        square[0] = T.float32(1) / T.sqrt(
                            square[0] / T.float32(hidden) + T.float32(eps)
                        )

                    @T.inline
                    def take_logit():
                        total[0] = T.float32(0)
                        for other in T.unroll(warps):
                            total[0] = total[0] + T.reinterpret(
                                "float32", shared[sums_at + other * experts + tx]
                            )
                        total[0] = total[0] * square[0] + T.reinterpret(
                            "float32", shared[bias_at + tx]
                        )
                        logits[tx] = total[0]
                        keys[tx] = order_key(total[0])

                    for s in T.unroll(each):
                        load(0, s)
                    # Not to registers, which the weights have. The norm's lie where the lane's
                    # inputs will.
                    for i in T.unroll(reads):
                        copy_async(
                            T.address_of(shared[items + (i * WARP + lane) * 4]),
                            T.address_of(norm_weight[first(i, warp, lane)]),
                        )
                    if tx < experts // 4:
                        copy_async(
                            T.address_of(shared[bias_at + tx * 4]), T.address_of(bias[tx * 4])
                        )
                    wait_for_launch_before()
                    for i in T.unroll(reads):
                        four[T.ramp(i * 4, 1, 4)] = T.broadcast(T.float32(0), 4)
                        if step(i, lane) < count:
                            load_floats(four, i * 4, x[vt, first(i, warp, lane)])
                    copies_done()
                    stage()
                    T.cuda.warp_sync()
                    for of_round in T.serial(rounds):
                        multiply(of_round)
                        leave_sums(of_round)
                    T.tvm_storage_sync("shared")
                    take_factor()
                    if tx < experts:
                        take_logit()
                    for i in T.unroll(reads):
                        if step(i, lane) < count:
                            for j in T.unroll(4):
                                four[i * 4 + j] = four[i * 4 + j] * square[0]
                            put(h, n, vt, first(i, warp, lane), four, i * 4, parts)
                    T.tvm_storage_sync("shared")
                    choose(logits, keys, chosen, rank, total, largest, ids, weights, vt, tx)

    return prim_func(arguments, body)


def schedule(activations: ActivationFormat) -> Schedule:
    """Of the kernel whose h is in this format of activations."""
    return Schedule(
        "a block of warps a token, experts as a matrix",
        gpu("cuda", "sm_80"),
        partial(_build, activations),
        TILE,
        layouts(TILING),
        fits=_fits,
    )
