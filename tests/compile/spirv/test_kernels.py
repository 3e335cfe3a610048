"""Every kernel of the registry: its Vulkan code is valid; on a device, it is right."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.kernels import call_of, compare, made_inputs, parameters
from support.matrix_programs import LAVAPIPE, needs_tools
from support.spirv_programs import checked, generate, kernels, lowered, run
from support.targets import VULKAN

from mxforge.compile.targets import VULKAN_PROFILES
from mxforge.schedules import KERNELS
from mxforge.schedules.attention import PAGED_ATTENTION
from mxforge.schedules.gpu.matrices import MATRICES

RUNS = parameters(VULKAN)
# What many tokens are multiplied with, for all devices, and the kernels that do.
((FEATURES, UNITS),) = ((each, units) for each, units in MATRICES.items() if "vulkan" in each)
VARIANTS = (
    "bf16w_linear", "i8w_linear", "bf16w_norm_qkv_insert", "i8w_norm_qkv_insert",
    "mxfp4w_moe_gate_up_swiglu", "mxfp4w_moe_down", "f32_paged_attention",
)  # fmt: skip

OF_CHUNKS = {"heads": 8, "kv_heads": 1, "head_dim": 32, "window": 0, "kv_dtype": "float16"}


@pytest.fixture(autouse=True, scope="module")
def lavapipes_matrices() -> Iterator[None]:
    """Of all variants the one of the device that is here: every other one takes a second a case.
    That those are valid has a test of its own."""
    here = UNITS
    while ((here.rows, here.columns, here.depth), here.lanes) != LAVAPIPE:
        here = here.otherwise
    MATRICES[FEATURES] = here
    yield
    MATRICES[FEATURES] = UNITS


@pytest.mark.parametrize(("kernel", "case", "schedule"), RUNS)
def test_code_is_valid(kernel, case, schedule):
    for code in kernels(kernel.build(VULKAN, schedule, **case.static)):
        pointers = [entry for entry in code.reflection["arguments"] if entry["kind"] == "pointer"]
        assert any(entry["write"] for entry in pointers)
        assert all(entry["read"] or entry["write"] for entry in pointers)


@pytest.mark.parametrize(("kernel", "case", "schedule"), RUNS)
def test_agrees_with_reference(kernel, case, schedule):
    inputs = made_inputs(case)
    call = call_of(kernel, VULKAN, inputs, case.static, schedule)
    arrays = run(kernel.build(VULKAN, schedule, **case.static), *call.arrays)
    compare(kernel, case, inputs, call.results(arrays))


@pytest.mark.parametrize("name", VARIANTS)
def test_all_variants_are_valid(name, monkeypatch):
    needs_tools()
    kernel = KERNELS[name]
    static = OF_CHUNKS if kernel is PAGED_ATTENTION else kernel.cases[0].static
    schedule = kernel.choose(VULKAN, **static)
    monkeypatch.setitem(MATRICES, FEATURES, UNITS)
    arguments = kernel.packed_signature(schedule, **static).arguments
    function = schedule.build(arguments, **static, tile=schedule.tile)
    found = [
        tuple(product.values())
        for code in kernels(function)
        for product in code.reflection["requirements"]["matrices"]
    ]
    units = UNITS
    while units is not None:
        dtypes = ("float16", "float16", "float32", "float32")
        assert (units.rows, units.columns, units.depth, *dtypes) in found
        units = units.otherwise
    assert len(found) == len(set(found))


@pytest.mark.parametrize("head_dim", [2, 64, 250, 1024])
def test_attention_fits_the_shared_memory_of_every_device(head_dim):
    shape = {"heads": 48, "kv_heads": 2, "head_dim": head_dim, "window": 0, "kv_dtype": "float32"}
    for code in kernels(PAGED_ATTENTION.build(VULKAN, **shape)):
        assert code.reflection["shared_bytes"] <= min(p.shared_bytes for p in VULKAN_PROFILES)


def test_generating_all_kernels_gives_equal_bytes_twice():
    modules = [
        lowered(kernel.build(VULKAN, **kernel.cases[0].static))
        for kernel in KERNELS.values()
        if kernel.runs_on(VULKAN)
    ]
    first = [generate(module) for module in modules]
    assert first == [generate(module) for module in modules]
    assert all(checked(data) for data in first)
