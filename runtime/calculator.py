"""A calculator as a tool: the example that chat and the demo offer to the model."""

from __future__ import annotations

import ast
import json
import operator
import re
from collections.abc import Callable
from typing import Any

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluates an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {
                "expression": {"type": "string", "description": "For example: 1234 * 5678"}
            },
            "required": ["expression"],
        },
    },
}

_LONGEST = 1000  # characters of an expression
_LARGEST = 10**1000  # of any result on the way

_CHARACTERS = re.compile(r"[0-9eE.+\-*/%()\s]*")

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}


def call(arguments: str) -> str:
    """The tool's answer to a call, `arguments` as the model wrote them; never an exception."""
    try:
        expression = json.loads(arguments)["expression"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return 'error: expected {"expression": "…"}'
    if not isinstance(expression, str):
        return "error: the expression must be text"
    try:
        return evaluate(expression)
    except (ValueError, ArithmeticError, RecursionError, MemoryError) as error:
        return f"error: {str(error) or type(error).__name__}"


def evaluate(expression: str) -> str:
    """The value of an expression of numbers, + - * / // % ** and parentheses.

    Raises ValueError for anything else and for numbers beyond 1000 digits, ArithmeticError for
    a division by zero.
    """
    if len(expression) > _LONGEST:
        raise ValueError(f"the expression is longer than {_LONGEST} characters")
    text = expression.replace(",", "").replace("×", "*").replace("÷", "/").replace("^", "**")
    if not _CHARACTERS.fullmatch(text):
        raise ValueError("only numbers, + - * / // % ** and parentheses can be evaluated")
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except SyntaxError:
        raise ValueError(f"not an arithmetic expression: {expression}") from None
    value = _value(tree.body)
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    return repr(value)


def _value(node: ast.expr) -> int | float:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(node.value)
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _bounded(_UNARY[type(node.op)](_value(node.operand)))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _bounded(_BINARY[type(node.op)](_value(node.left), _value(node.right)))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return _bounded(_power(_value(node.left), _value(node.right)))
    raise ValueError("only numbers, + - * / // % ** and parentheses can be evaluated")


def _power(base: int | float, exponent: int | float) -> Any:
    if isinstance(base, int) and isinstance(exponent, int) and exponent >= 0:
        if (abs(base).bit_length() - 1) * exponent > _LARGEST.bit_length():
            raise ValueError("the result is too large")
        return base**exponent
    return float(base) ** exponent


def _bounded(value: Any) -> int | float:
    if isinstance(value, complex):
        raise ValueError("the result is no real number")
    if not -_LARGEST < value < _LARGEST:  # NaN, too
        raise ValueError("the result is too large")
    return value  # type: ignore[no-any-return]
