"""The calculator tool: right, and safe with whatever a model writes."""

from __future__ import annotations

import json

import pytest

from mxforge import calculator


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1234 * 5678", "7006652"),
        ("1,234 × 2", "2468"),
        ("7 / 2", "3.5"),
        ("6 / 2", "3"),
        ("2^10", "1024"),
        ("1 ** 5000", "1"),
        ("2 ** 2000 // 2 ** 1999", "2"),
        ("-(3 - 5) * +2", "4"),
        ("7 // 2 + 7 % 4", "6"),
        ("2 ** -1", "0.5"),
        ("0.1 + 0.2", "0.30000000000000004"),
    ],
)
def test_arithmetic(expression: str, value: str) -> None:
    assert calculator.call(json.dumps({"expression": expression})) == value


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "{",
        "[]",
        "5",
        "null",
        "{}",
        '{"expression": 5}',
        "[" * 100_000,
        *(
            json.dumps({"expression": expression})
            for expression in (
                "",
                "1 +",
                "x",
                "__import__('os')",
                "'a' * 9",
                "True + 1",
                "1or 2",
                "1 / 0",
                "9 ** 9 ** 9",
                "2 ** (10 ** 9)",
                "0 ** -1",
                "(-8) ** 0.5",
                "1e308 * 10",
                "1e400",
                "1j",
                "9" * 5000,
                "(" * 500 + "1" + ")" * 500,
                "1 if 1 else 2",
                "\0",
            )
        ),
    ],
)
def test_everything_else_is_an_answer_too(arguments: str) -> None:
    assert calculator.call(arguments).startswith("error: ")
