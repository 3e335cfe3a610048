"""Conversations of OpenAI's form: what is read, and what is refused by name."""

from __future__ import annotations

import pytest

from mxforge.errors import ChatError
from mxforge.messages import (
    Message,
    Tool,
    ToolCall,
    ToolChoice,
    read_messages,
    read_tool_choice,
    read_tools,
)

CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
FUNCTION = {"type": "function", "function": {"name": "f", "description": "d"}}


def test_every_role_is_read() -> None:
    found = read_messages(
        [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]},
            {"role": "assistant", "content": None, "thinking": "hm", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": "2"},
            {"role": "assistant", "content": "done", "reasoning_content": "so"},
            {"role": "tool", "name": "g", "content": "3"},
        ]
    )
    assert found == [
        Message("developer", "be brief"),
        Message("user", "ab"),
        Message("assistant", "", "hm", (ToolCall("c1", "f", '{"a": 1}'),)),
        Message("tool", "2", name="f"),
        Message("assistant", "done", "so"),
        Message("tool", "3", name="g"),
    ]


def test_arguments_may_be_an_object() -> None:
    call = {"function": {"name": "f", "arguments": {"a": ["é"]}}}
    (message,) = read_messages([{"role": "assistant", "tool_calls": [call]}])
    assert message.tool_calls == (ToolCall("", "f", '{"a": ["é"]}'),)


@pytest.mark.parametrize(
    ("messages", "found"),
    [
        ([{"role": "assistant", "tool_calls": [CALL | {"id": 7}]}], "id must be text"),
        ([{"role": "assistant", "tool_calls": [CALL | {"id": None}]}, {"role": "tool"}], "answer"),
        ("hello", "messages must be a list"),
        (None, "messages must be a list"),
        ({}, "messages must be a list"),
        ([], "at least one message"),
        (["hello"], r"messages\[0\] must be a JSON object"),
        ([{"content": "x"}], r"messages\[0\].role must be system"),
        ([{"role": "robot"}], "found 'robot'"),
        ([{"role": ["user"]}], "role must be"),
        ([{"role": "user", "content": 5}], r"messages\[0\].content must be text"),
        ([{"role": "user", "content": b"x"}], "content must be text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "must be a part of text"),
        ([{"role": "user", "content": [7]}], r"content\[0\] must be a JSON object"),
        ([{"role": "assistant", "tool_calls": "f"}], "tool_calls must be a list"),
        ([{"role": "assistant", "tool_calls": [{}]}], "function must be a JSON object"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "a b"}}]}], "1 to 64"),
        ([{"role": "tool", "content": "x"}], "must answer a call"),
        ([{"role": "tool", "tool_call_id": "other", "content": "x"}], "found 'other'"),
        ([{"role": "tool", "name": "<|end|>", "content": "x"}], "name must be 1 to 64"),
    ],
)
def test_what_is_no_conversation_is_refused(messages: object, found: str) -> None:
    with pytest.raises(ChatError, match=found):
        read_messages(messages)


def test_tools_are_read() -> None:
    schema = {"type": "object", "properties": {}}
    second = {"function": {"name": "g.h", "parameters": schema}}
    assert read_tools([FUNCTION, second]) == (Tool("f", "d", None), Tool("g.h", "", schema))
    assert read_tools(None) == ()


def test_endless_and_odd_schemas_are_refused() -> None:
    endless: dict = {}
    endless["self"] = endless
    deep: dict = {}
    for _ in range(100_000):
        deep = {"a": deep}
    for schema in (endless, deep, {"a": float("nan")}, {"a": {1, 2}}):
        with pytest.raises(ChatError, match=r"tools\[0\].function.parameters must be JSON, but"):
            read_tools([{"function": {"name": "f", "parameters": schema}}])


@pytest.mark.parametrize(
    ("tools", "found"),
    [
        ("f", "tools must be a list"),
        ([5], r"tools\[0\] must be a JSON object"),
        ([{"type": "web_search"}], "type must be function"),
        ([{"type": "function"}], "function must be a JSON object"),
        ([{"function": {"name": ""}}], "name must be 1 to 64"),
        ([{"function": {"name": "f", "parameters": "{}"}}], "parameters must be a JSON object"),
        ([FUNCTION, FUNCTION], "found f twice"),
    ],
)
def test_what_is_no_tool_is_refused(tools: object, found: str) -> None:
    with pytest.raises(ChatError, match=found):
        read_tools(tools)


def test_tool_choices() -> None:
    one, two = (Tool("f", "", None),), (Tool("f", "", None), Tool("g", "", None))
    named = {"type": "function", "function": {"name": "g"}}
    assert read_tool_choice("auto", ()) == ToolChoice("auto")
    assert read_tool_choice(None, one) == ToolChoice("auto")
    assert read_tool_choice("none", one) == ToolChoice("none")
    assert read_tool_choice("required", one) == ToolChoice("required", "f")
    assert read_tool_choice("required", two) == ToolChoice("required", None)
    assert read_tool_choice(named, two) == ToolChoice("required", "g")
    for choice, tools, found in (
        ("required", (), "needs tools"),
        ("sometimes", one, "tool_choice must be"),
        (named, one, r"one of the tools \['f'\], found 'g'"),
        ({"function": 5}, one, "must be a JSON object"),
    ):
        with pytest.raises(ChatError, match=found):
            read_tool_choice(choice, tools)
