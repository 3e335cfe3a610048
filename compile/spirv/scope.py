"""What is in scope at a point of a kernel: the meaning of TIR's variables and buffers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .alignment import Divisors
from .builder import Builder
from .dtypes import Value
from .errors import Refusal
from .matrices import Fragments
from .memory import Buffer, Element, Memory, Pointer

Meaning = Value | Pointer | Element


@dataclass
class Scope:
    """Variables are known by identity: TIR's == on them builds an expression.

    live: identities of the variables that are used at all (`liveness`).
    """

    builder: Builder
    memory: Memory
    live: set[int]
    divisors: Divisors = field(default_factory=Divisors)
    meanings: dict[int, Meaning] = field(default_factory=dict)
    buffers: dict[int, Buffer] = field(default_factory=dict)
    fragments: dict[int, Fragments] = field(default_factory=dict)

    def is_live(self, variable: Any) -> bool:
        return hash(variable) in self.live

    def bind(self, variable: Any, meaning: Meaning) -> None:
        self.meanings[hash(variable)] = meaning

    def meaning(self, variable: Any) -> Meaning:
        try:
            return self.meanings[hash(variable)]
        except KeyError:
            raise Refusal(
                f"the variable {variable.name}, which nothing defines",
                "a parameter, a thread index, a loop variable or a bound value",
                "Pass the value as a parameter of the function.",
            ) from None

    def buffer(self, variable: Any) -> Buffer:
        try:
            return self.buffers[hash(variable)]
        except KeyError:
            raise Refusal(
                f"the buffer {variable.name}, which nothing declares",
                "a buffer of a parameter or one allocated in the kernel",
                "Pass the buffer as a parameter of the function.",
            ) from None
