"""Matrix units that take fragments from shared memory, in the words of each GPU family."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any

from ..kernel import T


@T.inline
def _put(tiles, at, four):
    tiles[T.ramp(at, 1, 4)] = four[T.ramp(0, 1, 4)]


@dataclass(frozen=True)
class Matrices:
    """A family's words; functions give TensorIR expressions for all lanes of a warp at once.

    A fragment is rows × depth of W, depth × columns of X or rows × columns of sums, and number i of
    a buffer that has room for some. Which lane has which element is nobody else's business.

    family: whose words (lanes.py) the rest of a kernel is in
    lanes: of a warp
    dtype: of W and X in shared memory, float32 or float16; sums are f32
    parts: numbers of this type whose sum is an input
    scopes: of buffers of fragments: W's, X's, sums
    shared_by: lanes that have a fragment between them, each a buffer of its part; 1 where a buffer
        is all lanes'
    pads: elements between two rows of W, two tokens of X and two tokens of sums in shared memory,
        so that a warp's accesses are to different banks, of steps of 32 inputs and 64 rows of sums
    fill(sums, i)                      = 0
    load_w(w, i, element, pitch)       from W [row][input], from `element` on
    load_x(x, i, element, pitch)       from X [token][input]
    load_x_rows(x, i, element, pitch)  from X [input][token], of rows that W's pad is for; None, as
        is store_rows, where attention does without these units
    multiply(sums, i, w, j, x, m)      sums += w · x
    store(sums, i, element, pitch)     to sums [token][row]
    store_rows(sums, i, element, pitch)   to sums [row][token]
    put(tiles, at, four)               four elements of this dtype to shared memory, at `at` on
    warps: of a block of 64 rows and 64 tokens, along these
    there()                            for the host: whether the device has them; None where all do
    otherwise: taken where it does not; None where there are no others
    """

    family: str
    rows: int
    columns: int
    depth: int
    lanes: int
    dtype: str
    parts: int
    scopes: tuple[str, str, str]
    pads: tuple[int, int, int]
    fill: Callable[..., Any]
    load_w: Callable[..., Any]
    load_x: Callable[..., Any]
    multiply: Callable[..., Any]
    store: Callable[..., Any]
    shared_by: int = 1
    put: Callable[..., Any] = _put
    load_x_rows: Callable[..., Any] | None = None
    store_rows: Callable[..., Any] | None = None
    warps: tuple[int, int] = (2, 2)
    there: Callable[[], Any] | None = None
    otherwise: Matrices | None = None

    def others(self) -> Iterator[Matrices]:
        """What is taken instead, best first."""
        if self.otherwise is not None:
            yield self.otherwise
            yield from self.otherwise.others()

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Elements of a fragment in a buffer."""
        rows, columns, depth, lanes = self.rows, self.columns, self.depth, self.shared_by
        return (rows * depth // lanes, depth * columns // lanes, rows * columns // lanes)


def _metal_load(transposed: bool) -> Callable[..., Any]:
    def load(to: Any, i: Any, element: Any, pitch: int) -> Any:
        return T.metal.simdgroup_load(to.data, i, T.address_of(element), pitch, 8, 8, transposed)

    return load


def _metal_store(transposed: bool) -> Callable[..., Any]:
    def store(sums: Any, i: Any, element: Any, pitch: int) -> Any:
        return T.metal.simdgroup_store(sums.data, i, T.address_of(element), pitch, 8, 8, transposed)

    return store


Shape = tuple[int, int, int]  # rows, columns, depth


def _cooperative_load(layout: str, shape: Shape) -> Callable[..., Any]:
    def load(to: Any, i: Any, element: Any, pitch: int) -> Any:
        return T.tvm_load_matrix_sync(to.data, *shape, i, T.address_of(element), pitch, layout)

    return load


def _cooperative_store(layout: str, shape: Shape) -> Callable[..., Any]:
    def store(sums: Any, i: Any, element: Any, pitch: int) -> Any:
        return T.tvm_store_matrix_sync(sums.data, *shape, i, T.address_of(element), pitch, layout)

    return store


def _cooperative(*shapes: tuple[Shape, int, tuple[int, int]]) -> Matrices:
    """Cooperative matrices of float16 into float32: shape, lanes and warps, best first."""
    (shape, lanes, warps), *others = shapes
    product = "x".join(map(str, shape)) + " float16 float16 float32 float32"

    @T.inline
    def fill(sums, i):
        T.evaluate(T.call_extern("int32", "subgroupRequireSize", lanes))
        T.evaluate(T.tvm_fill_fragment(sums.data, *shape, i, T.float32(0)))

    return Matrices(
        family="vulkan",
        rows=shape[0],
        columns=shape[1],
        depth=shape[2],
        lanes=lanes,
        dtype="float16",
        parts=2,
        scopes=("wmma.matrix_a", "wmma.matrix_b", "wmma.accumulator"),
        pads=(8, 8, 4),
        fill=fill,
        load_w=_cooperative_load("row_major", shape),
        load_x=_cooperative_load("col_major", shape),
        load_x_rows=_cooperative_load("row_major", shape),
        multiply=lambda sums, i, w, j, x, m: T.tvm_mma_sync(
            sums.data, i, w.data, j, x.data, m, sums.data, i
        ),
        store=_cooperative_store("col_major", shape),
        store_rows=_cooperative_store("row_major", shape),
        warps=warps,
        there=lambda: T.call_packed("mxforge.vulkan.multiplies", product, lanes) == 1,
        otherwise=_cooperative(*others) if others else None,
    )


# mma m16n8k8 of float16 (PTX ISA, "Matrix Fragments for mma.m16n8k8"), lane 4g + t: of W the inputs
# 2t and 2t + 1 of row g and of row g + 8, of X those of column g; of sums row g and then row g + 8
# of columns 2t and 2t + 1. TVM's vectors of four float16 would be stored one by one; the last one
# is named, since TVM makes shared memory as large as the elements that it sees.
_HEAD = "#include <cuda_fp16.h>\n__forceinline__ __device__ void"
_LANE = "int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;"
_MMA = {
    "mx_put8": f"""{_HEAD} mx_put8(half* last, const half* from) {{
  *(uint2*)(last - 3) = *(const uint2*)from;
}}
""",
    "mx_load_w8": f"""{_HEAD} mx_load_w8(half* to, const half* start, int pitch) {{
  {_LANE}
  for (int i = 0; i < 2; i++)
    *(half2*)(to + 2 * i) = *(const half2*)(start + (g + 8 * i) * pitch + 2 * t);
}}
""",
    "mx_load_x8": f"""{_HEAD} mx_load_x8(half* to, const half* start, int pitch) {{
  {_LANE}
  *(half2*)to = *(const half2*)(start + g * pitch + 2 * t);
}}
""",
    "mx_multiply8": f"""{_HEAD} mx_multiply8(float* d, const half* w, const half* x) {{
  const uint32_t *a = (const uint32_t*)w, *b = (const uint32_t*)x;
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 \
{{%0, %1, %2, %3}}, {{%4, %5}}, {{%6}}, {{%0, %1, %2, %3}};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(b[0]));
}}
""",
    "mx_store8": f"""{_HEAD} mx_store8(const float* d, float* start, int pitch) {{
  {_LANE}
  for (int i = 0; i < 4; i++) start[(2 * t + i % 2) * pitch + g + i / 2 * 8] = d[i];
}}
""",
}


def _mma(name: str, *arguments: Any) -> Any:
    return T.evaluate(T.cuda.func_call(name, *arguments, source_code=_MMA[name]))


@T.inline
def _zeros(sums, i):
    for j in T.unroll(4):
        sums[4 * i + j] = T.float32(0)


def unless_there(units: Matrices | None, condition: Any) -> Any:
    """For the host: the condition, or that the device has none of `units` and its others."""
    if units is None:
        return condition
    asked = [one.there() for one in (units, *units.others()) if one.there is not None]
    return T.Or(condition, T.Not(reduce(T.Or, asked))) if asked else condition


# By a family and what a target has to have besides, best first.
#
# Apple's GPUs multiply float32 as fast as float16 (half as fast from M3 on, not measured), and need
# no parts of inputs and no powers of two to be exact.
MATRICES: dict[tuple[str, ...], Matrices] = {
    ("metal",): Matrices(
        family="metal",
        rows=8,
        columns=8,
        depth=8,
        lanes=32,
        dtype="float32",
        parts=1,
        scopes=("metal.simdgroup",) * 3,
        pads=(8, 4, 4),
        fill=lambda sums, i: T.metal.make_filled_simdgroup_matrix(
            sums.data, i, T.float32(0), 8, 8
        ),
        load_w=_metal_load(False),
        load_x=_metal_load(True),
        load_x_rows=_metal_load(False),
        multiply=lambda sums, i, w, j, x, m: T.metal.simdgroup_multiply_accumulate(
            sums.data, i, w.data, j, x.data, m, sums.data, i
        ),
        store=_metal_store(True),
        store_rows=_metal_store(False),
    ),
    # From sm_75 on; later ones have schedules of their own, which come first.
    ("cuda",): Matrices(
        family="cuda",
        rows=16,
        columns=8,
        depth=8,
        lanes=32,
        dtype="float16",
        parts=2,
        scopes=("local",) * 3,
        shared_by=32,
        pads=(8, 8, 4),
        fill=_zeros,
        put=lambda tiles, at, four: _mma(
            "mx_put8", T.address_of(tiles[at + 3]), T.address_of(four[0])
        ),
        load_w=lambda w, i, element, pitch: _mma(
            "mx_load_w8", T.address_of(w[4 * i]), T.address_of(element), pitch
        ),
        load_x=lambda x, i, element, pitch: _mma(
            "mx_load_x8", T.address_of(x[2 * i]), T.address_of(element), pitch
        ),
        multiply=lambda sums, i, w, j, x, m: _mma(
            "mx_multiply8", T.address_of(sums[4 * i]), T.address_of(w[4 * j]),
            T.address_of(x[2 * m]),
        ),
        store=lambda sums, i, element, pitch: _mma(
            "mx_store8", T.address_of(sums[4 * i]), T.address_of(element), pitch
        ),
    ),
    # Devices differ: NVIDIA's, and AMD's from RDNA3 on; Intel's from Battlemage and from Alchemist
    # on; lavapipe's on a CPU.
    ("vulkan", "threads256"): _cooperative(
        ((16, 16, 16), 32, (2, 2)),
        ((8, 16, 16), 16, (4, 2)),
        ((8, 8, 16), 8, (4, 4)),
        ((8, 8, 8), 8, (4, 4)),
    ),
}  # fmt: skip
