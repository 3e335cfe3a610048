"""Every kernel of the registry: its Vulkan code is valid; on a device, it is right."""

from __future__ import annotations

import time

import pytest
from spirv_programs import checked, generate, kernels, lowered, run
from support.kernels import call_of, compare, made_inputs

from mxforge.compile.targets import VULKAN_PROFILES
from mxforge.schedules import KERNELS
from mxforge.schedules.attention import paged_attention
from mxforge.schedules.kernel import Target

VULKAN = Target("vulkan")
CASES = [
    pytest.param(kernel, case, id=f"{name}: {case.name}")
    for name, kernel in KERNELS.items()
    if "vulkan" in kernel.targets
    for case in kernel.cases
]


@pytest.mark.parametrize(("kernel", "case"), CASES)
def test_code_is_valid(kernel, case):
    for code in kernels(kernel.build(VULKAN, **case.static)):
        pointers = [entry for entry in code.reflection["arguments"] if entry["kind"] == "pointer"]
        assert any(entry["write"] for entry in pointers)
        assert all(entry["read"] or entry["write"] for entry in pointers)


@pytest.mark.parametrize(("kernel", "case"), CASES)
def test_agrees_with_reference(kernel, case):
    inputs = made_inputs(case)
    call = call_of(kernel, VULKAN, inputs, case.static)
    arrays = run(kernel.build(VULKAN, **case.static), *call.arrays)
    compare(kernel, case, inputs, call.results(arrays))


@pytest.mark.parametrize("head_dim", [2, 64, 250, 1024])
def test_attention_fits_the_shared_memory_of_every_device(head_dim):
    shape = {"heads": 48, "kv_heads": 2, "head_dim": head_dim, "window": 0, "kv_dtype": "float32"}
    for code in kernels(paged_attention(VULKAN, **shape)):
        assert code.reflection["shared_bytes"] <= min(p.shared_bytes for p in VULKAN_PROFILES)


def test_generating_all_kernels_takes_seconds_and_gives_equal_bytes_twice():
    modules = [
        lowered(kernel.build(VULKAN, **kernel.cases[0].static))
        for kernel in KERNELS.values()
        if "vulkan" in kernel.targets
    ]
    start = time.perf_counter()
    first = [generate(module) for module in modules]
    assert time.perf_counter() - start < 20
    assert first == [generate(module) for module in modules]
    assert all(checked(data) for data in first)
