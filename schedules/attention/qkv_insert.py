"""The first half of an attention layer in one launch: norm, projection, rotation, insertion.

    h = rms_norm(x, norm_weight, eps)                                   (rms_norm.py)
    qkv = h·Wᵀ + bias                                                   (linear.py)
    q, k rotated by positions; k, v stored in the paged cache           (kv_insert.py)

    x f32 [n, hidden]   norm_weight f32 [hidden]   bias f32 [rows], rows = (Hq + 2·Hkv)·D
    W [rows, hidden], as a dense format says, in one or more arguments called weight…
    cos_sin f32 [n, D]   positions, token_seq i32 [n]   page_table i32 [b, p]   first_page i32 [b]
    kv [2, Hkv, pages, row], updated in place -> q f32 [n, Hq·D], rotated

There is a kernel for each dense format that takes f32 inputs, and schedules of it where one launch
is faster than three: on GPUs. Elsewhere, and where none fits, the three kernels are called.

Roofline of decoding: the weight's bytes a step.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np

from ..formats.activations import F32
from ..formats.dense import BF16_WEIGHT, DenseWeight
from ..formats.kv import KV
from ..kernel import Case, Kernel, Schedule, Signature, Size, f32
from ..linear.i8 import I8_WEIGHT
from ..linear.linear import linear_ref
from ..rms_norm import rms_norm_ref
from . import qkv_insert_cuda as cuda
from .kv_insert import rope_kv_insert_ref
from .pages import paged_layout, table_arguments
from .qkv_insert_gpu import BF16_SCHEDULES, I8_SCHEDULES


def qkv_kernel(name: str, weight: DenseWeight, schedules: tuple[Schedule, ...]) -> Kernel:
    """The kernel of a weight in one format.

    Its static arguments are hidden, eps, heads, kv_heads, head_dim and kv_dtype. A schedule's
    `build` gets the arguments x, norm_weight, weight…, bias, cos_sin, positions, token_seq,
    page_table, first_page, kv, q.
    """
    return Kernel(
        name, partial(signature, weight), partial(qkv_ref, weight), _cases(weight), schedules
    )


def qkv_rows(heads: int, kv_heads: int, head_dim: int) -> int:
    return (heads + 2 * kv_heads) * head_dim


def signature(
    weight: DenseWeight, *, hidden: int, heads: int, kv_heads: int, head_dim: int, kv_dtype: str,
    **_eps: float,
) -> Signature:  # fmt: skip
    n = Size("n")
    rows = qkv_rows(heads, kv_heads, head_dim)
    return Signature(
        (
            f32("x", n, hidden),
            f32("norm_weight", hidden),
            *weight.tensors("weight", rows, hidden),
            f32("bias", rows),
            f32("cos_sin", n, head_dim),
            *table_arguments(n),
            KV[kv_dtype].tensor("kv", kv_heads, head_dim),
        ),
        (f32("q", n, heads * head_dim),),
        updated=("kv",),
    )


def qkv_ref(
    weight: DenseWeight,
    /,
    *,
    x: np.ndarray,
    norm_weight: np.ndarray,
    bias: np.ndarray,
    hidden: int,
    eps: float,
    heads: int,
    kv_heads: int,
    head_dim: int,
    kv_dtype: str,
    **arrays: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """(rotated q, the new kv), in float64."""
    rows = qkv_rows(heads, kv_heads, head_dim)
    names = [tensor.name for tensor in weight.tensors("weight", rows, hidden)]
    parts = {name: arrays.pop(name) for name in names}
    (h,) = rms_norm_ref(x, norm_weight, eps)
    (qkv,) = linear_ref(weight, F32, rows=rows, k=hidden, x=h, bias=bias, **parts)
    return rope_kv_insert_ref(
        qkv=qkv, heads=heads, kv_heads=kv_heads, head_dim=head_dim, kv_dtype=kv_dtype, **arrays
    )


def _case(
    weight: DenseWeight,
    name: str,
    spans: list[tuple[int, int]],
    hidden: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    kv_dtype: str = "float32",
    first: int = 0,
    spike: float = 1.0,
) -> Case:
    """A case inserting positions [begin, end) of every span, each to its own sequence.

    `first` drops that many tokens' pages from the front of each sequence, as sliding layers do;
    `spike` scales a channel of x.
    """
    n = sum(end - begin for begin, end in spans)
    rows = qkv_rows(heads, kv_heads, head_dim)

    def inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
        table, first_page, pages = paged_layout(rng, [(first, end) for _, end in spans])
        x = rng.standard_normal((n, hidden), dtype=np.float32)
        x[:, hidden // 2] *= spike
        w = rng.standard_normal((rows, hidden), dtype=np.float32) / np.float32(hidden**0.5)
        w[0, :32] = 0  # a block without a scale, where weights have one
        tensors = weight.tensors("weight", rows, hidden)
        parts = weight.quantize(w.astype("bfloat16"))
        angle = rng.uniform(0, 6, (n, head_dim // 2))
        cos_sin = np.concatenate([np.cos(angle), np.sin(angle)], axis=1) * 1.3465735
        return {
            "x": x,
            "norm_weight": rng.uniform(0.5, 2, hidden).astype(np.float32),
            **{tensor.name: part for tensor, part in zip(tensors, parts, strict=True)},
            "bias": rng.standard_normal(rows, dtype=np.float32),
            "cos_sin": cos_sin.astype(np.float32),
            "positions": np.concatenate([np.arange(*span, dtype=np.int32) for span in spans]),
            "token_seq": np.repeat(
                np.arange(len(spans), dtype=np.int32), [end - begin for begin, end in spans]
            ),
            "page_table": table,
            "first_page": first_page,
            "kv": KV[kv_dtype].random_cache(rng, pages, kv_heads, head_dim),
        }  # fmt: skip

    static = {
        "hidden": hidden, "eps": 1e-5, "heads": heads, "kv_heads": kv_heads,
        "head_dim": head_dim, "kv_dtype": kv_dtype,
    }  # fmt: skip
    tensors = weight.tensors("weight", rows, hidden)
    return Case(
        name,
        static,
        inputs,
        tolerance=max(2e-5, KV[kv_dtype].insert_tolerance),
        flops=2 * n * rows * hidden,
        bytes=sum(tensor.nbytes for tensor in tensors) + 4 * n * (hidden + rows),
    )


def _cases(weight: DenseWeight) -> tuple[Case, ...]:
    of = partial(_case, weight)
    return (
        of("one token, first of a page", [(16, 17)], 96, 4, 2, 32),
        of("one token, last of a page, a head of 16", [(31, 32)], 64, 8, 2, 16),
        of("two to five tokens over a page's edge", [(15, 17), (30, 33)], 160, 4, 1, 64, "float16"),
        of("two sequences, a token of each", [(7, 8), (20, 21)], 160, 4, 1, 64),
        of("a chunk", [(0, 9), (40, 48)], 64, 2, 2, 64, "bfloat16"),
        of(
            "position 131,071 of a sliding layer", [(131_071, 131_072)], 96, 4, 1, 16, first=130_944
        ),
        of("one channel 1000 times the others", [(5, 8)], 96, 4, 1, 64, spike=1000),
        *(
            of(f"{name}, a head of {d}, more inputs than a block has in flight", spans, k, 1, 1, d)
            for d in (16, 32, 64)
            for name, spans, k in (("one token", [(7, 8)], 4256), ("a chunk", [(0, 17)], 2144))
        ),
        of("150 tokens", [(0, 100), (40, 90)], 288, 4, 1, 64, "bfloat16"),
        *(
            of(f"140 tokens, heads of {d}", [(0, 3), (63, 200)], 288, 2, 2, d, "float16")
            for d in (16, 32)
        ),
        of("two to five tokens, scales", [(15, 17), (30, 33)], 160, 4, 1, 64, "int8"),
        of("17 tokens, scales", [(0, 9), (40, 48)], 96, 2, 2, 64, "int8"),
        of("60 tokens, scales", [(0, 9), (40, 91)], 96, 1, 1, 32, "int8"),
        of("130 tokens, scales", [(0, 90), (40, 80)], 96, 1, 1, 64, "int8"),
        of("one token, scales", [(7, 8)], 1312, 1, 1, 64, "int8"),
        of("three tokens, many heads", [(7, 8), (20, 22)], 96, 60, 3, 64),
        of("int8, one token", [(31, 32)], 160, 4, 2, 64, "int8"),
        of("int8, three tokens over a page's edge", [(15, 17), (7, 8)], 96, 3, 1, 32, "int8"),
        of("int8, one channel 1000 times the others", [(5, 8)], 96, 2, 1, 16, "int8", spike=1000),
        of("20b widths, one token", [(1000, 1001)], 2880, 8, 2, 64, "float16"),
        of("20b widths, one token, int8", [(1000, 1001)], 2880, 8, 2, 64, "int8"),
    )


# By the names of dense formats.
QKV_INSERT: dict[str, Kernel] = {
    "bf16": qkv_kernel("bf16w_norm_qkv_insert", BF16_WEIGHT, (*cuda.BF16, *BF16_SCHEDULES)),
    "i8xf32": qkv_kernel("i8w_norm_qkv_insert", I8_WEIGHT, (*cuda.I8, *I8_SCHEDULES)),
}
