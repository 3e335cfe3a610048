"""Child processes: what they print, how much memory they take, and how they end."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _setup import ROOT
from tqdm import tqdm

from mxforge.errors import UsageError

SCRIPTS = ROOT / "scripts"


def say(text: str) -> None:
    """What is being done, on stderr (above a progress bar): stdout belongs to the result."""
    tqdm.write(f"== {time.strftime('%H:%M:%S')} {text}", file=sys.stderr)


@dataclass
class Child:
    """What a process did: stdout, stderr lines and memory samples with seconds since its start."""

    output: str
    lines: list[tuple[float, str]]
    memory: list[tuple[float, int]]  # anonymous and shared bytes: all that is not page cache
    seconds: float


def run_child(command: list[str], *, watch_every_s: float = 0.25, echo: bool = False) -> Child:
    """Run to its end, looking at its memory so often; UsageError where it fails."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        cwd=ROOT,
    )
    assert process.stdout is not None and process.stderr is not None
    lines: list[tuple[float, str]] = []
    memory: list[tuple[float, int]] = []

    def listen(stream: Any) -> None:
        for line in stream:
            lines.append((time.perf_counter() - started, line.rstrip("\n")))
            if echo:
                print(f"   {line.rstrip()}", file=sys.stderr, flush=True)

    def watch() -> None:
        while process.poll() is None:
            if found := _memory_of(process.pid):
                memory.append((time.perf_counter() - started, found))
            time.sleep(watch_every_s)

    helpers = [
        threading.Thread(target=listen, args=(process.stderr,)),
        threading.Thread(target=watch),
    ]
    for helper in helpers:
        helper.start()
    try:
        output = process.stdout.read()
    except BaseException:  # Ctrl-C
        process.kill()
        raise
    finally:
        code = process.wait()
        seconds = time.perf_counter() - started
        for helper in helpers:
            helper.join()
    _check_exit(command, code, [text for _, text in lines])
    return Child(output, lines, memory, seconds)


def child_lines(command: list[str]) -> Iterator[str]:
    """The lines that a process prints, as they come; UsageError where it fails.

    With `-m` it can run the modules beside this one.
    """
    path = os.pathsep.join([str(SCRIPTS), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep)
    with tempfile.TemporaryFile("w+") as messages:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=messages,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
            cwd=ROOT,
        )
        assert process.stdout is not None
        try:
            yield from process.stdout
            code = process.wait()
        finally:  # Ctrl-C, or the caller stops reading
            process.kill()
            process.wait()
        messages.seek(0)
        _check_exit(command, code, messages.read().splitlines())


def _check_exit(command: list[str], code: int, messages: list[str]) -> None:
    if code != 0:
        tail = " | ".join(messages[-3:])
        raise UsageError(
            f"{' '.join(command)[:200]} should succeed, found exit code {code}: {tail}"
        )


def _memory_of(pid: int) -> int | None:
    """Bytes that a process holds beyond the page cache now."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    sizes = re.findall(r"^(?:RssAnon|RssShmem):\s*(\d+) kB$", status, re.MULTILINE)
    return sum(map(int, sizes)) * 1024 if len(sizes) == 2 else None  # otherwise it ends just now
