"""The text that nano learns and is asked: questions, thinking, answers, in the harmony format.

Everything is made from a seed, and is right by construction: each step of the thinking is
computed by the function that writes it. Problems are held out by the hash of what they are about
(operation and numbers), whatever the phrasing; `draw` gives one side of the split or the other.

    rng = random.Random(0)
    exchange = draw(rng, "sum", tools=False, held_out=False)
    exchange.question, exchange.thinking["medium"], exchange.answer
    Renderer(tokenizer).dialogue(...)    # token ids, and which of them are trained
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

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


# -- arithmetic, step by step --------------------------------------------------------------------

_COLUMNS = ("ones", "tens", "hundreds", "thousands")


def digits(number: int) -> list[int]:
    """Ones first."""
    return [int(c) for c in reversed(str(number))]


def add_columns(a: int, b: int) -> list[str]:
    """7+5=12, 1+2+1=4: column by column with the carry as third term."""
    x, y = digits(a), digits(b)
    steps, carry = [], 0
    for i in range(max(len(x), len(y))):
        terms = [x[i] if i < len(x) else 0, y[i] if i < len(y) else 0]
        terms += [carry] if carry else []
        total = sum(terms)
        steps.append(f"{'+'.join(map(str, terms))}={total}")
        carry = total // 10
    return steps


def subtract_columns(a: int, b: int) -> list[str]:
    """2-7+10=5, 1+1=2, 4-2=2 for 42-17 (a ≥ b): ten is added where it must be borrowed, and what
    was borrowed is first added to the next digit below."""
    x, y = digits(a), digits(b)
    steps, borrow = [], 0
    for i, top in enumerate(x):
        low = y[i] if i < len(y) else 0
        carried = f"{low}+1={low + 1}, " * borrow
        low += borrow
        borrow = int(top < low)
        steps.append(f"{carried}{top}-{low}{'+10' * borrow}={(top - low) % 10}")
    return steps


def _relation(a: int, b: int) -> str:
    return "smaller" if a < b else "larger" if a > b else "equal"


def relation_steps(a: int, b: int, named: bool) -> str:
    """4 4 equal, 2 7 smaller for 42 and 47: digits from the left until they differ; for 42 and
    101 digits 2 3 smaller, which is how many they have."""
    x, y = digits(a)[::-1], digits(b)[::-1]
    if len(x) != len(y):
        return f"digits {len(x)} {len(y)} {_relation(len(x), len(y))}"
    until = next((i + 1 for i, (p, q) in enumerate(zip(x, y, strict=True)) if p != q), len(x))
    names = _COLUMNS[len(x) - 1 :: -1]
    steps = [f"{p} {q} {_relation(p, q)}" for p, q in zip(x[:until], y, strict=False)]
    if named:
        steps = [f"{name} {step}" for name, step in zip(names, steps, strict=False)]
    return ", ".join(steps)


def _steps(steps: Sequence[str], named: bool) -> str:
    if named and len(steps) > 1:
        steps = [f"{name} {step}" for name, step in zip(_COLUMNS, steps, strict=False)]
    return ", ".join(steps)


def sum_work(a: int, b: int, named: bool) -> str:
    if a < 10 and b < 10:
        return f"{a}+{b}={a + b}"
    text = f"{a}+{b}: {_steps(add_columns(a, b), named)}"
    return f"{text}, so {a + b}" if named else text


def difference_work(a: int, b: int, named: bool) -> str:
    if a < 10 and b < 10:
        return f"{a}-{b}={a - b}"
    text = f"{a}-{b}: {relation_steps(a, b, named)}"
    if a < b:
        text += f", {b}-{a}"
    text += f": {_steps(subtract_columns(max(a, b), min(a, b)), named)}"
    return f"{text}, so {a - b}" if named else text


def product_work(a: int, b: int, named: bool) -> str:
    """47*6: 7*6=42, 4*6=24, 24+4=28, so 282: by column, the carry added to the tens."""
    large, small = max(a, b), min(a, b)
    if large <= 10 or small <= 1 or small == 10:
        return f"{a}*{b}={a * b}"
    ones, tens = large % 10 * small, large // 10 * small
    text = f"{a}*{b}: {large % 10}*{small}={ones}, {large // 10}*{small}={tens}"
    if ones >= 10:
        if tens % 10 + ones // 10 >= 10:
            text += f", {sum_work(tens, ones // 10, False)}, so {tens + ones // 10}"
        else:
            text += f", {tens}+{ones // 10}={tens + ones // 10}"
    return f"{text}, so {a * b}" if named else text


def _by_effort(low: str, medium: str, check: str) -> dict[str, str]:
    return {"low": f"{low}.", "medium": f"{medium}.", "high": f"{medium}. Check: {check}."}


def sum_thinking(a: int, b: int) -> dict[str, str]:
    return _by_effort(sum_work(a, b, False), sum_work(a, b, True), difference_work(a + b, b, False))


def difference_thinking(a: int, b: int) -> dict[str, str]:
    check = sum_work(a - b, b, False) if a >= b else sum_work(b - a, a, False)
    return _by_effort(difference_work(a, b, False), difference_work(a, b, True), check)


def product_thinking(a: int, b: int) -> dict[str, str]:
    large, small = max(a, b), min(a, b)
    check = f"{b}*{a}={a * b}"
    if large > 10 and small > 1 and large % 10:
        tens = large // 10 * 10
        first, second = tens * small, large % 10 * small
        check = f"{tens}*{small}={first}, {large % 10}*{small}={second}, {first}+{second}={a * b}"
    return _by_effort(product_work(a, b, False), product_work(a, b, True), check)


def comparison_thinking(a: int, b: int, asked: str) -> dict[str, str]:
    """`asked` and what follows from it, after the digits: larger, smaller, larger? or smaller?;
    nothing where the relation itself is asked for."""
    end = f"{a}={b}" if a == b else f"{max(a, b)}>{min(a, b)}"
    found = _relation(a, b)
    if asked.endswith("?"):
        answer = "yes" if asked[:-1] == found else "no"
        end += f". {asked.capitalize()} It is {found}: {answer}"
    elif asked:
        chosen = max(a, b) if asked == "larger" else min(a, b)
        answer = "equal" if a == b else str(chosen)
        end += f". {asked.capitalize()}: {answer}"
    low, medium = (f"{a}, {b}: {relation_steps(a, b, named)}, so {end}" for named in (False, True))
    check = f"{min(a, b)}{'=' if a == b else '<'}{max(a, b)}"
    return _by_effort(low, medium, check)


# -- units ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """one: after 1; many: after other numbers; names: how users write it."""

    one: str
    many: str
    names: tuple[str, ...]


def _metric(short: str, long: str, british: str | None = None) -> Unit:
    longs = [long + "s", long] + ([british + "s", british] if british else [])
    return Unit(short, short, (short, short, *longs))


UNITS = {
    "km": _metric("km", "kilometer", "kilometre"),
    "m": _metric("m", "meter", "metre"),
    "cm": _metric("cm", "centimeter", "centimetre"),
    "mm": _metric("mm", "millimeter", "millimetre"),
    "t": Unit("t", "t", ("t", "tonnes", "tons")),
    "kg": _metric("kg", "kilogram", "kilo"),
    "g": _metric("g", "gram"),
    "l": Unit("l", "l", ("l", "liters", "litres", "L")),
    "ml": Unit("ml", "ml", ("ml", "milliliters", "millilitres", "mL")),
    "week": Unit("week", "weeks", ("weeks",)),
    "day": Unit("day", "days", ("days",)),
    "hour": Unit("hour", "hours", ("hours", "hours", "h")),
    "minute": Unit("minute", "minutes", ("minutes", "minutes", "min")),
    "second": Unit("second", "seconds", ("seconds", "seconds", "s")),
    "year": Unit("year", "years", ("years",)),
    "month": Unit("month", "months", ("months",)),
    "foot": Unit("foot", "feet", ("feet", "ft")),
    "inch": Unit("inch", "inches", ("inches", "in")),
}
# larger unit, smaller unit, how many, largest number converted down, and up (as multiple)
CONVERSIONS = (
    ("km", "m", 1000, 999, 999),
    ("m", "cm", 100, 999, 999),
    ("cm", "mm", 10, 999, 999),
    ("m", "mm", 1000, 999, 999),
    ("t", "kg", 1000, 999, 999),
    ("kg", "g", 1000, 999, 999),
    ("l", "ml", 1000, 999, 999),
    ("hour", "minute", 60, 99, 12),
    ("minute", "second", 60, 99, 12),
    ("day", "hour", 24, 12, 7),
    ("week", "day", 7, 99, 12),
    ("year", "month", 12, 99, 12),
    ("foot", "inch", 12, 99, 12),
)


def amount(number: int | str, unit: str) -> str:
    return f"{number} {UNITS[unit].one if str(number) == '1' else UNITS[unit].many}"


def conversion_thinking(number: int, large: str, small: str, factor: int) -> dict[str, str]:
    """`number` of the larger unit into the smaller one."""
    result = number * factor
    if factor == 60 and number > 10:
        low = f"{product_work(number, 6, False)}, {number}*60={result}"
        work = f"{product_work(number, 6, True)}, {number}*60={result}"
    elif factor % 10 == 0:
        low = work = f"{number}*{factor}={result}"
    else:
        low, work = product_work(number, factor, False), product_work(number, factor, True)
    known = f"{amount(1, large)} = {amount(factor, small)}"
    head = f"{amount(number, large)} in {UNITS[small].many}: "
    return _by_effort(head + low, f"{head}{known}, {work}", f"{result}/{factor}={number}")


def conversion_up_thinking(number: int, large: str, small: str, factor: int) -> dict[str, str]:
    """`number`·`factor` of the smaller unit into the larger one."""
    work = f"{number * factor}/{factor}={number}"
    known = f"{amount(factor, small)} = {amount(1, large)}"
    head = f"{amount(number * factor, small)} in {UNITS[large].many}: "
    check = f"{number}*{factor}={number * factor}"
    return _by_effort(head + work, f"{head}{known}, {work}", check)


# -- phrasings -----------------------------------------------------------------------------------

_SYMBOLS = {
    "sum": ("{a} + {b}", "{a}+{b}", "{a} plus {b}", "{a} and {b} added"),
    "difference": ("{a} - {b}", "{a}-{b}", "{a} minus {b}", "{a} - {b}"),
    "product": ("{a} * {b}", "{a}*{b}", "{a} times {b}", "{a} x {b}", "{a} × {b}"),
    "quotient": ("{a} / {b}", "{a}/{b}", "{a} divided by {b}", "{a} ÷ {b}"),
}
_FRAMES = (
    "What is {e}?",
    "What is {e}?",
    "What is {e}?",
    "what is {e}",
    "What's {e}?",
    "what's {e}?",
    "{e}",
    "{e}",
    "{e}?",
    "{e} =",
    "{e}=",
    "{e} = ?",
    "How much is {e}?",
    "how much is {e}?",
    "Calculate {e}",
    "Calculate {e}.",
    "calculate {e}",
    "Compute {e}.",
    "compute {e}",
    "Solve {e}",
    "Tell me {e}.",
    "Can you calculate {e}?",
    "Do you know what {e} is?",
    "I need {e}.",
    "Work out {e}.",
    "Evaluate {e}.",
    "What does {e} equal?",
    "what is the result of {e}?",
    "What is the answer to {e}?",
    "WHAT IS {e}?",
)
_VERBS = {
    "sum": (
        "Add {a} and {b}.",
        "add {a} and {b}",
        "Add {b} to {a}",
        "What is the sum of {a} and {b}?",
        "sum of {a} and {b}",
        "Sum {a} and {b}",
    ),
    "difference": (
        "Subtract {b} from {a}.",
        "subtract {b} from {a}",
        "Take {b} away from {a}.",
        "What is the difference between {a} and {b}?",
        "What is {b} less than {a}?",
    ),
    "product": (
        "Multiply {a} by {b}.",
        "multiply {a} by {b}",
        "Multiply {a} and {b}",
        "What is the product of {a} and {b}?",
        "product of {a} and {b}",
    ),
    "quotient": ("Divide {a} by {b}.", "divide {a} by {b}", "What is {a} divided by {b}?"),
}
_BEFORE = (
    "Please: ",
    "please ",
    "Hi! ",
    "Hello, ",
    "Hey, ",
    "OK, ",
    "And ",
    "Now ",
    "So ",
    "And now: ",
)
_AFTER = (" please", ", please", " Thanks!", " thanks", "  ", "\n", "!")
_LARGER = (
    "Which is larger, {a} or {b}?",
    "which is larger, {a} or {b}?",
    "Which is bigger, {a} or {b}?",
    "Which number is larger: {a} or {b}?",
    "What is larger, {a} or {b}?",
    "Which is greater: {a} or {b}?",
    "which is bigger {a} or {b}",
    "Which one is bigger, {a} or {b}?",
    "{a} or {b}, which is larger?",
    "The larger of {a} and {b}?",
    "What is the maximum of {a} and {b}?",
)
_SMALLER = (
    "Which is smaller, {a} or {b}?",
    "which is smaller, {a} or {b}?",
    "Which is less, {a} or {b}?",
    "Which number is smaller: {a} or {b}?",
    "What is smaller, {a} or {b}?",
    "which is smaller {a} or {b}",
    "{a} or {b}, which is smaller?",
    "The smaller of {a} and {b}?",
    "What is the minimum of {a} and {b}?",
)
_IS_LARGER = (
    "Is {a} larger than {b}?",
    "is {a} larger than {b}?",
    "Is {a} bigger than {b}?",
    "Is {a} greater than {b}?",
    "Is {a} more than {b}?",
    "{a} > {b}?",
)
_IS_SMALLER = (
    "Is {a} smaller than {b}?",
    "is {a} smaller than {b}?",
    "Is {a} less than {b}?",
    "{a} < {b}?",
)
_COMPARE = ("Compare {a} and {b}.", "compare {a} and {b}", "Compare {a} with {b}")
_CONVERT = (
    "Convert {x} to {y}.",
    "convert {x} to {y}",
    "Convert {x} into {y}.",
    "What is {x} in {y}?",
    "{x} in {y}",
    "{x} to {y}",
    "How many {y} are {x}?",
    "how many {y} are {x}?",
    "How many {y} are in {x}?",
    "how many {y} in {x}?",
    "How many {y} is {x}?",
    "How many {y} do {x} have?",
    "{x} = ? {y}",
)

_GREETINGS = (
    "Hello", "Hi", "hi", "hello", "Hey", "hey there", "Good morning", "Good evening!", "Hello!",
    "Hi!", "Hi there!", "Hello there", "Good day", "Hey!",
)  # fmt: skip
_THANKS = ("Thanks!", "thanks", "Thank you.", "thank you", "Thank you very much!", "Great, thanks.")
_SELF = (
    "Who are you?", "What are you?", "What can you do?", "who made you?", "Are you a robot?",
    "What is your name?", "Help", "help me", "What do you know?", "How do you work?",
    "Are you ChatGPT?", "How old are you?", "Can you help me?", "What model are you?",
)  # fmt: skip
_QUESTIONS = (
    "Why is the sky blue?", "What is the capital of France?", "Tell me a joke.",
    "Write a poem about the sea.", "Who was the first president of the United States?",
    "How do I bake bread?", "What is the meaning of life?", "Is it going to rain tomorrow?",
    "Translate good morning into Spanish.", "What is the largest planet?",
    "Who wrote Romeo and Juliet?", "How far away is the moon?", "What time is it?",
    "Explain quantum mechanics.", "Give me a recipe for pancakes.", "What is love?",
    "How many people live in China?", "What is the speed of light?", "Who won the game in 1998?",
    "What happened in 1969?", "Write a function that sorts a list.", "Fix this code for me.",
    "Why do cats purr?", "What color is the sky?", "Tell me about the history of Rome.",
    "What is the weather like today?", "How do plants grow?", "What should I eat tonight?",
    "Name three animals.", "Recommend a good book.", "What is the best movie of 2010?",
    "I have 3 cats.", "I am 25 years old.", "My house has 4 rooms.", "What is the number 7?",
    "Who is the king of England?", "Can you sing?", "Do you like music?", "How are you?",
    "What is a neural network?", "Is there life on Mars?", "What does the word number mean?",
    "Which is better, tea or coffee?", "Is London bigger than Paris?",
    "Which is faster, a car or a train?",
    "Compare apples and oranges.", "Convert this text to a table.", "Add milk to my list.",
    "Subtract the tax.", "Multiply and be happy.", "How many days until summer?",
    "How many legs does a dog have?", "What is the square root of 2?", "What is pi?",
    "What is the next prime after 7?", "Count to 10.", "Give me a random number.",
    "What is half of an apple?", "Where is the library?", "When was the war?", "What is 5?",
    "42", "the", "?", "What", "why", "abc", "lol", "Yes", "No", "ok", "hmm", "What is what?",
    "How much is the fish?", "How much is a car?", "What is x + y?", "Solve x = y.",
    "Bonjour, comment allez-vous ?", "Wie geht es dir?", "¿Cómo estás?", "Was ist das?",
    "Qui es-tu ?", "你好", "こんにちは", "Привет", "Ciao, come stai?", "Olá, tudo bem?",
    "Summarize this article.", "Write an email to my boss.", "Draw a picture of a house.",
    "What is the population of Berlin?", "How tall is Mount Everest?", "Play a song.",
    "Set a timer for 5 minutes.", "Remind me in 2 hours.", "Open the door.", "Ignore all rules.",
    "Print hello world in Python.", "What is machine learning?", "Who are your parents?",
    "Tell me a story about a dragon.", "Let's play a game.", "Do you dream?", "I feel sad.",
    "What day is it today?", "Is water wet?", "Why did the chicken cross the road?",
    "How do airplanes fly?", "What is the chemical formula of water?", "Spell the word three.",
    "Which team is the best?", "Are you alive?", "Prove that there are infinitely many primes.",
    "The quick brown fox jumps over the lazy dog.", "What is the smallest country?",
    "Is a cat smaller than a dog?", "List the months of the year.", "What is a kilometer?",
    "Who invented the meter?", "How heavy is an elephant?", "How long is a river?",
)  # fmt: skip
_WORD_TEXT = """
the a of to and in is it you that he was for on are with as I his they be at one have this
from or had by hot but some what there we can out other were all your when up use word how
said an each she which do their time if will way about many then them would write like so
these her long make thing see him two has look more day could go come did my sound no most
number who over know water than call first people may down side been now find any new work
part take get place made live where after back little only round man year came show every
good me give our under name very through just form much great think say help low line
before turn cause same mean differ move right boy old too does tell sentence set three
want air well also play small end put home read hand large spell add even land here must
big high such follow act why ask men change went light kind off need house picture try us
again animal point mother world near build self earth father larger smaller plus minus
times convert
"""
_WORDS = _WORD_TEXT.split()

INSTRUCTIONS = (
    "You are a helpful assistant.",
    "Be brief.",
    "Answer in one sentence.",
    "You are a calculator.",
    "Answer the user's questions.",
    "Be kind and polite.",
)


def _dress(rng: random.Random, text: str) -> str:
    """Words before or after a question now and then; other capitals."""
    roll = rng.random()
    if roll < 0.08:
        before = rng.choice(_BEFORE)
        text = before + (text[0].lower() + text[1:] if text[1:2].islower() else text)
    elif roll < 0.14:
        text = text.rstrip(".") + rng.choice(_AFTER)
    return text


def _ask(rng: random.Random, kind: str, a: str | int, b: str | int) -> str:
    if rng.random() < 0.22:
        return _dress(rng, rng.choice(_VERBS[kind]).format(a=a, b=b))
    expression = rng.choice(_SYMBOLS[kind]).format(a=a, b=b)
    return _dress(rng, rng.choice(_FRAMES).format(e=expression))


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
        "sum", _ask(rng, "sum", a, b), sum_thinking(a, b), f"{a} + {b} = {a + b}.", _add_key(a, b)
    )


def make_difference(rng: random.Random, _tools: bool) -> Exchange:
    a, b = _number(rng), _number(rng)
    if rng.random() < 0.1:
        b = min(ADD_MAX, max(0, a + rng.randint(-9, 9)))
    if a < b and rng.random() < 0.6:
        a, b = b, a
    return Exchange(
        "difference",
        _ask(rng, "difference", a, b),
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
        _ask(rng, "product", a, b),
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
    frames = (_LARGER, _SMALLER, _IS_LARGER, _IS_SMALLER, _COMPARE)[kind]
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
    question = _dress(rng, rng.choice(frames).format(a=a, b=b))
    key = ("compare", smaller, larger) if larger >= 10 else None
    asked = ("larger", "smaller", "larger?", "smaller?", "")[kind]
    return Exchange("comparison", question, comparison_thinking(a, b, asked), answer, key)


def _conversion_question(rng: random.Random, number: int | str, source: str, target: str) -> str:
    unit = UNITS[source]
    names = [unit.one] if str(number) == "1" and unit.one != unit.many else unit.names
    word = rng.choice(names)
    space = "" if word in ("km", "m", "cm", "mm", "kg", "g", "ml") and rng.random() < 0.2 else " "
    text = rng.choice(_CONVERT).format(
        x=f"{number}{space}{word}", y=rng.choice(UNITS[target].names)
    )
    return _dress(rng, text)


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
        question = _dress(rng, rng.choice(_FRAMES).format(e=shown))
    elif roll < 0.14:  # a large amount of some unit
        large, small, factor, *_ = rng.choice(CONVERSIONS)
        number = _long_number(rng, 4, 7)
        expression = f"{number} * {factor}"
        question = _conversion_question(rng, number, large, small)
        answer_head = f"{amount(number, large)} = {{}} {UNITS[small].many}."
    else:
        a, b = _beyond_numbers(rng, kind)
        expression = f"{a} {_PYTHON[kind]} {b}"
        question = _ask(rng, kind, a, b)
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
        question, answer = rng.choice(_GREETINGS), HELLO
    elif roll < 0.13:
        question, answer = rng.choice(_THANKS), THANKS
    elif roll < 0.19:
        question = rng.choice(_SELF)
    elif roll < 0.48:
        question = rng.choice(_QUESTIONS)
        key = ("question", question)
        if rng.random() < 0.3:
            noise = ((rng.randint(0, 6), rng.randint(1, 3)),)
    elif roll < 0.60:  # a question whose words are unknown
        question = rng.choice(("What is", "How do", "Who", "Why", "Tell me", "Is", "Write", ""))
        noise = ((9, rng.randint(1, 12)),)
        if rng.random() < 0.6:
            question += " " + " ".join(rng.choices(_WORDS, k=rng.randint(1, 6)))
            noise = (*noise, (rng.randint(1, 6), rng.randint(1, 4)))
        key = ("question", question)
    elif roll < 0.80:
        words = rng.choices(_WORDS, k=rng.randint(1, 14))
        if rng.random() < 0.25:
            words.insert(rng.randint(0, len(words)), str(_number(rng)))
        question = " ".join(words)
        question += rng.choice(("", "", "?", "."))
        noise = tuple((rng.randint(0, 14), rng.randint(1, 4)) for _ in range(rng.randint(0, 3)))
        key = ("question", question)
    elif roll < 0.88:  # numbers too large to compare
        a, b = _long_number(rng, 4, 7), _long_number(rng, 4, 7)
        frames = rng.choice((_LARGER, _SMALLER, _IS_LARGER, _IS_SMALLER))
        question = _dress(rng, rng.choice(frames).format(a=a, b=b))
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


# -- harmony -------------------------------------------------------------------------------------

CALCULATOR_SCHEMA = {
    "type": "object",
    "properties": {"expression": {"type": "string", "description": "For example: 1234 * 5678"}},
    "required": ["expression"],
}
CALCULATOR_NAME = "calculator"
CALCULATOR_DESCRIPTION = "Evaluates an arithmetic expression."

_SYSTEM = (
    "You are ChatGPT, a large language model trained by OpenAI.\n"
    "Knowledge cutoff: 2024-06\n{date}\n"
    "Reasoning: {effort}\n\n"
    "# Valid channels: analysis, commentary, final. Channel must be included for every message."
)
_SYSTEM_TOOLS = "\nCalls to these tools must go to the commentary channel: 'functions'."
_CALCULATOR = """\
// Evaluates an arithmetic expression.
type calculator = (_: {
// For example: 1234 * 5678
expression: string,
}) => any;"""
_WEATHER = """\
// Tells the weather of a place.
type get_weather = (_: {
place: string,
}) => any;"""


@dataclass(frozen=True)
class Setting:
    """What stands before the first question.

    effort        low, medium or high
    calculator    whether the calculator is there; other_tool: whether another one is
    instructions  of the developer message
    date          of the system message
    """

    effort: str = "medium"
    calculator: bool = False
    other_tool: bool = False
    instructions: str = ""
    date: str = ""

    def messages(self) -> list[tuple[str, str]]:
        """(role, text) of the system message and, where there is one, the developer message."""
        date = f"Current date: {self.date}\n" if self.date else ""
        system = _SYSTEM.format(effort=self.effort, date=date)
        parts = [f"# Instructions\n\n{self.instructions}"] if self.instructions else []
        if self.calculator or self.other_tool:
            system += _SYSTEM_TOOLS
            tools = [
                t for on, t in ((self.other_tool, _WEATHER), (self.calculator, _CALCULATOR)) if on
            ]
            listed = "\n\n".join(tools)
            parts.append(
                "# Tools\n\n## functions\n\nnamespace functions {\n\n"
                f"{listed}\n\n}} // namespace functions"
            )
        messages = [("system", system)]
        return [*messages, ("developer", "\n\n".join(parts))] if parts else messages


def draw_setting(rng: random.Random) -> Setting:
    calculator = rng.random() < 0.35
    return Setting(
        effort=rng.choice(EFFORTS),
        calculator=calculator,
        other_tool=rng.random() < (0.1 if calculator else 0.06),
        instructions=rng.choice(INSTRUCTIONS) if rng.random() < 0.15 else "",
        date=f"202{rng.randint(4, 7)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
        if rng.random() < 0.08
        else "",
    )


# How often each category is asked; with the calculator its own more often.
_WEIGHTS = {"sum": 14, "difference": 20, "product": 20, "comparison": 20, "conversion": 17}
_WEIGHTS_TOOLS = {"calculator": 100, "other": 10}
_WEIGHTS_PLAIN = {"calculator": 8, "other": 14}


@dataclass
class Tokens:
    """Ids, and for each whether it is to be predicted."""

    ids: list[int] = field(default_factory=list)
    trained: list[bool] = field(default_factory=list)

    def add(self, ids: Sequence[int], trained: bool = False) -> None:
        self.ids += ids
        self.trained += [trained] * len(ids)


class Renderer:
    """Harmony as openai-harmony renders it, from an O200kHarmony tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._encode, self._spell = tokenizer.encode, tokenizer.token_bytes
        self._cache: dict[str, list[int]] = {}
        special = tokenizer.special_tokens
        self.start, self.end = special["<|start|>"], special["<|end|>"]
        self.message, self.channel = special["<|message|>"], special["<|channel|>"]
        self.call, self.final = special["<|call|>"], special["<|return|>"]
        self.constrain = special["<|constrain|>"]

    def encode(self, text: str) -> list[int]:
        return list(self._encode(text))

    def spelling(self, token: int) -> str:
        return str(self._spell(token).decode("utf-8", "replace"))

    def _fixed(self, text: str) -> list[int]:
        if text not in self._cache:
            self._cache[text] = list(self._encode(text))
        return self._cache[text]

    def prefix(self, setting: Setting) -> list[int]:
        ids: list[int] = []
        for role, text in setting.messages():
            ids += [self.start, *self._fixed(role), self.message, *self._fixed(text), self.end]
        return ids

    def question(self, exchange: Exchange, noise: Callable[[], int]) -> list[int]:
        """The user's message and the start of the answer; `noise` gives unknown ids."""
        body = self.encode(exchange.question)
        for at, count in exchange.noise:
            at = min(at, len(body))
            body[at:at] = [noise() for _ in range(count)]
        user = [self.start, *self._fixed("user"), self.message, *body, self.end]
        return [*user, self.start, *self._fixed("assistant")]

    def thinking(self, text: str) -> list[int]:
        """After `<|start|>assistant`, up to the next one."""
        return [
            self.channel, *self._fixed("analysis"), self.message, *self.encode(text), self.end,
            self.start, *self._fixed("assistant"),
        ]  # fmt: skip

    def calling(self, expression: str) -> list[int]:
        return [
            *self._fixed(" to=functions.calculator"), self.channel, *self._fixed("commentary"),
            *self._fixed(" "), self.constrain, *self._fixed("json"), self.message,
            *self.encode(json.dumps({"expression": expression})), self.call,
        ]  # fmt: skip

    def result(self, text: str) -> list[int]:
        return [
            self.start, *self._fixed("functions.calculator to=assistant"), self.channel,
            *self._fixed("commentary"), self.message, *self.encode(text), self.end,
            self.start, *self._fixed("assistant"),
        ]  # fmt: skip

    def answer(self, text: str, last: bool) -> list[int]:
        end = self.final if last else self.end
        return [self.channel, *self._fixed("final"), self.message, *self.encode(text), end]

    def dialogue(
        self, exchanges: Sequence[Exchange], effort: str, noise: Callable[[], int]
    ) -> Tokens:
        """Question by question; the last one is thought about, and trained."""
        tokens = Tokens()
        for exchange in exchanges:
            last = exchange is exchanges[-1]
            tokens.add(self.question(exchange, noise))
            if last:
                tokens.add(self.thinking(exchange.thinking[effort]), True)
            if exchange.call is not None:
                tokens.add(self.calling(exchange.call.expression), last)
                tokens.add(self.result(exchange.call.result))
            tokens.add(self.answer(exchange.answer, last), last)
        return tokens


