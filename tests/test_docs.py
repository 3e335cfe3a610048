"""The pages say what is so: their examples run, their options and names exist, their links lead
somewhere.

A code block under `<!-- run -->` is run as it stands, and a block under `<!-- prints -->` is what
the block before it printed. One under `<!-- file -->` is a file, which its first line names. All
blocks of a page run in one folder, which holds a small random checkpoint twice, as `gpt-oss-20b`
and as `artifacts/tiny`, and what scripts/demo compiles, `artifacts/nano-cpu`.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from checkpoints.random_checkpoint import write_checkpoint
from support.parsers import arguments, commands, options

import mxforge
from mxforge import errors
from mxforge.compile.targets import known_targets
from mxforge.manifest import Manifest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), ROOT / "artifacts/README.md"]
README = (ROOT / "README.md").read_text()
COMMANDS = (ROOT / "docs" / "commands.md").read_text()
PYTHON = (ROOT / "docs" / "python.md").read_text()
CHAT = (ROOT / "docs" / "chat.md").read_text()
ERRORS = (ROOT / "docs" / "errors.md").read_text()
BLOCK = re.compile(
    r"(?:<!-- (run|prints|file) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL
)


class Block(NamedTuple):
    mark: str  # "run", "prints", "file" or ""
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    return [Block(*found.groups(default="")) for found in BLOCK.finditer(page.read_text())]


def named(pages: list[Path]) -> list:
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("docs") / "tiny", "tiny")


@pytest.fixture(scope="module")
def nano(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("nano")
    expand = ROOT / "scripts" / "expand_nano"
    subprocess.run([sys.executable, expand, folder / "nano"], check=True, capture_output=True)
    return mxforge.compile_model(folder / "nano", output=folder / "nano-cpu")


@pytest.mark.parametrize(
    "page", named([page for page in PAGES if any(block.mark for block in blocks(page))])
)
def test_examples_run_and_print_what_the_page_says(page, checkpoint, nano, tmp_path, request):
    if page.name == "vulkan.md":
        request.getfixturevalue("vulkan")
    for name in ("gpt-oss-20b", "artifacts/tiny"):
        shutil.copytree(checkpoint, tmp_path / name, copy_function=os.link)
    shutil.copytree(nano, tmp_path / "artifacts" / "nano-cpu", copy_function=os.link)
    printed = None
    for block in blocks(page):
        if block.mark == "run":
            printed = run(block, tmp_path)
        elif block.mark == "file":
            name = re.search(r"[\w.]+", block.text)
            assert name is not None
            (tmp_path / name[0]).write_text(block.text)
        elif block.mark == "prints":
            assert printed is not None, "nothing ran before this block"
            assert printed.rstrip() == block.text.rstrip()


def run(block: Block, folder: Path) -> str:
    """Run a block in `folder`; returns what it printed."""
    file, command = {
        "sh": ("example.sh", ["bash", "-euo", "pipefail"]),
        "python": ("example.py", [sys.executable]),
    }[block.language]
    (folder / file).write_text(block.text)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        [*command, file],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, f"{block.text}\n{result.stderr}"
    return result.stdout


@pytest.mark.parametrize("page", named(PAGES))
def test_links_lead_to_files(page):
    for target in re.findall(r"\]\(([^)]+)\)", BLOCK.sub("", page.read_text())):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("page", named(PAGES))
def test_named_files_exist(page):
    """Paths in backquotes that begin with one of our folders."""
    folders = "runtime|compile|schedules|scripts|tests|docs"
    for path in re.findall(rf"`(?:\./)?((?:{folders})/[\w/.-]+)`", page.read_text()):
        assert (ROOT / path).exists(), path


def command_lines(page: Path) -> Iterator[str]:
    for block in blocks(page):
        if block.language == "sh":
            yield from (line.split("#")[0].strip() for line in block.text.splitlines())


@pytest.mark.parametrize("page", named(PAGES))
def test_command_lines_use_options_that_exist(page):
    for line in command_lines(page):
        for name, parser in commands().items():
            if line.startswith(f"{name} "):
                assert set(re.findall(r"(?<= )--[\w-]+", line)) <= options(parser), line


@cache
def sections() -> dict[str, str]:
    """What docs/commands.md says of each command, by its name: compile, generate …"""
    parts = re.split(r"^## (.*)$", COMMANDS, flags=re.MULTILINE)[1:]
    return {
        name: text
        for names, text in zip(parts[::2], parts[1::2], strict=True)
        for name in names.split(", ")
    }


@pytest.mark.parametrize("command", commands())
def test_page_shows_every_option_and_default_of_a_command(command):
    section = sections()[command.removeprefix("mxforge ").replace("compile-model", "compile")]
    assert command in section
    for action in arguments(commands()[command]):
        option = max(action.option_strings, key=len, default="")
        if not option or option == "--help":
            continue
        assert f"`{option}" in section, option
        row = next((line for line in section.splitlines() if line.startswith(f"| `{option}")), "")
        default = action.default
        if row and "as for `generate`" not in row and default not in (None, False):
            assert re.search(rf"\(default: `?{float_or_text(default)}\b", row), row


def float_or_text(default: object) -> str:
    return f"{default:g}" if isinstance(default, float) else str(default)


def test_commands_page_names_no_option_that_does_not_exist():
    known = set().union(*(options(parser) for parser in commands().values()))
    assert set(re.findall(r"`(--[\w-]+)", COMMANDS)) <= known | {"--help"}


def test_errors_page_shows_every_error():
    classes = [
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, errors.MxforgeError)
    ]
    assert [name for name in classes if f"`{name}`" not in ERRORS.replace("mxforge.", "")] == []


@pytest.mark.parametrize(
    "function", [mxforge.compile_model, mxforge.Engine.load], ids=["compile_model", "Engine.load"]
)
def test_python_page_shows_every_parameter(function):
    for parameter in inspect.signature(function).parameters.values():
        shown = parameter.name
        if isinstance(parameter.default, str | int | None) and shown != "progress":
            shown += f"={parameter.default!r}".replace("'", '"')
        if parameter.default is not inspect.Parameter.empty:
            assert shown in PYTHON, shown


@pytest.mark.parametrize(
    "record", [mxforge.SamplingParams, mxforge.Completion, mxforge.Usage, mxforge.Timings]
)
def test_python_page_shows_every_field(record):
    assert [f.name for f in dataclasses.fields(record) if f"`{f.name}`" not in PYTHON] == []


@pytest.mark.parametrize(
    "record", [mxforge.ChatCompletion, mxforge.ChatPiece, mxforge.ToolCallPiece]
)
def test_chat_page_shows_every_field(record):
    assert [f.name for f in dataclasses.fields(record) if f"`{f.name}`" not in CHAT] == []


def test_chat_page_shows_every_argument():
    names = [name for name in inspect.signature(mxforge.Engine.chat).parameters if name != "self"]
    assert [name for name in names if name != "cancel" and f"| `{name}` |" not in CHAT] == []


def test_readme_begins_with_what_there_is():
    """The first screen: two commands, an example, and a row for each kind of target."""
    screen = README[: README.index("\n## ")]
    assert "./scripts/demo" in screen
    assert "<!-- prints -->" in screen
    rows = [line.split(" | ")[0] for line in screen.splitlines() if line.startswith("| `")]
    kinds = {name.partition(":")[0] for name in known_targets()}
    assert {kind for row in rows for kind in re.findall("`(.*?)`", row)} == kinds


def test_readme_shows_where_speed_was_measured():
    section = README[README.index("\n## Speed") :].split("\n## ")[1]
    assert "<!-- figures" in section
    assert "<!-- /figures -->" in section


def test_artifact_page_shows_every_field_of_the_manifest():
    page = (ROOT / "docs" / "artifact.md").read_text()
    assert [f.name for f in dataclasses.fields(Manifest) if f"| `{f.name}` |" not in page] == []
