"""Calls of TIR's operators: the table from an operator's name to what writes it.

`CALLS` holds tirx.* and prim.* operators. `call_extern` and `call_pure_extern` lead to math
functions (`functions`), subgroup operations (`subgroups`) and atomics (`atomics`) by the name of
what they call.
"""

from __future__ import annotations

from typing import Any

from tvm.ir import PointerType

from . import arithmetic, atomics, matrices, subgroups
from .convert import cast, reinterpret
from .dtypes import BOOL, I32, U32, U64, DType, Value
from .encoding import PACKED_VECTOR_FORMAT_4X8BIT, Capability, Glsl, Op
from .errors import Refusal
from .expressions import CallWriter, Expressions
from .functions import FUNCTIONS, apply, lookup, takes
from .memory import Array, Element, Index, Pointer
from .scope import Meaning
from .terms import Term


def _extern(x: Expressions, call: Any) -> Meaning | None:
    name = str(call.args[0].value)
    arguments = list(call.args[1:])
    for table in (subgroups.FUNCTIONS, atomics.FUNCTIONS):
        if name in table:
            return table[name](x, call, arguments)
    key = lookup(name)
    if key is None:
        raise Refusal(
            f"a call of the external function {name}",
            "a math function of C, a subgroup or an atomic function",
            "A kernel cannot link with other code: write the function in TIR.",
        )
    return _math(x, key, arguments)


def _function(key: str) -> CallWriter:
    return lambda x, call: _math(x, key, list(call.args))


def _math(x: Expressions, key: str, arguments: list[Any]) -> Value:
    function = FUNCTIONS[key]
    operands = [x.value(argument) for argument in arguments]
    if len(operands) != function.arity or not takes(function, operands[0]):
        dtypes = ", ".join(str(operand.dtype) for operand in operands)
        raise Refusal(
            f"a call of {key} on ({dtypes})",
            f"{function.arity} operand(s) of float16, bfloat16, "
            + " or ".join(f"float{bits}" for bits in function.bits if bits > 16),
            "Cast to float32 first.",
        )
    return apply(function, [Term(x.b, operand) for operand in operands])


def _if_then_else(x: Expressions, call: Any) -> Value:
    condition, yes, no = call.args
    decided = x.value(condition)
    if decided.dtype.lanes > 1:
        raise Refusal(
            "a lazy if_then_else with a vector as its condition",
            "a scalar condition",
            "Use T.Select, which evaluates both sides, or do not vectorize the loop.",
        )
    return x.b.choose(decided, lambda: x.value(yes), lambda: x.value(no))


def _likely(x: Expressions, call: Any) -> Meaning:
    return x.meaning(call.args[0])


def _nothing(_x: Expressions, _call: Any) -> None:
    """Hints to other backends."""


def _return(x: Expressions, _call: Any) -> None:
    x.b.leave()


def _break(x: Expressions, _call: Any) -> None:
    x.b.branch(x.b.innermost("break").merge)


def _continue(x: Expressions, _call: Any) -> None:
    x.b.branch(x.b.innermost("continue").advance)


def _undefined(x: Expressions, call: Any) -> Value:
    """An arbitrary value: zero, so that two runs agree."""
    return x.b.constant(x.dtype(call), 0)


def _reinterpret(x: Expressions, call: Any) -> Meaning:
    source = x.meaning(call.args[0])
    if isinstance(call.ty, PointerType) and not isinstance(source, Value):
        return source
    if isinstance(call.ty, PointerType) or not isinstance(source, Value):
        raise Refusal(
            "a reinterpretation between a pointer and a number",
            "numbers on both sides",
            "Pass the buffer itself: addresses have no number in a kernel.",
        )
    to = x.dtype(call)
    if "bool" in (to.kind, source.dtype.kind) and to != source.dtype:
        return cast(x.b, source, to)
    return reinterpret(x.b, source, to)


# Counting bits. Vulkan has the instructions for 32 bits only.


def _words(x: Expressions, value: Value) -> list[Value]:
    """The bits as uint32 words, the lowest first."""
    lanes = value.dtype.lanes
    word = U32.with_lanes(lanes)
    b = x.b
    unsigned = cast(b, value, DType("uint", value.dtype.bits, lanes))
    if value.dtype.bits < 64:
        return [cast(b, unsigned, word)]
    shift = b.constant(unsigned.dtype, 32)
    high = arithmetic.shift_right(b, unsigned, shift)
    return [cast(b, unsigned, word), cast(b, high, word)]


def _popcount(x: Expressions, call: Any) -> Value:
    words = _words(x, x.value(call.args[0]))
    counts = [x.b.op(Op.BIT_COUNT, word.dtype, word) for word in words]
    total = counts[0] if len(counts) == 1 else arithmetic.add(x.b, counts[0], counts[1])
    return cast(x.b, total, x.dtype(call))


