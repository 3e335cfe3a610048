"""Launch plans as bytes: what is written is read back, and whatever is damaged is refused."""

from __future__ import annotations

import contextlib
import random
from dataclasses import replace

import pytest

from mxforge.errors import ArtifactCorruptError, MxforgeError
from mxforge.plan import (
    Constant,
    Feature,
    Function,
    Launch,
    Number,
    Op,
    Operation,
    Plan,
    PlanError,
    Role,
    Step,
    Storage,
    Symbol,
    Tensor,
)

VALUES = (
    Symbol("n", 8),  # 0
    Constant(4),  # 1
    Operation(Op.MUL, 0, 1),  # 2: 4 n
    Constant(512),  # 3
    Feature("matrices 8x8x8"),  # 4
    Operation(Op.LESS, 0, 1),  # 5: n < 4
    Operation(Op.AND, 4, 5),  # 6
)
FUNCTION = Function(
    "forward",
    VALUES,
    (
        Tensor(Role.INPUT, "int32", (0,), "tokens"),
        Tensor(Role.WEIGHT, "bfloat16", (1, 1), "a.weight"),
        Tensor(Role.LOCAL, "float32", (0, 1), storage=0, offset=1),
        Tensor(Role.LOCAL, "float32", (0,), storage=1, offset=1),
    ),
    (Storage(3, 256), Storage(2, None)),
    (
        Step("one", (0, 1, 2)),
        Step("two", (2, Number(0, 32), Number(2, 64), 3), Launch((0, 1, 1), (3, 1, 1), 1, True), 6),
    ),
    (3,),
)
SIZED_BY_A_FEATURE = Function(
    "f", (Feature("x"),), (Tensor(Role.INPUT, "int8", (0,), "a"),), (), (), ()
)
PLAN = Plan((FUNCTION,), 768)
DATA = PLAN.to_bytes()


def test_what_is_written_is_read_back():
    assert Plan.from_bytes(DATA) == PLAN
    assert Plan.from_bytes(DATA).to_bytes() == DATA
    assert PLAN["forward"] is FUNCTION
    assert [tensor.name for tensor in FUNCTION.arguments] == ["tokens", "a.weight"]


def test_values_are_computed_in_their_order():
    assert FUNCTION.evaluate({"n": 3}) == [3, 4, 12, 512, 0, 1, 0]
    assert FUNCTION.evaluate({"n": 3}, {"matrices 8x8x8"})[4:] == [1, 1, 1]
    assert FUNCTION.evaluate({"n": 5}, {"matrices 8x8x8"})[4:] == [1, 0, 0]


@pytest.mark.parametrize(
    ("op", "a", "b", "expected"),
    [
        (Op.ADD, 3, -5, -2), (Op.SUB, 3, 5, -2), (Op.MUL, -3, 5, -15), (Op.DIV, 7, 2, 3),
        (Op.DIV, -7, 2, -4), (Op.MOD, 7, 2, 1), (Op.MOD, -7, 2, 1), (Op.MIN, 3, -1, -1),
        (Op.MAX, 3, -1, 3), (Op.LESS, 3, 3, 0), (Op.LESS_EQUAL, 3, 3, 1), (Op.EQUAL, 2, 3, 0),
        (Op.AND, 2, 0, 0), (Op.AND, 2, 3, 1), (Op.OR, 0, 0, 0), (Op.OR, 0, 4, 1),
        (Op.MIN, -(1 << 63), 1, -(1 << 63)),
    ],
)  # fmt: skip
def test_operations(op, a, b, expected):
    function = Function("", (Constant(a), Constant(b), Operation(op, 0, 1)), (), (), (), ())
    assert function.evaluate({})[2] == expected


@pytest.mark.parametrize(
    ("op", "a", "b"),
    [(Op.DIV, 1, 0), (Op.MOD, 1, -1), (Op.MUL, 1 << 62, 2), (Op.ADD, 1 << 62, 1 << 62)],
)
def test_what_cannot_be_computed_is_said(op, a, b):
    function = Function("", (Constant(a), Constant(b), Operation(op, 0, 1)), (), (), (), ())
    with pytest.raises(PlanError):
        function.evaluate({})


def test_every_truncation_is_refused():
    for size in range(len(DATA)):
        with pytest.raises(ArtifactCorruptError, match="should be a launch plan"):
            Plan.from_bytes(DATA[:size])


def test_damage_is_refused_or_gives_another_plan():
    drawn = random.Random(0)
    for _ in range(3000):
        data = bytearray(DATA)
        for _ in range(drawn.randint(1, 4)):
            data[drawn.randrange(len(data))] = drawn.randrange(256)
        with contextlib.suppress(ArtifactCorruptError):
            assert Plan.from_bytes(bytes(data)).to_bytes()


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (Plan((FUNCTION, FUNCTION), 768), "two functions have one name"),
        (Plan((FUNCTION,), 767), "outside the workspace"),
        (Plan((replace(FUNCTION, name="f" * 257),), 768), "a name has 257 bytes"),
        (Plan((SIZED_BY_A_FEATURE,), 768), "has a computed extent"),
    ],
)
def test_what_does_not_fit_together_is_refused(changed: Plan, reason: str):
    with pytest.raises(ArtifactCorruptError, match=reason):
        Plan.from_bytes(changed.to_bytes())


def test_its_errors_are_the_packages():
    assert issubclass(PlanError, MxforgeError)
