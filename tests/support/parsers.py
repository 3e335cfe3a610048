"""The argument parsers of every command: mxforge's, compile-model's, and those of scripts/."""

from __future__ import annotations

import argparse
import runpy
from functools import cache
from pathlib import Path

import pytest

from mxforge import cli
from mxforge.compile import cli as compile_cli

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
SCRIPT_NAMES = sorted(
    path.name for path in SCRIPTS.iterdir() if path.is_file() and path.suffix != ".py"
)


class _ParserFound(Exception):
    pass


@cache
def commands() -> dict[str, argparse.ArgumentParser]:
    """`compile-model` and every `mxforge COMMAND`, by how they are called."""
    (sub,) = [a for a in cli.parser()._actions if isinstance(a, argparse._SubParsersAction)]
    parsers = {f"mxforge {name}": parser for name, parser in sub.choices.items()}
    parsers["mxforge compile"] = compile_cli.parser("mxforge compile")
    return {"compile-model": compile_cli.parser(), **parsers}


def script_parser(name: str) -> argparse.ArgumentParser:
    """The parser of scripts/NAME: the script runs up to where it parses its arguments."""
    found: list[argparse.ArgumentParser] = []

    def parse(self: argparse.ArgumentParser, *_args: object, **_options: object) -> None:
        found.append(self)
        raise _ParserFound

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse)
        patch.setenv("TVM_NUM_THREADS", "1")  # scripts set it for themselves
        with pytest.raises(_ParserFound):
            runpy.run_path(str(SCRIPTS / name), run_name="__main__")
    return found[0]


def options(parser: argparse.ArgumentParser) -> set[str]:
    """The long options of a parser, --help aside."""
    return {
        name for action in parser._actions for name in action.option_strings if name != "--help"
    } - {"-h"}


def arguments(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Every argument that a user can give, subcommands aside."""
    return [
        action
        for action in parser._actions
        if action.help is not argparse.SUPPRESS
        and not isinstance(action, argparse._SubParsersAction)
    ]
