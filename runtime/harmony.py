"""The harmony format: conversations to token ids, and what the model writes back to an answer.

    <|start|>system<|message|>…<|end|>                      identity, date, reasoning effort
    <|start|>developer<|message|>…<|end|>                   instructions, tools
    <|start|>user<|message|>…<|end|>
    <|start|>assistant<|channel|>analysis<|message|>…<|end|>        thinking
    <|start|>assistant to=functions.f<|channel|>commentary <|constrain|>json<|message|>{…}<|call|>
    <|start|>functions.f to=assistant<|channel|>commentary<|message|>…<|end|>
    <|start|>assistant<|channel|>final<|message|>…<|return|>        the answer

openai-harmony renders messages and parses their headers. Around it stand two guards. Rendering:
the text of messages is encoded by the model's own tokenizer, which takes texts of any kind and
length (the library's overflows its stack on a million blanks), so what is written in a message
never becomes a special token. Parsing: whatever the model writes gives text; `AnswerParser` says
how.
"""

from __future__ import annotations

import datetime
import functools
import os
import secrets
import tempfile
import threading
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import regex

from .errors import ChatError, TokenizerError
from .messages import Message, Tool, ToolCall, is_name
from .text import IncrementalDecoder
from .tokenizer import HARMONY_SPECIAL_TOKENS, Tokenizer, o200k_ranks

if TYPE_CHECKING:
    import openai_harmony

ReasoningEffort = Literal["low", "medium", "high"]

START = HARMONY_SPECIAL_TOKENS["<|start|>"]
MESSAGE = HARMONY_SPECIAL_TOKENS["<|message|>"]
CHANNEL = HARMONY_SPECIAL_TOKENS["<|channel|>"]
CONSTRAIN = HARMONY_SPECIAL_TOKENS["<|constrain|>"]
END = HARMONY_SPECIAL_TOKENS["<|end|>"]
CALL = HARMONY_SPECIAL_TOKENS["<|call|>"]
# Ends of an answer: the model stops after these.
STOPS = (HARMONY_SPECIAL_TOKENS["<|return|>"], CALL, HARMONY_SPECIAL_TOKENS["<|endoftext|>"])
_FIRST_SPECIAL = min(HARMONY_SPECIAL_TOKENS.values())

_NAMESPACE = "functions"
_INSTRUCTIONS = "mxforge-instructions"  # stands for them while the library renders
_LONGEST_RUN = 1000  # characters of tools without a blank, or of blanks


# ------------------------------------------------------------------------------------- rendering


