"""What this machine is, from what Linux and macOS say about it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mxforge import machine
from mxforge.machine import (
    default_threads,
    missing_cpu_features,
    parse_cpuinfo,
    parse_sysctl,
    usable_cores,
)

CPUINFO = """processor\t: 0
flags\t\t: fpu avx2 fma avx512f avx512_vnni
processor\t: 1
flags\t\t: fpu avx2 fma avx512f
"""


def test_cpuinfo_counts_what_all_processors_have():
    assert parse_cpuinfo(CPUINFO) == {"fpu", "avx2", "fma", "avx512f"}
    assert parse_cpuinfo("Features : fp asimd asimddp\n") == {"fp", "asimd", "asimddp"}
    assert parse_cpuinfo("") == frozenset()


def test_sysctl_of_both_kinds_of_mac():
    assert parse_sysctl(
        "machdep.cpu.features: FPU AVX1.0 SSE4.1\nmachdep.cpu.leaf7_features: AVX2 BMI2\n"
    ) == {"fpu", "avx1.0", "sse4.1", "avx2", "bmi2"}
    assert parse_sysctl(
        "hw.optional.arm.FEAT_DotProd: 1\nhw.optional.arm.FEAT_I8MM: 0\nhw.optional.AdvSIMD: 1\n"
    ) == {"FEAT_DotProd", "AdvSIMD"}


@pytest.mark.parametrize(
    ("system", "flags", "required", "missing"),
    [
        ("linux-x86_64", "avx2 avx512_vnni", ["avx2", "avx512vnni"], ()),
        (
            "linux-x86_64",
            "avx2",
            ["avx512vnni", "avx2", "avx512bf16"],
            ("avx512bf16", "avx512vnni"),
        ),
        ("linux-aarch64", "asimd asimddp i8mm", ["neon", "dotprod", "i8mm"], ()),
        ("linux-aarch64", "asimd", ["neon", "i8mm", "dotprod"], ("dotprod", "i8mm")),
        ("darwin-aarch64", "AdvSIMD FEAT_DotProd", ["neon", "dotprod", "i8mm"], ("i8mm",)),
        ("linux-x86_64", "", ["avx2"], ()),  # the system does not tell
    ],
)
def test_features_under_the_systems_names(monkeypatch, system, flags, required, missing):
    monkeypatch.setattr(machine, "_cpu_flags", lambda: frozenset(flags.split()))
    monkeypatch.setattr(machine, "host_system", lambda: system)
    assert missing_cpu_features(required) == missing


def test_threads_are_the_usable_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "usable_cores", lambda: 64)
    for content, expected in (
        ("max 100000\n", 64),
        ("200000 100000\n", 2),
        ("150000 100000\n", 2),
        ("50000 100000\n", 1),
        ("9900000 100000\n", 64),
        ("nonsense", 64),
    ):
        monkeypatch.setattr(Path, "read_text", lambda _self, content=content: content)
        assert default_threads() == expected
    monkeypatch.undo()
    if hasattr(os, "sched_getaffinity"):
        assert usable_cores() == len(os.sched_getaffinity(0))
    assert 1 <= default_threads() <= usable_cores()