def _leading_zeros(x: Expressions, call: Any) -> Value:
    """The width for zero."""
    b = x.b
    value = x.value(call.args[0])
    words = _words(x, value)
    counts = [
        arithmetic.subtract(
            b, b.constant(word.dtype, 31), b.glsl(Glsl.FIND_U_MSB, word.dtype, word)
        )
        for word in words
    ]
    if len(words) == 1:
        unused = b.constant(counts[0].dtype, 32 - value.dtype.bits)
        return cast(b, arithmetic.subtract(b, counts[0], unused), x.dtype(call))
    low, high = counts
    beyond = arithmetic.add(b, low, b.constant(low.dtype, 32))
    is_zero = arithmetic.compare(Op.I_EQUAL, b, words[1], b.constant(words[1].dtype, 0))
    return cast(b, b.select(is_zero, beyond, high), x.dtype(call))


def _dp4a(x: Expressions, call: Any) -> Value:
    """acc + Σ a_i·b_i over four bytes each; the signs of the bytes are those of the dtypes."""
    b = x.b
    first, second = call.args[0], call.args[1]
    signed = [x.dtype(first).is_signed, x.dtype(second).is_signed]
    if signed == [False, True]:
        first, second, signed = second, first, [True, False]
    op = {(True, True): Op.S_DOT, (False, False): Op.U_DOT, (True, False): Op.SU_DOT}
    words = [_packed_bytes(x, first), _packed_bytes(x, second)]
    b.requirements.capability(Capability.DOT_PRODUCT)
    b.requirements.capability(Capability.DOT_PRODUCT_INPUT_4X8BIT_PACKED)
    b.requirements.extension("SPV_KHR_integer_dot_product")
    dtype = x.dtype(call)
    result = b.assembler.value(
        op[signed[0], signed[1]],
        b.type_id(dtype),
        words[0].id,
        words[1].id,
        PACKED_VECTOR_FORMAT_4X8BIT,
    )
    dot = Value(dtype, (result,))
    if len(call.args) < 3:
        return dot
    return arithmetic.add(b, x.value(call.args[2]), dot)


def _packed_bytes(x: Expressions, expr: Any) -> Value:
    """Four bytes as the word they are; where they were a word before, without a detour."""
    if getattr(getattr(expr, "op", None), "name", "") == "tirx.reinterpret":
        source = expr.args[0]
        if x.dtype(source) in (I32, U32):
            return cast(x.b, x.value(source), U32)
    return reinterpret(x.b, x.value(expr), U32)


# Vectors


def _half(upper: bool) -> CallWriter:
    def write(x: Expressions, call: Any) -> Value:
        lanes = x.b.lanes(x.value(call.args[0]))
        middle = len(lanes) // 2
        return x.b.from_lanes(x.dtype(call), lanes[middle:] if upper else lanes[:middle])

    return write


def _combine(x: Expressions, call: Any) -> Value:
    lanes = [lane for half in call.args for lane in x.b.lanes(x.value(half))]
    return x.b.from_lanes(x.dtype(call), lanes)


def _active_lanes(x: Expressions, call: Any) -> Value:
    """base + lane < limit."""
    b = x.b
    base, limit = x.value(call.args[0]), x.value(call.args[1])
    lanes = []
    for lane in range(x.dtype(call).lanes):
        position = arithmetic.add(b, base, b.constant(base.dtype, lane))
        lanes.append(arithmetic.less(b, position, limit).id)
    return b.from_lanes(x.dtype(call), lanes)


def _masked_load(x: Expressions, call: Any) -> Value:
    """Lanes whose mask is false are zero and touch no memory."""
    buffer = x.scope.buffer(call.args[0])
    dtype = x.dtype(call)
    places, mask = _lane_indices(x, call.args[-2]), x.value(call.args[-1])
    zero = x.b.constant(dtype.scalar, 0)
    lanes = []
    for place, bit in zip(places, x.b.lanes(mask), strict=True):

        def load(place: Value = place) -> Value:
            return x.scope.memory.load(buffer, dtype.scalar, Index((place,)))

        lanes.append(x.b.choose(Value(BOOL, (bit,)), load, lambda: zero).id)
    return x.b.from_lanes(dtype, lanes)


def _masked_store(x: Expressions, call: Any) -> None:
    buffer, value = x.scope.buffer(call.args[0]), x.value(call.args[1])
    places, mask = _lane_indices(x, call.args[-2]), x.value(call.args[-1])
    scalar = value.dtype.scalar
    for place, lane, bit in zip(places, x.b.lanes(value), x.b.lanes(mask), strict=True):

        def store(place: Value = place, lane: int = lane) -> None:
            x.scope.memory.store(buffer, Value(scalar, (lane,)), Index((place,)))

        x.b.if_then_else(Value(BOOL, (bit,)), store, None)


def _lane_indices(x: Expressions, expr: Any) -> list[Value]:
    value = x.value(expr)
    return [Value(value.dtype.scalar, (lane,)) for lane in x.b.lanes(value)]


# Pointers


