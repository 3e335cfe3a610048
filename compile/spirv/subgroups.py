"""Barriers and what the lanes of a subgroup do together.

TIR's warp shuffles name the warp size they are written for; it becomes a requirement on the
device's subgroup size, and that subgroups are full: Vulkan grants it to blocks whose size in x is
a multiple of the subgroup's, and others are refused. The functions of `FUNCTIONS`, called with
T.call_extern and named as in GLSL, work for any subgroup size; subgroupRequireSize, the one that
GLSL does not have, states the size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from tvm.ir import prim

from . import arithmetic
from .convert import cast
from .dtypes import BOOL, U32, Value
from .encoding import BuiltIn, Capability, GroupOperation, Op, Scope, Semantics
from .errors import Refusal

if TYPE_CHECKING:
    from .expressions import CallWriter, Expressions
    from .requirements import Requirements


def storage_sync(x: Expressions, call: Any) -> None:
    """tvm_storage_sync("shared"): all threads of the block meet, and see each other's writes to
    shared memory; "warp" is the same within a subgroup.

    It orders global memory too, as __syncthreads does: two threads may write to one place in
    turn, or exchange values there (see Memory).
    """
    b = x.b
    scope = str(call.args[0].value)
    if scope not in ("shared", "warp"):
        raise Refusal(
            f"a barrier of scope {scope!r}",
            "the scopes shared (a block's threads) and warp (a subgroup's)",
            "Split the kernel in two where all blocks have to meet.",
        )
    if scope == "warp":
        b.requirements.capability(Capability.GROUP_NON_UNIFORM)
    execution = b.word(Scope.WORKGROUP if scope == "shared" else Scope.SUBGROUP)
    semantics = Semantics.ACQUIRE_RELEASE | Semantics.WORKGROUP_MEMORY | Semantics.UNIFORM_MEMORY
    if b.vulkan_memory:
        semantics |= Semantics.MAKE_AVAILABLE | Semantics.MAKE_VISIBLE
    x.scope.memory.has_barrier = True
    b.assembler.emit(Op.CONTROL_BARRIER, execution, execution, b.word(semantics))


def _builtin(x: Expressions, builtin: BuiltIn) -> Value:
    """One of the subgroup's numbers, as uint32."""
    b = x.b
    b.requirements.capability(Capability.GROUP_NON_UNIFORM)
    variable = b.builtin(builtin, b.type_id(U32))
    return Value(U32, (b.load(b.type_id(U32), variable),))


def _require_size(x: Expressions, expr: Any) -> None:
    if type(expr) is not prim.IntImm or int(expr.value) <= 0:
        raise Refusal(
            f"subgroups of {expr} lanes",
            "a constant subgroup size",
            "Name the subgroup size that the kernel is written for.",
        )
    size, requirements = int(expr.value), x.b.requirements
    if requirements.subgroup_size not in (None, size):
        raise Refusal(
            f"code for subgroups of {requirements.subgroup_size} and of {size} lanes",
            "one subgroup size in a kernel",
            "Write all shuffles for the same size.",
        )
    requirements.subgroup_size = size
    # A source lane that the device left empty has no value to give.
    requirements.features.add("computeFullSubgroups")


def check_block(requirements: Requirements, threads_in_x: int) -> None:
    """Refusal where full subgroups are required of a block that has none; 0: known at launch."""
    size = requirements.subgroup_size
    if requirements.products and size is None:
        raise Refusal(
            "products of matrices by subgroups of any size",
            'T.call_extern("int32", "subgroupRequireSize", size)',
            "State how many threads of the block work on a matrix together.",
        )
    if size is not None and threads_in_x % size != 0:
        raise Refusal(
            f"code for subgroups of {size} lanes in blocks of {threads_in_x} threads in x",
            f"a multiple of {size} threads in x, which fills them",
            "Bind more threads to threadIdx.x, or use the subgroup functions of any size.",
        )


