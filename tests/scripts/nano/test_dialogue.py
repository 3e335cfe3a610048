"""Dialogues as token ids: the harmony format, and which tokens are trained."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from nano import dialogue, text
from nano.thinking import sum_thinking

from mxforge.harmony import Harmony
from mxforge.messages import read_messages
from mxforge.tokenizer import O200kHarmony, o200k_ranks


def test_prompts_are_those_of_the_command_line(tokenizer: O200kHarmony, renderer: Any):
    exchange = text.Exchange("sum", "What is 17 + 25?", sum_thinking(17, 25), "")
    ids = [*renderer.prefix(dialogue.Setting()), *renderer.question(exchange, lambda: 0)]
    messages = read_messages([{"role": "user", "content": "What is 17 + 25?"}])
    assert ids == Harmony(tokenizer).prompt(messages)


@pytest.mark.parametrize("effort", ["low", "medium", "high"])
@pytest.mark.parametrize("calculator", [False, True])
@pytest.mark.parametrize("instructions", ["", "Be brief."])
def test_dialogues_are_rendered_as_openai_harmony_does(
    effort: str,
    calculator: bool,
    instructions: str,
    renderer: Any,
    tokenizer: O200kHarmony,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    h = pytest.importorskip("openai_harmony")
    (tmp_path / "o200k_base.tiktoken").write_bytes(o200k_ranks().text())
    monkeypatch.setenv("TIKTOKEN_ENCODINGS_BASE", str(tmp_path))
    encoding = h.load_harmony_encoding(h.HarmonyEncodingName.HARMONY_GPT_OSS)

    rng = random.Random(effort)
    categories = ("sum", "calculator", "calculator" if calculator else "other")
    exchanges = [text.draw(rng, c, calculator, False) for c in categories]
    exchanges = [e for e in exchanges if not e.noise]
    say = h.Message.from_role_and_content
    content = h.SystemContent.new().with_reasoning_effort(h.ReasoningEffort[effort.upper()])
    messages = [say(h.Role.SYSTEM, content)]
    if calculator or instructions:
        developer = h.DeveloperContent.new()
        if instructions:
            developer = developer.with_instructions(instructions)
        if calculator:
            tool = h.ToolDescription.new(
                dialogue.CALCULATOR_NAME,
                dialogue.CALCULATOR_DESCRIPTION,
                dialogue.CALCULATOR_SCHEMA,
            )
            developer = developer.with_function_tools([tool])
        messages.append(say(h.Role.DEVELOPER, developer))
    for exchange in exchanges:
        messages.append(say(h.Role.USER, exchange.question))
        if exchange is exchanges[-1]:  # that of earlier turns was dropped
            thinking = say(h.Role.ASSISTANT, exchange.thinking[effort])
            messages.append(thinking.with_channel("analysis"))
        if exchange.call is not None:
            call = say(h.Role.ASSISTANT, json.dumps({"expression": exchange.call.expression}))
            call = call.with_channel("commentary").with_recipient("functions.calculator")
            messages.append(call.with_content_type("<|constrain|>json"))
            author = h.Author.new(h.Role.TOOL, "functions.calculator")
            result = h.Message.from_author_and_content(author, exchange.call.result)
            messages.append(result.with_channel("commentary").with_recipient("assistant"))
        messages.append(say(h.Role.ASSISTANT, exchange.answer).with_channel("final"))

    def rendered(upto: int) -> list[int]:
        conversation = h.Conversation.from_messages(messages[:upto])
        ids: list[int] = encoding.render_conversation_for_completion(conversation, h.Role.ASSISTANT)
        return ids

    setting = dialogue.Setting(effort, calculator, instructions=instructions)
    ours = renderer.prefix(setting) + renderer.dialogue(exchanges, effort, lambda: 0).ids
    # The last answer is what is to come: harmony keeps the thinking before it until then.
    ours = ours[: len(ours) - len(renderer.answer(exchanges[-1].answer, True))]
    theirs = rendered(-1)
    if exchanges[-1].call is None:  # nor is thinking kept without a call
        ours = ours[: len(ours) - len(renderer.thinking(exchanges[-1].thinking[effort]))]
        theirs = rendered(-2)
    assert tokenizer.decode_bytes(ours).decode() == tokenizer.decode_bytes(theirs).decode()
    assert ours == theirs


def test_only_what_the_model_says_last_is_trained(renderer: Any, tokenizer: O200kHarmony):
    rng = random.Random(0)
    exchanges = [text.draw(rng, "calculator", True, False) for _ in range(2)]
    tokens = renderer.dialogue(exchanges, "low", lambda: 0)
    trained = [t for t, on in zip(tokens.ids, tokens.trained, strict=True) if on]
    said = tokenizer.decode_bytes(trained).decode()
    call = json.dumps({"expression": exchanges[1].call.expression})
    assert said == (
        f"<|channel|>analysis<|message|>{exchanges[1].thinking['low']}<|end|><|start|>assistant"
        f" to=functions.calculator<|channel|>commentary <|constrain|>json<|message|>{call}<|call|>"
        f"<|channel|>final<|message|>{exchanges[1].answer}<|return|>"
    )
