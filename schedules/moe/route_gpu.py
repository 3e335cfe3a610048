"""`route` on GPUs: a block of threads works on one token, a warp on some experts at a time.

One block reads the whole router, so that loads in flight count: a warp's first ones begin before it
reads x, and the next follow as registers come free. The norm's factor comes last,

    logits = Σ_i W[:, i]·(x[i]·norm_weight[i]) / rms(x) + bias

so that inputs and squares take one barrier. The inputs are staged in shared memory. A lane's vector
of weights is 16 bytes, 4 inputs of the first half of a row and 4 of the second: so the lanes of a
warp read neighbouring weights and neighbouring inputs, whatever the number of lanes is.
"""

# ruff: noqa: B023 (T.inline functions are expanded where they are called, not closures)

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import tvm

from ..formats.activations import F32, ActivationFormat
from ..gpu.lanes import LANES
from ..kernel import Layout, Schedule, T, Tensor, TileConfig, gpu, prim_func
from ..math import order_key
from ..rms_norm_gpu import BlockNorm
from .router_topk_gpu import chooser

VECTOR = 8  # weights of 16 bytes


@dataclass(frozen=True)
class RouteTile(TileConfig):
    threads: int  # of a block
    experts: int  # of a warp at a time
    depth: int  # vectors of each that a lane has in flight
    shared_bytes: int  # that the target's blocks have


