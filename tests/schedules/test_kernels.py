"""Every kernel of the registry: each case against the reference, and code for every target."""

from __future__ import annotations

import importlib
import pkgutil
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tvm
from aarch64 import CPUS, KernelCalls, Machine
from support.kernels import compare, made_inputs

import mxforge.schedules
from mxforge.compile.targets import CPU_LEVELS, resolve
from mxforge.machine import architecture, missing_cpu_features
from mxforge.schedules import KERNELS
from mxforge.schedules.kernel import TARGET_KINDS, Case, Kernel, Target
from mxforge.schedules.linear_bf16 import LINEAR_BF16
from mxforge.schedules.linear_i8 import LINEAR_I8
from mxforge.schedules.moe_down import DOWN_BF16, DOWN_I8
from mxforge.schedules.moe_gate_up import GATE_UP_BF16, GATE_UP_I8

CASES = [
    pytest.param(kernel, case, id=f"{name}: {case.name}")
    for name, kernel in KERNELS.items()
    for case in kernel.cases
]
EVERY = [pytest.param(kernel, id=name) for name, kernel in KERNELS.items()]
AARCH64_LEVELS = [level.name for level in CPU_LEVELS if level.machine == "aarch64"]
CUDA = {"kind": "cuda", "arch": "sm_90a"}


@pytest.mark.parametrize(("kernel", "case"), CASES)
def test_cpu_schedule_agrees_with_reference(harness, kernel, case):
    inputs = made_inputs(case)
    compare(kernel, case, inputs, harness.run(kernel, inputs, case.static))


# Most kernels leave instructions to LLVM; these choose them by level, as attention does by cache.
CHOOSING = {
    kernel.name for kernel in (LINEAR_BF16, LINEAR_I8, GATE_UP_BF16, GATE_UP_I8, DOWN_BF16, DOWN_I8)
}


def chooses(kernel: Kernel, case: Case) -> bool:
    return kernel.name in CHOOSING or case.static.get("kv_dtype") in ("bfloat16", "int8")


LOWER_LEVELS = [
    pytest.param(
        level,
        kernel,
        case,
        id=f"{level.name}, {kernel.name}: {case.name}",
        marks=() if chooses(kernel, case) else pytest.mark.full,
    )
    for level in CPU_LEVELS
    if level.machine == architecture()
    for kernel in KERNELS.values()
    for case in kernel.cases
]


@pytest.mark.parametrize(("level", "kernel", "case"), LOWER_LEVELS)
def test_schedules_of_every_cpu_level_agree_with_reference(harness, level, kernel, case):
    if missing := missing_cpu_features(level.required):
        pytest.skip(f"this CPU lacks {', '.join(missing)}")
    target = resolve(f"cpu:{level.name}")
    if target == harness.cpu:
        pytest.skip("the best level: tested above")
    inputs = made_inputs(case)
    compare(kernel, case, inputs, harness.run(kernel, inputs, case.static, target))


@pytest.fixture(scope="session")
def aarch64_results(
    aarch64: Machine, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], dict[str, list[np.ndarray]]]:
    """aarch64_results(level) -> the results of every case, by kernel and case."""
    calls = KernelCalls(tmp_path_factory.mktemp("aarch64"))
    for kernel in KERNELS.values():
        for case in kernel.cases:
            calls.add(kernel, case)
    calls.write()
    with ThreadPoolExecutor(1) as pool:  # one level runs while the next is compiled
        running = {
            level: pool.submit(calls.run, aarch64, cpu, calls.compile(level))
            for level, cpu in CPUS.items()
        }
    return lambda level: running[level].result()


@pytest.mark.full
@pytest.mark.parametrize("level", AARCH64_LEVELS)
@pytest.mark.parametrize(("kernel", "case"), CASES)
def test_schedules_of_every_aarch64_level_agree_with_reference(
    aarch64_results, level, kernel, case
):
    results = aarch64_results(level)[f"{kernel.name}: {case.name}"]
    compare(kernel, case, made_inputs(case), results)


@pytest.mark.parametrize("kernel", EVERY)
def test_cpu_results_do_not_depend_on_thread_count(harness, kernel):
    case = max(kernel.cases, key=lambda case: case.bytes)
    inputs = made_inputs(case)
    two = harness.run(kernel, inputs, case.static)
    with harness.threads(1):
        one = harness.run(kernel, inputs, case.static)
    for ours, theirs in zip(one, two, strict=True):
        np.testing.assert_array_equal(ours.view(np.uint8), theirs.view(np.uint8))


@pytest.mark.parametrize("kernel", EVERY)
def test_registered_completely(harness, kernel):
    assert callable(kernel.reference)
    assert len(kernel.cases) >= 3
    assert len({case.name for case in kernel.cases}) == len(kernel.cases)
    assert set(kernel.targets) <= set(TARGET_KINDS)
    assert set(kernel.targets) in ({"cpu"}, set(TARGET_KINDS))
    for kind in kernel.targets:
        target = harness.cpu.kernels if kind == "cpu" else Target(kind)
        attributes = kernel.build(target, **kernel.cases[0].static).attrs
        assert attributes["tirx.is_scheduled"], kind
        assert attributes["mxforge.kernel"] == kernel.name
        assert attributes["mxforge.schedule"]


def test_registry_holds_every_kernel_once():
    found = {}
    for info in pkgutil.iter_modules(mxforge.schedules.__path__):
        module = importlib.import_module(f"mxforge.schedules.{info.name}")
        for value in vars(module).values():
            if isinstance(value, Kernel):
                assert found.setdefault(value.name, value) is value, "two kernels of one name"
    assert found == KERNELS


@pytest.mark.parametrize("level", AARCH64_LEVELS)
@pytest.mark.parametrize("kernel", EVERY)
def test_cpu_code_generates_for_aarch64(harness, kernel, level):
    target = resolve(f"cpu:{level}")
    func = kernel.build(target.kernels, **kernel.cases[0].static)
    tvm.compile(harness.module(func), target.tvm)


@pytest.mark.parametrize("kernel", EVERY)
def test_cuda_code_generates(harness, kernel):
    if "cuda" not in kernel.targets:
        pytest.skip("has no CUDA schedule")
    func = kernel.build(Target("cuda"), **kernel.cases[0].static)
    assert "__global__" in harness.device_source(harness.module(func), CUDA)


@pytest.mark.parametrize("kernel", EVERY)
def test_metal_code_generates(harness, kernel):
    if "metal" not in kernel.targets:
        pytest.skip("has no Metal schedule")
    func = kernel.build(Target("metal"), **kernel.cases[0].static)
    source = harness.device_source(harness.module(func), {"kind": "metal"})
    assert "kernel void" in source
    assert "double" not in source  # Metal has none


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_nvcc_compiles_every_kernel(harness, monkeypatch):
    """In one module: nvcc takes longer to start than to compile a kernel."""
    from tvm.support.nvcc import compile_cuda

    functions = {}
    for kernel in KERNELS.values():
        if "cuda" in kernel.targets:
            func = kernel.build(Target("cuda"), **kernel.cases[0].static)
            functions[kernel.name] = func.with_attr("global_symbol", kernel.name)
    source = harness.device_source(tvm.IRModule(functions), CUDA)
    monkeypatch.setenv("TVM_CUDA_NVCC_NO_FAST_MATH", "1")  # we keep denormals and division
    with tvm.target.Target(CUDA):
        assert compile_cuda(source, target_format="cubin", compiler="nvcc")
