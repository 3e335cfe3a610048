"""Kernels compiled by NVIDIA's nvcc, and read back from the machine code with cuobjdump."""

from __future__ import annotations

import os
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
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
SPREAD = {
    "instructions": 0.02, "loads": 0.02, "local_accesses": 0.1,
    "instructions_a_weight": 0.05, "wide_loads_ahead": 0.3,
}  # fmt: skip
_SPILL = "4 or 8 bytes of a thread wait in local memory, outside the steps over the weights"
EXCEPTIONS = {
    **{
        (arch, kernel): _SPILL
        for arch in ("sm_80", "sm_89", "sm_90a")
        for kernel in ("mxfp4w_moe_gate_up_swiglu", "mxfp4w_moe_down")
    },
    ("sm_120a", "mxfp4w_moe_gate_up_swiglu"): _SPILL,
}
# Instructions a weight, of kernels whose loop has no parts for other numbers of tokens.
MOST_A_WEIGHT = {"mxfp4w_moe_gate_up_swiglu": 2.8}


def gates(found: results.Results) -> list[str]:
    """A sentence for each gate that a kernel does not pass."""
    return results.broken_gates(found, EXCEPTIONS) + [
        f"{kernel} on {gpu} takes {count} instructions a weight, more than {MOST_A_WEIGHT[kernel]}"
        for gpu, kernel, statistics in results.each(found)
        if (count := statistics.get("instructions_a_weight", 0)) > MOST_A_WEIGHT.get(kernel, count)
    ]


page = partial(results.page, TITLE, ABOUT, exceptions=EXCEPTIONS)


def measure(scratch: Path) -> results.Results:
    """The statistics of every kernel on every architecture. SetupError where nvcc cannot
    be fetched."""
    _find_tools()
    release = re.search(r"release \S+, V(\S+)", run("nvcc", "--version"))
    assert release is not None
    gpus = {}
    for arch in ARCHS:
        kernels: dict[str, Any] = {}
        for artifact in shipped.artifacts(f"cuda:{arch}", scratch):
            (code,) = artifact.glob("device-*.fatbin")
            used = run("cuobjdump", "--dump-resource-usage", code)
            kernels = parse(used, run("cuobjdump", "--dump-sass", code)) | kernels
        gpus[arch] = dict(sorted(kernels.items()))
    compiler = f"nvcc {release[1]}"
    return results.results(compiler, shipped.MODEL, shipped.NUMERICS, gpus)


def _find_tools() -> None:
    """Put the pinned tools on PATH, fetched where they are missing. Not from .venv: torch brings
    other versions of the same packages."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    compiler = project["project"]["optional-dependencies"]["cuda"]
    packages = [*compiler, *project["dependency-groups"]["gpu-compilers"]]

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
    for name, code in _functions(sass):
        opcodes = [instruction.opcode for instruction in code]
        count = Counter(opcodes)
        loads = {opcode: n for opcode, n in count.items() if opcode.startswith("LDG")}
        found[shipped.short(name)] |= {
            "instructions": count.total(),
            "loads": sum(loads.values()),
            "wide_loads": sum(n for opcode, n in loads.items() if ".128" in opcode),
            "early_loads": _early_loads(opcodes),
            "local_accesses": sum(n for op, n in count.items() if op[:3] in ("LDL", "STL")),
            **_main_loop(shipped.short(name), code),
        }
    return dict(sorted(found.items()))


def _early_loads(opcodes: list[str]) -> int:
    """Loads that the compiler put before the wait for the launch before (griddepcontrol.wait is
    ACQBULK): of what it may write, they would be wrong."""
    if "ACQBULK" not in opcodes:
        return 0
    before = opcodes[: opcodes.index("ACQBULK")]
    return sum(opcode.startswith(("LDG", "LD.", "LDGSTS")) for opcode in before)


# Weights of a lane in one instruction of the tensor cores, by how kernels that read weights are
# called: 16 rows, and 16 or 32 inputs, of 32 lanes.
WEIGHTS = {"mxfp4w": 8, "bf16w": 8, "i8w": 16}


def _main_loop(name: str, code: list[Instruction]) -> dict[str, float]:
    """Of kernels that multiply weights on tensor cores: a thread's instructions a weight, in the
    loop that multiplies; of several, for several numbers of tokens, in the dearest. And of all:
    how many loads of 128 bits a thread has sent before it needs the first."""
    found: dict[str, float] = {}
    wide = [instruction.opcode.startswith("LDG") and ".128" in instruction.opcode
            for instruction in code]  # fmt: skip
    matrix = [instruction.opcode[:4] in ("HMMA", "IMMA") for instruction in code]
    weights = next((n for kind, n in WEIGHTS.items() if name.startswith(kind)), 0)
    loops = [(start, end) for start, end in _loops(code) if any(matrix[start:end])]
    inner = [
        (start, end)
        for start, end in loops
        if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in loops)
    ]
    if weights and inner:
        each = [(end - start) / (weights * sum(matrix[start:end])) for start, end in inner]
        found["instructions_a_weight"] = round(max(each), 2)
    if any(wide):
        used = ("HMMA", "IMMA", "FFMA", "FMUL")
        uses = [i for i, one in enumerate(code) if one.opcode.startswith(used) and any(wide[:i])]
        found["wide_loads_ahead"] = sum(wide[: uses[0]]) if uses else sum(wide)
    return found


def _loops(code: list[Instruction]) -> list[tuple[int, int]]:
    """[start, end) of the loops, by their branches backwards."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    return [
        (index[instruction.target], i + 1)
        for i, instruction in enumerate(code)
        if instruction.target is not None and index.get(instruction.target, i + 1) <= i
    ]


@dataclass(frozen=True)
class Instruction:
    """`target` is the address that a branch goes to."""

    address: int
    opcode: str
    target: int | None


_INSTRUCTION = re.compile(
    r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);", re.MULTILINE
)


def _functions(sass: str) -> Iterator[tuple[str, list[Instruction]]]:
    """The instructions of each function, without the padding."""
    parts = re.split(r"^\s*Function : (\S+)$", sass, flags=re.MULTILINE)[1:]
    for name, text in zip(parts[::2], parts[1::2], strict=True):
        found = []
        for address, opcode, operands in _INSTRUCTION.findall(text):
            target = re.search(r"0x([0-9a-f]+)\s*$", operands) if opcode[:3] == "BRA" else None
            if opcode != "NOP":
                to = int(target[1], 16) if target else None
                found.append(Instruction(int(address, 16), opcode, to))
        yield name, found
