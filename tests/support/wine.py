"""Windows, for tests: Debian's wine64 runs programs for it.

Its settings are made once, into build/wine; nothing of the user's is touched.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.folders import SetupError, made, run

ROOT = Path(__file__).resolve().parents[2]
# Debian keeps wine64 without 32-bit wine here.
FOLDERS = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/lib/wine"])


def unavailable(reason: str) -> Any:
    """Skip; or fail, where MXFORGE_REQUIRE_WINE says that it is installed."""
    if os.environ.get("MXFORGE_REQUIRE_WINE") == "1":
        pytest.fail(f"MXFORGE_REQUIRE_WINE=1, but {reason}")
    pytest.skip(reason)


@dataclass(frozen=True)
class Wine:
    command: str
    server: str
    prefix: Path

    def run(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """A program and its arguments; a path is taken as one of this machine."""
        return subprocess.run(
            [self.command, *map(str, words)],
            env=_environment(self.prefix), capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    def close(self) -> None:
        """End what wine has left running."""
        subprocess.run([self.server, "--kill"], env=_environment(self.prefix), check=False)


def open_wine() -> Wine:
    """Skips (or fails, see `unavailable`) where there is none."""
    command = shutil.which("wine64", path=FOLDERS)
    server = shutil.which("wineserver64", path=FOLDERS) or shutil.which("wineserver", path=FOLDERS)
    if command is None or server is None:
        unavailable("wine64 is missing; Debian: apt-get install --no-install-recommends wine64")

    def make(folder: Path) -> None:
        # The first program makes them, and they are written when wine ends.
        wine = Wine(str(command), str(server), folder / "prefix")
        try:
            done = wine.run("cmd", "/c", "ver")
        finally:
            wine.close()
        if "Windows" not in done.stdout:
            raise SetupError(f"wine said {done.stderr.strip()[-400:]}")

    try:
        folder = made(ROOT / "build" / "wine", run(str(command), "--version"), make)
    except SetupError as error:
        unavailable(f"wine does not start: {error}")
    return Wine(str(command), str(server), folder / "prefix")


def _environment(prefix: Path) -> dict[str, str]:
    own = {
        "WINEPREFIX": str(prefix),
        "WINEDEBUG": "-all",
        "WINEDLLOVERRIDES": "mscoree,mshtml=",  # asks for nothing to be fetched
    }
    return {name: value for name, value in os.environ.items() if name != "DISPLAY"} | own
