"""This machine: its system and memory, its architecture, and the features of its CPU."""

from __future__ import annotations

import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

_ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}


def architecture() -> str:
    """The CPU architecture: x86_64, aarch64, or another as the system calls it."""
    machine = platform.machine().lower()
    return _ARCHITECTURES.get(machine, machine)


def host_system() -> str:
    """The system and CPU architecture, such as ``linux-x86_64``."""
    return f"{platform.system().lower()}-{architecture()}"


def cpu_name() -> str:
    """The CPU as its maker calls it, or its architecture where the system does not tell."""
    text = ""
    try:
        if sys.platform == "darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            text = subprocess.run(command, capture_output=True, text=True, timeout=10).stdout
        else:
            cpuinfo = Path("/proc/cpuinfo").read_text(errors="replace")
            found = re.search(r"^(?:model name|Hardware)\s*: (.*)$", cpuinfo, re.MULTILINE)
            text = found[1] if found else ""
    except (OSError, subprocess.SubprocessError):
        pass
    return text.strip() or architecture()


# What schedules ask for or may come to ask for.
_NOTABLE_FEATURES = (
    "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512vnni", "avx512bf16",
    "avx512fp16", "avxvnni", "amx-int8", "amx-bf16",
    "neon", "dotprod", "i8mm", "bf16", "fullfp16", "sve", "sme",
)  # fmt: skip


def cpu_features() -> tuple[str, ...]:
    """Which of the notable instruction sets this CPU has, under LLVM's names."""
    if not knows_cpu_features():
        return ()
    missing = missing_cpu_features(_NOTABLE_FEATURES)
    return tuple(name for name in _NOTABLE_FEATURES if name not in missing)


def missing_cpu_features(required: Iterable[str]) -> tuple[str, ...]:
    """What of `required` (instruction sets, LLVM's spelling) this CPU lacks, sorted.

    Nothing where the system does not tell its CPU's features.
    """
    present = _cpu_flags()
    names = _FEATURE_NAMES.get(host_system(), {})
    if not present:
        return ()
    return tuple(sorted(f for f in set(required) if names.get(f, f) not in present))


def knows_cpu_features() -> bool:
    """Whether the system tells its CPU's features."""
    return bool(_cpu_flags())


@cache
def _cpu_flags() -> frozenset[str]:
    """The CPU's features by the system's names; empty where it does not tell."""
    try:
        if sys.platform == "darwin":
            output = subprocess.run(
                ["sysctl", "-a"], capture_output=True, text=True, check=True, timeout=10
            )
            return parse_sysctl(output.stdout)
        return parse_cpuinfo(Path("/proc/cpuinfo").read_text(errors="replace"))
    except (OSError, subprocess.SubprocessError):
        return frozenset()


