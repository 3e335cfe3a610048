"""Feed damaged inputs to one subject, in a process that may crash:

    python tests/fuzz/sweep.py tokenizer ARTIFACT --seeds 0 10000
    python tests/fuzz/sweep.py tokenizer ARTIFACT --seeds 17 18      # one that failed

Prints a JSON object: how many inputs were taken, how many refused, and what failed by seed.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import random
import re
import resource
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path

# Where helpers are imported from, as pytest's settings say for itself.
HELPERS = [str(Path(__file__).resolve().parents[2] / name) for name in ("tests", "scripts")]
if __package__ in (None, ""):
    sys.path[:0] = HELPERS

from fuzz.subjects import SUBJECTS, Subject  # noqa: E402

from mxforge.errors import MxforgeError  # noqa: E402

SECONDS = 10  # for one input
GROWTH = 512 << 20  # most that the peak of resident memory may grow
ADDRESS_SPACE = 8 << 30  # beyond the start's; so that what grows without end fails early
MESSAGE = 2000  # characters of an error's message, paths included
MOST_FAILURES = 20


def peak_memory() -> int:
    """The largest resident size so far, in bytes."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS: bytes
    match = re.search(r"VmHWM:\s+(\d+)", status)
    assert match is not None
    return int(match[1]) * 1024


def limit_memory() -> None:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return
    most = pages * resource.getpagesize() + ADDRESS_SPACE
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def check_message(error: MxforgeError) -> None:
    """It is one line for a terminal, whatever the file held."""
    text = str(error)
    text.encode()
    assert text, "the error says nothing"
    assert text.isprintable(), f"the message is not printable: {text[:300]!r}"
    assert len(text) <= MESSAGE, f"the message has {len(text)} characters: {text[:300]!r}"


def feed(subject: Subject, rng: random.Random) -> str:
    """One input; the name of the error that refused it, or "taken"."""
    subject.damage(rng)
    before = files(subject.folder)
    try:
        subject.use()
    except MxforgeError as error:
        check_message(error)
        return type(error).__name__
    finally:
        assert files(subject.folder) == before, "files came or went"
    return "taken"


def files(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("*"))


def sweep(name: str, artifact: Path, first: int, last: int, at: Path) -> dict[str, object]:
    """Feed the inputs of seeds [first, last); the file `at` tells which one a crash was about."""
    warnings.simplefilter("error")
    outcomes: Counter[str] = Counter()
    failures: dict[int, str] = {}
    with tempfile.TemporaryDirectory(prefix="mxforge-fuzz-") as scratch, at.open("w") as progress:
        subject = SUBJECTS[name](Path(scratch), artifact)
        limit_memory()
        peak = None
        for seed in range(first, last):
            progress.seek(0)
            progress.write(f"{seed:12}")
            progress.flush()
            faulthandler.dump_traceback_later(SECONDS, exit=True)
            try:
                outcomes[feed(subject, random.Random(f"{name} {seed}"))] += 1
            except BaseException:
                failures[seed] = traceback.format_exc(limit=-6)[-3000:]
            faulthandler.cancel_dump_traceback_later()
            now = peak_memory()
            if peak is not None and now > peak + GROWTH:
                failures[seed] = f"the peak of memory grew from {peak} to {now} bytes"
                peak = now
            peak = now if peak is None else peak
            if len(failures) >= MOST_FAILURES:
                break
    grown = 0 if peak is None else peak_memory() - peak
    return {"outcomes": dict(outcomes), "failures": failures, "grown": grown}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("subject", choices=SUBJECTS)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--seeds", type=int, nargs=2, default=(0, 300), metavar=("FIRST", "LAST"))
    parser.add_argument("--at", type=Path, default=Path(tempfile.gettempdir(), "mxforge-fuzz-at"))
    options = parser.parse_args()
    print(json.dumps(sweep(options.subject, options.artifact, *options.seeds, options.at)))


if __name__ == "__main__":
    main()
