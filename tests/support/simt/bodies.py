"""Small kernels whose body is written by hand, in CUDA's or Metal's language."""

from __future__ import annotations

import re
from functools import cache

import tvm

from mxforge.schedules.kernel import T

from .harness import Program, Simt


@cache
def _copy(dtype: str, blocks: int, threads: int) -> tvm.tirx.PrimFunc:
    """y = x, an element a thread: what a hand-written body takes the place of."""
    n = blocks * threads

    @T.prim_func(s_tir=True, private=True)
    def main(x: T.Buffer((n,), dtype), y: T.Buffer((n,), dtype)):
        for block in T.thread_binding(blocks, thread="blockIdx.x"):
            for thread in T.thread_binding(threads, thread="threadIdx.x"):
                with T.sblock("copy"):
                    i = T.axis.spatial(n, block * threads + thread)
                    y[i] = x[i]

    return main


def compile_body(
    simt: Simt, kind: str, body: str, dtype: str = "float32", blocks: int = 1, threads: int = 64
) -> Program:
    """A kernel with arguments x, which it may only read, and y, of blocks · threads elements.

    `body` sees pointers x and y, `tx` (thread of the block) and `bx` (block).
    """
    index = {"cuda": "int tx = threadIdx.x, bx = blockIdx.x;", "metal": METAL_INDEX}[kind]

    def edit(text: str) -> str:
        head = re.search(r"main_kernel\([^;{]*\) \{", text)
        assert head, text
        return f"{text[: head.end()]}\n auto x = x_ptr; auto y = y_ptr; {index}\n{body}\n}}\n"

    return simt.compile(_copy(dtype, blocks, threads), kind, edit)


METAL_INDEX = "int tx = threadIdx, bx = blockIdx;"
