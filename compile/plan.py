"""Launch plans from Relax functions whose memory is planned: what `mxforge.plan` holds of them.

After the phase `memory-plan` a function is one block of bindings, in order: storages, tensors in
them, calls of kernels, and tuples and aliases of these. Nothing else is understood.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import tvm
from tvm import relax, tirx

from mxforge.plan import DTYPES, Function, Op, Plan, Role, Step, Storage, Symbol, Tensor

from .launches import Hosts
from .models.emit import ARGUMENTS
from .plan_values import NotStraightError, Values

ALIGNMENT = 256  # of storages, bytes: what Vulkan's devices ask at most
_ROLES = {"input": Role.INPUT, "kv": Role.KV, "weight": Role.WEIGHT}


def plan_of(module: tvm.IRModule, hosts: Hosts | None = None) -> Plan:
    """The plan of all Relax functions of a module after `memory-plan`, in order of their names.

    `hosts` launch its kernels on a device; without, a step is a call of a kernel itself.
    """
    functions = sorted(
        (var.name_hint, function)
        for var, function in module.functions.items()
        if isinstance(function, relax.Function)
    )
    made = [_Function(name, function, hosts) for name, function in functions]
    return Plan(tuple(each.done() for each in made), max(each.workspace for each in made))


class _Function:
    """One function while its bindings are read."""

    def __init__(self, name: str, function: relax.Function, hosts: Hosts | None) -> None:
        self.name = name
        self._hosts = hosts
        self.values = Values()
        self.tensors: list[Tensor] = []
        self.storages: list[Storage] = []
        self.steps: list[Step] = []
        self.workspace = 0
        self._symbols: dict[Any, int] = {}
        self._named: dict[Any, Any] = {}  # of a variable: tensor, storage, or a tuple of these
        bounds = dict((function.attrs or {}).get("tir_var_upper_bound", {}))
        for var, argument in zip(function.params, function.attrs[ARGUMENTS], strict=True):
            role, _, of = str(argument).partition(" ")
            shape = tuple(self._extent(extent, bounds) for extent in var.ty.shape.values)
            self._named[var] = self._add(Tensor(_ROLES[role], str(var.ty.dtype), shape, of))
        for block in function.body.blocks:
            for binding in block.bindings:
                self._bind(binding)
        self.outputs = tuple(_flat(self._of(function.body.body)))

    def done(self) -> Function:
        return Function(
            self.name, self.values.all(), tuple(self.tensors), tuple(self.storages),
            tuple(self.steps), self.outputs,
        )  # fmt: skip

    def _extent(self, extent: Any, bounds: Mapping[str, Any]) -> int:
        """Of an argument: a number, or a symbol."""
        if isinstance(extent, tirx.Var) and extent not in self._symbols:
            symbol = Symbol(extent.name, int(bounds.get(extent.name, 0)))
            self._symbols[extent] = self.values.add(symbol)
        return self._value(extent)

    def _value(self, expression: Any) -> int:
        return self.values.expression(expression, self._symbols)

    def _add(self, tensor: Tensor) -> int:
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def _of(self, expression: relax.Expr) -> Any:
        if isinstance(expression, relax.Var):
            return self._named[expression]
        if isinstance(expression, relax.Tuple):
            return tuple(map(self._of, expression.fields))
        if isinstance(expression, relax.TupleGetItem):
            return self._of(expression.tuple_value)[expression.index]
        raise self._refused(expression)

    def _bind(self, binding: relax.Binding) -> None:
        if not isinstance(binding, relax.VarBinding):
            raise self._refused(binding)
        value = binding.value
        if not isinstance(value, relax.Call):
            self._named[binding.var] = self._of(value)
        elif isinstance(value.op, tvm.ir.GlobalVar):
            self._call(value.op.name_hint, tuple(self._of(argument) for argument in value.args))
        else:
            allocates: dict[str, Callable[..., int]] = {
                "relax.memory.alloc_storage": self._storage,
                "relax.memory.alloc_tensor": self._tensor,
                "relax.builtin.alloc_tensor": self._alone,
            }
            allocate = allocates.get(value.op.name)
            if allocate is None:
                raise self._refused(value)
            self._named[binding.var] = allocate(*value.args)

    def _call(self, kernel: str, tensors: tuple[int, ...]) -> None:
        if self._hosts is None:
            self.steps.append(Step(kernel, tensors))
        else:
            shapes = [self.tensors[tensor].shape for tensor in tensors]
            self.steps += self._hosts.launches(kernel, tensors, shapes, self.values)

    def _storage(self, size: Any, *_where: Any) -> int:
        """In the workspace, if its size is known now."""
        (expression,) = size.values
        at = None
        if isinstance(expression, tirx.IntImm):
            at = self.workspace
            self.workspace += -(-int(expression) // ALIGNMENT) * ALIGNMENT
        self.storages.append(Storage(self._value(expression), at))
        return len(self.storages) - 1

    def _tensor(self, storage: Any, offset: Any, shape: Any, dtype: Any, *_where: Any) -> int:
        extents = tuple(map(self._value, shape.values))
        at, begin = self._of(storage), self._value(offset.value)
        return self._add(Tensor(Role.LOCAL, str(dtype.value), extents, storage=at, offset=begin))

    def _alone(self, shape: Any, dtype: Any, *_where: Any) -> int:
        """What the caller is given: in memory of its own."""
        extents = tuple(map(self._value, shape.values))
        size = self.values.constant(DTYPES[str(dtype.value)])
        for extent in extents:
            size = self.values.operation(Op.MUL, size, extent)
        self.storages.append(Storage(size, None))
        return self._add(
            Tensor(
                Role.LOCAL, str(dtype.value), extents, storage=len(self.storages) - 1,
                offset=self.values.constant(0),
            )
        )  # fmt: skip

    def _refused(self, what: Any) -> NotStraightError:
        return NotStraightError(
            f"A launch plan has no words for {type(what).__name__} in {self.name}: {what}"
        )


def _flat(value: Any) -> Iterable[int]:
    if isinstance(value, tuple):
        for each in value:
            yield from _flat(each)
    else:
        yield value
