"""`mxforge chat`: a conversation in the terminal.

With a terminal on both sides lines are edited by prompt_toolkit (history, several lines); without
one, every line of stdin is a message, so that a chat can be scripted.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from . import calculator
from .errors import ChatError, ContextLengthError
from .harmony import ReasoningEffort
from .text import printable

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

_COMMANDS = ("/new", "/reasoning", "/thinking", "/stats", "/help", "/quit", "/exit")
_MOST_CALLS = 8  # of the calculator, for one message
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
        write: Callable[[str], object] | None = None,
        style: bool = False,
    ) -> None:
        self._engine = engine
        self._params = params
        self._effort: ReasoningEffort = reasoning_effort
        self._hide_thinking = hide_thinking
        self._date = date
        self._write = sys.stdout.write if write is None else write
        self._style = style
        self._messages: list[dict[str, Any]] = []
        self._last: ChatPiece | None = None

    def take(self, line: str) -> bool:
        """Act on what was typed, a message or a /command; False at the end."""
        line = line.strip()
        if not line:
            return True
        if line.startswith("/") and (line.split()[0] in _COMMANDS or " " not in line):
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
            with _ctrl_c() as stopped:
                for _ in range(_MOST_CALLS):
                    calls = self._turn(stopped)
                    for call in calls:
                        self._serve(call)
                    if not calls or stopped.is_set():
                        return
            self._say(f"stopped after {_MOST_CALLS} calls")
        except ContextLengthError as error:
            del self._messages[before:]
            self._say(f"{error} /new begins a new conversation.")
        except ChatError as error:
            del self._messages[before:]
            self._say(str(error))

    def _serve(self, call: ToolCall) -> None:
        if call.name == calculator.TOOL["function"]["name"]:
            result = calculator.call(call.arguments)
        else:
            result = f"error: there is no function {call.name}"
        self._say(f"{call.name} {call.arguments} → {result}")
        self._messages.append({"role": "tool", "tool_call_id": call.id, "content": result})

    def _turn(self, stopped: threading.Event) -> tuple[ToolCall, ...]:
        """One answer, shown as it comes; its calls, if it ended in them."""
        stream = self._engine.chat_stream(
            self._messages,
            self._params,
            reasoning_effort=self._effort,
            tools=[calculator.TOOL],
            date=self._date,
            cancel=stopped,
        )
        thinking, content, shown = "", "", ""
        for piece in stream:
            for kind, text in (("thinking", piece.thinking), ("content", piece.content)):
                if not text or (kind == "thinking" and self._hide_thinking):
                    continue
                if shown not in ("", kind):
                    self._write("\n\n")
                shown = kind
                text = printable(text)
                self._write(self._dim(text) if kind == "thinking" else text)
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
        self._write(self._dim(f"[{printable(text)}]") + "\n")

    def _dim(self, text: str) -> str:
        return f"{_DIM}{text}{_PLAIN}" if self._style else text


def run(chat: Chat, greeting: str) -> None:
    """Read lines until /quit or the end of the input, and let `chat` take them."""
    if sys.stdin is None:  # closed
        return
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        for line in sys.stdin:
            if not chat.take(line):
                return
        return
    print(greeting)
    read = _editor()
    while True:
        try:
            if not chat.take(read()):
                return
        except KeyboardInterrupt:
            continue  # an empty line again
        except EOFError:
            return


@contextlib.contextmanager
def _ctrl_c() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets, and does nothing else."""
    pressed = threading.Event()

    def press(*_: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Event.set cannot be interrupted by itself
        pressed.set()

    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def may_style() -> bool:
    """Whether stdout is a terminal that wants colours (https://no-color.org)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return sys.stdout.isatty() and not plain


def _editor() -> Callable[[], str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.enums import DEFAULT_BUFFER
    from prompt_toolkit.filters import has_focus
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.key_binding import KeyBindings

    class Forgiving(FileHistory):  # type: ignore[misc]
        """A history on disk; one that cannot be read or written is no reason to stop."""

        def load_history_strings(self) -> Iterator[str]:
            with contextlib.suppress(OSError):
                yield from super().load_history_strings()

        def store_string(self, string: str) -> None:
            with contextlib.suppress(OSError):
                super().store_string(string)

    keys, typing = KeyBindings(), has_focus(DEFAULT_BUFFER)  # and not searching
    keys.add("enter", filter=typing)(lambda event: event.current_buffer.validate_and_handle())
    keys.add("escape", "enter", filter=typing)(lambda event: event.current_buffer.insert_text("\n"))
    history: Any = InMemoryHistory()
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: the user has no home
        base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
        file = Path(base) / "mxforge" / "chat-history"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode=0o600)
        history = Forgiving(str(file))
    session: PromptSession[str] = PromptSession(history=history, multiline=True, key_bindings=keys)
    return lambda: session.prompt("> ", prompt_continuation="  ")


def _room(last: ChatPiece) -> str:
    assert last.usage is not None
    return f"the context or --max-tokens is used up after {last.usage.completion_tokens} tokens"