def shuffle(kind: Literal["index", "up", "down", "xor"]) -> CallWriter:
    """The writer of tvm_warp_shuffle*(mask, value, operand, width, warp_size).

    Lanes form groups of `width`, a power of two. A lane whose source would be outside its group
    keeps its own value. The mask is not needed: lanes that left do not take part.
    """

    def write(x: Expressions, call: Any) -> Value:
        b = x.b
        value, operand, width = (x.value(argument) for argument in call.args[1:4])
        _require_size(x, call.args[4])
        b.requirements.capability(Capability.GROUP_NON_UNIFORM_SHUFFLE)
        b.requirements.subgroup_type(value.dtype)
        lane = _builtin(x, BuiltIn.SUBGROUP_LOCAL_INVOCATION_ID)
        operand, width = cast(b, operand, U32), cast(b, width, U32)
        last = arithmetic.subtract(b, width, b.constant(U32, 1))
        inside = arithmetic.bitwise_and(b, lane, last)
        group = arithmetic.subtract(b, lane, inside)
        if kind == "index":
            position = arithmetic.bitwise_and(b, operand, last)
        elif kind == "up":
            position = arithmetic.subtract(b, inside, operand)
        elif kind == "down":
            position = arithmetic.add(b, inside, operand)
        else:
            position = arithmetic.bitwise_xor(b, inside, operand)
        # Below zero wraps around to far above the width.
        valid = arithmetic.compare(Op.U_LESS_THAN, b, position, width)
        source = b.select(valid, arithmetic.add(b, group, position), lane)
        scope = b.word(Scope.SUBGROUP)
        parts = tuple(
            b.assembler.value(Op.GROUP_NON_UNIFORM_SHUFFLE, type_id, scope, part, source.id)
            for part, type_id in b.typed_parts(value)
        )
        return Value(value.dtype, parts)

    return write


def active_mask(x: Expressions, call: Any) -> Value:
    """The lowest 32 lanes that are active, a bit each."""
    return cast(x.b, _ballot(x, x.b.truth(True)), x.dtype(call))


def _ballot(x: Expressions, condition: Value) -> Value:
    b = x.b
    b.requirements.capability(Capability.GROUP_NON_UNIFORM_BALLOT)
    four = b.type_id(U32, 4)
    scope = b.word(Scope.SUBGROUP)
    mask = b.assembler.value(Op.GROUP_NON_UNIFORM_BALLOT, four, scope, condition.id)
    return Value(U32, (b.assembler.value(Op.COMPOSITE_EXTRACT, b.type_id(U32), mask, 0),))


# The instruction for (float, signed, unsigned) operands.
_REDUCTIONS = {
    "Add": (Op.GROUP_NON_UNIFORM_F_ADD, Op.GROUP_NON_UNIFORM_I_ADD, Op.GROUP_NON_UNIFORM_I_ADD),
    "Mul": (Op.GROUP_NON_UNIFORM_F_MUL, Op.GROUP_NON_UNIFORM_I_MUL, Op.GROUP_NON_UNIFORM_I_MUL),
    "Min": (Op.GROUP_NON_UNIFORM_F_MIN, Op.GROUP_NON_UNIFORM_S_MIN, Op.GROUP_NON_UNIFORM_U_MIN),
    "Max": (Op.GROUP_NON_UNIFORM_F_MAX, Op.GROUP_NON_UNIFORM_S_MAX, Op.GROUP_NON_UNIFORM_U_MAX),
    "And": (None, Op.GROUP_NON_UNIFORM_BITWISE_AND, Op.GROUP_NON_UNIFORM_BITWISE_AND),
    "Or": (None, Op.GROUP_NON_UNIFORM_BITWISE_OR, Op.GROUP_NON_UNIFORM_BITWISE_OR),
    "Xor": (None, Op.GROUP_NON_UNIFORM_BITWISE_XOR, Op.GROUP_NON_UNIFORM_BITWISE_XOR),
}
_MODES = {
    "subgroup": GroupOperation.REDUCE,
    "subgroupInclusive": GroupOperation.INCLUSIVE_SCAN,
    "subgroupExclusive": GroupOperation.EXCLUSIVE_SCAN,
}


