"""A model that writes what a test tells it to: everything of an engine that chat needs."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import numpy as np

from mxforge import SamplingParams
from mxforge.chat import ChatStream, chat_stream
from mxforge.harmony import Harmony
from mxforge.results import Piece, Timings, Usage
from mxforge.tokenizer import HARMONY_VOCAB

USER = {"role": "user", "content": "hi"}


def tool(name: str) -> dict:
    return {"type": "function", "function": {"name": name, "description": "one"}}


class Script:
    """Stands for an engine whose model writes `texts`, one an answer, the last one again and
    again; `prompts` are what it was asked."""

    vocab_size = HARMONY_VOCAB
    context_length = 4096

    def __init__(self, harmony: Harmony, *texts: str, reason: str = "stop") -> None:
        self.harmony = harmony
        self.answers = [harmony._library.encode(text, allowed_special="all") for text in texts]
        self.tokens = self.answers[0]
        self.reason = reason
        self.prompts: list[str] = []
        self.params: list[SamplingParams] = []
        self.cancelled = threading.Event()

    def _shown(self, tokens: Sequence[int]) -> str:
        return self.harmony._tokenizer.decode_bytes(tokens).decode()

    def stream(self, prompt, params, *, cancel=None) -> ScriptStream:
        self.cancelled = cancel or threading.Event()
        self.prompts.append(self._shown(prompt))
        self.params.append(params)
        if len(self.answers) > 1:
            self.tokens = self.answers.pop(0)
        elif self.answers:
            self.tokens = self.answers[0]
        return ScriptStream(self, len(prompt))

    def generate(self, prompt, params, *, cancel=None):
        """The allowed token with the highest id, so that a choice can be told."""
        self.prompts.append(self._shown(prompt))
        allowed = np.flatnonzero(np.unpackbits(params.bitmask.view(np.uint8), bitorder="little"))
        return Piece("", (int(allowed[-1]),))

    def ask(self, messages=(USER,), params: SamplingParams | None = None, **options) -> ChatStream:
        return self.chat_stream(list(messages), params, **options)

    def chat_stream(self, messages, params=None, **options) -> ChatStream:
        options = {
            "reasoning_effort": "medium", "tools": None, "tool_choice": "auto", "date": None,
            "cancel": None, **options,
        }  # fmt: skip
        return chat_stream(self, self.harmony, messages, params, **options)  # type: ignore[arg-type]


class ScriptStream(Iterator[Piece]):
    def __init__(self, script: Script, prompt_tokens: int) -> None:
        self.script = script
        self.left = list(script.tokens)
        self.written = 0
        self.prompt_tokens = prompt_tokens
        self.ended = False

    def __next__(self) -> Piece:
        if self.ended:
            raise StopIteration
        cancelled = self.script.cancelled.is_set()
        if self.left and not cancelled:
            token = (self.left.pop(0),)
            self.written += 1
            if self.left:
                return Piece("", token)
        else:
            token = ()
        self.ended = True
        usage = Usage(self.prompt_tokens, self.written, 0)
        reason = "cancelled" if cancelled else self.script.reason
        return Piece("", token, (), reason, usage, Timings(0, 0, 1, 10))

    def cancel(self) -> None:
        self.script.cancelled.set()

    def close(self) -> None:
        self.cancel()
        self.ended = True
