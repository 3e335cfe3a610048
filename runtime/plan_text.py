"""A launch plan as text, for people: one line for a function, and one for each of its steps."""

from __future__ import annotations

from collections.abc import Iterator

from .plan import Constant, Feature, Function, Number, Op, Operation, Plan, Role, Step, Symbol

_SIGNS = {
    Op.ADD: "+", Op.SUB: "-", Op.MUL: "*", Op.DIV: "//", Op.MOD: "%", Op.LESS: "<",
    Op.LESS_EQUAL: "<=", Op.EQUAL: "==", Op.AND: "and", Op.OR: "or",
}  # fmt: skip


def described(plan: Plan) -> Iterator[str]:
    """Its lines.

    A step reads ``kernel(arguments)``; a local tensor is ``%`` and its number, and is told with
    dtype and shape where a step first has it. A launch on a device follows in brackets: grid, block
    and bytes of shared memory.
    """
    yield f"workspace of {plan.workspace:,} bytes"
    for function in plan.functions:
        yield ""
        yield from _function(function)


def _function(function: Function) -> Iterator[str]:
    inputs = [
        f"{tensor.name} {_type(function, index)}"
        for index, tensor in enumerate(function.arguments)
        if tensor.role is Role.INPUT
    ]
    counts = {
        word: sum(tensor.role is role for tensor in function.tensors)
        for word, role in (("caches", Role.KV), ("weights", Role.WEIGHT))
    }
    inputs += [f"{count} {word}" for word, count in counts.items() if count]
    outputs = ", ".join(_type(function, output) for output in function.outputs)
    yield f"{function.name}({', '.join(inputs)}) -> {outputs}"
    bounds = [
        f"{value.name} <= {value.most}"
        for value in function.values
        if isinstance(value, Symbol) and value.most
    ]
    if bounds:
        yield f"  where {', '.join(bounds)}"
    told: set[int] = set()
    for step in function.steps:
        yield f"  {_step(function, step, told)}"


def _step(function: Function, step: Step, told: set[int]) -> str:
    words = []
    for argument in step.arguments:
        if isinstance(argument, Number):
            words.append(_value(function, argument.value))
            continue
        tensor = function.tensors[argument]
        word = tensor.name or f"%{argument}"
        if tensor.role is Role.LOCAL and argument not in told:
            told.add(argument)
            word += f" {_type(function, argument)}"
        words.append(word)
    text = f"{step.kernel}({', '.join(words)})"
    if launch := step.launch:
        grid, block = (
            " x ".join(_value(function, size) for size in sizes)
            for sizes in (launch.grid, launch.block)
        )
        text += f" [{grid}; {block}; {_value(function, launch.shared)}"
        text += "; overlaps]" if launch.overlaps else "]"
    if step.when is not None:
        text = f"if {_value(function, step.when)}: {text}"
    return text


def _type(function: Function, index: int) -> str:
    tensor = function.tensors[index]
    return f"{tensor.dtype}[{', '.join(_value(function, extent) for extent in tensor.shape)}]"


def _value(function: Function, index: int) -> str:
    value = function.values[index]
    if isinstance(value, Constant):
        return str(value.number)
    if isinstance(value, Symbol):
        return value.name
    if isinstance(value, Feature):
        return f"has({value.name})"
    assert isinstance(value, Operation)
    a, b = _value(function, value.a), _value(function, value.b)
    if value.op in (Op.MIN, Op.MAX):
        return f"{value.op.name.lower()}({a}, {b})"
    return f"({a} {_SIGNS[value.op]} {b})"
