"""Launches of a GPU's kernels, from the host functions that TVM splits off: data, not code.

A host function computes sizes, decides by them which kernels are launched, and launches these. It
has no loops and no memory of its own, so that a launch plan says all of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import tirx

from mxforge.plan import Launch, Number, Op, Step

from .plan_values import NotStraightError, Values

_AXES = ("blockIdx.x", "blockIdx.y", "blockIdx.z", "threadIdx.x", "threadIdx.y", "threadIdx.z")
_SHARED = "tirx.use_dyn_shared_memory"
_OVERLAP = "tirx.use_programtic_dependent_launch"  # TVM's spelling


@dataclass(frozen=True)
class Hosts:
    """The host functions of a module after SplitHostDevice, by their kernels' names, and the
    device's functions."""

    hosts: Mapping[str, tirx.PrimFunc]
    devices: Mapping[str, tirx.PrimFunc]

    @classmethod
    def of(cls, module: tvm.IRModule) -> Hosts:
        functions = {var.name_hint: function for var, function in module.functions.items()}
        devices = {
            name: function
            for name, function in functions.items()
            if "tirx.is_global_func" in function.attrs
        }
        hosts = {
            name: function
            for name, function in functions.items()
            if "mxforge.kernel" in function.attrs
        }
        return cls(hosts, devices)

    def launches(
        self, kernel: str, tensors: Sequence[int], shapes: Sequence[Sequence[int]], values: Values
    ) -> list[Step]:
        """The steps that one call of a kernel is on a device.

        `tensors` are its arguments, of these `shapes`, which are of `values`; what the launches
        need is added to them.
        """
        return _Host(self, self.hosts[kernel], tensors, shapes, values).steps


class _Host:
    """A host function while it is read."""

    def __init__(
        self, hosts: Hosts, function: tirx.PrimFunc, tensors: Sequence[int],
        shapes: Sequence[Sequence[int]], values: Values,
    ) -> None:  # fmt: skip
        self.steps: list[Step] = []
        self._devices = hosts.devices
        self._values = values
        self._variables: dict[Any, int] = {}
        self._buffers: dict[Any, int] = dict(zip(function.params, tensors, strict=True))
        for param, shape in zip(function.params, shapes, strict=True):
            for extent, value in zip(param.ty.shape, shape, strict=True):
                if isinstance(extent, tirx.Var):
                    self._variables.setdefault(extent, value)
        self._statement(function.body, None)

    def _statement(self, statement: Any, when: int | None) -> None:
        if isinstance(statement, tirx.SeqStmt):
            for each in statement.seq:
                self._statement(each, when)
        elif isinstance(statement, tirx.Bind):
            self._variables[statement.var] = self._value(statement.value)
        elif isinstance(statement, tirx.DeclBuffer):
            self._buffers[statement.buffer] = self._tensor(statement.data)
        elif isinstance(statement, tirx.IfThenElse):
            met = self._value(statement.condition)
            self._statement(statement.then_case, self._both(when, met))
            if statement.else_case is not None:
                unmet = self._values.negation(met)
                self._statement(statement.else_case, self._both(when, unmet))
        elif isinstance(statement, tirx.Evaluate):
            self._launch(statement.value, when)
        else:
            raise NotStraightError(f"A launch plan has no words for {type(statement).__name__}")

    def _both(self, when: int | None, condition: int) -> int:
        return condition if when is None else self._values.operation(Op.AND, when, condition)

    def _value(self, expression: Any) -> int:
        return self._values.expression(expression, self._variables)

    def _tensor(self, data: Any) -> int:
        """Which tensor a buffer's data is."""
        return self._buffers[data.args[0]]

    def _launch(self, call: Any, when: int | None) -> None:
        if isinstance(call, tirx.IntImm):  # nothing
            return
        if getattr(call.op, "name", "") != "tirx.call_ffi_kernel":
            raise NotStraightError(f"A launch plan has no words for a call of {call.op}")
        kernel, *arguments = call.args
        parameters = self._devices[kernel.value].params
        names = [name for name in map(str, call.attrs["launch_params"]) if name != _OVERLAP]
        own, extents = arguments[: len(parameters)], arguments[len(parameters) :]
        given = dict(zip(names, extents, strict=True))
        sizes = [self._value(given.get(axis, 1)) for axis in _AXES]
        overlaps = len(names) < len(call.attrs["launch_params"])
        self.steps.append(
            Step(
                kernel.value,
                tuple(map(self._argument, own, parameters)),
                Launch(
                    (sizes[0], sizes[1], sizes[2]), (sizes[3], sizes[4], sizes[5]),
                    self._value(given.get(_SHARED, 0)), overlaps,
                ),
                when,
            )
        )  # fmt: skip

    def _argument(self, argument: Any, parameter: Any) -> int | Number:
        type_ = parameter.ty
        if not isinstance(type_, tvm.ir.PrimType):
            return self._tensor(argument)
        return Number(self._value(argument), tvm.DataType(str(type_.dtype)).bits)
