"""NVIDIA's compiler: its architectures, where it is, and from CUDA text to machine code."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import tvm_ffi

from mxforge.errors import TargetError

ARCHS = (
    "sm_75", "sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_100a",
    "sm_103", "sm_103a", "sm_110", "sm_120", "sm_120a", "sm_121",
)  # fmt: skip
OLDEST = "sm_80"  # what the target `cuda` has code for: this architecture and all later ones


def number(arch: str) -> int:
    """90 of sm_90 and of sm_90a."""
    return int(arch.removeprefix("sm_").rstrip("a"))


# What the target `cuda` is compiled for. Cards of sm_75 have no bfloat16 on their tensor cores;
# weights are laid out for these.
PORTABLE_ARCHS = tuple(a for a in ARCHS if not a.endswith("a") and number(a) >= number(OLDEST))


def features(arch: str) -> tuple[str, ...]:
    """An architecture, and the older ones whose instructions it has.

    Those of an `a`, as in sm_90a, are of that architecture alone.
    """
    older = [a for a in ARCHS if not a.endswith("a") and number(a) <= number(arch)]
    return (arch, *older)


def find_nvcc() -> str:
    """nvcc of the package nvidia-cuda-nvcc, or else the first on PATH; TargetError without one."""
    packages = find_spec("nvidia")  # a namespace that NVIDIA's packages share
    for folder in packages.submodule_search_locations or () if packages else ():
        for found in sorted(Path(folder).glob("cu*/bin/nvcc"), reverse=True):
            return str(found)
    if found_on_path := shutil.which("nvcc"):
        return found_on_path
    raise TargetError(
        "Compiling for CUDA needs NVIDIA's compiler nvcc, and it is not here; install it with "
        "pip install 'mxforge[compile,cuda]', or put a CUDA toolkit (13.0 or later) on PATH."
    )


def compiled(source: str, archs: Sequence[str], folder: Path) -> bytes:
    """A fatbin: machine code for each architecture and, for later ones, PTX of the last.

    An `a` has no PTX that others could run. `folder` is for what nvcc needs meanwhile. TargetError
    where nvcc fails.
    """
    options = [_code(arch, with_ptx=arch == archs[-1]) for arch in archs]
    with tempfile.TemporaryDirectory(prefix="nvcc-", dir=folder) as scratch:
        text, binary = Path(scratch, "device.cu"), Path(scratch, "device.fatbin")
        text.write_text(source)
        # No fast math: denormals, division and square roots stay exact.
        command = [find_nvcc(), "--fatbin", "-O3", "--threads", "0", *options]
        result = subprocess.run(
            [*command, "-o", binary.name, text.name],
            cwd=scratch, env={**os.environ, "TMPDIR": str(Path(scratch).resolve())},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if result.returncode != 0:
            raise TargetError(
                f"nvcc could not compile the kernels for {', '.join(archs)}: "
                f"{_errors(result.stderr)}"
            )
        return binary.read_bytes()


# -- launches that overlap -------------------------------------------------------------------------

LAUNCH = "tirx.kernel_launch_params"
OVERLAP = "tirx.use_programtic_dependent_launch"  # TVM's spelling
_KERNEL = re.compile(r'^(extern "C" __global__ void [^;{]*\{)$', re.MULTILINE)
_OWN_WAIT = re.compile(r"griddepcontrol[._]wait")  # the instruction, or a function's name
_START, _WAIT = (
    f'  asm volatile("griddepcontrol.{what};" ::: "memory");'
    for what in ("launch_dependents", "wait")
)


def overlaps(arch: str) -> bool:
    """Whether a launch may begin while the one before it ends (programmatic dependent launch)."""
    return number(arch) >= 90


def all_overlap(archs: Sequence[str]) -> bool:
    """Whether launches may overlap wherever code for these runs; not for no architectures."""
    return bool(archs) and all(map(overlaps, archs))


def with_overlap(source: str) -> str:
    """CUDA text whose kernels let the next one begin at once, and wait for the one before.

    The wait comes first in a kernel, unless it has one of its own: further down, after reading
    what no launch writes. As every kernel waits, a launch never runs beside the second before it.
    """
    parts = _KERNEL.split(source)
    for index in range(1, len(parts), 2):
        own = _OWN_WAIT.search(parts[index + 1])
        parts[index] += f"\n{_START}" if own else f"\n{_START}\n{_WAIT}"
    return "".join(parts)


@contextlib.contextmanager
def overlapping() -> Iterator[None]:
    """TVM writes CUDA text `with_overlap` meanwhile."""
    name = "tvm_callback_cuda_postproc"
    before = tvm_ffi.get_global_func(name, allow_missing=True)
    tvm_ffi.register_global_func(name, lambda source, _target: with_overlap(source), override=True)
    try:
        yield
    finally:
        if before is None:
            tvm_ffi.remove_global_func(name)
        else:
            tvm_ffi.register_global_func(name, before, override=True)


def _code(arch: str, with_ptx: bool) -> str:
    virtual = arch.replace("sm_", "compute_")
    codes = f"{arch},{virtual}" if with_ptx and not arch.endswith("a") else arch
    return f"-gencode=arch={virtual},code=[{codes}]"


def _errors(log: str) -> str:
    """The first lines of nvcc's output that speak of errors; warnings come by the dozen."""
    lines = [line.strip() for line in log.splitlines() if "error" in line]
    return "; ".join(lines[:2]) or log.strip()[-400:]
