"""The values of a launch plan, from TVM's integer expressions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tvm import tirx

from mxforge.errors import MxforgeError
from mxforge.plan import Constant, Feature, Function, Op, Operation, Value

_OPS = {
    "Add": Op.ADD, "Sub": Op.SUB, "Mul": Op.MUL, "FloorDiv": Op.DIV, "FloorMod": Op.MOD,
    "Min": Op.MIN, "Max": Op.MAX, "LT": Op.LESS, "LE": Op.LESS_EQUAL, "EQ": Op.EQUAL,
    "And": Op.AND, "Or": Op.OR,
}  # fmt: skip
_TURNED = {"GT": Op.LESS_EQUAL, "GE": Op.LESS, "NE": Op.EQUAL}  # what they are not


class NotStraightError(MxforgeError):
    """A function does what no launch plan can say: a mistake of the compiler's."""


class Values:
    """A function's values while it is made: equal ones are one, and of constants none is computed
    later."""

    def __init__(self) -> None:
        self._known: dict[Value, int] = {}

    def add(self, value: Value) -> int:
        return self._known.setdefault(value, len(self._known))

    def constant(self, number: int) -> int:
        return self.add(Constant(number))

    def operation(self, op: Op, a: int, b: int) -> int:
        made = tuple(self._known)
        x, y = made[a], made[b]
        if isinstance(x, Constant) and isinstance(y, Constant):
            (*_, number) = Function("", (x, y, Operation(op, 0, 1)), (), (), (), ()).evaluate({})
            return self.constant(number)
        return self.add(Operation(op, a, b))

    def negation(self, value: int) -> int:
        return self.operation(Op.EQUAL, value, self.constant(0))

    def expression(self, expression: Any, variables: Mapping[Any, int]) -> int:
        """An integer expression of TVM's, whose variables are these values."""
        kind = type(expression).__name__
        if isinstance(expression, int | tirx.IntImm):
            return self.constant(int(expression))
        if isinstance(expression, tirx.Var) and expression in variables:
            return variables[expression]
        if kind == "Call" and getattr(expression.op, "name", "") == "tirx.tvm_call_packed":
            return self.add(Feature(" ".join(str(each.value) for each in expression.args)))
        if kind == "Cast":
            return self.expression(expression.value, variables)
        if kind == "Not":
            return self.negation(self.expression(expression.a, variables))
        if kind in _OPS or kind in _TURNED:
            a, b = (self.expression(each, variables) for each in (expression.a, expression.b))
            if kind in _OPS:
                return self.operation(_OPS[kind], a, b)
            return self.negation(self.operation(_TURNED[kind], a, b))
        raise NotStraightError(f"A launch plan cannot compute {kind}: {expression}")

    def all(self) -> tuple[Value, ...]:
        return tuple(self._known)
