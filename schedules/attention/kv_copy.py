"""Copy whole pages of one layer's KV cache: copy-on-write of a shared, half-filled page.

    kv [2, Hkv, pages, row], updated in place   source, destination i32 [c]
    kv[:, :, destination[i]] = kv[:, :, source[i]]

The copies have no order: no page may be a destination twice, or a destination and a source.

The layout is in formats/kv.py. Roofline: reads and writes a page once (32 KiB at 20b in float16).
"""

from __future__ import annotations

import numpy as np
import tvm

from mxforge.kv_layout import page_bytes, row_elements

from ..cpu.vectors import LANES
from ..formats.kv import KV
from ..gpu.items import one_thread_an_item
from ..kernel import Case, Kernel, Schedule, Signature, Size, T, Tensor, cpu, i32, prim_func

NAME = "kv_copy_pages"


def kv_copy_pages_ref(
    kv: np.ndarray, source: np.ndarray, destination: np.ndarray, **_static: object
) -> tuple[np.ndarray]:
    """The new kv, in float64."""
    new = kv.astype(np.float64)
    new[:, :, destination] = new[:, :, source]
    return (new,)


def signature(*, kv_heads: int, head_dim: int, kv_dtype: str) -> Signature:
    c = Size("c")
    return Signature(
        (
            KV[kv_dtype].tensor("kv", kv_heads, head_dim),
            i32("source", c),
            i32("destination", c),
        ),
        updated=("kv",),
    )


def _elements(
    arguments: tuple[Tensor, ...], *, kv_heads: int, head_dim: int, kv_dtype: str
) -> tvm.tirx.PrimFunc:
    """One item is one element."""
    width = row_elements(head_dim, kv_dtype)

    @T.inline
    def body(c, kv, source, destination):
        for i, part, h, e in T.grid(c, 2, kv_heads, width):
            with T.sblock("item"):
                vi, vp, vh, ve = T.axis.remap("SSSS", [i, part, h, e])
                # kv is left out of the reads: no item reads what another one writes.
                T.reads(source[vi], destination[vi])
                T.writes(kv[vp, vh, T.Cast("int64", destination[vi]), ve])
                kv[vp, vh, T.Cast("int64", destination[vi]), ve] = kv[
                    vp, vh, T.Cast("int64", source[vi]), ve
                ]

    return prim_func(arguments, body)


def _cpu(
    arguments: tuple[Tensor, ...], *, kv_heads: int, head_dim: int, kv_dtype: str
) -> tvm.tirx.PrimFunc:
    vectors = row_elements(head_dim, kv_dtype) // LANES

    @T.inline
    def body(c, kv, source, destination):
        for item in T.parallel(c * 2 * kv_heads):
            with T.sblock("item"):
                v = T.axis.spatial(c * 2 * kv_heads, item)
                i: T.let = v // (2 * kv_heads)
                part: T.let = v // kv_heads % 2
                h: T.let = v % kv_heads
                from_page: T.let = T.Cast("int64", source[i])
                to_page: T.let = T.Cast("int64", destination[i])
                for e in T.serial(vectors):
                    for lane in T.vectorized(LANES):
                        kv[part, h, to_page, e * LANES + lane] = kv[
                            part, h, from_page, e * LANES + lane
                        ]

    return prim_func(arguments, body)


def _case(
    name: str,
    pages: int,
    source: list[int],
    destination: list[int],
    kv_heads: int,
    head_dim: int,
    kv_dtype: str,
) -> Case:
    def inputs(rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {
            "kv": KV[kv_dtype].random_cache(rng, pages, kv_heads, head_dim),
            "source": np.array(source, np.int32),
            "destination": np.array(destination, np.int32),
        }

    return Case(
        name,
        {"kv_heads": kv_heads, "head_dim": head_dim, "kv_dtype": kv_dtype},
        inputs,
        tolerance=0.0,
        bytes=2 * len(source) * page_bytes(kv_heads, head_dim, kv_dtype),
    )


CASES = (
    _case("one page", 3, [2], [0], 2, 16, "float32"),
    _case("last page, odd head", 5, [0, 1], [4, 3], 3, 6, "float32"),
    _case("one source for two destinations", 6, [1, 1, 5], [0, 2, 3], 1, 40, "float16"),
    _case("bfloat16", 3, [2], [0], 2, 16, "bfloat16"),
    _case("int8, odd head", 5, [0, 1], [4, 3], 3, 6, "int8"),
    _case("20b pages", 8, [0, 1, 2], [7, 6, 5], 8, 64, "float16"),
)

KV_COPY_PAGES = Kernel(
    NAME,
    signature,
    kv_copy_pages_ref,
    CASES,
    (Schedule("heads of pages in parallel", cpu(), _cpu), one_thread_an_item(_elements)),
)
