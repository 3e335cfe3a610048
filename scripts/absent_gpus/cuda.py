"""Kernels compiled by NVIDIA's nvcc, and read back from the machine code with cuobjdump."""

from __future__ import annotations

import os
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from support.folders import made, run

from . import hopper, results, shipped
from .sass import LANES, MATRIX, Instruction, follow, functions, matrix_share
from .shipped import ROOT

TITLE = "CUDA on GPUs that are not here"
ABOUT = "nvcc compiles every kernel for each architecture, cuobjdump reads its code. Nothing ran."
ARCHS = ("sm_75", "sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120a")
FOLDER = ROOT / "build" / "nvcc"
# nvcc's first stage (13.0, 13.2 and 13.5 were tried) goes by addresses in places, which the system
# draws anew for each process: f32_router_topk had 993 to 999 instructions, and all else was alike.
SPREAD = {
    "instructions": 0.02, "loads": 0.02, "local_accesses": 0.1,
    "instructions_a_weight": 0.05, "wide_loads_ahead": 0.3, "matrix_share": 0.02,
    "slots_a_cycle": 0.02,
}  # fmt: skip
_SPILL = "8 to 32 bytes of a thread wait in local memory, outside the steps over the weights"
_SPILLING = {
    "mxfp4w_moe_gate_up_swiglu": ("sm_120a",),
    "mxfp4w_moe_gate_up_swiglu_1": ("sm_80", "sm_89", "sm_90a", "sm_100a"),  # many tokens
    "mxfp4w_moe_down": ("sm_120a",),
    "mxfp4w_moe_down_2": ("sm_80", "sm_89", "sm_90a"),  # many tokens
    "mxfp4w_bf16_moe_gate_up_swiglu": ("sm_120a",),
    "mxfp4w_bf16_moe_gate_up_swiglu_1": ("sm_80", "sm_89", "sm_90a", "sm_100a", "sm_120a"),
}
EXCEPTIONS = {(arch, kernel): _SPILL for kernel, archs in _SPILLING.items() for arch in archs}
EXCEPTIONS["sm_90a", "mxfp4w_bf16_moe_gate_up_swiglu_1"] = (
    "32 bytes of a thread wait in local memory, 4 of which are read in one of eight steps"
)


@dataclass(frozen=True)
class Weights:
    """A format of weights: how many are in a byte of the loads that read them, and how many
    instructions a thread should execute for each at most (bounds.py)."""

    a_byte: float
    most: float


# By how kernels that read weights are called.
WEIGHTS = {"mxfp4w": Weights(2, 2.8), "bf16w": Weights(0.5, 2.0), "i8w": Weights(1, 2.2)}
COUNTED = ("sm_80", "sm_89", "sm_90a")  # the architectures that these bounds are for


def gates(found: results.Results) -> list[str]:
    """A sentence for each gate that a kernel does not pass."""
    return results.broken_gates(found, EXCEPTIONS)


def _weights(kernel: str) -> Weights | None:
    return next((w for kind, w in WEIGHTS.items() if kernel.startswith(kind)), None)


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
            code = artifact / "model.fatbin"
            used = run("cuobjdump", "--dump-resource-usage", code)
            elf = run("cuobjdump", "--dump-elf", code) if arch in COUNTED else ""
            text = run("cuobjdump", "--dump-sass", code)
            kernels = parse(used, text, threads_of_blocks(elf)) | kernels
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


def threads_of_blocks(elf: str) -> dict[str, int]:
    """Device function -> the threads of its blocks, of cuobjdump's dump of all sections."""
    sections = re.split(r"^\.nv\.info\.(\S+)$", elf, flags=re.MULTILINE)[1:]
    most = re.compile(r"EIATTR_MAX_THREADS\s+Format:\s+EIFMT_SVAL\s+Value:\s+0x([0-9a-f]+)")
    return {
        name: int(match[1], 16)
        for name, text in zip(sections[::2], sections[1::2], strict=True)
        if (match := most.search(text))
    }


def parse(used: str, sass: str, threads: Mapping[str, int]) -> dict[str, Any]:
    """Kernel -> statistics, of cuobjdump's resource usage and machine code. Those of a token are
    counted of functions of which the `threads` of a block are given."""
    found: dict[str, dict[str, Any]] = {}
    for name, line in re.findall(r"Function (\S+):\n\s*(REG:.*)", used):
        has = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
        found[shipped.short(name)] = {
            "registers": has["REG"],
            "scratch_bytes": has["STACK"] + has["LOCAL"],
            "shared_bytes": has["SHARED"],
        }
    for name, code in functions(sass):
        opcodes = [instruction.opcode for instruction in code]
        count = Counter(opcodes)
        loads = {opcode: n for opcode, n in count.items() if opcode.startswith("LDG")}
        found[shipped.short(name)] |= {
            "instructions": count.total(),
            "loads": sum(loads.values()),
            "wide_loads": sum(n for opcode, n in loads.items() if ".128" in opcode),
            "early_loads": _early_loads(opcodes),
            "local_accesses": sum(n for op, n in count.items() if op[:3] in ("LDL", "STL")),
            **({"threads": threads[name]} if name in threads else {}),
            **_loads_ahead(code),
            **_a_weight(name, code, threads.get(name, 0)),
            **_matrix_share(code),
            **hopper.statistics(code),
        }
    return dict(sorted(found.items()))


def _early_loads(opcodes: list[str]) -> int:
    """Loads that the compiler put before the wait for the launch before (griddepcontrol.wait is
    ACQBULK): of what it may write, they would be wrong."""
    if "ACQBULK" not in opcodes:
        return 0
    before = opcodes[: opcodes.index("ACQBULK")]
    return sum(opcode.startswith(("LDG", "LD.", "LDGSTS")) for opcode in before)


def _loads_ahead(code: list[Instruction]) -> dict[str, int]:
    """How many loads of 128 bits a thread has sent before it needs the first."""
    wide = [one.opcode.startswith("LDG") and ".128" in one.opcode for one in code]
    if not any(wide):
        return {}
    used = ("HMMA", "IMMA", "FFMA", "FMUL", "HFMA2.BF16", "HMUL2.BF16")
    uses = [i for i, one in enumerate(code) if one.opcode.startswith(used) and any(wide[:i])]
    return {"wide_loads_ahead": sum(wide[: uses[0]]) if uses else sum(wide)}


def _matrix_share(code: list[Instruction]) -> dict[str, float]:
    share = matrix_share(code)
    return {} if share is None else {"matrix_share": share}


def _a_weight(name: str, code: list[Instruction], threads: int) -> dict[str, float]:
    """Of kernels that multiply weights on tensor cores: the instructions that a block executes for
    one token, all of them, and for each lane of a warp, divided by the weights that it reads.

    A kernel's further functions are for more tokens.
    """
    weights = _weights(name)
    if weights is None or not threads or not name.endswith("_kernel"):
        return {}
    if not any(one.opcode.startswith(MATRIX) for one in code):
        return {}
    block = follow(code, threads)
    read = block.weight_bytes * weights.a_byte
    return {"instructions_a_weight": round(block.instructions * LANES / read, 2)}
