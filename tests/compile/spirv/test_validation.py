"""The other files' tests once more under Vulkan's validation layers, GPU-assisted.

The kernels' addresses are of their own making: only the assisted validation, which compiles a
check into each access, sees one that lies outside every buffer. Whatever the layers say fails the
test that they say it of (tests/conftest.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.kernels import run_name, runs
from support.targets import VULKAN
from support.vulkan_device import run_apart

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
ASSISTED = ("test_statements.py", "test_structure.py", "test_limits.py", "test_math.py")
# Each access becomes a loop over all buffers. Kernels with hundreds of them take lavapipe minutes
# to compile; and in a subgroup that is not full it (Mesa 22.3.6) leaves such loops, and those
# around them, too early, which looks as if right addresses were wrong. These run without.
UNASSISTED = (
    "test_operators.py",
    "test_statements.py::test_strided_vectors_are_gathered_and_scattered[4-0]",
    "test_structure.py::test_bfloat16_rounds_to_nearest_even_and_keeps_nan",
)
CASES: dict[str, list[str]] = {}  # by kernel
for kernel, case, schedule in runs(VULKAN):
    name = run_name(kernel, case, schedule)
    CASES.setdefault(kernel.name, []).append(f"test_agrees_with_reference[{name}]")


@pytest.fixture
def unassisted(watched) -> dict[str, str]:
    """The same without what is compiled into the kernels."""
    features = watched["VK_LAYER_ENABLES"].split(":")
    return {**watched, "VK_LAYER_ENABLES": ":".join(f for f in features if "GPU" not in f)}


def run_pytest(
    environment: dict[str, str], *tests: str, without: Sequence[str] = ()
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not full", "-p", "no:cacheprovider",
         *(f"--deselect={HERE.relative_to(ROOT) / test}" for test in without),
         *(str(HERE / test) for test in tests)],
        env={**os.environ, **environment}, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip


def check(environment: dict[str, str], *tests: str, without: Sequence[str] = ()) -> None:
    result = run_pytest(environment, *tests, without=without)
    assert result.returncode == 0, result.stdout[-10_000:] + result.stderr[-2_000:]


def test_a_wild_address_is_told_of(watched):
    result = run_pytest(watched, "wild_address.py")
    assert result.returncode == 1, result.stdout
    assert "the validation layers say:" in result.stdout
    assert "out of bounds" in result.stdout


@pytest.mark.slow
def test_the_generator(watched):
    check(watched, *ASSISTED, "test_dlight.py::test_matrix_products", without=UNASSISTED)


@pytest.mark.slow
def test_what_the_device_cannot_run_assisted(unassisted):
    check(unassisted, *UNASSISTED)


@pytest.mark.slow
def test_each_kernel(watched):
    check(watched, *(f"test_kernels.py::{cases[0]}" for cases in CASES.values()))


@pytest.mark.full
def test_every_case_of_each_kernel(watched):
    check(watched, "test_kernels.py::test_agrees_with_reference", "test_dlight.py")


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [range(50), pytest.param(range(50, 550), marks=pytest.mark.full)])
def test_random_programs(unassisted, seeds):
    code = (
        "from support.differential import compare\n"
        f"for seed, reason in compare({seeds!r}).failed.items():\n"
        "    if 'validation' in reason: print(seed, reason)"
    )
    result = run_apart(code, timeout=3600, **unassisted)
    assert (result.returncode, result.stdout) == (0, ""), result.stdout + result.stderr[-2_000:]