def _pack(weight: np.ndarray) -> np.ndarray:
    """bf16 [experts, hidden] -> u32 [experts, hidden / 8, 4]: the module's vectors."""
    experts, hidden = weight.shape
    halves = weight.view(np.uint16).reshape(experts, 2, hidden // VECTOR, VECTOR // 2)
    vectors = np.ascontiguousarray(halves.swapaxes(1, 2))
    return vectors.view(np.uint32).reshape(experts, hidden // VECTOR, 4)


VECTORS = Layout(shape=lambda shape: (shape[0], shape[1] // VECTOR, 4), pack=_pack, dtype="uint32")


def _norm(family: str, tile: RouteTile, hidden: int, eps: float) -> BlockNorm:
    return BlockNorm(family, tile.threads, hidden, eps)


def _fits(
    family: str, tile: RouteTile, *, experts: int, top_k: int, hidden: int, eps: float
) -> bool:
    norm = _norm(family, tile, hidden, eps)
    numbers = hidden + norm.sums.elements + 2 * experts + top_k
    return hidden % VECTOR == 0 and norm.fits and 4 * numbers <= tile.shared_bytes


def _build(
    family: str,
    activations: ActivationFormat,
    arguments: tuple[Tensor, ...],
    *,
    experts: int,
    top_k: int,
    hidden: int,
    eps: float,
    tile: RouteTile,
) -> tvm.tirx.PrimFunc:
    threads, together, depth = tile.threads, tile.experts, tile.depth
    lanes, norm = LANES[family], _norm(family, tile, hidden, eps)
    # TVM's cast of vectors to 16 bits is not Metal.
    loop = T.vectorized if activations is F32 else T.unroll
    each, width = norm.each, norm.width
    choose = chooser(experts, top_k, threads)
    vectors = hidden // VECTOR
    groups = -(-experts // together)
    warps = lanes.count(threads)

    @T.inline
    def body(n, x, norm_weight, weight, bias, h, ids, weights):
        for t in T.thread_binding(n, thread="blockIdx.x"):
            with T.sblock("token"):
                vt = T.axis.spatial(n, t)
                parts = T.sblock_alloc_buffer((norm.sums.elements,), "float32", scope="shared")
                staged = T.sblock_alloc_buffer((hidden,), "float32", scope="shared")
                logits = T.sblock_alloc_buffer((experts,), "float32", scope="shared")
                keys = T.sblock_alloc_buffer((experts,), "int32", scope="shared")
                chosen = T.sblock_alloc_buffer((top_k,), "float32", scope="shared")
                for tx in T.thread_binding(threads, thread="threadIdx.x"):
                    with T.sblock("thread"):
                        T.reads(
                            x[vt, 0:hidden], norm_weight[0:hidden],
                            weight[0:experts, 0:vectors, 0:4], bias[0:experts],
                        )  # fmt: skip
                        T.writes(h[vt, 0:hidden], ids[vt, 0:top_k], weights[vt, 0:top_k])
                        kept = T.sblock_alloc_buffer((norm.elements,), "float32", scope="local")
                        factor = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        inputs = T.sblock_alloc_buffer((VECTOR,), "float32", scope="local")
                        words = T.sblock_alloc_buffer(
                            (depth * together * 4,), "uint32", scope="local"
                        )
                        acc = T.sblock_alloc_buffer((together,), "float32", scope="local")
                        begin = T.sblock_alloc_buffer((together,), "float32", scope="local")
                        warp = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        lane = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        size = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        turns = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        rank = T.sblock_alloc_buffer((1,), "int32", scope="local")
                        total = T.sblock_alloc_buffer((1,), "float32", scope="local")
                        largest = T.sblock_alloc_buffer((1,), "float32", scope="local")

                        @T.inline
                        def stage(first, place):
                            for i in T.vectorized(width):
                                kept[place + i] = kept[place + i] * norm_weight[first + i]
                            for i in T.vectorized(width):
                                staged[first + i] = kept[place + i]

                        @T.inline
                        def put(first, place):
                            for i in T.vectorized(width):
                                kept[place + i] = kept[place + i] * factor[0]
                            for i in loop(width):
                                h[vt, first + i] = activations.put(kept[place + i])

                        @T.inline
                        def load(group, j, d):
                            # Past the end of a row, its last vector, and past the last expert,
                            # that one: no branch between loads.
                            v: T.let = T.min((j * depth + d) * size[0] + lane[0], vectors - 1)
                            for e in T.unroll(together):
                                words[T.ramp((d * together + e) * 4, 1, 4)] = weight[
                                    T.min(group * together + e, experts - 1), v, T.ramp(0, 1, 4)
                                ]

                        @T.inline
                        def multiply(v, place):
                            for half in T.unroll(2):
                                inputs[T.ramp(half * 4, 1, 4)] = staged[
                                    T.ramp(half * (hidden // 2) + v * 4, 1, 4)
                                ]
                            for e in T.unroll(together):
                                for word in T.unroll(4):
                                    pair: T.let = words[place + e * 4 + word]
                                    acc[e] = acc[e] + inputs[word * 2] * T.reinterpret(
                                        "float32", T.shift_left(pair, T.uint32(16))
                                    )
                                    acc[e] = acc[e] + inputs[word * 2 + 1] * T.reinterpret(
                                        "float32", T.bitwise_and(pair, T.uint32(0xFFFF0000))
                                    )

                        @T.inline
                        def dot(group):  # acc: the warp's experts' sums
                            for e in T.unroll(together):
                                begin[e] = bias[T.min(group * together + e, experts - 1)]
                                acc[e] = T.float32(0)
                            for j in T.serial(turns[0]):
                                for d in T.unroll(depth):
                                    if (j * depth + d) * size[0] + lane[0] < vectors:
                                        multiply(
                                            (j * depth + d) * size[0] + lane[0], d * together * 4
                                        )
                                    if j + 1 < turns[0]:
                                        load(group, j + 1, d)
                                    elif group + warps < groups:
                                        load(group + warps, 0, d)
                            for e in T.unroll(together):
                                acc[e] = lanes.total(acc[e])

                        @T.inline
                        def keep(group):
                            for e in T.unroll(together):
                                if group * together + e < experts:
                                    acc[e] = acc[e] * factor[0] + begin[e]
                                    logits[group * together + e] = acc[e]
                                    keys[group * together + e] = order_key(acc[e])

                        warp[0] = lanes.number(tx)
                        lane[0] = lanes.lane(tx)
                        size[0] = lanes.size()
                        turns[0] = (vectors + size[0] * depth - 1) // (size[0] * depth)
                        if warp[0] < groups:
                            for d in T.unroll(depth):
                                load(warp[0], 0, d)
                        norm.squares(x, vt, kept, factor, tx)
                        each(stage, tx)
                        norm.sums.share(factor, parts, tx)
                        norm.factor(parts, factor)
                        for i in T.serial((groups + warps - 1) // warps):
                            if i * warps + warp[0] < groups:
                                dot(i * warps + warp[0])
                                if lanes.first(tx):
                                    keep(i * warps + warp[0])
                        each(put, tx)
                        T.tvm_storage_sync("shared")
                        choose(logits, keys, chosen, rank, total, largest, ids, weights, vt, tx)

    return prim_func(arguments, body)


# (family, what its devices have to offer, tile), best first. Of 20b's rows of 360 vectors a lane
# has 12 of a warp with 32 lanes, and 6 of one with 64. Not measured.
_TABLE = (
    ("cuda", (), RouteTile(threads=512, experts=2, depth=6, shared_bytes=48 << 10)),
    ("metal", (), RouteTile(threads=512, experts=2, depth=4, shared_bytes=32 << 10)),
    ("vulkan", ("threads256",), RouteTile(threads=256, experts=4, depth=4, shared_bytes=32 << 10)),
    ("vulkan", (), RouteTile(threads=128, experts=4, depth=4, shared_bytes=16 << 10)),
)


def schedules(activations: ActivationFormat) -> tuple[Schedule, ...]:
    """Of the kernel whose h is in this format of activations."""
    return tuple(
        Schedule(
            f"a block of {tile.threads} threads a token, {family}",
            gpu(family, *features),
            partial(_build, family, activations),
            tile,
            {"weight": VECTORS},
            fits=partial(_fits, family, tile),
        )
        for family, features, tile in _TABLE
    )
