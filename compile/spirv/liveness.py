"""Which variables of a kernel are used, so that dead bindings leave no trace in its code.

TVM's elimination of common subexpressions leaves bindings that nobody reads. Writing them would
be harmless were it not for what they declare: loads count as reads, types need capabilities.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tvm.ir import Call, TensorLoad, Var, prim
from tvm.tirx import stmt as tir

_UNARY = {prim.Cast: "value", prim.Not: "a", prim.BitwiseNot: "a", prim.Broadcast: "value"}
_BINARY = frozenset(
    {
        prim.Add, prim.Sub, prim.Mul, prim.Div, prim.Mod, prim.FloorDiv, prim.FloorMod, prim.Min,
        prim.Max, prim.EQ, prim.NE, prim.LT, prim.LE, prim.GT, prim.GE, prim.And, prim.Or,
        prim.LShift, prim.RShift, prim.BitwiseAnd, prim.BitwiseOr, prim.BitwiseXor,
    }
)  # fmt: skip


def children(node: Any) -> Iterator[Any]:
    """The nodes that `node` evaluates or runs; bindings (Bind, Let, DeclBuffer) are not among
    them, nor are shapes of buffers."""
    kind = type(node)
    if kind in _BINARY:
        yield from (node.a, node.b)
    elif kind in _UNARY:
        yield getattr(node, _UNARY[kind])
    elif kind is TensorLoad:
        yield node.source
        yield from node.indices
    elif kind is Call:
        yield from node.args
    elif kind is prim.Select:
        yield from (node.condition, node.true_value, node.false_value)
    elif kind is prim.Ramp:
        yield from (node.base, node.stride)
    elif kind is prim.Shuffle:
        yield from node.vectors
        yield from node.indices
    elif kind is prim.Let:
        yield node.body
    elif kind is tir.SeqStmt:
        yield from node.seq
    elif kind is tir.BufferStore:
        yield node.buffer
        yield node.value
        yield from node.indices
    elif kind is tir.Evaluate:
        yield node.value
    elif kind is tir.For:
        yield from (node.min, node.extent, node.body)
        if node.step is not None:
            yield node.step
    elif kind is tir.While:
        yield from (node.condition, node.body)
    elif kind is tir.IfThenElse:
        yield from (node.condition, node.then_case)
        if node.else_case is not None:
            yield node.else_case
    elif kind is tir.AttrStmt:
        yield node.body


def live_variables(body: Any) -> set[int]:
    """Identities (hashes) of all variables and buffers that the kernel's code uses."""
    live: set[int] = set()
    bindings: dict[int, Any] = {}  # what becomes used once the variable is
    pending = [body]
    while pending:
        node = pending.pop()
        kind = type(node)
        if kind is Var:
            key = hash(node)
            if key not in live:
                live.add(key)
                if key in bindings:
                    pending.append(bindings.pop(key))
            continue
        if kind is tir.Bind or kind is prim.Let:
            variable, value = node.var, node.value
        elif kind is tir.DeclBuffer:
            variable, value = node.buffer, node.data
        else:
            variable = None
        if variable is not None:
            if hash(variable) in live:
                pending.append(value)
            else:
                bindings[hash(variable)] = value
        pending.extend(children(node))
    return live
