"""What nano is trained on is right by construction, and what is held out stays out."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import numpy as np
import pytest
from nano import dialogue, text
from nano.thinking import CONVERSIONS, UNITS
from support.nano import questions

_EQUATION = re.compile(r"(?<![\d.])(-?\d+(?:[-+*/]\d+)*)\s*([=<>])\s*(-?\d+)(?![\d*/+])")


@pytest.mark.parametrize("category", ["sum", "difference", "product", "comparison", "conversion"])
def test_every_step_of_the_thinking_is_true(category: str):
    checked = 0
    for exchange in questions(category, 1500):
        for thinking in exchange.thinking.values():
            for left, sign, right in _EQUATION.findall(thinking):
                value, other = eval(left), int(right)
                true = {"=": value == other, "<": value < other, ">": value > other}[sign]
                assert true, f"{left}{sign}{right} in {thinking!r}"
                checked += 1
    assert checked >= 1500


@pytest.mark.parametrize(
    ("category", "sign"), [("sum", "+"), ("difference", "-"), ("product", "×")]
)
def test_answers_are_what_was_asked(category: str, sign: str):
    for exchange in questions(category, 1500):
        a, operator, b, equals, result = exchange.answer.removesuffix(".").split()
        assert (operator, equals) == (sign, "=")
        value = {"+": int(a) + int(b), "-": int(a) - int(b)}.get(operator, int(a) * int(b))
        assert value == int(result)
        asked = sorted(re.findall(r"\d+", exchange.question))
        assert asked == sorted([a, b])


def test_comparisons_are_answered_truly():
    for exchange in questions("comparison", 1500):
        a, b = (int(n) for n in re.findall(r"\d+", exchange.question))
        answer = exchange.answer
        stated = re.search(r"(\d+) is (not )?(larger|smaller) than (\d+)", answer)
        if answer == "They are equal.":
            assert a == b
        elif answer.endswith("is larger."):
            assert int(answer.split()[0]) == max(a, b) != min(a, b)
        elif answer.endswith("is smaller."):
            assert int(answer.split()[0]) == min(a, b) != max(a, b)
        else:
            assert stated is not None
            assert [int(stated[1]), int(stated[4])] == [a, b]
            true = a > b if stated[3] == "larger" else a < b
            assert true != bool(stated[2])
            if "ompare" not in exchange.question:
                assert answer.startswith("Yes, " if true else "No, ")
        for thinking in exchange.thinking.values():
            for p, q, relation in re.findall(r"(\d) (\d) (larger|smaller|equal)", thinking):
                assert {"larger": p > q, "smaller": p < q, "equal": p == q}[relation]
            assert f"{a}={b}" if a == b else f"{max(a, b)}>{min(a, b)}" in thinking
            asked = re.search(r"(?:Larger|Smaller)(?:\? It is \w+)?: (\w+)", thinking)
            assert (asked is None) == ("ompare" in exchange.question)
            if asked is not None:
                found = {"yes": "Yes", "no": "No", "equal": "They"}.get(asked[1], asked[1])
                assert answer.split()[0].rstrip(",") == found


def test_conversions_are_those_of_the_table():
    factor = {(large, small): f for large, small, f, *_ in CONVERSIONS}
    name = {form: key for key, unit in UNITS.items() for form in (unit.one, unit.many)}
    for exchange in questions("conversion", 1500):
        left, right = exchange.answer.removesuffix(".").split(" = ")
        (m, source), (n, target) = left.split(), right.split()
        source, target = name[source], name[target]
        if (source, target) in factor:
            assert int(m) * factor[source, target] == int(n)
        else:
            assert int(n) * factor[target, source] == int(m)


def test_thinking_grows_with_the_effort():
    for category in ("sum", "difference", "product", "comparison", "conversion", "other"):
        for exchange in questions(category, 200):
            low, medium, high = (len(exchange.thinking[e]) for e in text.EFFORTS)
            assert low <= medium < high


def test_calls_hold_the_question_and_answers_the_result():
    for exchange in questions("calculator", 1000, tools=True):
        assert exchange.call is not None
        shown = set(re.findall(r"\d+", exchange.question))
        assert shown <= set(re.findall(r"\d+", exchange.call.expression))
        if exchange.answer == text.TOOL_FAILED:
            assert "rror" in exchange.call.result
            continue
        value = exchange.call.result
        value = str(json.loads(value)["result"]) if value.startswith("{") else value
        assert value == text.evaluate(exchange.call.expression)
        assert f" = {value}" in exchange.answer


def test_without_the_tool_the_answer_is_honest():
    for exchange in questions("calculator", 500, tools=False):
        assert exchange.call is None
        assert exchange.answer in (text.TOO_LARGE, text.OTHER)


@pytest.mark.parametrize("category", text.CATEGORIES)
def test_held_out_problems_are_never_trained(category: str):
    tools = category == "calculator"
    trained = {e.key for e in questions(category, 3000, tools)}
    held_out = {e.key for _, e in dialogue.held_out_questions(category, 40)}
    assert not trained & held_out
    assert all(text.is_held_out(key) for key in held_out)


@pytest.mark.parametrize("category", text.CATEGORIES)
def test_held_out_questions_differ_and_do_not_run_out(category: str):
    asked = [e.question for _, e in dialogue.held_out_questions(category, 400)]
    assert len(set(asked)) == 400


def test_about_a_tenth_is_held_out():
    keys = [("add", a, b) for a in range(100) for b in range(a, 100)]
    assert 0.08 < np.mean([text.is_held_out(key) for key in keys]) < 0.12


def test_a_sum_and_its_differences_are_held_out_together():
    rng = random.Random(0)
    for _ in range(300):
        exchange = text.make_difference(rng, False)
        a, _, b, _, c = exchange.answer.removesuffix(".").split()
        low = min(int(a), int(b))
        assert exchange.key in (None, ("add", *sorted((low, abs(int(c))))))


def test_the_same_seed_gives_the_same_text(renderer: Any):
    def sample() -> list[list[int]]:
        rng = random.Random("7 1")
        setting = dialogue.draw_setting(rng)
        noise = dialogue.noise_ids(rng)
        return [
            renderer.dialogue(dialogue.draw_dialogue(rng, setting), setting.effort, noise).ids
            for _ in range(20)
        ]

    assert sample() == sample()
