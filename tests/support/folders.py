"""Folders under build/ that are made once and kept: fetched from elsewhere, or slow to make."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

STAMP = "made-from.txt"


class SetupError(Exception):
    """Something that a test needs cannot be made here; the text says why."""


def made(folder: Path, stamp: str, make: Callable[[Path], None]) -> Path:
    """`folder`, after make(new folder) unless it was made with the same `stamp` before.

    It appears complete or not at all, and one process makes it while others wait. What `make`
    raises comes through, and leaves what was there before.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        made_from = folder / STAMP
        if made_from.exists() and made_from.read_text() == stamp:
            return folder
        with tempfile.TemporaryDirectory(prefix=f"{folder.name}-", dir=folder.parent) as scratch:
            new = Path(scratch) / folder.name
            new.mkdir()
            make(new)
            (new / STAMP).write_text(stamp)
            shutil.rmtree(folder, ignore_errors=True)
            new.rename(folder)
    return folder


def run(*command: str | Path, check: bool = True) -> str:
    """What a tool prints; SetupError where it is missing or fails, unless `check` is off."""
    words = list(map(str, command))
    try:
        result = subprocess.run(words, capture_output=True, text=True)
    except FileNotFoundError:
        raise SetupError(f"{words[0]} is missing") from None
    if check and result.returncode != 0:
        said = (result.stderr.strip() or result.stdout.strip())[-600:]
        raise SetupError(f"{words[0]} said {said}")
    return result.stdout
