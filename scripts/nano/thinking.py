"""How nano thinks: arithmetic and conversions, step by step, for each reasoning effort."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
