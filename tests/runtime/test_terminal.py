"""`mxforge chat`: what is shown, what is remembered, and a real terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.scripted import Script

from mxforge import SamplingParams
from mxforge.errors import ContextLengthError
from mxforge.harmony import Harmony
from mxforge.terminal import Chat, _editor
from mxforge.tokenizer import O200kHarmony

THINK = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant"
YES = THINK + "<|channel|>final<|message|>Yes.<|return|>"
CALL = (
    THINK + "<|channel|>commentary to=functions.calculator <|constrain|>json<|message|>"
    '{"expression": "1234 * 5678"}<|call|>'
)


@pytest.fixture(scope="module")
def harmony() -> Harmony:
    return Harmony(O200kHarmony())


@pytest.fixture
def talk(harmony: Harmony) -> Callable[..., tuple[Chat, Script, list[str]]]:
    """talk(texts, options) -> chat, the model that writes the texts, what is shown."""

    def make(*texts: str, **options) -> tuple[Chat, Script, list[str]]:
        script = Script(harmony, *texts, reason=options.pop("reason", "stop"))
        shown: list[str] = []
        chat = Chat(script, SamplingParams(), write=shown.append, **options)  # type: ignore[arg-type]
        return chat, script, shown

    return make


def test_thinking_then_the_answer(talk) -> None:
    chat, _, shown = talk(YES)
    assert chat.take("hi")
    assert "".join(shown) == "hm\n\nYes.\n"
    chat, _, shown = talk(YES, hide_thinking=True)
    chat.take("hi")
    assert "".join(shown) == "Yes.\n"


def test_thinking_is_dimmed_where_colours_may_be(talk) -> None:
    chat, _, shown = talk(YES, style=True)
    chat.take("hi")
    assert "".join(shown) == "\x1b[2mhm\x1b[0m\n\nYes.\n"


def test_the_conversation_goes_on_until_a_new_one(talk) -> None:
    chat, script, _ = talk(YES)
    for line in ("first", "second", "/new", "third"):
        chat.take(line)
    assert "first" in script.prompts[1]
    assert "Yes." in script.prompts[1]
    assert "first" not in script.prompts[2]


def test_the_calculator_is_called(talk) -> None:
    chat, script, shown = talk(CALL, YES)
    chat.take("1234 times 5678?")
    assert 'calculator {"expression": "1234 * 5678"} → 7006652' in "".join(shown)
    assert "<|start|>functions.calculator to=assistant" in script.prompts[1]
    assert "7006652" in script.prompts[1]
    assert "".join(shown).endswith("Yes.\n")


def test_a_model_that_only_calls_is_stopped(talk) -> None:
    chat, script, shown = talk(CALL)
    chat.take("?")
    assert len(script.prompts) == 8
    assert "stopped after 8 calls" in shown[-1]


def test_only_the_calculator_answers_calls(talk) -> None:
    chat, script, _ = talk(CALL.replace("functions.calculator", "functions.search"), YES)
    chat.take("?")
    assert "error: there is no function search" in script.prompts[1]


def test_what_only_looks_like_a_command_is_a_message(talk) -> None:
    chat, script, _ = talk(YES)
    chat.take("/etc/passwd is what?")
    assert "/etc/passwd is what?" in script.prompts[0]


def test_commands(talk) -> None:
    chat, script, shown = talk(YES)
    assert chat.take("/stats")
    assert "no answer yet" in shown[-1]
    assert chat.take("/reasoning high")
    chat.take("hi")
    assert "Reasoning: high" in script.prompts[0]
    assert chat.take("/stats")
    assert "10.0 tok/s" in shown[-1]
    assert "of 4096 of the context" in shown[-1]
    assert chat.take("/thinking")
    assert "hidden" in shown[-1]
    for line in ("/help", "/unknown", "/reasoning", "/reasoning extreme", "/"):
        assert chat.take(line)
        assert "/new" in shown[-1]
    assert chat.take("  \n")
    assert len(script.prompts) == 1
    assert not chat.take("/quit")


def test_ctrl_c_stops_the_answer_and_keeps_what_there_is(talk, monkeypatch) -> None:
    long = "<|channel|>final<|message|>" + "word " * 50 + "<|return|>"
    chat, script, shown = talk(long)
    write, count = shown.append, 0

    def interrupted(text: str) -> None:
        nonlocal count
        write(text)
        count += 1
        if count == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(chat, "_write", interrupted)
    assert chat.take("hi")
    assert shown[-1] == "[stopped]\n"
    assert 1 <= "".join(shown).count("word") < 50
    chat.take("go on")
    assert "word" in script.prompts[1]


def test_an_answer_that_is_cut_off_says_so(talk) -> None:
    chat, _, shown = talk("<|channel|>final<|message|>Ye", reason="length")
    chat.take("hi")
    assert "used up" in shown[-1]


def test_a_full_context_says_how_to_go_on(talk, monkeypatch) -> None:
    chat, script, shown = talk(YES)

    def refuse(*_: object, **__: object) -> None:
        raise ContextLengthError("Too long.")

    monkeypatch.setattr(script, "stream", refuse)
    chat.take("long text")
    assert shown == ["[Too long. /new begins a new conversation.]\n"]
    monkeypatch.undo()
    chat.take("short")
    assert "long text" not in script.prompts[0]


def test_control_characters_do_not_reach_the_terminal(talk) -> None:
    chat, _, shown = talk("<|channel|>final<|message|>a\x1b[2Jb\x07\n\tc\x9bd<|return|>")
    chat.take("hi")
    assert "".join(shown) == "a[2Jb\n\tcd\n"


# --------------------------------------------------------------------------------- the command

MXFORGE = [sys.executable, "-c", "import sys; from mxforge.cli import main; sys.exit(main())"]


def test_lines_of_a_pipe_are_messages(chat_artifact: Path) -> None:
    done = subprocess.run(
        [*MXFORGE, "chat", str(chat_artifact), "--max-tokens", "3", "--seed", "1"],
        input="hello\n/stats\n/quit\nnever\n",
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "tok/s" in done.stdout
    assert "\x1b" not in done.stdout


def test_a_model_without_harmony_says_so_at_once(text_artifact: Path) -> None:
    command = [*MXFORGE, "chat", str(text_artifact)]
    done = subprocess.run(command, input="", capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("mxforge chat: This model's tokenizer has no harmony format")


def test_input_that_is_no_text_and_no_input(chat_artifact: Path) -> None:
    command = [*MXFORGE, "chat", str(chat_artifact), "--max-tokens", "2"]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(
        command, input=b"a\xff\n", capture_output=True, env=environment, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, b"")
    closed = ["bash", "-c", '"$@" <&-', "bash", *command]
    done = subprocess.run(closed, capture_output=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_day_that_is_none_is_told_at_once(chat_artifact: Path) -> None:
    command = [*MXFORGE, "chat", str(chat_artifact), "--date", "tomorrow"]
    done = subprocess.run(command, input="hi", capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("mxforge chat: date must be a day such as 2026-01-31")


def test_a_user_without_a_home_has_no_history(monkeypatch, tmp_path: Path) -> None:
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with create_pipe_input() as typed, create_app_session(typed, DummyOutput()):
        read = _editor()
        typed.send_text("hi\r")
        assert read() == "hi"
        (tmp_path / "mxforge").mkdir()
        (tmp_path / "mxforge" / "chat-history").mkdir()
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
        read = _editor()
        typed.send_text("hi\r")
        assert read() == "hi"


def test_a_real_terminal(chat_artifact: Path, tmp_path: Path) -> None:
    """Two lines in one message, Ctrl-C at the prompt, history kept, Ctrl-D ends."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path), "TERM": "xterm"}
    process = subprocess.Popen(
        [*MXFORGE, "chat", str(chat_artifact), "--max-tokens", "4", "--seed", "1"],
        stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True,
    )  # fmt: skip
    os.close(slave)
    seen = b""

    def until(text: bytes) -> None:
        nonlocal seen
        end = time.monotonic() + 60
        while text not in seen:
            assert time.monotonic() < end, seen
            if select.select([master], [], [], 1)[0]:
                data = os.read(master, 4096)
                if b"\x1b[6n" in data:  # where is the cursor?
                    os.write(master, b"\x1b[1;1R")
                seen += data
        seen = seen.partition(text)[2]

    reads = b"\x1b[?2004h"  # what is typed before would be read by nobody
    until(b"Ctrl-D ends")
    until(reads)
    os.write(master, b"never sent\x03")
    until(reads)
    os.write(master, b"one\x1b\rtwo\r")
    until(b"used up")
    until(reads)
    os.write(master, b"/stats\r")
    until(b"tok/s")
    until(reads)
    os.write(master, b"\x04")
    assert process.wait(timeout=60) == 0
    os.close(master)
    history = (tmp_path / "mxforge" / "chat-history").read_text()
    assert "+one\n+two\n" in history
    assert "never sent" not in history
