"""The dialogues that nano learns and is asked, as token ids in the harmony format.

Made from a seed, as what is in them:

    rng = random.Random(0)
    setting = draw_setting(rng)
    tokens = Renderer(tokenizer).dialogue(draw_dialogue(rng, setting), setting.effort, noise)
    tokens.ids, tokens.trained    # and which of them are trained
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nano import phrasings
from nano.text import EFFORTS, HELLO, OTHER, THANKS, TOO_LARGE, TOOL_FAILED, Exchange, draw
from nano.thinking import UNITS

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
        instructions=rng.choice(phrasings.INSTRUCTIONS) if rng.random() < 0.15 else "",
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
    fixed = [*phrasings.WORDS, *(" " + word for word in phrasings.WORDS), *phrasings.QUESTIONS]
    fixed += [*phrasings.SELF, *phrasings.GREETINGS, *phrasings.THANKED, *phrasings.INSTRUCTIONS]
    fixed += [OTHER, HELLO, THANKS, TOO_LARGE, TOOL_FAILED, "0.,:;!?'\"()"]
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
