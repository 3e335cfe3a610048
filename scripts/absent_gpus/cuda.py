"""Kernels compiled by NVIDIA's nvcc, and read back from the machine code with cuobjdump."""

from __future__ import annotations

import os
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.folders import made, run

from . import results, shipped
from .shipped import ROOT

TITLE = "CUDA on GPUs that are not here"
ABOUT = "nvcc compiles every kernel for each architecture, cuobjdump reads its code. Nothing ran."
ARCHS = ("sm_75", "sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120a")
FOLDER = ROOT / "build" / "nvcc"
# nvcc's first stage (13.0, 13.2 and 13.5 were tried) goes by addresses in places, which the system
# draws anew for each process: f32_router_topk had 993 to 999 instructions, and all else was alike.
SPREAD = {"instructions": 0.02, "loads": 0.02, "local_accesses": 0.1}
EXCEPTIONS = {
    ("sm_120a", "f32_paged_attention1"): "8 bytes are spilled and read back once",
}


def measure(scratch: Path) -> results.Results:
    """The statistics of every kernel on every architecture. SetupError where nvcc cannot
    be fetched."""
    _find_tools()
    release = re.search(r"release \S+, V(\S+)", run("nvcc", "--version"))
    assert release is not None
    gpus = {}
    for arch in ARCHS:
        (code,) = shipped.artifact(f"cuda:{arch}", scratch).glob("device-*.fatbin")
        used = run("cuobjdump", "--dump-resource-usage", code)
        gpus[arch] = parse(used, run("cuobjdump", "--dump-sass", code))
    compiler = f"nvcc {release[1]}"
    return results.results(compiler, shipped.MODEL, shipped.NUMERICS, gpus)


def _find_tools() -> None:
    """Put the pinned tools on PATH, fetched where they are missing. Not from .venv: torch brings
    other versions of the same packages."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    packages = groups["gpu-compilers"]

    def install(new: Path) -> None:
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps")
        run(*pip, "--target", new, *packages)

    (tools,) = made(FOLDER, "\n".join(packages), install).glob("nvidia/cu*/bin")
    os.environ["PATH"] = f"{tools}{os.pathsep}{os.environ['PATH']}"


def parse(used: str, sass: str) -> dict[str, Any]:
    """Kernel -> statistics, of cuobjdump's resource usage and machine code."""
    found: dict[str, dict[str, int]] = {}
    for name, line in re.findall(r"Function (\S+):\n\s*(REG:.*)", used):
        has = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
        found[shipped.short(name)] = {
            "registers": has["REG"],
            "scratch_bytes": has["STACK"] + has["LOCAL"],
            "shared_bytes": has["SHARED"],
        }
    for name, opcodes in _functions(sass):
        count = Counter(opcodes)
        loads = {opcode: n for opcode, n in count.items() if opcode.startswith("LDG")}
        found[shipped.short(name)] |= {
            "instructions": count.total(),
            "loads": sum(loads.values()),
            "wide_loads": sum(n for opcode, n in loads.items() if ".128" in opcode),
            "local_accesses": sum(n for code, n in count.items() if code[:3] in ("LDL", "STL")),
        }
    return dict(sorted(found.items()))


def _functions(sass: str) -> Iterator[tuple[str, list[str]]]:
    """The opcodes of each function, without the padding."""
    parts = re.split(r"^\s*Function : (\S+)$", sass, flags=re.MULTILINE)[1:]
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        instruction = r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)"
        opcodes = re.findall(instruction, text, re.MULTILINE)
        yield name, [opcode for opcode in opcodes if opcode != "NOP"]
