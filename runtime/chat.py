"""Chat on an engine: conversations in, thinking, content and tool calls out.

`Engine.chat` and `Engine.chat_stream` are the way in; what they take and give is described there.
"""

from __future__ import annotations

import datetime
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .harmony import STOPS, AnswerParser, Delta, Harmony, ReasoningEffort
from .messages import ToolCall, read_messages, read_tool_choice, read_tools
from .results import Piece, Timings, TokenLogprob, Usage
from .sampling import SamplingParams, token_bitmask
from .text import StopMatcher

if TYPE_CHECKING:
    from .engine import Engine
    from .streams import Stream


@dataclass(frozen=True)
class ToolCallPiece:
    """What a step added to tool call number `index`: `arguments` continue those before."""

    index: int
    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class ChatPiece:
    """What a step added to an answer. The last piece has a finish reason.

    finish_reason is "stop", "tool_calls" (it ended in a call), "length" or "cancelled".
    """

    thinking: str = ""
    content: str = ""
    tool_calls: tuple[ToolCallPiece, ...] = ()
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    usage: Usage | None = None
    timings: Timings | None = None


@dataclass(frozen=True)
class ChatCompletion:
    """A whole answer.

    `thinking` is the chain of thought, `content` the answer to show. `token_ids` hold everything
    generated, harmony's special tokens included. `logprobs` is None if they were not requested.
    """

    thinking: str
    content: str
    tool_calls: tuple[ToolCall, ...]
    finish_reason: str
    token_ids: tuple[int, ...]
    usage: Usage
    timings: Timings
    logprobs: tuple[TokenLogprob, ...] | None = None

    def message(self) -> dict[str, Any]:
        """The answer as an assistant message, to be appended to the conversation.

        It holds `thinking`: the next prompt drops it by itself once it is of no more use.
        """
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.thinking:
            message["thinking"] = self.thinking
        if self.tool_calls:
            message["tool_calls"] = [call.to_dict() for call in self.tool_calls]
        return message


