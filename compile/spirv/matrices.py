"""Cooperative matrices: TVM's wmma intrinsics on buffers of fragments.

A buffer of scope wmma.matrix_a, wmma.matrix_b or wmma.accumulator holds matrices that the lanes of
a subgroup keep in their registers together. Their shape is said by the calls, (m, n, k) of the
product a [m, k] · b [k, n] + c [m, n], and is one for each buffer.

    tvm_fill_fragment(fragments, m, n, k, i, value)
    tvm_load_matrix_sync(fragments, m, n, k, i, pointer, stride, "row_major" | "col_major")
    tvm_store_matrix_sync(the same)
    tvm_mma_sync(d, i, a, j, b, k, c, l)                d[i] = a[j]·b[k] + c[l]

The subgroup's size is stated by T.call_extern("int32", "subgroupRequireSize", size). A whole
subgroup has to come to each call. Which shapes there are differs between devices, so that each
product is recorded with the kernel, and compared with the device before it gets to see the code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tvm.ir import prim, register_op_attr
from tvm.tirx import CallEffectKind

from .convert import cast
from .dtypes import F16, F32, I8, I32, U8, U32, DType
from .encoding import MatrixUse, Op, Scope, StorageClass
from .errors import Refusal
from .memory import Pointer
from .requirements import MatrixProduct

if TYPE_CHECKING:
    from .expressions import Expressions

# TVM takes a load for one that only reads, whose result nobody uses: it would leave it out.
register_op_attr(
    "tirx.tvm_load_matrix_sync", "TCallEffectKind", CallEffectKind.UpdateState.value, level=20
)

Shape = tuple[int, int, int]  # m, n, k

USES = {
    "wmma.matrix_a": MatrixUse.A,
    "wmma.matrix_b": MatrixUse.B,
    "wmma.accumulator": MatrixUse.ACCUMULATOR,
}
_LAYOUTS = {"row_major": 0, "col_major": 1}
# Of the two factors, and of the sum.
_PRODUCTS = {(F16, F16): (F16, F32), (I8, I8): (I32,), (U8, U8): (U32,)}
_OPERANDS = ("a", "b", "c", "result")  # of a product, and the bits that say which are signed


@dataclass
class Fragments:
    """A buffer of matrices; shape, variable and type as the first call gives them."""

    name: str
    dtype: DType
    use: MatrixUse
    elements: int
    shape: Shape = (0, 0, 0)
    count: int = 0
    variable: int = 0
    type_id: int = 0


def allocate(scope: str, name: str, dtype: DType, elements: int) -> Fragments:
    """The fragments of a buffer in a scope of USES; Refusal for dtypes that have none."""
    use = USES[scope]
    of_sums = {dtype for sums in _PRODUCTS.values() for dtype in sums}
    known = of_sums if use is MatrixUse.ACCUMULATOR else {dtype for dtype, _ in _PRODUCTS}
    if dtype not in known:
        raise Refusal(
            f"the buffer {name} of {dtype} in the scope {scope!r}",
            ", ".join(sorted(map(str, known))),
            "Convert on the way into shared memory.",
        )
    return Fragments(name, dtype, use, elements)


def _fragments(x: Expressions, expr: Any) -> Fragments:
    if getattr(getattr(expr, "op", None), "name", "") == "tirx.buffer_data":
        expr = expr.args[0]
    found = x.scope.fragments.get(hash(expr))
    if found is None:
        raise Refusal(
            f"{expr} as a matrix", f"a buffer in one of the scopes {', '.join(USES)}",
            "Allocate it there.",
        )  # fmt: skip
    return found


def _shaped(x: Expressions, call: Any) -> Fragments:
    """The fragments that a fill, load or store is of, in the shape that it gives."""
    fragments = _fragments(x, call.args[0])
    sizes = call.args[1:4]
    if any(type(size) is not prim.IntImm or int(size.value) <= 0 for size in sizes):
        raise Refusal(
            f"matrices {fragments.name} of the shape ({', '.join(map(str, sizes))})",
            "constants m, n and k above 0",
            "Write one kernel for each shape.",
        )
    m, n, k = (int(size.value) for size in sizes)
    if not fragments.type_id:
        _declare(x, fragments, (m, n, k))
    elif fragments.shape != (m, n, k):
        raise Refusal(
            f"matrices {fragments.name} of the shapes {fragments.shape} and {(m, n, k)}",
            "one shape in a buffer",
            "Allocate a buffer for each shape.",
        )
    return fragments


def _declare(x: Expressions, fragments: Fragments, shape: Shape) -> None:
    b = x.b
    m, n, k = shape
    rows, columns = {
        MatrixUse.A: (m, k), MatrixUse.B: (k, n), MatrixUse.ACCUMULATOR: (m, n)
    }[fragments.use]  # fmt: skip
    count, rest = divmod(fragments.elements, rows * columns)
    if rest or not count:
        raise Refusal(
            f"the buffer {fragments.name} of {fragments.elements} elements",
            f"whole matrices of {rows} times {columns}",
            "Allocate as many elements as its matrices have.",
        )
    b.requirements.matrices()
    fragments.shape, fragments.count = shape, count
    sizes = (Scope.SUBGROUP, rows, columns, fragments.use)
    fragments.type_id = b.assembler.type(
        Op.TYPE_COOPERATIVE_MATRIX, b.type_id(fragments.dtype), *map(b.word, sizes)
    )
    array = b.assembler.type(Op.TYPE_ARRAY, fragments.type_id, b.word(count))
    pointer = b.pointer_type(StorageClass.FUNCTION, array)
    fragments.variable = b.assembler.local_variable(pointer, StorageClass.FUNCTION)
    b.assembler.name(fragments.variable, fragments.name)


def _place(x: Expressions, fragments: Fragments, index: Any) -> int:
    """SPIR-V's pointer to one of the matrices."""
    b = x.b
    value = x.value(index)
    known = b.known(value)
    if known is not None and not 0 <= int(known) < fragments.count:
        raise Refusal(
            f"matrix number {known} of {fragments.name}",
            f"0 to {fragments.count - 1}",
            "Allocate more of them.",
        )
    pointer = b.pointer_type(StorageClass.FUNCTION, fragments.type_id)
    where = b.constant(U32, int(known)) if known is not None else cast(b, value, U32)
    return b.assembler.value(Op.ACCESS_CHAIN, pointer, fragments.variable, where.id)


