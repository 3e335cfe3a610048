"""Bad input for what reads files in libmxforge's core, under sanitizers.

`native/` has a target for each reader, and a corpus that each began with, or once failed on. Here
they run on it and on some thousands of damaged inputs. Where Python has a reader of the same files,
both have to come to the same. For hours of it give a target a time, or build it with libFuzzer:

    clang++ -std=c++17 -O2 -g -fsanitize=fuzzer,address,undefined -DFUZZ_WITH_LIBFUZZER \\
        -Iruntime/native/core -Itests/native tests/fuzz/native/{plan,driver,memory}.cc \\
        runtime/native/core/*.cc -o plan && ./plan NEW tests/fuzz/native/corpus/plan
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.native import CoreTests, run

from mxforge.errors import ArtifactCorruptError, SafetensorsError
from mxforge.plan import Plan, PlanError, Symbol
from mxforge.safetensors import open_safetensors

HERE = Path(__file__).parent / "native"
CORE_DTYPES = {"U8", "I8", "U16", "U32", "F16", "BF16", "F32"}  # of safetensors, that weights have


@pytest.fixture(scope="module")
def target(once: Callable[..., Path]) -> Callable[[str], Path]:
    tests = CoreTests(once)
    shared = [HERE / "driver.cc", HERE / "memory.cc"]
    return lambda name: tests.program(f"fuzz-{name}", [HERE / f"{name}.cc", *shared])


def verdicts(target: Path, name: str, runs: int) -> Iterator[tuple[bytes, str]]:
    """Inputs, and what the target made of each; "" where it refused it."""
    said = run(target, "--say", "--runs", runs, *sorted((HERE / "corpus" / name).iterdir())).stdout
    at = 0
    while at < len(said):
        size, length = struct.unpack_from("<II", said, at)
        at += 8
        yield said[at : at + size], said[at + size : at + size + length].decode()
        at += size + length


def plan_of(data: bytes) -> str:
    """As the target tells of one: of each function its arguments, and all values."""
    try:
        plan = Plan.from_bytes(data)
    except ArtifactCorruptError:
        return ""
    lines = ["read"]
    for function in sorted(plan.functions, key=lambda function: function.name.encode()):
        symbols = {value.name: 3 for value in function.values if isinstance(value, Symbol)}
        try:
            values = "".join(f" {value}" for value in function.evaluate(symbols))
        except PlanError:
            values = " none"
        lines.append(f"{len(function.arguments)}{values}")
    return "\n".join(lines)


def test_plans_are_read_as_python_reads_them(target: Callable[[str], Path]):
    read = 0
    for data, verdict in verdicts(target("plan"), "plan", 6000):
        assert verdict == plan_of(data), data.hex()
        read += verdict != ""
    assert read > 500


def safetensors_of(path: Path) -> str:
    """As the target tells of one: the sum of all tensors' bytes."""
    try:
        file = open_safetensors(path)
        "".join(file.tensors).encode()
    except (SafetensorsError, UnicodeEncodeError):  # half of a surrogate is no text to the core
        return ""
    if {info.dtype for info in file.tensors.values()} - CORE_DTYPES:
        return ""
    return f"read {sum(path.read_bytes()[file.data_start :])}"


def test_safetensors_are_read_as_python_reads_them(target: Callable[[str], Path], tmp_path: Path):
    path, read = tmp_path / "x.safetensors", 0
    for data, verdict in verdicts(target("safetensors"), "safetensors", 3000):
        path.write_bytes(data)
        assert verdict == safetensors_of(path), data.hex()
        read += verdict != ""
    assert read > 50


def test_manifests(target: Callable[[str], Path]):
    assert sum(verdict != "" for _, verdict in verdicts(target("manifest"), "manifest", 3000)) > 100


@pytest.mark.full
@pytest.mark.parametrize("name", ["plan", "safetensors", "manifest"])
def test_for_a_minute(name: str, target: Callable[[str], Path]):
    corpus = sorted((HERE / "corpus" / name).iterdir())
    run(target(name), "--seconds", 60, "--seed", 2, *corpus)
