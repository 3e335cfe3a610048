"""TIR expressions to values, by dispatch on the node's type."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.ir import Call, TensorLoad, Var, prim

from . import arithmetic
from .builder import Builder
from .convert import cast, float32_of_half_bits
from .dtypes import F32, DType, Value, from_tvm
from .encoding import Op
from .errors import Refusal
from .liveness import children
from .memory import Element, Index, Pointer
from .scope import Meaning, Scope

CallWriter = Callable[["Expressions", Any], Meaning | None]


class Expressions:
    """Writes expressions into the current block.

    `calls` maps an operator's name ("tirx.popcount") to what writes a call of it.
    """

    def __init__(self, scope: Scope, calls: dict[str, CallWriter]) -> None:
        self.scope = scope
        self.b: Builder = scope.builder
        self._calls = calls

    def value(self, expr: Any) -> Value:
        """The expression's value; Refusal where it has none."""
        meaning = self.meaning(expr)
        if isinstance(meaning, Value):
            return meaning
        raise Refusal(
            f"a pointer where a number is used ({expr})",
            "an integer, a float or a bool",
            "Load from the pointer's buffer instead.",
        )

    def pointer(self, expr: Any) -> Pointer | Element:
        """The pointer that an expression is; Refusal where it is none."""
        meaning = self.meaning(expr)
        if isinstance(meaning, Value):
            raise Refusal(
                f"a number where a pointer is used ({expr})",
                "the address of a buffer's element",
                "Take it with T.address_of.",
            )
        return meaning

    def meaning(self, expr: Any) -> Meaning:
        """What an expression stands for."""
        result = self.run(expr)
        if result is None:
            raise Refusal(
                f"a call without a result where a value is used ({expr})",
                "an expression with a value",
                "Make the call a statement of its own.",
            )
        return result

    def run(self, expr: Any) -> Meaning | None:
        """Evaluate; None for calls that only have an effect."""
        write = _WRITERS.get(type(expr))
        if write is None:
            raise Refusal(
                f"the expression {type(expr).__name__} ({expr})",
                "an expression of TVM's standard lowering",
                "Rewrite it with the operators of tvm.tirx.",
            )
        return write(self, expr)

    def dtype(self, expr: Any) -> DType:
        """The dtype that TIR gives an expression."""
        return known_dtype(expr.ty, lambda: f"the expression {expr}")

    def index(self, expr: Any) -> Index:
        """A buffer index: a ramp of stride one is a run, other vectors are gathered."""
        divisors = self.scope.divisors
        if type(expr) is prim.Ramp and _is_number(expr.stride, 1):
            base = self.value(expr.base)
            return Index((base,), self.dtype(expr).lanes, divisors.of(expr.base))
        value = self.value(expr)
        if value.dtype.lanes == 1:
            return Index((value,), divisor=divisors.of(expr))
        scalar = value.dtype.scalar
        return Index(tuple(Value(scalar, (lane,)) for lane in self.b.lanes(value)))

    # Writers, one for each kind of node

    def _variable(self, expr: Any) -> Meaning:
        return self.scope.meaning(expr)

    def _number(self, expr: Any) -> Value:
        return self.b.constant(self.dtype(expr), expr.value)

    def _cast(self, expr: Any) -> Value:
        source, to = expr.value, self.dtype(expr)
        if to.scalar == F32 and self._is_half_of_bits(source):
            return float32_of_half_bits(self.b, self.value(source.args[0]))
        return cast(self.b, self.value(source), to)

    def _is_half_of_bits(self, expr: Any) -> bool:
        """Whether it reinterprets 16-bit integers as float16."""
        if getattr(getattr(expr, "op", None), "name", "") != "tirx.reinterpret":
            return False
        half, bits = self.dtype(expr), self.dtype(expr.args[0])
        return half.is_float and bits.is_integer and half.bits == bits.bits == 16

    def _select(self, expr: Any) -> Value:
        """Both sides are evaluated: TIR's Select is eager."""
        yes, no = self.value(expr.true_value), self.value(expr.false_value)
        return self.b.select(self.value(expr.condition), yes, no)

    def _not(self, expr: Any) -> Value:
        return arithmetic.bitwise_not(self.b, self.value(expr.a))

    def _both(self, expr: Any) -> Value:
        return self._lazy(expr, Op.LOGICAL_AND, lambda: self.b.truth(False), otherwise=True)

    def _either(self, expr: Any) -> Value:
        return self._lazy(expr, Op.LOGICAL_OR, lambda: self.b.truth(True), otherwise=False)

    def _lazy(self, expr: Any, op: Op, decided: Callable[[], Value], otherwise: bool) -> Value:
        """And, Or: the right side only where the left one leaves it open, if it reads memory."""
        left = self.value(expr.a)
        if left.dtype.lanes > 1 or not reads_memory(expr.b):
            return self.b.op(op, left.dtype, left, self.value(expr.b))

        def right() -> Value:
            return self.value(expr.b)

        if otherwise:
            return self.b.choose(left, right, decided)
        return self.b.choose(left, decided, right)

    def _ramp(self, expr: Any) -> Value:
        dtype = self.dtype(expr)
        scalar = dtype.scalar
        base, stride = self.value(expr.base), self.value(expr.stride)
        lanes = [base.id]
        for lane in range(1, dtype.lanes):
            offset = arithmetic.multiply(self.b, stride, self.b.constant(scalar, lane))
            lanes.append(arithmetic.add(self.b, base, offset).id)
        return self.b.from_lanes(dtype, lanes)

    def _broadcast(self, expr: Any) -> Value:
        return self.b.broadcast(self.value(expr.value), self.dtype(expr).lanes)

    def _shuffle(self, expr: Any) -> Value:
        lanes = [lane for vector in expr.vectors for lane in self.b.lanes(self.value(vector))]
        dtype = self.dtype(expr)
        chosen = []
        for index in expr.indices:
            if type(index) is not prim.IntImm:
                chosen.append(self._dynamic_lane(lanes, dtype.scalar, self.value(index)))
            else:
                chosen.append(lanes[int(index.value)])
        return self.b.from_lanes(dtype, chosen)

    def _dynamic_lane(self, lanes: list[int], dtype: DType, index: Value) -> int:
        """lanes[index] for an index that is only known when the kernel runs."""
        result = Value(dtype, (lanes[0],))
        for position, lane in enumerate(lanes[1:], start=1):
            here = arithmetic.compare(
                Op.I_EQUAL, self.b, index, self.b.constant(index.dtype, position)
            )
            result = self.b.select(here, Value(dtype, (lane,)), result)
        return result.id

    def _let(self, expr: Any) -> Meaning:
        self.bind(expr.var, expr.value)
        return self.meaning(expr.body)

    def bind(self, variable: Any, value: Any) -> None:
        """Give a variable its value, unless nobody asks for it."""
        if self.scope.is_live(variable):
            self.scope.bind(variable, self.meaning(value))
            self.scope.divisors.bind(variable, self.scope.divisors.of(value))

    def _load(self, expr: Any) -> Value:
        buffer = self.scope.buffer(expr.source)
        return self.scope.memory.load(buffer, self.dtype(expr), self.index(only_index(expr)))

    def _call(self, expr: Any) -> Meaning | None:
        name = getattr(expr.op, "name", str(expr.op))
        write = self._calls.get(name)
        if write is None:
            raise Refusal(
                f"a call of {name}",
                "one of the operators that compile/spirv/calls.py lists",
                "Express it with those, or add it there.",
            )
        return write(self, expr)