def _fill(x: Expressions, call: Any) -> None:
    b = x.b
    fragments = _shaped(x, call)
    value = cast(b, x.value(call.args[5]), fragments.dtype)
    matrix = b.assembler.value(Op.COMPOSITE_CONSTRUCT, fragments.type_id, value.id)
    b.store(_place(x, fragments, call.args[4]), matrix)


def _in_memory(
    x: Expressions, fragments: Fragments, call: Any, *, written: bool
) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """Of a load or store: the pointer to a matrix's first element, the operands layout and stride
    (in elements), and the memory operands."""
    b, memory = x.b, x.scope.memory
    pointer = x.pointer(call.args[5])
    layout = _LAYOUTS.get(str(getattr(call.args[7], "value", call.args[7])))
    if layout is None:
        raise Refusal(
            f"matrices in the layout {call.args[7]}", " or ".join(_LAYOUTS), "Name one of these."
        )
    operands = b.word(layout), cast(b, x.value(call.args[6]), U32).id
    if isinstance(pointer, Pointer):
        (memory.written if written else memory.read).update(pointer.parameters)
        access = b.access(fragments.dtype.bytes, memory.is_exchanged(pointer))
    elif pointer.array.storage is not StorageClass.WORKGROUP:
        raise Refusal(
            f"matrices {fragments.name} in local memory",
            "a pointer to shared or global memory",
            "A subgroup's lanes share no other memory.",
        )
    elif pointer.array.element != fragments.dtype:
        raise Refusal(
            f"matrices {fragments.name} of {fragments.dtype} in an array of "
            f"{pointer.array.element}",
            "elements of one dtype",
            "Convert on the way into shared memory.",
        )
    else:
        access = b.access(0, exchanged=True)
    return memory.element_pointer(pointer, fragments.dtype, array=True), operands, access


