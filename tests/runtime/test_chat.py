"""Chat on an engine: what a model writes, as thinking, content and tool calls."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.scripted import USER, Script, tool

from mxforge import Engine, SamplingParams
from mxforge.chat import chat
from mxforge.errors import ChatError, ContextLengthError, TokenizerError
from mxforge.harmony import STOPS, Harmony
from mxforge.tokenizer import O200kHarmony


@pytest.fixture(scope="module")
def harmony() -> Harmony:
    return Harmony(O200kHarmony())


# ------------------------------------------------------------------- a model that writes a script

THINK = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>"
CALL = "<|channel|>commentary to=functions.f <|constrain|>json<|message|>"


def test_thinking_and_content_arrive_apart(harmony: Harmony) -> None:
    script = Script(harmony, THINK + FINAL + "Well, yes 🦖.<|return|>")
    pieces = list(script.ask())
    assert "".join(piece.thinking for piece in pieces) == "hm"
    assert "".join(piece.content for piece in pieces) == "Well, yes 🦖."
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == "stop"
    assert pieces[-1].usage is not None
    assert sum((piece.token_ids for piece in pieces), ()) == tuple(script.tokens)
    assert script.prompts[0].endswith("<|start|>user<|message|>hi<|end|><|start|>assistant")
    assert set(STOPS) <= set(script.params[0].stop_token_ids)


def test_an_answer_goes_back_into_the_conversation(harmony: Harmony) -> None:
    tools = [tool("f")]
    answer = chat(Script(harmony, THINK + CALL + '{"a": 1}<|call|>').ask(tools=tools), False)
    assert (answer.thinking, answer.content, answer.finish_reason) == ("hm", "", "tool_calls")
    (call,) = answer.tool_calls
    assert (call.name, call.arguments) == ("f", '{"a": 1}')
    assert answer.logprobs is None
    result = {"role": "tool", "tool_call_id": call.id, "content": "2"}
    second = Script(harmony, FINAL + "2.<|return|>")
    stream = second.ask([USER, answer.message(), result], tools=tools)
    last = chat(stream, True)
    assert (last.content, last.finish_reason, last.logprobs) == ("2.", "stop", ())
    assert "analysis<|message|>hm<|end|>" in second.prompts[0]
    assert "<|start|>functions.f to=assistant" in second.prompts[0]
    assert last.message() == {"role": "assistant", "content": "2."}


def test_a_call_streams(harmony: Harmony) -> None:
    stream = Script(harmony, CALL + '{"a": 1}<|call|>').ask(tools=[tool("f")])
    parts = [part for piece in stream for part in piece.tool_calls]
    assert {(part.index, part.id, part.name) for part in parts} == {
        (0, stream.tool_calls[0].id, "f")
    }
    assert parts[0].arguments == ""
    assert "".join(part.arguments for part in parts) == '{"a": 1}'


def test_a_call_that_is_cut_off_is_no_finished_call(harmony: Harmony) -> None:
    answer = chat(Script(harmony, CALL + '{"a"', reason="length").ask(tools=[tool("f")]), False)
    assert answer.finish_reason == "length"
    assert answer.tool_calls[0].arguments == '{"a"'


@pytest.mark.parametrize("stop", ["es 🦖", "."])
def test_stop_strings_end_the_content_and_not_the_thinking(harmony: Harmony, stop: str) -> None:
    thinking = f"<|channel|>analysis<|message|>{stop}<|end|><|start|>assistant"
    script = Script(harmony, thinking + FINAL + "Well, yes 🦖. And no.<|return|>")
    answer = chat(script.ask(params=SamplingParams(stop=stop)), False)
    assert answer.thinking == stop
    assert answer.content == "Well, yes 🦖. And no."[: "Well, yes 🦖. And no.".index(stop)]
    assert answer.finish_reason == "stop"
    assert script.cancelled.is_set()
    assert answer.usage.completion_tokens < len(script.tokens)


def test_a_stop_string_may_end_with_the_last_token(harmony: Harmony) -> None:
    script = Script(harmony, FINAL + "Yes.", reason="length")
    answer = chat(script.ask(params=SamplingParams(stop=".")), False)
    assert (answer.content, answer.finish_reason) == ("Yes", "stop")


def test_a_stop_string_lies_within_one_message(harmony: Harmony) -> None:
    text = "<|channel|>commentary<|message|>First.<|end|><|start|>assistant" + FINAL + "Then."
    answer = chat(Script(harmony, text).ask(params=SamplingParams(stop="\n\n")), False)
    assert answer.content == "First.\n\nThen"  # its last token stands for a stop id


def test_a_stop_id_that_is_text_is_no_content(harmony: Harmony) -> None:
    script = Script(harmony, FINAL + "Hello world")
    params = SamplingParams(stop_token_ids=[script.tokens[-1]])
    assert chat(script.ask(params=params), False).content == "Hello"


def test_what_was_not_handed_out_is_not_counted(harmony: Harmony) -> None:
    stream = Script(harmony, FINAL + "Well, yes. And no.").ask(params=SamplingParams(stop="yes"))
    pieces = list(stream)
    assert pieces[-1].usage is not None
    tokens = sum(len(piece.token_ids) for piece in pieces)
    assert pieces[-1].usage.completion_tokens == tokens


def test_half_a_stop_string_is_given_out_at_the_end(harmony: Harmony) -> None:
    script = Script(harmony, FINAL + "Well, yes<|return|>")
    assert chat(script.ask(params=SamplingParams(stop="yes!")), False).content == "Well, yes"


def test_tool_choices(harmony: Harmony) -> None:
    tools = [tool("f"), tool("get_weather"), tool("get_time")]
    script = Script(harmony, "{}<|call|>")
    answer = chat(script.ask(tools=tools, tool_choice={"function": {"name": "get_time"}}), False)
    assert [call.name for call in answer.tool_calls] == ["get_time"]
    assert answer.finish_reason == "tool_calls"
    assert script.prompts[-1].endswith(
        "<|start|>assistant to=functions.get_time<|channel|>commentary <|constrain|>json<|message|>"
    )
    script = Script(harmony, "<|call|>")
    pieces = list(script.ask(tools=tools, tool_choice={"function": {"name": "f"}}))
    assert [part.name for piece in pieces for part in piece.tool_calls] == ["f"]
    script = Script(harmony, "{}<|call|>")
    answer = chat(script.ask(tools=tools, tool_choice="required"), False)
    assert answer.tool_calls[0].name in ("f", "get_weather", "get_time")
    assert 2 <= len(script.prompts) <= 4  # as few questions as names part
    script = Script(harmony, FINAL + "no<|return|>")
    chat(script.ask(tools=tools, tool_choice="none"), False)
    assert "get_weather" not in script.prompts[-1]


def test_a_closed_stream_cancels(harmony: Harmony) -> None:
    script = Script(harmony, FINAL + "one two three<|return|>")
    with script.ask() as stream:
        next(stream)
    assert script.cancelled.is_set()
    assert list(stream) == []


# ------------------------------------------------------------------------------ a compiled model


@pytest.fixture(scope="module")
def engine(chat_artifact: Path) -> Iterator[Engine]:
    with Engine.load(chat_artifact, context_length=512) as loaded:
        yield loaded


def test_noise_ends_as_an_answer(engine: Engine) -> None:
    params = SamplingParams(max_tokens=20, seed=1, logprobs=1)
    answer = engine.chat([USER], params)
    assert answer.finish_reason in ("length", "stop")
    assert len(answer.token_ids) == answer.usage.completion_tokens <= 20
    assert answer.logprobs is not None
    assert len(answer.logprobs) == len(answer.token_ids)
    again = engine.chat([USER], params)
    assert (again.content, again.thinking) == (answer.content, answer.thinking)
    pieces = list(engine.chat_stream([USER], params))
    assert "".join(piece.content for piece in pieces) == answer.content


def test_a_required_call_is_made(engine: Engine) -> None:
    tools = [tool("get_weather"), tool("get_time")]
    params = SamplingParams(max_tokens=3, temperature=0)
    answer = engine.chat([USER], params, tools=tools, tool_choice="required")
    assert answer.tool_calls[0].name in ("get_weather", "get_time")


def test_cancelling_ends_an_answer(engine: Engine) -> None:
    cancel = threading.Event()
    stream = engine.chat_stream([USER], cancel=cancel)
    list(itertools.islice(stream, 3))
    cancel.set()
    assert list(stream)[-1].finish_reason in ("cancelled", "stop")


def test_errors_are_named(engine: Engine) -> None:
    with pytest.raises(ChatError, match="role must be"):
        engine.chat([{"role": "robot"}])
    with pytest.raises(ContextLengthError):
        engine.chat([{"role": "user", "content": "word " * 600}])


def test_a_model_without_harmony_says_so(text_artifact: Path) -> None:
    with (
        Engine.load(text_artifact, context_length=64) as other,
        pytest.raises(TokenizerError, match="no harmony format"),
    ):
        other.chat([USER])
