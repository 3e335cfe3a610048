"""The kernels of a decoded token, each alone: a launch plan for gpu_token.py, which runs it.

The library's functions `decode` and `sample` are in it as they are, and once more `apart`: there
every tensor has memory of its own, where functions of single kernels then find it as it was left,
since all functions share the plan's workspace. A kernel's function has its steps of a token in
turn, each with weights of its own; where the layers do not have enough of them to fill a cache,
there are copies.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from absent_gpus.shipped import short
from absent_gpus.token import FUNCTIONS, Token

from mxforge.compile.plan import ALIGNMENT
from mxforge.compile.plan_values import Values
from mxforge.kv_layout import PAGE_TOKENS
from mxforge.plan import (
    DTYPES,
    Constant,
    Feature,
    Function,
    Number,
    Op,
    Plan,
    Role,
    Step,
    Storage,
    Symbol,
    Tensor,
)

ROTATED_BYTES = 512 << 20  # of weights and cache, before a kernel meets the same again
COPIED_BYTES = 512 << 20  # at most, for that
MOST_CALLS = 512  # in one turn of a kernel, however small its weights


def of_token(token: Token) -> tuple[Plan, dict[str, Any]]:
    """The plan, and what gpu_token.py has to know of it:

    sizes    the plan's symbols
    inputs   what arguments hold, in all elements or in each; zeros where nothing is told
    kernels  of each: its name, its function in the plan, calls in a token, bytes of weights and
             cache that a call reads, and those of all calls of the function
    """
    token = replace(token, sizes={**token.sizes, "e": 1, "g": 1})  # what sampling gets at least
    functions: list[Function] = []
    kernels: list[dict[str, Any]] = []
    workspace = token.plan.workspace
    for name in FUNCTIONS:
        function, workspace = _apart(token, name, workspace)
        functions += [token.plan[name], function]
        for kernel in dict.fromkeys(step.kernel for step in function.steps):
            steps = [step for step in function.steps if step.kernel == kernel]
            rotated = sum(sum(token.reads(function, step)) for step in steps)
            copies = _copies(function, steps, rotated)
            functions.append(_turn(function, steps, copies, f"{name} {kernel}"))
            kernels.append(
                {
                    "kernel": short(kernel),
                    "function": functions[-1].name,
                    "calls": len(steps),
                    "bytes": rotated / len(steps),
                    "rotated_bytes": rotated * copies,
                }
            )
    told = {"sizes": token.sizes, "inputs": _inputs(token.sizes), "kernels": kernels}
    return Plan(tuple(functions), workspace), told


def _inputs(sizes: dict[str, int]) -> dict[str, Any]:
    """Of one sequence, whose next token begins its last page; the most likely is drawn."""
    full, window = sizes["full_columns"], sizes["sliding_columns"]
    return {
        "tokens": 1, "positions": (full - 1) * PAGE_TOKENS,
        "full_table": list(range(full)), "sliding_table": list(range(window)),
        "sliding_first": full - window,
        "top_p": 1, "penalties": [1, 0, 0], "mask_row": -1, "edit_row": -1, "edit_token": -1,
    }  # fmt: skip


def _apart(token: Token, name: str, workspace: int) -> tuple[Function, int]:
    """A function for the token's sizes alone, whose tensors lie behind so much workspace, and where
    that ends. Nothing in it is taken back to the host but its outputs."""
    function, values = token.plan[name], Values()
    of: list[int] = []  # its values, among the new ones

    def constant(value: int) -> int | None:
        made = values.all()[value]
        return made.number if isinstance(made, Constant) else None

    for value in function.values:
        if isinstance(value, Constant | Feature):
            of.append(values.add(value))
        elif isinstance(value, Symbol):
            of.append(values.constant(token.sizes[value.name]))
        elif value.op is Op.AND and 0 in (constant(of[value.a]), constant(of[value.b])):
            of.append(values.constant(0))  # whatever features the device has
        else:
            of.append(values.operation(value.op, of[value.a], of[value.b]))

    tensors: list[Tensor] = []
    storages: list[Storage] = []
    start = values.constant(0)
    for tensor in function.tensors:
        shape = tuple(of[extent] for extent in tensor.shape)
        if tensor.role is Role.LOCAL:
            size = math.prod(constant(extent) or 0 for extent in shape) * DTYPES[tensor.dtype]
            tensor = replace(tensor, storage=len(storages), offset=start)
            storages.append(Storage(values.constant(size), workspace))
            workspace += -(-size // ALIGNMENT) * ALIGNMENT
        role = Role.WEIGHT if tensor.role is Role.KV else tensor.role
        tensors.append(replace(tensor, role=role, shape=shape))
    steps = []
    for step in function.steps:
        when = None if step.when is None else of[step.when]
        if when is not None and constant(when) is not None:
            if not constant(when):
                continue
            when = None
        launch = step.launch and replace(
            step.launch,
            grid=tuple(of[extent] for extent in step.launch.grid),
            block=tuple(of[extent] for extent in step.launch.block),
            shared=of[step.launch.shared],
        )
        arguments = tuple(
            replace(each, value=of[each.value]) if isinstance(each, Number) else each
            for each in step.arguments
        )
        steps.append(Step(step.kernel, arguments, launch, when))
    made = Function(
        f"{name} apart", values.all(), tuple(tensors), tuple(storages), tuple(steps),
        function.outputs,
    )  # fmt: skip
    return made, workspace


def _copies(function: Function, steps: Sequence[Step], rotated: int) -> int:
    """How many times the weights and the cache of these steps should be there."""
    values = function.evaluate({})
    held = 0
    for step in steps:
        for tensor in (function.tensors[a] for a in step.arguments if isinstance(a, int)):
            if tensor.role is Role.WEIGHT:
                extents = (values[extent] for extent in tensor.shape)
                held += math.prod(extents) * DTYPES[tensor.dtype]
    if not rotated or not held:
        return 1
    wanted, most = -(-ROTATED_BYTES // rotated), max(1, MOST_CALLS // len(steps))
    return min(wanted, most, 1 + COPIED_BYTES // held)


def _turn(function: Function, steps: Sequence[Step], copies: int, name: str) -> Function:
    """Steps of a function alone, with so many copies of what is resident: a copy's name ends in its
    number."""
    arguments: dict[tuple[int, int], Tensor] = {}  # by place in the function, and copy
    locals_: dict[tuple[int, int], Tensor] = {}
    storages: list[Storage] = []

    def key(place: int, copy: int) -> tuple[int, int]:
        resident = function.tensors[place].role is Role.WEIGHT
        return (place, copy if resident else 0)

    for copy in range(copies):
        for place in (a for step in steps for a in step.arguments if isinstance(a, int)):
            tensor, at = function.tensors[place], key(place, copy)
            if tensor.role is not Role.LOCAL:
                copied = replace(tensor, name=f"{tensor.name} {at[1]}" if at[1] else tensor.name)
                arguments.setdefault(at, copied)
            elif at not in locals_:
                locals_[at] = replace(tensor, storage=len(storages))
                storages.append(function.storages[tensor.storage])
    tensors = arguments | locals_
    places = {at: number for number, at in enumerate(tensors)}
    turn = tuple(
        replace(
            step,
            arguments=tuple(
                places[key(each, copy)] if isinstance(each, int) else each
                for each in step.arguments
            ),
        )
        for copy in range(copies)
        for step in steps
    )
    return Function(name, function.values, tuple(tensors.values()), tuple(storages), turn, ())