def parse_cpuinfo(text: str) -> frozenset[str]:
    """The features that all processors of Linux's /proc/cpuinfo have.

    All, because a big.LITTLE phone may list different ones and threads move between them.
    """
    lines = re.findall(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return frozenset.intersection(*map(frozenset, map(str.split, lines))) if lines else frozenset()


def parse_sysctl(text: str) -> frozenset[str]:
    """The features in the output of macOS's ``sysctl -a``.

    Intel: the lower-cased words of machdep.cpu.*features; Apple: names under hw.optional whose
    value is 1.
    """
    words = re.findall(r"^machdep\.cpu\.(?:leaf7_)?features: (.*)$", text, re.MULTILINE)
    optional = re.findall(r"^hw\.optional\.(?:arm\.)?(\w+): 1$", text, re.MULTILINE)
    return frozenset(" ".join(words).lower().split()) | frozenset(optional)


# Of each system: LLVM's name -> the system's, where they differ.
_FEATURE_NAMES = {
    "linux-x86_64": {
        "64bit": "lm",
        "amx-bf16": "amx_bf16",
        "amx-int8": "amx_int8",
        "amx-tile": "amx_tile",
        "avx512bf16": "avx512_bf16",
        "avx512bitalg": "avx512_bitalg",
        "avx512fp16": "avx512_fp16",
        "avx512vbmi2": "avx512_vbmi2",
        "avx512vnni": "avx512_vnni",
        "avx512vp2intersect": "avx512_vp2intersect",
        "avx512vpopcntdq": "avx512_vpopcntdq",
        "avxvnni": "avx_vnni",
        "avxvnniint8": "avx_vnni_int8",
        "bmi": "bmi1",
        "crc32": "sse4_2",
        "lzcnt": "abm",
        "pclmul": "pclmulqdq",
        "prfchw": "3dnowprefetch",
        "rdrnd": "rdrand",
        "sahf": "lahf_lm",
        "sha": "sha_ni",
        "sse3": "pni",
        "sse4.1": "sse4_1",
        "sse4.2": "sse4_2",
        "x87": "fpu",
    },
    "linux-aarch64": {
        "crc": "crc32",
        "dotprod": "asimddp",
        "fp-armv8": "fp",
        "fp16fml": "asimdfhm",
        "fullfp16": "asimdhp",
        "lse": "atomics",
        "neon": "asimd",
        "rcpc": "lrcpc",
        "rdm": "asimdrdm",
    },
    "darwin-x86_64": {"avx": "avx1.0", "bmi": "bmi1", "pclmul": "pclmulqdq", "rdrnd": "rdrand"},
    "darwin-aarch64": {
        "bf16": "FEAT_BF16",
        "crc": "armv8_crc32",
        "dotprod": "FEAT_DotProd",
        "fp-armv8": "floatingpoint",
        "fp16fml": "FEAT_FHM",
        "fullfp16": "FEAT_FP16",
        "i8mm": "FEAT_I8MM",
        "lse": "FEAT_LSE",
        "neon": "AdvSIMD",
        "rcpc": "FEAT_LRCPC",
        "rdm": "FEAT_RDM",
        "sme": "FEAT_SME",
        "sme2": "FEAT_SME2",
    },
}


def usable_cores() -> int:
    """How many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def default_threads() -> int:
    """A thread for each usable core, but no more than a container's share of CPU time pays for:
    threads that wait for each other spin for a moment, and would use it up."""
    cores = usable_cores()
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return min(cores, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no control group, or "max": unlimited
        return cores


def available_memory() -> int | None:
    """Bytes of memory that this process may still take, or None where the system does not say.

    On Linux what is free or only caches files, within the limit of the process's control group.
    """
    if sys.platform == "darwin":
        return _macos_available()
    bounds = [_meminfo_available(), *_cgroup_available(Path("/sys/fs/cgroup"))]
    return min((bound for bound in bounds if bound is not None), default=None)


def _meminfo_available() -> int | None:
    text = _read(Path("/proc/meminfo"))
    match = re.search(r"^MemAvailable:\s*(\d+) kB", text, re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def _cgroup_available(root: Path) -> list[int]:
    """What the limits of the process's control group (version 2, then 1) leave it."""
    found = []
    match = re.search(r"^0::/(.*)$", _read(Path("/proc/self/cgroup")), re.MULTILINE)
    own = root / match[1] if match else root
    for folder in dict.fromkeys((own, *own.parents, root / "memory")):
        if not folder.is_relative_to(root):
            break
        for limit_file, usage_file, cache_key in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit, usage = _read(folder / limit_file).strip(), _read(folder / usage_file).strip()
            if not (limit.isdigit() and usage.isdigit()):
                continue
            cache = re.search(rf"^{cache_key} (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
            found.append(max(0, int(limit) - int(usage) + (int(cache[1]) if cache else 0)))
    return found


def _macos_available() -> int | None:
    try:
        text = subprocess.run(
            ["vm_stat"], capture_output=True, text=True, check=True, timeout=5
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    size = re.search(r"page size of (\d+) bytes", text)
    pages = re.findall(r"^Pages (?:free|inactive|speculative|purgeable):\s*(\d+)", text, re.M)
    return int(size[1]) * sum(map(int, pages)) if size else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
