"""Atomic operations, called with T.call_extern under CUDA's names, and tirx.atomic_add.

    atomicAdd/Sub/Min/Max/And/Or/Xor/Exch(pointer, value), atomicCAS(pointer, compare, value)

Each gives the old value. They order no other memory. Integers of 32 bits, and of 64 where the
device has them. Add, Min and Max of float32 and float64 in global memory are a loop around
compare-and-exchange, which every device can do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from . import arithmetic
from .convert import cast, reinterpret
from .dtypes import BOOL, U32, U64, DType, Value
from .encoding import Capability, Op, Scope, StorageClass
from .errors import Refusal
from .memory import Element, Pointer

if TYPE_CHECKING:
    from .expressions import Expressions

_RELAXED = 0

# The instruction for (signed, unsigned) integers.
_OPS: dict[str, tuple[Op, Op]] = {
    "atomicAdd": (Op.ATOMIC_I_ADD, Op.ATOMIC_I_ADD),
    "atomicSub": (Op.ATOMIC_I_SUB, Op.ATOMIC_I_SUB),
    "atomicMin": (Op.ATOMIC_S_MIN, Op.ATOMIC_U_MIN),
    "atomicMax": (Op.ATOMIC_S_MAX, Op.ATOMIC_U_MAX),
    "atomicAnd": (Op.ATOMIC_AND, Op.ATOMIC_AND),
    "atomicOr": (Op.ATOMIC_OR, Op.ATOMIC_OR),
    "atomicXor": (Op.ATOMIC_XOR, Op.ATOMIC_XOR),
    "atomicExch": (Op.ATOMIC_EXCHANGE, Op.ATOMIC_EXCHANGE),
}
_ON_FLOATS: dict[str, arithmetic.Binary] = {
    "atomicAdd": arithmetic.add,
    "atomicSub": arithmetic.subtract,
    "atomicMin": arithmetic.minimum,
    "atomicMax": arithmetic.maximum,
    "atomicExch": lambda _b, _old, new: new,
}


def _target(x: Expressions, expr: Any, dtype: DType) -> tuple[Pointer | Element, int]:
    """The pointer operand, recorded as read and written, and the scope of the operation's id."""
    pointer = x.pointer(expr)
    if isinstance(pointer, Pointer):
        x.scope.memory.read |= pointer.parameters
        x.scope.memory.written |= pointer.parameters
        if dtype.bits == 64:
            x.b.requirements.capability(Capability.INT64_ATOMICS)
            x.b.requirements.features.add("shaderBufferInt64Atomics")
        if x.b.vulkan_memory:
            x.b.requirements.capability(Capability.VULKAN_MEMORY_MODEL_DEVICE_SCOPE)
        return pointer, x.b.word(Scope.DEVICE)
    if pointer.array.storage is not StorageClass.WORKGROUP or pointer.array.element != dtype:
        raise Refusal(
            f"an atomic operation on {dtype} in an array of {pointer.array.element}",
            "shared or global memory whose elements are of the operand's dtype",
            "Use a shared or global buffer of that dtype.",
        )
    if dtype.bits == 64:
        x.b.requirements.capability(Capability.INT64_ATOMICS)
        x.b.requirements.features.add("shaderSharedInt64Atomics")
    return pointer, x.b.word(Scope.WORKGROUP)


def _check(name: str, dtype: DType, floats: bool) -> None:
    fits = dtype.is_integer or (dtype.is_float and floats)
    if dtype.lanes > 1 or dtype.bits not in (32, 64) or not fits:
        raise Refusal(
            f"{name} on {dtype}",
            "int32, uint32, int64 or uint64"
            + (", float32 or float64" if name in _ON_FLOATS else ""),
            "Keep the memory in one of these.",
        )


def _writer(name: str) -> Callable[[Expressions, Any, list[Any]], Value]:
    def write(x: Expressions, _call: Any, arguments: list[Any]) -> Value:
        b = x.b
        value = x.value(arguments[1])
        dtype = value.dtype
        _check(name, dtype, floats=name in _ON_FLOATS)
        pointer, scope = _target(x, arguments[0], dtype)
        if dtype.is_float:
            return _float_loop(x, pointer, value, _ON_FLOATS[name])
        op = _OPS[name][0 if dtype.is_signed else 1]
        place = x.scope.memory.element_pointer(pointer, dtype)
        relaxed = b.word(_RELAXED)
        old = b.assembler.value(op, b.type_id(dtype), place, scope, relaxed, value.id)
        return Value(dtype, (old,))

    return write


def _compare_exchange(x: Expressions, _call: Any, arguments: list[Any]) -> Value:
    b = x.b
    expected, value = x.value(arguments[1]), x.value(arguments[2])
    _check("atomicCAS", value.dtype, floats=False)
    pointer, scope = _target(x, arguments[0], value.dtype)
    place = x.scope.memory.element_pointer(pointer, value.dtype)
    old = _exchange(x, place, scope, value.dtype, cast(b, expected, value.dtype), value)
    return Value(value.dtype, (old,))


def _exchange(
    x: Expressions, place: int, scope: int, dtype: DType, expected: Value, value: Value
) -> int:
    relaxed = x.b.word(_RELAXED)
    return x.b.assembler.value(
        Op.ATOMIC_COMPARE_EXCHANGE, x.b.type_id(dtype), place, scope, relaxed, relaxed,
        value.id, expected.id,
    )  # fmt: skip


def _float_loop(
    x: Expressions, pointer: Pointer | Element, value: Value, operation: arithmetic.Binary
) -> Value:
    """old = *p; while (p was changed meanwhile) old = *p; on the float's bits."""
    b = x.b
    if isinstance(pointer, Element):
        raise Refusal(
            f"an atomic operation on {value.dtype} in shared memory",
            "integers there, or floats in global memory",
            "Reduce through T.tvm_thread_allreduce, or add up in global memory.",
        )
    bits = U32 if value.dtype.bits == 32 else U64
    type_id, scope = b.type_id(bits), b.word(Scope.DEVICE)
    place = x.scope.memory.element_pointer(pointer, bits)
    pointer_type = b.pointer_type(StorageClass.FUNCTION, type_id)
    seen = b.assembler.local_variable(pointer_type, StorageClass.FUNCTION)
    bool_pointer = b.pointer_type(StorageClass.FUNCTION, b.type_id(BOOL))
    pending = b.assembler.local_variable(bool_pointer, StorageClass.FUNCTION)
    first = b.assembler.value(Op.ATOMIC_LOAD, type_id, place, scope, b.word(_RELAXED))
    b.store(seen, first)
    b.store(pending, b.truth(True).id)

    def attempt() -> None:
        old = Value(bits, (b.load(type_id, seen),))
        new = operation(b, reinterpret(b, old, value.dtype), value)
        found = _exchange(x, place, scope, bits, old, reinterpret(b, new, bits))
        b.store(seen, found)
        changed = arithmetic.compare(Op.I_NOT_EQUAL, b, Value(bits, (found,)), old)
        b.store(pending, changed.id)

    b.while_loop(lambda: Value(BOOL, (b.load(b.type_id(BOOL), pending),)), attempt)
    return reinterpret(b, Value(bits, (b.load(type_id, seen),)), value.dtype)


FUNCTIONS: dict[str, Callable[[Expressions, Any, list[Any]], Value]] = {
    **{name: _writer(name) for name in _OPS},
    "atomicCAS": _compare_exchange,
}
