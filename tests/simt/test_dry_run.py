"""What docs/adding-a-kernel.md says of adding a schedule, done: an entry and a function each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tvm
from support.kernels import compare, made_inputs
from support.simt.kernels import program_of, run_case
from support.targets import CUDA, METAL, PLAIN_CPU, VULKAN

from mxforge.compile import cuda
from mxforge.compile.targets import gpu_target
from mxforge.schedules.gather import GATHER_ROWS
from mxforge.schedules.gpu.items import GpuTile
from mxforge.schedules.kernel import Schedule, T, Tensor, gpu, prim_func

SIZE = 16  # of a cooperative matrix


def _four_elements(
    arguments: tuple[Tensor, ...], *, hidden: int, tile: GpuTile
) -> tvm.tirx.PrimFunc:
    """A block of threads is a row; a thread copies four neighbours at once."""
    quads = hidden // 4

    @T.inline
    def body(m, x, rows, y):
        for row in T.thread_binding(m, thread="blockIdx.x"):
            for thread in T.thread_binding(tile.threads, thread="threadIdx.x"):
                with T.sblock("row"):
                    r, t = T.axis.remap("SS", [row, thread])
                    T.reads(x[0 : x.shape[0], 0:hidden], rows[r])
                    T.writes(y[r, 0:hidden])
                    for i in T.serial(-(-quads // tile.threads)):
                        if i * tile.threads + t < quads:
                            y[r, T.ramp((i * tile.threads + t) * 4, 1, 4)] = x[
                                rows[r], T.ramp((i * tile.threads + t) * 4, 1, 4)
                            ]

    return prim_func(arguments, body)


def _matrices(arguments: tuple[Tensor, ...], *, hidden: int) -> tvm.tirx.PrimFunc:
    """A block of one thread copies a tile; the matrix is declared, and filled with zeros only."""

    @T.inline
    def body(m, x, rows, y):
        for row in T.thread_binding(m, thread="blockIdx.x"):
            for column in T.thread_binding(hidden // SIZE, thread="blockIdx.y"):
                with T.sblock("tile"):
                    r, c = T.axis.remap("SS", [row, column])
                    T.reads(x[rows[r], c * SIZE : c * SIZE + SIZE], rows[r])
                    T.writes(y[r, c * SIZE : c * SIZE + SIZE])
                    tile = T.sblock_alloc_buffer(
                        (SIZE * SIZE,), "float32", scope="wmma.accumulator"
                    )
                    T.evaluate(T.tvm_fill_fragment(tile.data, SIZE, SIZE, SIZE, 0, T.float32(0)))
                    for i in T.serial(SIZE):
                        y[r, c * SIZE + i] = x[rows[r], c * SIZE + i]

    return prim_func(arguments, body)


KERNEL = replace(
    GATHER_ROWS,
    schedules=(
        Schedule(
            "four elements a thread",
            gpu("cuda", "sm_90a"),
            _four_elements,
            GpuTile(threads=64),
            fits=lambda hidden: hidden % 4 == 0,
        ),
        Schedule(
            "matrices",
            gpu("vulkan", "threads256"),
            _matrices,
            fits=lambda hidden: hidden % SIZE == 0,
        ),
        *GATHER_ROWS.schedules,
    ),
)


@pytest.mark.parametrize(
    ("target", "hidden", "name"),
    [
        (CUDA, 64, "four elements a thread"),
        (CUDA, 50, "one thread an item"),
        (gpu_target("cuda", *cuda.features("sm_89")), 64, "one thread an item"),
        (gpu_target("cuda", *cuda.features("sm_120a")), 64, "one thread an item"),
        (VULKAN, 64, "matrices"),
        (gpu_target("vulkan"), 64, "one thread an item"),
        (METAL, 64, "one thread an item"),
        (PLAIN_CPU, 64, "parallel items"),
    ],
)
def test_only_the_targets_that_have_what_it_needs_take_it(target, hidden, name):
    assert KERNEL.choose(target, hidden=hidden).name == name
    func = KERNEL.build(target, hidden=hidden)
    assert str(func.attrs["mxforge.schedule"]) == name


@pytest.mark.parametrize("case", KERNEL.cases, ids=lambda case: case.name)
def test_the_new_code_is_right_where_it_is_taken(simt, case):
    schedule = KERNEL.choose(CUDA, **case.static)
    program = program_of(simt, "cuda", KERNEL, case, schedule)
    compare(KERNEL, case, made_inputs(case), run_case(simt, program, KERNEL, case, schedule))


def test_the_new_code_has_loads_of_128_bits(simt):
    (case,) = (case for case in KERNEL.cases if case.static["hidden"] == 2880)
    text = program_of(simt, "cuda", KERNEL, case, KERNEL.schedules[0]).text
    assert "float4" in text
