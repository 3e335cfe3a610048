"""Help texts: every option of every command says what it does and what its default is."""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

import pytest
from support.parsers import SCRIPT_NAMES, SCRIPTS, arguments, commands, script_parser

from mxforge import cli

COMMANDS = {"mxforge": cli.parser(), **commands()}
NEED_TORCH = ("make_golden", "train_nano")


def explained(action: argparse.Action) -> list[str]:
    """What is wrong with the help of an argument."""
    name = "/".join(action.option_strings) or str(action.metavar or action.dest)
    if not action.help:
        return [f"{name} has no help text"]
    text = action.help % {**vars(action), "prog": ""}
    shown = default_shown(action.default)
    if shown and f"(default: {shown}" not in text:
        return [f"{name} should say (default: {shown}), found {text!r}"]
    return []


def default_shown(default: object) -> str:
    """A default as a help text names it; "" where there is none to name."""
    if default in (None, False, argparse.SUPPRESS, [], ()):
        return ""
    if isinstance(default, Path):
        return str(default.relative_to(SCRIPTS.parent))
    if isinstance(default, tuple | list):
        return " ".join(map(str, default))
    return "all" if isinstance(default, str) and "," in default else str(default)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_argument_of_a_command_is_explained(name: str):
    assert [line for a in arguments(COMMANDS[name]) for line in explained(a)] == []


@pytest.mark.parametrize("name", SCRIPT_NAMES)
def test_every_argument_of_a_script_is_explained(name: str):
    if name in NEED_TORCH and importlib.util.find_spec("torch") is None:
        pytest.skip("torch is missing; ./scripts/test --live installs it")
    assert [line for a in arguments(script_parser(name)) for line in explained(a)] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_help_texts_are_in_plain_words(name: str):
    text = COMMANDS[name].format_help()
    assert not [word for word in ("unless", "TensorIR", "Relax") if word in text]


def test_an_argument_without_help_or_default_is_found():
    parser = argparse.ArgumentParser()
    parser.add_argument("--bare")
    parser.add_argument("--silent", default=3, help="how many")
    parser.add_argument("--other", default=3, help="how many (default: 4)")
    parser.add_argument("--right", default=3, help="how many (default: %(default)s)")
    _, bare, silent, other, right = (explained(a) for a in arguments(parser))
    assert bare == ["--bare has no help text"]
    assert silent == ["--silent should say (default: 3), found 'how many'"]
    assert other
    assert not right


def test_compile_is_the_same_command_twice():
    """Everything but the name: options, defaults and texts."""
    twice = [COMMANDS[name] for name in ("compile-model", "mxforge compile")]
    one, other = (" ".join(p.format_help().replace(p.prog, "PROG").split()) for p in twice)
    assert one == other
