"""Kernels compiled by NVIDIA's nvcc, and read back from the machine code with cuobjdump."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import results, shipped
from .vulkan import SetupError, run

TITLE = "CUDA on GPUs that are not here"
ABOUT = "nvcc compiles every kernel for each architecture, cuobjdump reads its code. Nothing ran."
ARCHS = ("sm_75", "sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120a")
TOOLS = ("nvcc", "cuobjdump", "nvdisasm")
EXCEPTIONS = {
    **{(arch, "f32_router_topk"): "the 32 keys of a thread stay in memory" for arch in ARCHS},
    **{(arch, "moe_plan"): "the 32 places of a thread stay in memory" for arch in ARCHS},
    ("sm_120a", "f32_paged_attention1"): "8 bytes are spilled and read back once",
}


def measure(scratch: Path) -> results.Results:
    """The statistics of every kernel on every architecture. SetupError where nvcc is missing."""
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
    """Put the tools on PATH: those of the packages nvidia-… where they are installed."""
    package = importlib.util.find_spec("nvidia")
    for folder in () if package is None else package.submodule_search_locations or ():
        for tools in sorted(Path(folder).glob("cu*/bin")):
            os.environ["PATH"] = f"{tools}{os.pathsep}{os.environ['PATH']}"
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        raise SetupError(
            f"{' and '.join(missing)} are missing; scripts/gpu_statistics installs them from PyPI"
        )


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