class ChatStream(Iterator[ChatPiece]):
    """An answer's pieces as they arrive; the last one has a finish reason.

    Closing it, or forgetting it, cancels what is left of the answer.
    """

    def __init__(self, stream: Stream, parser: AnswerParser, stops: Sequence[str]) -> None:
        self._stream = stream
        self._parser = parser
        self._matcher = StopMatcher(stops)
        self._tokens = 0  # handed out

    @property
    def tool_calls(self) -> tuple[ToolCall, ...]:
        """The calls so far; the last one's arguments may be incomplete."""
        return tuple(self._parser.tool_calls)

    def __next__(self) -> ChatPiece:
        piece = next(self._stream)
        reason = piece.finish_reason
        # Stop strings are matched here and not below, so that "stop" means a stop id.
        tokens = piece.token_ids[:-1] if reason == "stop" else piece.token_ids
        deltas = [delta for token in tokens for delta in self._parser.push(token)]
        self._tokens += len(piece.token_ids)
        if reason is not None:
            deltas += self._parser.finish()
        content = "".join(self._matched(delta) for delta in deltas if delta.kind == "content")
        if self._matcher.matched is not None:
            piece, reason = (self._cancelled(piece) if reason is None else piece), "stop"
        elif reason is not None:
            content += self._matcher.finish()
        return ChatPiece(
            thinking="".join(delta.text for delta in deltas if delta.kind == "thinking"),
            content=content,
            tool_calls=self._calls(deltas),
            token_ids=piece.token_ids,
            logprobs=piece.logprobs,
            finish_reason="tool_calls" if reason == "stop" and self.tool_calls else reason,
            usage=piece.usage,
            timings=piece.timings,
        )

    def _matched(self, delta: Delta) -> str:
        """What of the content is certainly output; a stop string lies within one message."""
        if not delta.parting:
            return self._matcher.push(delta.text)
        return "" if self._matcher.matched is not None else self._matcher.finish() + delta.text

    def _cancelled(self, piece: Piece) -> Piece:
        """`piece` with the usage and the times that a request has when it ends.

        The engine may be some tokens ahead; what was not handed out does not count.
        """
        self._stream.cancel()
        *_, last = self._stream
        assert last.usage is not None
        usage = replace(last.usage, completion_tokens=self._tokens)
        return replace(piece, usage=usage, timings=last.timings)

    def _calls(self, deltas: Sequence[Delta]) -> tuple[ToolCallPiece, ...]:
        calls = self._parser.tool_calls
        return tuple(
            ToolCallPiece(delta.call, calls[delta.call].id, calls[delta.call].name, delta.text)
            for delta in deltas
            if delta.kind == "arguments"
        )

    def cancel(self) -> None:
        """End the answer before the next step; its last piece still comes."""
        self._stream.cancel()

    def close(self) -> None:
        """Cancel what is left of the answer; no further pieces come."""
        self._stream.close()

    def __enter__(self) -> ChatStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def chat_stream(
    engine: Engine,
    harmony: Harmony,
    messages: Sequence[Mapping[str, Any]],
    params: SamplingParams | None,
    *,
    reasoning_effort: ReasoningEffort,
    tools: Sequence[Mapping[str, Any]] | None,
    tool_choice: str | Mapping[str, Any],
    date: str | datetime.date | None,
    cancel: threading.Event | None,
) -> ChatStream:
    """See `Engine.chat_stream`."""
    params = SamplingParams() if params is None else params
    conversation = read_messages(messages)
    offered = read_tools(tools)
    choice = read_tool_choice(tool_choice, offered)
    if choice.mode == "none":
        offered = ()
    prompt = harmony.prompt(
        conversation, reasoning_effort=reasoning_effort, tools=offered, date=date
    )
    names = [tool.name for tool in offered]
    header: Sequence[int] = ()
    if choice.mode == "required":
        headers = [harmony.call_header(name) for name in names if choice.name in (None, name)]
        header = _chosen(engine, prompt, headers, params, cancel)
    stops = params.stop_strings
    params = replace(params, stop=(), stop_token_ids=(*params.stop_token_ids, *STOPS))
    stream = engine.stream([*prompt, *header], params, cancel=cancel)
    return ChatStream(stream, AnswerParser(harmony, names, header), stops)


def chat(stream: ChatStream, wants_logprobs: bool) -> ChatCompletion:
    """The whole of `stream`."""
    pieces = list(stream)
    last = pieces[-1]
    assert last.finish_reason is not None and last.usage is not None and last.timings is not None
    return ChatCompletion(
        thinking="".join(piece.thinking for piece in pieces),
        content="".join(piece.content for piece in pieces),
        tool_calls=stream.tool_calls,
        finish_reason=last.finish_reason,
        token_ids=tuple(token for piece in pieces for token in piece.token_ids),
        usage=last.usage,
        timings=last.timings,
        logprobs=tuple(lp for piece in pieces for lp in piece.logprobs) if wants_logprobs else None,
    )


def _chosen(
    engine: Engine,
    prompt: Sequence[int],
    headers: Sequence[list[int]],
    params: SamplingParams,
    cancel: threading.Event | None,
) -> list[int]:
    """Which of the headers the model chooses, going down their common beginnings."""
    begun: list[int] = []
    while len(headers) > 1:
        following = {header[len(begun)] for header in headers}
        if len(following) > 1:
            mask = token_bitmask(following, engine.vocab_size)
            one = replace(params, max_tokens=1, bitmask=mask, logprobs=None, stop=())
            told = engine.generate([*prompt, *begun], one, cancel=cancel).token_ids
            if not told:  # cancelled, as the stream to come will be
                break
            token = told[0]
        else:
            token = following.pop()
        begun.append(token)
        headers = [header for header in headers if header[: len(begun)] == begun]
    return list(headers[0])