class Harmony:
    """The format in one model's tokenizer. TokenizerError where that is not o200k_harmony."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.assistant = tokenizer.encode("assistant")  # without a tokenizer, that is the error
        if tokenizer.kind != "o200k_harmony":
            raise TokenizerError(
                "This model's tokenizer has no harmony format to chat in; "
                "continue plain text with --raw or engine.generate instead."
            )
        self._tokenizer = tokenizer
        self._library = _encoding()

    def prompt(
        self,
        messages: Sequence[Message],
        *,
        reasoning_effort: ReasoningEffort = "medium",
        tools: Sequence[Tool] = (),
        date: str | datetime.date | None = None,
    ) -> list[int]:
        """Token ids that ask for the assistant's next message, ``<|start|>assistant`` the last.

        Instructions at the beginning become one developer message, with the tools. Analysis is
        dropped from before the last final answer and kept after it, where a call is being served.
        """
        leading = next((i for i, m in enumerate(messages) if m.role != "developer"), len(messages))
        instructions = "\n\n".join(message.content for message in messages[:leading])
        ids = self._system(reasoning_effort, bool(tools), date)
        if instructions or tools:
            ids += self._developer(instructions, tools)
        rest = messages[leading:]
        finals = [
            i
            for i, m in enumerate(rest)
            if m.role == "assistant" and m.content and not m.tool_calls
        ]
        for index, message in enumerate(rest):
            answered = bool(finals) and index <= finals[-1]
            ids += self._message(replace(message, thinking="") if answered else message)
        return [*ids, START, *self.assistant]

    def call_header(self, name: str) -> list[int]:
        """What follows ``<|start|>assistant`` where the function `name` is called."""
        ids: list[int] = self._text("assistant", "", "commentary", f"{_NAMESPACE}.{name}")
        return ids[1 + len(self.assistant) : ids.index(MESSAGE) + 1]

    def _system(self, effort: str, tools: bool, date: Any) -> list[int]:
        import openai_harmony as library

        if not isinstance(effort, str) or effort not in get_args(ReasoningEffort):
            raise ChatError(f"reasoning_effort must be low, medium or high, found {effort!r}.")
        content = library.SystemContent.new()
        content = content.with_reasoning_effort(library.ReasoningEffort(effort.capitalize()))
        if date is not None:
            content = content.with_conversation_start_date(iso_date(date))
        message = library.Message.from_role_and_content(library.Role.SYSTEM, content)
        options = library.RenderOptions(conversation_has_function_tools=tools)
        ids: list[int] = self._library.render(message, options)
        return ids

    def _developer(self, instructions: str, tools: Sequence[Tool]) -> list[int]:
        import openai_harmony as library

        content = library.DeveloperContent.new()
        if instructions:
            content = content.with_instructions(_INSTRUCTIONS)
        if tools:
            _check_runs(tools)
            content = content.with_function_tools(
                [
                    library.ToolDescription.new(
                        tool.name,
                        tool.description,
                        None if tool.parameters is None else dict(tool.parameters),
                    )
                    for tool in tools
                ]
            )
        message = library.Message.from_role_and_content(library.Role.DEVELOPER, content)
        try:
            ids = self._library.render(message)
        except (library.HarmonyError, ValueError) as error:
            raise ChatError(f"tools must be functions with JSON schemas, but {error}.") from None
        begin, end = ids.index(MESSAGE) + 1, len(ids) - 1
        text = self._tokenizer.decode_bytes(ids[begin:end]).decode()
        text = text.replace(_INSTRUCTIONS, instructions, 1) if instructions else text
        return [*ids[:begin], *self._tokenizer.encode(text), *ids[end:]]

    def _message(self, message: Message) -> list[int]:
        if message.role != "assistant":
            if message.role == "tool":
                author = f"{_NAMESPACE}.{message.name}"
                return self._text(author, message.content, "commentary", "assistant")
            if message.role == "developer":
                return self._developer(message.content, ())
            return self._text("user", message.content)
        ids = []
        if message.thinking:
            ids += self._text("assistant", message.thinking, "analysis")
        if message.content:
            channel = "commentary" if message.tool_calls else "final"
            ids += self._text("assistant", message.content, channel)
        for call in message.tool_calls:
            recipient = f"{_NAMESPACE}.{call.name}"
            ids += self._text("assistant", call.arguments, "commentary", recipient)
        return ids

    def _text(
        self, author: str, text: str, channel: str | None = None, recipient: str | None = None
    ) -> list[int]:
        """A message of `text`: the library's header and end around our encoding of it."""
        import openai_harmony as library

        if author in ("user", "assistant"):
            message = library.Message.from_role_and_content(library.Role(author), "")
        else:
            tool = library.Author.new(library.Role.TOOL, author)
            message = library.Message.from_author_and_content(tool, "")
        if channel:
            message = message.with_channel(channel)
        if recipient:
            message = message.with_recipient(recipient)
            if author == "assistant":
                message = message.with_content_type("<|constrain|>json")
        ids = self._library.render(message)
        return [*ids[:-1], *self._tokenizer.encode(text), *ids[-1:]]


def iso_date(date: Any) -> str:
    """A date, or its text, as YYYY-MM-DD; ChatError where it is none."""
    try:
        if not isinstance(date, datetime.date):
            date = datetime.date.fromisoformat(date)
        return datetime.date(date.year, date.month, date.day).isoformat()
    except (TypeError, ValueError):
        raise ChatError(f"date must be a day such as 2026-01-31, found {date!r}.") from None