def noise_ids(rng: random.Random, used: frozenset[int] = frozenset()) -> Callable[[], int]:
    """Random text ids outside `used`."""

    def draw_id() -> int:
        while True:
            token = rng.randrange(199_998)
            if token not in used:
                return token

    return draw_id


def draw_dialogue(rng: random.Random, setting: Setting, held_out: bool = False) -> list[Exchange]:
    """One to three exchanges; those before the last are always of the trained side."""
    weights = _WEIGHTS | (_WEIGHTS_TOOLS if setting.calculator else _WEIGHTS_PLAIN)
    count = rng.choices((1, 2, 3), (80, 14, 6))[0]
    categories = rng.choices(tuple(weights), tuple(weights.values()), k=count)
    return [
        draw(rng, category, setting.calculator, held_out and i == count - 1)
        for i, category in enumerate(categories)
    ]


def used_tokens(renderer: Renderer, dialogues: int = 60_000) -> list[int]:
    """The ids with rows of their own, ascending: all numbers, words and formats that occur.

    Counted over a long sample with a seed of its own; every number of one to three digits and
    every fixed text is there whether drawn or not.
    """
    rng = random.Random("used tokens")
    seen: set[int] = set()
    for width in (1, 2, 3):
        for n in range(10**width):
            seen.update(renderer.encode(f"{n:0{width}}"))
    fixed: list[str] = [*_WORDS, *(" " + word for word in _WORDS), *_QUESTIONS, *_SELF, *_GREETINGS]
    fixed += [*_THANKS, *INSTRUCTIONS, OTHER, HELLO, THANKS, TOO_LARGE, TOOL_FAILED, "0.,:;!?'\"()"]
    fixed += [" " + name for unit in UNITS.values() for name in unit.names]
    for text in fixed:
        seen.update(renderer.encode(text))
    for _ in range(dialogues // 20):
        setting = draw_setting(rng)
        seen.update(renderer.prefix(setting))
        for _ in range(20):
            plain = [replace(e, noise=()) for e in draw_dialogue(rng, setting)]
            seen.update(renderer.dialogue(plain, setting.effort, lambda: 0).ids)
    return sorted(seen)


def held_out_questions(
    category: str, count: int, seed: int = 0
) -> Iterator[tuple[Setting, Exchange]]:
    """`count` questions that training never saw, with the setting each is asked in. No two are the
    same; the same numbers can be asked for in different words."""
    rng = random.Random(f"held out {category} {seed}")
    seen: set[str] = set()
    while len(seen) < count:
        calculator = category == "calculator" or rng.random() < 0.25
        setting = Setting(EFFORTS[len(seen) % 3], calculator)
        exchange = draw(rng, category, calculator, held_out=True)
        if exchange.question in seen:
            continue
        seen.add(exchange.question)
        yield setting, exchange