def _address_of(x: Expressions, call: Any) -> Meaning:
    access = call.args[0]
    if not hasattr(access, "indices"):
        raise Refusal(
            f"the address of the variable {access}",
            "the address of a buffer's element",
            "Keep the value in a buffer of scope local.",
        )
    buffer = x.scope.buffer(access.source)
    index = x.value(access.indices[0])
    if isinstance(buffer.root, Array):
        lanes = buffer.dtype.lanes
        if lanes > 1:
            index = arithmetic.multiply(x.b, index, x.b.constant(index.dtype, lanes))
        return Element(buffer.root, index)
    divisor = x.scope.divisors.of(access.indices[0])
    size = buffer.dtype.bytes * buffer.dtype.lanes
    return x.scope.memory.offset(buffer.root, index, size, divisor)


def _buffer_data(x: Expressions, call: Any) -> Meaning:
    root = x.scope.buffer(call.args[0]).root
    return Element(root, x.b.constant(U32, 0)) if isinstance(root, Array) else root


def _byte_offset(x: Expressions, call: Any) -> Meaning:
    pointer = _global(x.pointer(call.args[0]))
    divisor = x.scope.divisors.of(call.args[1])
    return x.scope.memory.offset(pointer, x.value(call.args[1]), 1, divisor)


def _access_pointer(x: Expressions, call: Any) -> Meaning:
    """tvm_access_ptr(type, data, offset, extent, mode): data plus `offset` elements."""
    _, data, offset = call.args[:3]
    pointer = x.pointer(data)
    index = x.value(offset)
    if isinstance(pointer, Element):
        return Element(pointer.array, arithmetic.add(x.b, pointer.index, cast(x.b, index, U32)))
    dtype = x.dtype(call.args[0])
    divisor = x.scope.divisors.of(offset)
    return x.scope.memory.offset(pointer, index, dtype.bytes * dtype.lanes, divisor)


def _is_null(x: Expressions, call: Any) -> Value:
    pointer = _global(x.pointer(call.args[0]))
    zero = x.b.constant(U64, 0)
    return arithmetic.compare(Op.I_EQUAL, x.b, Value(U64, (pointer.address,)), zero)


def _global(pointer: Pointer | Element) -> Pointer:
    if isinstance(pointer, Pointer):
        return pointer
    raise Refusal(
        "arithmetic in bytes on a pointer to shared or local memory",
        "a pointer to global memory",
        "Index the buffer instead.",
    )


def _not_here(construct: str, expected: str, remedy: str) -> CallWriter:
    def write(_x: Expressions, _call: Any) -> None:
        raise Refusal(construct, expected, remedy)

    return write


CALLS: dict[str, CallWriter] = {
    **{f"{space}.{name}": _function(name) for name in FUNCTIONS for space in ("tirx", "prim")},
    "tirx.call_extern": _extern,
    "tirx.call_pure_extern": _extern,
    "prim.if_then_else": _if_then_else,
    "prim.likely": _likely,
    "tirx.tvm_thread_invariant": _likely,
    "tirx.prefetch": _nothing,
    "tirx.assume": _nothing,
    "tirx.undef": _undefined,
    "tirx.thread_return": _return,
    "tirx.break_loop": _break,
    "tirx.continue_loop": _continue,
    "tirx.reinterpret": _reinterpret,
    "tirx.popcount": _popcount,
    "tirx.ctpop": _popcount,
    "prim.clz": _leading_zeros,
    "tirx.dp4a": _dp4a,
    "tirx.vectorlow": _half(upper=False),
    "tirx.vectorhigh": _half(upper=True),
    "tirx.vectorcombine": _combine,
    "tirx.get_active_lane_mask": _active_lanes,
    "tirx.masked_load": _masked_load,
    "tirx.masked_store": _masked_store,
    "tirx.address_of": _address_of,
    "tirx.buffer_data": _buffer_data,
    "tirx.handle_add_byte_offset": _byte_offset,
    "tirx.ptr_byte_offset": _byte_offset,
    "tirx.tvm_access_ptr": _access_pointer,
    "tirx.isnullptr": _is_null,
    "tirx.atomic_add": lambda x, call: atomics.FUNCTIONS["atomicAdd"](x, call, list(call.args)),
    "tirx.tvm_storage_sync": subgroups.storage_sync,
    "tirx.tvm_warp_shuffle": subgroups.shuffle("index"),
    "tirx.tvm_warp_shuffle_up": subgroups.shuffle("up"),
    "tirx.tvm_warp_shuffle_down": subgroups.shuffle("down"),
    "tirx.tvm_warp_shuffle_xor": subgroups.shuffle("xor"),
    "tirx.tvm_warp_activemask": subgroups.active_mask,
    **matrices.CALLS,
    "tirx.tvm_thread_allreduce": _not_here(
        "tvm_thread_allreduce",
        "the loads, stores and barriers that TVM lowers it to",
        "Build through tvm.compile, which runs TVM's standard lowering.",
    ),
    "tirx.call_llvm_pure_intrin": _not_here(
        "an intrinsic of LLVM", "operators of TIR", "Schedule for vulkan without it."
    ),
    "tirx.call_llvm_intrin": _not_here(
        "an intrinsic of LLVM", "operators of TIR", "Schedule for vulkan without it."
    ),
}