def known_dtype(ty: Any, where: str | Callable[[], str]) -> DType:
    """The DType of a TVM type; Refusal where it is none of ours.

    `where` is for the error: a function where it takes TVM's printer, which is slow.
    """
    dtype = from_tvm(ty.dtype) if hasattr(ty, "dtype") else None
    if dtype is None:
        raise Refusal(
            f"the type {ty} in {where if isinstance(where, str) else where()}",
            "bool, integers of 8 to 64 bits, float16, bfloat16, float32 or float64",
            "Cast to one of these; narrower floats are kept in uint8 and widened by integer code.",
        )
    return dtype


def only_index(access: Any) -> Any:
    """The index of a flattened buffer access."""
    if len(access.indices) != 1:
        raise Refusal(
            f"an access with {len(access.indices)} indices",
            "one index: the generator takes functions after FlattenBuffer",
            "Build through tvm.compile, which runs TVM's standard lowering.",
        )
    return access.indices[0]


def reads_memory(expr: Any) -> bool:
    """Whether evaluating the expression could touch memory, or has an effect."""
    kind = type(expr)
    if kind is TensorLoad or kind is Call:
        return True
    if kind is prim.Let and reads_memory(expr.value):
        return True
    return any(reads_memory(child) for child in children(expr))


def _is_number(expr: Any, number: int) -> bool:
    return type(expr) is prim.IntImm and int(expr.value) == number


def _binary(operation: arithmetic.Binary) -> Callable[[Expressions, Any], Value]:
    def write(self: Expressions, expr: Any) -> Value:
        return operation(self.b, self.value(expr.a), self.value(expr.b))

    return write


_WRITERS: dict[type, Callable[[Expressions, Any], Meaning | None]] = {
    Var: Expressions._variable,
    prim.IntImm: Expressions._number,
    prim.FloatImm: Expressions._number,
    prim.Cast: Expressions._cast,
    prim.Add: _binary(arithmetic.add),
    prim.Sub: _binary(arithmetic.subtract),
    prim.Mul: _binary(arithmetic.multiply),
    prim.Div: _binary(arithmetic.divide),
    prim.Mod: _binary(arithmetic.remainder),
    prim.FloorDiv: _binary(arithmetic.floor_divide),
    prim.FloorMod: _binary(arithmetic.floor_remainder),
    prim.Min: _binary(arithmetic.minimum),
    prim.Max: _binary(arithmetic.maximum),
    prim.EQ: _binary(arithmetic.comparison("==")),
    prim.NE: _binary(arithmetic.comparison("!=")),
    prim.LT: _binary(arithmetic.comparison("<")),
    prim.LE: _binary(arithmetic.comparison("<=")),
    prim.GT: _binary(arithmetic.comparison(">")),
    prim.GE: _binary(arithmetic.comparison(">=")),
    prim.And: Expressions._both,
    prim.Or: Expressions._either,
    prim.Not: Expressions._not,
    prim.Select: Expressions._select,
    prim.LShift: _binary(arithmetic.shift_left),
    prim.RShift: _binary(arithmetic.shift_right),
    prim.BitwiseAnd: _binary(arithmetic.bitwise_and),
    prim.BitwiseOr: _binary(arithmetic.bitwise_or),
    prim.BitwiseXor: _binary(arithmetic.bitwise_xor),
    prim.BitwiseNot: Expressions._not,
    prim.Let: Expressions._let,
    prim.Ramp: Expressions._ramp,
    prim.Broadcast: Expressions._broadcast,
    prim.Shuffle: Expressions._shuffle,
    TensorLoad: Expressions._load,
    Call: Expressions._call,
}