def _check_runs(tools: Iterable[Tool]) -> None:
    """The library takes quadratic time over a word, and a stack's depth over blanks."""
    for tool in tools:
        texts = [tool.description, *_strings(tool.parameters)]
        if any(regex.search(rf"\S{{{_LONGEST_RUN}}}|\s{{{_LONGEST_RUN}}}", t) for t in texts):
            raise ChatError(
                f"The tool {tool.name} must not hold a word or a run of blanks of "
                f"{_LONGEST_RUN} characters; shorten it."
            )


def _strings(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _strings(item)


_loading = threading.Lock()


def _encoding() -> openai_harmony.HarmonyEncoding:
    with _loading:
        return _load_encoding()


@functools.lru_cache(maxsize=1)
def _load_encoding() -> openai_harmony.HarmonyEncoding:
    """The library's encoding, from the ranks that come with mxforge: it would download them."""
    import openai_harmony as library

    variable = "TIKTOKEN_ENCODINGS_BASE"
    before = os.environ.get(variable)
    try:
        with tempfile.TemporaryDirectory(prefix="mxforge-") as folder:
            ranks = Path(folder) / "o200k_base.tiktoken"
            ranks.write_bytes(o200k_ranks().text())
            os.environ[variable] = folder
            return library.load_harmony_encoding(library.HarmonyEncodingName.HARMONY_GPT_OSS)
    except (OSError, library.HarmonyError) as error:
        raise TokenizerError(
            f"The harmony format could not be loaded ({error}); free some space in the folder for "
            "temporary files, or install mxforge again."
        ) from None
    finally:
        if before is None:
            os.environ.pop(variable, None)
        else:
            os.environ[variable] = before


# --------------------------------------------------------------------------------------- parsing


@dataclass(frozen=True)
class Delta:
    """What a token added: to the thinking, to the content, or to the arguments of tool call number
    `call`, which begin with an empty text. `parting`: it is the empty line between messages."""

    kind: Literal["thinking", "content", "arguments"]
    text: str
    call: int = 0
    parting: bool = False


# A header up to where it may still become one. Only these authors, so that text is told from
# them; a content type follows <|constrain|> or, as the model sometimes writes, a recipient.
_HEADER = regex.compile(
    r"(?P<author>assistant|user|system|developer|tool|functions\.[\w.\-]{0,64})"
    r"(?:\s+to=(?P<to>[^\W\d][\w.\-]{0,127}))?"
    r"\s*(?:<\|channel\|>\s*"
    r"(?P<channel>analysis|commentary|final|(?!analysis|commentary|final)[\w\-]{0,32})"
    r"(?:\s+to=(?P<to>[^\W\d][\w.\-]{0,127}))?)?"
    r"(?:\s*<\|constrain\|>\s*[\w\-/+.]{0,32}|(?(to)\s+(?:json|code|text)|(?!)))?\s*"
)
_LONGEST_HEADER = 64  # tokens
_SPELLED = regex.compile(r"<\|(?:channel|constrain)\|>")


class AnswerParser:
    """Splits what the model writes into thinking, content and tool calls, token by token.

    Any sequence of ids is taken. What the format has no place for is read as follows:

        text where a header should be           content (or thinking, behind <|channel|>analysis)
        a header that is cut off                nothing, as it holds no text
        a channel of another name, or none      content
        a call on any channel                   a call, if functions were offered; else text
        a call of what is no function's name    text
        a new header without <|end|>            ends the message before it
        a message of another author             content
        other special tokens                    nothing

    Several messages of one kind are parted by an empty line.
    """

    def __init__(
        self, harmony: Harmony, tools: Collection[str] = (), header: Sequence[int] = ()
    ) -> None:
        """`tools` are the names of the offered functions; `header` are tokens behind
        ``<|start|>assistant`` that the prompt already ends with."""
        self._tokenizer = harmony._tokenizer
        self._library = harmony._library
        self._tools = frozenset(tools)
        self._assistant = harmony.assistant
        self._state: Literal["header", "content", "between"] = "header"
        self._header = list(self._assistant)
        self._decoder = IncrementalDecoder()
        self._kind: Literal["thinking", "content", "arguments"] = "content"
        self._written: set[str] = set()  # kinds that have text already
        self._parting = False  # an empty line is due before the next text
        self.tool_calls: list[ToolCall] = []
        self._due: list[Delta] = []
        self._due = [delta for token in header for delta in self.push(token)]

    def push(self, token: int) -> list[Delta]:
        """What the token adds, possibly nothing."""
        due, self._due = self._due, []
        return due + self._push(token)

    def _push(self, token: int) -> list[Delta]:
        if token < _FIRST_SPECIAL:
            return self._push_text(token)
        if token in (END, *STOPS):
            return self._end("between")
        if token == START:
            ended = self._end("header")
            self._header = []
            return ended
        if token == CHANNEL and (self._state != "header" or CHANNEL in self._header):
            ended = self._end("header")
            self._header = [*self._assistant, CHANNEL]
            return ended
        if self._state == "between":
            self._state, self._header = "header", list(self._assistant)
        if self._state == "header":
            if token == MESSAGE:
                return self._open()
            if token in (CHANNEL, CONSTRAIN):
                self._header.append(token)
                return self._spill()
        return []

    def finish(self) -> list[Delta]:
        """What was held back, at the end of the answer."""
        due, self._due = self._due, []
        return due + self._end("between")

    def _push_text(self, token: int) -> list[Delta]:
        if self._state == "between":
            self._state, self._header = "header", list(self._assistant)
        if self._state == "header":
            self._header.append(token)
            return self._spill()
        return self._add(self._decoder.push(self._tokenizer.token_bytes(token)))

    def _end(self, state: Literal["header", "between"]) -> list[Delta]:
        deltas = self._add(self._decoder.finish()) if self._state == "content" else []
        self._decoder = IncrementalDecoder()
        self._state = state
        return deltas

    def _spill(self) -> list[Delta]:
        """Text where a header should be: taken for a message without one."""
        text = self._header_text()
        match = _HEADER.fullmatch(text, partial=True)
        if match is not None and len(self._header) <= _LONGEST_HEADER:
            return []
        begun = _HEADER.match(text)
        rest = text[begun.end() :] if begun else text
        return self._begin(begun) + self._add(_SPELLED.sub("", rest))

    def _open(self) -> list[Delta]:
        """The header is complete: the library reads it, and our own pattern what it cannot."""
        import openai_harmony as library

        parser = library.StreamableParser(self._library, None, strict=False)
        try:
            for token in (START, *self._header, MESSAGE):
                parser.process(token)
            recipient = parser.current_recipient
            if recipient is not None and recipient.startswith("<|"):
                recipient = None  # it takes <|constrain|>json for one where none is
            read = parser.current_role, parser.current_channel, recipient
        except (library.HarmonyError, ValueError):
            return self._begin(_HEADER.match(self._header_text()))
        return self._begin_message(*read)

    def _begin(self, header: Any) -> list[Delta]:
        found = header.groupdict() if header else {}
        return self._begin_message(found.get("author"), found.get("channel"), found.get("to"))

    def _begin_message(
        self, author: str | None, channel: str | None, to: str | None
    ) -> list[Delta]:
        self._state = "content"
        name = (to or "").removeprefix(f"{_NAMESPACE}.")
        called = name in self._tools or (bool(self._tools) and name != to and is_name(name))
        if author == "assistant" and called:
            self._kind = "arguments"
            self.tool_calls.append(ToolCall(f"call_{secrets.token_hex(12)}", name, ""))
            return [Delta("arguments", "", len(self.tool_calls) - 1)]
        self._kind = "thinking" if channel == "analysis" else "content"
        self._parting = self._kind in self._written
        return []

    def _add(self, text: str) -> list[Delta]:
        if not text:
            return []
        if self._kind == "arguments":
            call = self.tool_calls[-1]
            self.tool_calls[-1] = replace(call, arguments=call.arguments + text)
            return [Delta("arguments", text, len(self.tool_calls) - 1)]
        parting = [Delta(self._kind, "\n\n", parting=True)] if self._parting else []
        self._parting = False
        self._written.add(self._kind)
        return [*parting, Delta(self._kind, text)]

    def _header_text(self) -> str:
        return self._tokenizer.decode_bytes(self._header).decode(errors="replace")