def _load(x: Expressions, call: Any) -> None:
    b = x.b
    fragments = _shaped(x, call)
    source, operands, access = _in_memory(x, fragments, call, written=False)
    matrix = b.assembler.value(
        Op.COOPERATIVE_MATRIX_LOAD, fragments.type_id, source, *operands, *access
    )
    b.store(_place(x, fragments, call.args[4]), matrix)


def _store(x: Expressions, call: Any) -> None:
    b = x.b
    fragments = _shaped(x, call)
    matrix = b.load(fragments.type_id, _place(x, fragments, call.args[4]))
    target, operands, access = _in_memory(x, fragments, call, written=True)
    b.assembler.emit(Op.COOPERATIVE_MATRIX_STORE, target, matrix, *operands, *access)


def _multiply(x: Expressions, call: Any) -> None:
    b = x.b
    result, first, second, third = (_fragments(x, call.args[at]) for at in (0, 2, 4, 6))
    _check_product((first, second, third, result))
    if not result.type_id:
        _declare(x, result, first.shape)
    values = [
        b.load(part.type_id, _place(x, part, call.args[at]))
        for part, at in ((first, 3), (second, 5), (third, 7))
    ]
    parts = dict(zip(_OPERANDS, (first, second, third, result), strict=True))
    signed = sum(1 << bit for bit, part in enumerate(parts.values()) if part.dtype.is_signed)
    matrix = b.assembler.value(
        Op.COOPERATIVE_MATRIX_MUL_ADD, result.type_id, *values, *((signed,) if signed else ())
    )
    b.store(_place(x, result, call.args[1]), matrix)
    m, n, k = first.shape
    dtypes = {name: str(part.dtype) for name, part in parts.items()}
    b.requirements.products.add(MatrixProduct(m, n, k, **dtypes))


def _check_product(parts: tuple[Fragments, ...]) -> None:
    """Refusal where these are not a, b, c and the result of one product."""
    first, second, third, result = parts
    names = ", ".join(part.name for part in parts)
    for part in (first, second, third):
        if not part.type_id:
            raise Refusal(
                f"a product of matrices {part.name} that nothing fills",
                "a fill or a load before it",
                "Fill the accumulator with zero first.",
            )
    uses = tuple(part.use for part in parts)
    if uses != (MatrixUse.A, MatrixUse.B, MatrixUse.ACCUMULATOR, MatrixUse.ACCUMULATOR):
        scopes = {use: scope for scope, use in USES.items()}
        raise Refusal(
            f"a product of matrices ({names}) in the scopes "
            + ", ".join(scopes[use] for use in uses),
            "wmma.matrix_a, wmma.matrix_b and two times wmma.accumulator",
            "Allocate each in the scope of its place.",
        )
    if {first.shape, second.shape, third.shape} | ({result.shape} - {(0, 0, 0)}) != {first.shape}:
        raise Refusal(
            f"a product of matrices ({names}) of the shapes "
            + ", ".join(str(part.shape) for part in parts),
            "one (m, n, k)",
            "Load and fill all of them with the same m, n and k.",
        )
    sums = _PRODUCTS.get((first.dtype, second.dtype), ())
    if third.dtype not in sums or result.dtype != third.dtype:
        raise Refusal(
            f"a product of matrices ({names}) of " + ", ".join(str(part.dtype) for part in parts),
            "two equal factors, and two equal accumulators: "
            + "; ".join(
                f"{factors[0]} into {' or '.join(map(str, into))}"
                for factors, into in _PRODUCTS.items()
            ),
            "Allocate the fragments with these dtypes.",
        )


CALLS = {
    "tirx.tvm_fill_fragment": _fill,
    "tirx.tvm_load_matrix_sync": _load,
    "tirx.tvm_store_matrix_sync": _store,
    "tirx.tvm_mma_sync": _multiply,
}
