"""Conversations as OpenAI's Chat Completions API writes them, checked.

A message is a mapping with a `role`:

    system, developer   instructions: `content`
    user                `content`
    assistant           `content`, `tool_calls`, and the chain of thought under `thinking` (also
                        read under `reasoning_content` and `reasoning`, as other servers name it)
    tool                the result of a call: `content`, and `tool_call_id` or `name`

`content` is text or a list of parts ``{"type": "text", "text": …}``. A tool is
``{"type": "function", "function": {"name", "description", "parameters"}}``, `parameters` a JSON
schema. Everything here raises ChatError for what is not of this form.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .errors import ChatError

Role = Literal["developer", "user", "assistant", "tool"]

_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")  # of a function
_THINKING = ("thinking", "reasoning_content", "reasoning")


@dataclass(frozen=True)
class ToolCall:
    """A function that the model asks to be called; `arguments` is JSON as the model wrote it."""

    id: str
    name: str
    arguments: str

    def to_dict(self) -> dict[str, Any]:
        """As an item of an assistant message's `tool_calls`."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


@dataclass(frozen=True)
class Tool:
    """A function that the model may call."""

    name: str
    description: str
    parameters: Mapping[str, Any] | None


@dataclass(frozen=True)
class Message:
    """One message; `name` is that of the function whose result a tool message holds."""

    role: Role
    content: str
    thinking: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    name: str = ""


@dataclass(frozen=True)
class ToolChoice:
    """Whether the model may call a tool, must, or must call the one of that `name`."""

    mode: Literal["auto", "none", "required"]
    name: str | None = None


def is_name(text: str) -> bool:
    """Whether a function may have this name."""
    return _NAME.fullmatch(text) is not None


def read_messages(messages: Any) -> list[Message]:
    """The conversation as Messages; a system message is harmony's developer message."""
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise ChatError(f"messages must be a list of messages, found {_short(messages)}.")
    if not messages:
        raise ChatError("messages must hold at least one message, found none.")
    found: list[Message] = []
    callers: dict[str, str] = {}  # tool_call_id -> function
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        read = _read_message(_mapping(message, where), where, callers)
        callers |= {call.id: call.name for call in read.tool_calls if call.id}
        found.append(read)
    return found


def _read_message(message: Mapping[str, Any], where: str, callers: Mapping[str, str]) -> Message:
    role = message.get("role") if isinstance(message.get("role"), str) else None
    content = _text(message.get("content"), f"{where}.content")
    if role in ("system", "developer"):
        return Message("developer", content)
    if role == "user":
        return Message("user", content)
    if role == "assistant":
        named = next((name for name in _THINKING if message.get(name) is not None), None)
        calls = message.get("tool_calls")
        return Message(
            "assistant",
            content,
            thinking=_text(message[named], f"{where}.{named}") if named else "",
            tool_calls=tuple(
                _read_call(call, f"{where}.tool_calls[{i}]")
                for i, call in enumerate(_list(calls, f"{where}.tool_calls"))
            ),
        )
    if role == "tool":
        return Message("tool", content, name=_caller(message, where, callers))
    raise ChatError(
        f"{where}.role must be system, developer, user, assistant or tool, "
        f"found {_short(message.get('role'))}."
    )


def _read_call(call: Any, where: str) -> ToolCall:
    function = _mapping(_mapping(call, where).get("function"), f"{where}.function")
    arguments = function.get("arguments")
    if isinstance(arguments, Mapping):
        arguments = _json(arguments, f"{where}.function.arguments")
    return ToolCall(
        id=_text(call.get("id"), f"{where}.id"),
        name=_name(function.get("name"), f"{where}.function.name"),
        arguments=_text(arguments, f"{where}.function.arguments"),
    )


def _caller(message: Mapping[str, Any], where: str, callers: Mapping[str, str]) -> str:
    known = callers.get(_text(message.get("tool_call_id"), f"{where}.tool_call_id"))
    if known is None and message.get("name") is None:
        raise ChatError(
            f"{where} must answer a call: its tool_call_id should be that of an earlier assistant "
            f"message's tool_calls, found {_short(message.get('tool_call_id'))}; "
            "give one of those, or the function's name as `name`."
        )
    return known or _name(message.get("name"), f"{where}.name")


def read_tools(tools: Any) -> tuple[Tool, ...]:
    """The offered functions; None is none."""
    found = []
    for index, tool in enumerate(_list(tools, "tools")):
        where = f"tools[{index}]"
        if _mapping(tool, where).get("type", "function") != "function":
            raise ChatError(
                f"{where}.type must be function, found {_short(tool['type'])}; "
                "only function tools can be offered."
            )
        where += ".function"
        function = _mapping(tool.get("function"), where)
        parameters = function.get("parameters")
        if parameters is not None:
            _json(_mapping(parameters, f"{where}.parameters"), f"{where}.parameters")
        found.append(
            Tool(
                _name(function.get("name"), f"{where}.name"),
                _text(function.get("description"), f"{where}.description"),
                parameters,
            )
        )
    names = [tool.name for tool in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ChatError(f"tools must have distinct names, found {twice[0]} twice.")
    return tuple(found)


def read_tool_choice(choice: Any, tools: Sequence[Tool]) -> ToolChoice:
    """`choice` is "auto", "none", "required", or ``{"type": "function", "function": {"name"}}``."""
    if choice is None:
        return ToolChoice("auto")
    if isinstance(choice, str) and choice in ("auto", "none"):
        return ToolChoice("none" if choice == "none" else "auto")
    names = [tool.name for tool in tools]
    if isinstance(choice, str) and choice == "required":
        if not names:
            raise ChatError('tool_choice "required" needs tools to choose from, found none.')
        return ToolChoice("required", names[0] if len(names) == 1 else None)
    if not isinstance(choice, Mapping):
        raise ChatError(
            'tool_choice must be "auto", "none", "required" or '
            f'{{"type": "function", "function": {{"name": …}}}}, found {_short(choice)}.'
        )
    function = _mapping(choice.get("function", choice), "tool_choice.function")
    name = _name(function.get("name"), "tool_choice.function.name")
    if name not in names:
        raise ChatError(f"tool_choice must name one of the tools {names}, found {name!r}.")
    return ToolChoice("required", name)


def _text(value: Any, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if not isinstance(value, Sequence) or isinstance(value, (bytes, bytearray)):
        raise ChatError(f"{where} must be text or a list of text parts, found {_short(value)}.")
    parts = []
    for index, part in enumerate(value):
        text = _mapping(part, f"{where}[{index}]").get("text")
        if not isinstance(text, str):
            raise ChatError(
                f"{where}[{index}] must be a part of text, found {_short(part)}; "
                "gpt-oss reads nothing else."
            )
        parts.append(text)
    return "".join(parts)


def _name(value: Any, where: str) -> str:
    if not isinstance(value, str) or not is_name(value):
        raise ChatError(
            f"{where} must be 1 to 64 letters, digits, dots, dashes or underscores, "
            f"found {_short(value)}."
        )
    return value


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ChatError(f"{where} must be a JSON object, found {_short(value)}.")
    return value


def _list(value: Any, where: str) -> Sequence[Any]:
    if value is None:
        return ()
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Sequence):
        raise ChatError(f"{where} must be a list, found {_short(value)}.")
    return value


def _json(value: Any, where: str) -> str:
    try:
        return json.dumps(value, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ChatError(f"{where} must be JSON, but {reason}.") from None


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except Exception:  # a foreign object's own
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."