def _reduction(name: str, mode: GroupOperation) -> Any:
    as_float, as_signed, as_unsigned = _REDUCTIONS[name]

    def write(x: Expressions, _call: Any, arguments: list[Any]) -> Value:
        b = x.b
        value = x.value(arguments[0])
        op = as_float if value.dtype.is_float else as_signed
        if value.dtype.kind == "uint":
            op = as_unsigned
        if op is None or value.dtype.kind in ("bool", "bfloat"):
            raise Refusal(
                f"a subgroup's {name} of {value.dtype}",
                "integers, or floats where the operation is defined on them",
                "Cast the value first.",
            )
        b.requirements.capability(Capability.GROUP_NON_UNIFORM_ARITHMETIC)
        b.requirements.subgroup_type(value.dtype)
        scope = b.word(Scope.SUBGROUP)
        parts = tuple(
            b.assembler.value(op, type_id, scope, mode, part)
            for part, type_id in b.typed_parts(value)
        )
        return Value(value.dtype, parts)

    return write


def _vote(op: Op) -> Any:
    def write(x: Expressions, _call: Any, arguments: list[Any]) -> Value:
        b = x.b
        condition = cast(b, x.value(arguments[0]), BOOL)
        b.requirements.capability(Capability.GROUP_NON_UNIFORM_VOTE)
        scope = b.word(Scope.SUBGROUP)
        return Value(BOOL, (b.assembler.value(op, b.type_id(BOOL), scope, condition.id),))

    return write


def _elect(x: Expressions, _call: Any, _arguments: list[Any]) -> Value:
    b = x.b
    b.requirements.capability(Capability.GROUP_NON_UNIFORM)
    scope = b.word(Scope.SUBGROUP)
    elected = b.assembler.value(Op.GROUP_NON_UNIFORM_ELECT, b.type_id(BOOL), scope)
    return Value(BOOL, (elected,))


def _broadcast_first(x: Expressions, _call: Any, arguments: list[Any]) -> Value:
    b = x.b
    value = x.value(arguments[0])
    b.requirements.capability(Capability.GROUP_NON_UNIFORM_BALLOT)
    b.requirements.subgroup_type(value.dtype)
    scope = b.word(Scope.SUBGROUP)
    parts = tuple(
        b.assembler.value(Op.GROUP_NON_UNIFORM_BROADCAST_FIRST, type_id, scope, part)
        for part, type_id in b.typed_parts(value)
    )
    return Value(value.dtype, parts)


def _number(builtin: BuiltIn) -> Any:
    def write(x: Expressions, call: Any, _arguments: list[Any]) -> Value:
        return cast(x.b, _builtin(x, builtin), x.dtype(call))

    return write


def _state_size(x: Expressions, call: Any, arguments: list[Any]) -> Value:
    """The size that the kernel is written for, and that the device then has to give it."""
    _require_size(x, arguments[0])
    return cast(x.b, x.value(arguments[0]), x.dtype(call))


FUNCTIONS: dict[str, Any] = {
    **{
        f"{prefix}{name}": _reduction(name, mode)
        for prefix, mode in _MODES.items()
        for name in _REDUCTIONS
    },
    "subgroupAll": _vote(Op.GROUP_NON_UNIFORM_ALL),
    "subgroupAny": _vote(Op.GROUP_NON_UNIFORM_ANY),
    "subgroupElect": _elect,
    "subgroupBroadcastFirst": _broadcast_first,
    "subgroupRequireSize": _state_size,
    "subgroupSize": _number(BuiltIn.SUBGROUP_SIZE),
    "subgroupInvocation": _number(BuiltIn.SUBGROUP_LOCAL_INVOCATION_ID),
    "subgroupCount": _number(BuiltIn.NUM_SUBGROUPS),
    "subgroupNumber": _number(BuiltIn.SUBGROUP_ID),
}
