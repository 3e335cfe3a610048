"""The text that nano learns and is asked: questions, thinking, answers.

Everything is made from a seed, and is right by construction: each step of the thinking is
computed by the function that writes it. Problems are held out by the hash of what they are about
(operation and numbers), whatever the phrasing; `draw` gives one side of the split or the other.

    rng = random.Random(0)
    exchange = draw(rng, "sum", tools=False, held_out=False)
    exchange.question, exchange.thinking["medium"], exchange.answer

thinking.py has the thinking, phrasings.py the words, dialogue.py the token ids.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from nano import phrasings
from nano.thinking import (
    CONVERSIONS,
    UNITS,
    amount,
    comparison_thinking,
    conversion_thinking,
    conversion_up_thinking,
    difference_thinking,
    product_thinking,
    sum_thinking,
)

EFFORTS = ("low", "medium", "high")
CATEGORIES = ("sum", "difference", "product", "comparison", "conversion", "calculator", "other")
_COMPUTED = CATEGORIES[:5]
ADD_MAX = 999  # largest number of a sum, a difference, a comparison
TIMES_MAX = 12  # the smaller factor
FACTOR_MAX = 99  # the larger one
HELD_OUT_IN = 10  # one problem of so many is never trained

OTHER = "I am a tiny demo model: I can add, subtract, multiply, compare numbers and convert units."
HELLO = "Hello! " + OTHER
THANKS = "You are welcome."
TOO_LARGE = "That is too large for me: I know numbers up to 999 and products up to 99 × 12."
TOOL_FAILED = "The calculator gave an error."


@dataclass(frozen=True)
class Call:
    """A call of the calculator, and what it answered."""

    expression: str
    result: str


@dataclass(frozen=True)
class Exchange:
    """One question and what is to be answered.

    key       what the question is about; None where it is always trained
    thinking  effort -> text
    noise     places in the question's tokens that become random ids: (index, how many)
    """

    category: str
    question: str
    thinking: Mapping[str, str]
    answer: str
    key: tuple[Any, ...] | None = None
    call: Call | None = None
    noise: tuple[tuple[int, int], ...] = ()


def is_held_out(key: tuple[Any, ...] | None) -> bool:
    """Whether a problem is kept for evaluation: by hash, so that every machine agrees."""
    if key is None:
        return False
    digest = hashlib.sha256(repr(key).encode()).digest()
    return int.from_bytes(digest[:4], "little") % HELD_OUT_IN == 0


# -- problems ------------------------------------------------------------------------------------


def _number(rng: random.Random) -> int:
    """0 to 999, short and long ones alike."""
    return rng.randrange(*rng.choices(((0, 10), (10, 100), (100, 1000)), (3, 8, 9))[0])


def _add_key(a: int, b: int) -> tuple[Any, ...] | None:
    """A sum and the two differences that undo it are one family, held out together."""
    return ("add", min(a, b), max(a, b)) if max(a, b) >= 10 else None


def _times_key(a: int, b: int) -> tuple[Any, ...] | None:
    """The table to 10 · 10, and times 0, 1 and 10, are learnt by heart."""
    large, small = max(a, b), min(a, b)
    return ("times", small, large) if large > 10 and small > 1 and small != 10 else None


def make_sum(rng: random.Random, _tools: bool) -> Exchange:
    a, b = _number(rng), _number(rng)
    return Exchange(
        "sum",
        phrasings.ask(rng, "sum", a, b),
        sum_thinking(a, b),
        f"{a} + {b} = {a + b}.",
        _add_key(a, b),
    )


def make_difference(rng: random.Random, _tools: bool) -> Exchange:
    a, b = _number(rng), _number(rng)
    if rng.random() < 0.1:
        b = min(ADD_MAX, max(0, a + rng.randint(-9, 9)))
    if a < b and rng.random() < 0.6:
        a, b = b, a
    return Exchange(
        "difference",
        phrasings.ask(rng, "difference", a, b),
        difference_thinking(a, b),
        f"{a} - {b} = {a - b}.",
        _add_key(min(a, b), abs(a - b)),
    )


def make_product(rng: random.Random, _tools: bool) -> Exchange:
    if rng.random() < 0.22:
        a, b = rng.randint(0, TIMES_MAX), rng.randint(0, TIMES_MAX)
    else:
        a, b = rng.randint(11, FACTOR_MAX), rng.choices(range(13), [1, 1] + [4] * 11)[0]
    if rng.random() < 0.5:
        a, b = b, a
    return Exchange(
        "product",
        phrasings.ask(rng, "product", a, b),
        product_thinking(a, b),
        f"{a} × {b} = {a * b}.",
        _times_key(a, b),
    )


def make_comparison(rng: random.Random, _tools: bool) -> Exchange:
    a, b = _number(rng), _number(rng)
    roll = rng.random()
    if roll < 0.06:
        b = a
    elif roll < 0.35:  # of one length, and alike
        b = min(ADD_MAX, max(0, a + rng.randint(-30, 30)))
    larger, smaller = max(a, b), min(a, b)
    kind = rng.choices(range(5), (6, 5, 3, 3, 1))[0]
    frames = phrasings.COMPARISONS[kind]
    if kind <= 1:
        answer = f"{larger} is larger." if kind == 0 else f"{smaller} is smaller."
        answer = "They are equal." if a == b else answer
    elif kind <= 3:
        word = "larger" if kind == 2 else "smaller"
        yes = a > b if kind == 2 else a < b
        answer = f"Yes, {a} is {word} than {b}." if yes else f"No, {a} is not {word} than {b}."
    else:
        word = "larger" if a > b else "smaller"
        answer = "They are equal." if a == b else f"{a} is {word} than {b}."
    question = phrasings.dress(rng, rng.choice(frames).format(a=a, b=b))
    key = ("compare", smaller, larger) if larger >= 10 else None
    asked = ("larger", "smaller", "larger?", "smaller?", "")[kind]
    return Exchange("comparison", question, comparison_thinking(a, b, asked), answer, key)


def _conversion_question(rng: random.Random, number: int | str, source: str, target: str) -> str:
    unit = UNITS[source]
    names = [unit.one] if str(number) == "1" and unit.one != unit.many else unit.names
    word = rng.choice(names)
    space = "" if word in ("km", "m", "cm", "mm", "kg", "g", "ml") and rng.random() < 0.2 else " "
    text = rng.choice(phrasings.CONVERT).format(
        x=f"{number}{space}{word}", y=rng.choice(UNITS[target].names)
    )
    return phrasings.dress(rng, text)


def make_conversion(rng: random.Random, _tools: bool) -> Exchange:
    large, small, factor, most, most_up = rng.choice(CONVERSIONS)
    if rng.random() < 0.7:
        number = rng.randint(1, min(most, rng.choice((12, 99, 999))))
        answer = f"{amount(number, large)} = {amount(number * factor, small)}."
        if factor % 10:
            key = _times_key(number, factor)
        elif factor == 60:
            key = _times_key(number, 6)
        else:
            key = ("convert", large, small, number) if number >= 10 else None
        question = _conversion_question(rng, number, large, small)
        thinking = conversion_thinking(number, large, small, factor)
    else:
        number = rng.randint(1, min(most_up, rng.choice((12, 99, 999))))
        answer = f"{amount(number * factor, small)} = {amount(number, large)}."
        key = ("convert", small, large, number) if most_up == 999 and number >= 10 else None
        question = _conversion_question(rng, number * factor, small, large)
        thinking = conversion_up_thinking(number, large, small, factor)
    return Exchange("conversion", question, thinking, answer, key)


# -- beyond: the calculator, or saying so --------------------------------------------------------

_PYTHON = {"sum": "+", "difference": "-", "product": "*", "quotient": "/"}
_SHOWN = {"*": "×"}
_LARGE_THINKING = {
    "low": "Too large.",
    "medium": "This is too large for me.",
    "high": "This is too large for me. I say so.",
}
_CALL_THINKING = {
    "low": "Calculator.",
    "medium": "This is too large for me. I use the calculator.",
    "high": "This is too large for me. I use the calculator and copy its result.",
}
_OTHER_THINKING = {
    "low": "Not for me.",
    "medium": "This is no arithmetic. I say what I can do.",
    "high": "This is no sum, difference, product, comparison or conversion. I say what I can do.",
}


def _long_number(rng: random.Random, shortest: int = 1, longest: int = 9) -> str:
    length = rng.randint(shortest, longest)
    return str(rng.randint(1, 9)) + "".join(str(rng.randint(0, 9)) for _ in range(length - 1))


def _beyond_numbers(rng: random.Random, kind: str) -> tuple[str, str]:
    """Two numbers that are outside what nano computes itself."""
    roll = rng.random()
    if kind == "product" and roll < 0.4:
        a, b = (str(rng.randint(13, rng.choice((99, 999)))) for _ in range(2))
        if rng.random() < 0.3:
            a, b = str(rng.randint(100, 999)), str(rng.randint(2, 12))
    elif kind == "quotient" and roll < 0.6:
        n = rng.randint(2, 99)
        a, b = str(rng.randint(1, 999) if roll < 0.2 else n * rng.randint(2, 999)), str(n)
        return a, b
    elif roll < 0.1:
        a = f"{rng.randint(0, 99)}.{rng.randint(1, 99)}"
        b = rng.choice((str(rng.randint(1, 99)), f"{rng.randint(0, 9)}.{rng.randint(1, 9)}"))
    else:
        a, b = _long_number(rng, 4), _long_number(rng, rng.choice((1, 4)))
    return (b, a) if rng.random() < 0.5 else (a, b)


def evaluate(expression: str) -> str:
    """What a calculator says: a whole number where the result is one."""
    value = eval(expression, {"__builtins__": {}})
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    return repr(value)


def make_beyond(rng: random.Random, tools: bool) -> Exchange:
    """Numbers beyond nano: a call where there is the tool, otherwise an honest answer."""
    kind = rng.choices(tuple(_PYTHON), (5, 5, 6, 4))[0]
    roll = rng.random()
    answer_head = None
    if roll < 0.08:  # several operations
        count = rng.randint(3, 4)
        operators = [rng.choice("+-*") for _ in range(count - 1)]
        numbers = [_long_number(rng, 1, rng.choice((2, 4))) for _ in range(count)]
        if rng.random() < 0.2:
            numbers[:2], operators[:1] = [f"({numbers[0]} {operators[0]} {numbers[1]})"], []
        expression = numbers[0] + "".join(
            f" {o} {n}" for o, n in zip(operators, numbers[1:], strict=True)
        )
        shown = expression if rng.random() < 0.7 else expression.replace(" ", "")
        question = phrasings.dress(rng, rng.choice(phrasings.FRAMES).format(e=shown))
    elif roll < 0.14:  # a large amount of some unit
        large, small, factor, *_ = rng.choice(CONVERSIONS)
        number = _long_number(rng, 4, 7)
        expression = f"{number} * {factor}"
        question = _conversion_question(rng, number, large, small)
        answer_head = f"{amount(number, large)} = {{}} {UNITS[small].many}."
    else:
        a, b = _beyond_numbers(rng, kind)
        expression = f"{a} {_PYTHON[kind]} {b}"
        question = phrasings.ask(rng, kind, a, b)
    key = ("beyond", expression)
    if not tools:
        category = "other"
        division = "/" in expression
        thinking = _OTHER_THINKING if division else _LARGE_THINKING
        return Exchange(category, question, thinking, OTHER if division else TOO_LARGE, key)
    result = evaluate(expression)
    shown = "".join(_SHOWN.get(c, c) for c in expression)
    answer = f"{shown} = {result}." if answer_head is None else answer_head.format(result)
    roll = rng.random()
    if roll < 0.12:
        result = json.dumps({"result": json.loads(result)})
    elif roll < 0.18:
        result = rng.choice(
            ("error", "error: division by zero", "error: the calculator is not available")
        )
        answer = TOOL_FAILED
    return Exchange("calculator", question, _CALL_THINKING, answer, key, Call(expression, result))


def make_other(rng: random.Random, tools: bool) -> Exchange:
    """Anything else: greetings, other questions, words and ids at random."""
    roll = rng.random()
    noise: tuple[tuple[int, int], ...] = ()
    answer, key = OTHER, None
    if roll < 0.09:
        question, answer = rng.choice(phrasings.GREETINGS), HELLO
    elif roll < 0.13:
        question, answer = rng.choice(phrasings.THANKED), THANKS
    elif roll < 0.19:
        question = rng.choice(phrasings.SELF)
    elif roll < 0.48:
        question = rng.choice(phrasings.QUESTIONS)
        key = ("question", question)
        if rng.random() < 0.3:
            noise = ((rng.randint(0, 6), rng.randint(1, 3)),)
    elif roll < 0.60:  # a question whose words are unknown
        question = rng.choice(("What is", "How do", "Who", "Why", "Tell me", "Is", "Write", ""))
        noise = ((9, rng.randint(1, 12)),)
        if rng.random() < 0.6:
            question += " " + " ".join(rng.choices(phrasings.WORDS, k=rng.randint(1, 6)))
            noise = (*noise, (rng.randint(1, 6), rng.randint(1, 4)))
        key = ("question", question)
    elif roll < 0.80:
        words = rng.choices(phrasings.WORDS, k=rng.randint(1, 14))
        if rng.random() < 0.25:
            words.insert(rng.randint(0, len(words)), str(_number(rng)))
        question = " ".join(words)
        question += rng.choice(("", "", "?", "."))
        noise = tuple((rng.randint(0, 14), rng.randint(1, 4)) for _ in range(rng.randint(0, 3)))
        key = ("question", question)
    elif roll < 0.88:  # numbers too large to compare
        a, b = _long_number(rng, 4, 7), _long_number(rng, 4, 7)
        frames = rng.choice(phrasings.COMPARISONS[:4])
        question = phrasings.dress(rng, rng.choice(frames).format(a=a, b=b))
        return Exchange("other", question, _LARGE_THINKING, TOO_LARGE, ("compare", a, b))
    else:
        question, noise = "", ((0, rng.randint(1, 20)),)
        key = None
    return Exchange("other", question, _OTHER_THINKING, answer, key, None, noise)


_MAKERS: dict[str, Callable[[random.Random, bool], Exchange]] = {
    "sum": make_sum,
    "difference": make_difference,
    "product": make_product,
    "comparison": make_comparison,
    "conversion": make_conversion,
    "calculator": make_beyond,
    "other": make_other,
}


def draw(rng: random.Random, category: str, tools: bool, held_out: bool) -> Exchange:
    """A question of this category from one side of the split.

    Without tools, `calculator` gives questions that would need it and the answer that says so.
    """
    while True:
        exchange = _MAKERS[category](rng, tools)
        if category in _COMPUTED and rng.random() < 0.04:  # unknown words before the question
            exchange = replace(exchange, noise=((0, rng.randint(1, 4)),))
        if is_held_out(exchange.key) == held_out:
            return exchange
