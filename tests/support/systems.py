"""libmxforge for other systems, and a program that answers with it, compiled here by zig."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock
from support.folders import run

from mxforge.native import build

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).with_name("answer.c")
HEADERS = ROOT / "runtime" / "native" / "core"


def built_core(system: str) -> Path:
    """libmxforge for a system of `build.SYSTEMS`, kept under build/native."""
    output = ROOT / "build" / "native" / system / build.CORE.output_on(system).name
    output.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(output.with_suffix(".lock")):
        if not build.CORE.up_to_date(output):
            build.build(build.CORE, output, system=system)
    return output


def built_answer(system: str, folder: Path) -> Path:
    """The program of `answer.c` in `folder`, with the core beside it."""
    core = folder / built_core(system).name
    core.write_bytes(built_core(system).read_bytes())
    windows = system.startswith("windows")
    program = folder / ("answer.exe" if windows else "answer")
    zig = [*build.find_zig()[:-1], "cc", "-target", build.SYSTEMS[system].zig, "-O2", "-s"]
    beside = [] if windows else ["-Wl,-rpath,$ORIGIN"]
    run(*zig, f"-I{HEADERS}", "-o", program, SOURCE, core, *beside)
    return program
