"""`mxforge chat`: a conversation in the terminal.

With a terminal on both sides lines are edited by prompt_toolkit (history, several lines); without
one, every line of stdin is a message, so that a chat can be scripted.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from . import calculator
from .errors import ChatError, ContextLengthError
from .harmony import ReasoningEffort

if TYPE_CHECKING:
    from .chat import ChatPiece
    from .engine import Engine
    from .messages import ToolCall
    from .sampling import SamplingParams

HELP = """\
  /new                       begin a new conversation
  /reasoning low|medium|high how long the model thinks
  /thinking                  show or hide what it thinks
  /stats                     speed and context use of the last answer
  /help                      these lines
  /quit                      end, as Ctrl-D does
Enter sends, Alt-Enter (or Esc, Enter) begins a new line, Ctrl-C stops an answer."""

_MOST_CALLS = 8  # of the calculator, for one message
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # could garble a terminal
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


class Chat:
    """One conversation; `write` takes what is shown, `style` whether it may hold colours."""

    def __init__(
        self,
        engine: Engine,
        params: SamplingParams,
        *,
        reasoning_effort: ReasoningEffort = "medium",
        hide_thinking: bool = False,
        date: str | None = None,
        write: Callable[[str], object] = sys.stdout.write,
        style: bool = False,
    ) -> None:
        self._engine = engine
        self._params = params
        self._effort: ReasoningEffort = reasoning_effort
        self._hide_thinking = hide_thinking
        self._date = date
        self._write = write
        self._style = style
        self._messages: list[dict[str, Any]] = []
        self._last: ChatPiece | None = None

    def take(self, line: str) -> bool:
        """Act on what was typed, a message or a /command; False at the end."""
        line = line.strip()
        if not line:
            return True
        if line.startswith("/"):
            return self._command(*line[1:].split())
        self._answer(line)
        return True

    def _command(self, name: str = "", *arguments: str) -> bool:
        if name in ("quit", "exit"):
            return False
        if name == "new":
            self._messages.clear()
            self._say("a new conversation")
        elif name == "reasoning" and arguments and arguments[0] in get_args(ReasoningEffort):
            self._effort = arguments[0]  # type: ignore[assignment]
            self._say(f"reasoning {self._effort}")
        elif name == "thinking":
            self._hide_thinking = not self._hide_thinking
            self._say("thinking is hidden" if self._hide_thinking else "thinking is shown")
        elif name == "stats":
            self._say(self._stats())
        else:
            self._write(HELP + "\n")
        return True

    def _answer(self, text: str) -> None:
        """Ask, serve the calculator, ask again, until there is an answer without a call."""
        before = len(self._messages)
        self._messages.append({"role": "user", "content": text})
        try:
            for _ in range(_MOST_CALLS):
                calls = self._turn()
                if not calls:
                    return
                for call in calls:
                    result = calculator.call(call.arguments)
                    self._say(f"{call.name} {call.arguments} → {result}")
                    self._messages.append(
                        {"role": "tool", "tool_call_id": call.id, "content": result}
                    )
            self._say(f"stopped after {_MOST_CALLS} calls")
        except (ContextLengthError, ChatError) as error:
            del self._messages[before:]
            self._say(f"{error} /new begins a new conversation.")

    def _turn(self) -> tuple[ToolCall, ...]:
        """One answer, shown as it comes; its calls, if it ended in them."""
        stream = self._engine.chat_stream(
            self._messages,
            self._params,
            reasoning_effort=self._effort,
            tools=[calculator.TOOL],
            date=self._date,
        )
        thinking, content = "", ""
        with _on_ctrl_c(stream.cancel):
            for piece in stream:
                if piece.thinking and not self._hide_thinking:
                    self._write(self._dim(_clean(piece.thinking)))
                if piece.content:
                    if not content and thinking and not self._hide_thinking:
                        self._write("\n\n")
                    self._write(_clean(piece.content))
                thinking += piece.thinking
                content += piece.content
                self._last = piece
                sys.stdout.flush()
        self._write("\n")
        last = self._last
        assert last is not None
        if last.finish_reason in ("cancelled", "length"):
            self._say("stopped" if last.finish_reason == "cancelled" else "cut off: " + _room(last))
        calls = stream.tool_calls if last.finish_reason == "tool_calls" else ()
        message: dict[str, Any] = {"role": "assistant", "content": content, "thinking": thinking}
        if calls:
            message["tool_calls"] = [call.to_dict() for call in calls]
        self._messages.append(message)
        return calls

    def _stats(self) -> str:
        if self._last is None or self._last.usage is None or self._last.timings is None:
            return "no answer yet"
        usage, timings = self._last.usage, self._last.timings
        used = usage.prompt_tokens + usage.completion_tokens
        return (
            f"{usage.completion_tokens} tokens at {timings.decode_tok_s:.1f} tok/s behind "
            f"{usage.prompt_tokens} of prompt ({usage.cached_tokens} known already, the rest in "
            f"{timings.prefill_s:.2f} s); {used} of {self._engine.context_length} of the context"
        )

    def _say(self, text: str) -> None:
        self._write(self._dim(f"[{_clean(text)}]") + "\n")

    def _dim(self, text: str) -> str:
        return f"{_DIM}{text}{_PLAIN}" if self._style else text


def run(chat: Chat, greeting: str) -> None:
    """Read lines until /quit or the end of the input, and let `chat` take them."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        for line in sys.stdin:
            if not chat.take(line):
                return
        return
    print(greeting)
    read = _editor()
    while True:
        try:
            line = read()
        except KeyboardInterrupt:
            continue  # an empty line again
        except EOFError:
            return
        if not chat.take(line):
            return


@contextlib.contextmanager
def _on_ctrl_c(act: Callable[[], None]) -> Iterator[None]:
    """Let Ctrl-C do this and nothing else."""
    before = signal.signal(signal.SIGINT, lambda *_: act())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def may_style() -> bool:
    """Whether stdout is a terminal that wants colours (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


def _editor() -> Callable[[], str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("enter")(lambda event: event.current_buffer.validate_and_handle())
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    file = Path(base) / "mxforge" / "chat-history"
    history: Any = InMemoryHistory()
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        history = FileHistory(str(file))
    session: PromptSession[str] = PromptSession(history=history, multiline=True, key_bindings=keys)
    return lambda: session.prompt("> ", prompt_continuation="  ")


def _room(last: ChatPiece) -> str:
    assert last.usage is not None
    return f"the context or --max-tokens is used up after {last.usage.completion_tokens} tokens"


def _clean(text: str) -> str:
    return _CONTROL.sub("", text)
