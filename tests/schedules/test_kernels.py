"""Every kernel of the registry: each case against the reference, and code for every target."""

from __future__ import annotations

import importlib
import pkgutil
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest
import tvm
from support.kernels import compare, made_inputs, parameters
from support.qemu import LEVELS, KernelCalls, open_cpu
from support.targets import CUDA, GPUS, METAL, PLAIN_CPU

import mxforge.schedules
from mxforge.compile.targets import CPU_LEVELS, resolve
from mxforge.machine import architecture, missing_cpu_features
from mxforge.schedules import KERNELS
from mxforge.schedules.kernel import Kernel
from mxforge.schedules.linear import LINEAR_I8

CASES = [
    pytest.param(kernel, case, id=f"{name}: {case.name}")
    for name, kernel in KERNELS.items()
    for case in kernel.cases
]
EVERY = [pytest.param(kernel, id=name) for name, kernel in KERNELS.items()]
# Some kernels take the place of several on GPUs only.
CPU_KERNELS = [kernel for kernel in KERNELS.values() if kernel.runs_on(PLAIN_CPU)]
CPU_CASES = [
    pytest.param(kernel, case, id=f"{kernel.name}: {case.name}")
    for kernel in CPU_KERNELS
    for case in kernel.cases
]
# Emulators are slow. Experts with inputs in a format that only CUDA multiplies run the plain code
# of others here.
SMALL_CASES = [
    run
    for run in CPU_CASES
    if run.values[1].bytes < 1 << 22
    and run.values[1].flops < 1e8
    and not run.values[0].name.startswith(("mxfp4w_bf16_", "mxfp4w_mxfp8_"))
]
EVERY_OF_CPUS = [pytest.param(kernel, id=kernel.name) for kernel in CPU_KERNELS]
AARCH64_LEVELS = [level.name for level in CPU_LEVELS if level.machine == "aarch64"]
TVM_CUDA = {"kind": "cuda", "arch": "sm_90a"}


HERE = resolve("cpu").kernels
RUNS = parameters(HERE)


@pytest.mark.parametrize(("kernel", "case", "schedule"), RUNS)
def test_every_schedule_for_this_cpu_agrees_with_reference(harness, kernel, case, schedule):
    inputs = made_inputs(case)
    compare(kernel, case, inputs, harness.run(kernel, inputs, case.static, schedule=schedule))


LOWER_LEVELS = [
    pytest.param(
        level,
        kernel,
        case,
        id=f"{level.name}, {kernel.name}: {case.name}",
        # Of the others qemu runs all cases, on CPUs that have no AVX-512.
        marks=pytest.mark.slow if "avx512f" in level.required else pytest.mark.full,
    )
    for level in CPU_LEVELS
    if level.machine == architecture()
    for kernel in CPU_KERNELS
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
def emulated(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[str], dict[str, list[np.ndarray]]]]:
    """emulated(level) -> the results of every small case, by kernel and case."""
    calls = KernelCalls(tmp_path_factory.mktemp("emulated"))
    for run in SMALL_CASES:
        calls.add(*run.values)
    calls.write()
    with ThreadPoolExecutor(1) as pool:  # whose futures keep a failure as they keep results

        @cache
        def submitted(level: str) -> Future[dict[str, list[np.ndarray]]]:
            cpu = open_cpu(level)
            return pool.submit(lambda: calls.run(cpu, calls.compile(level)))

        yield lambda level: submitted(level).result()


# Where several processes run the tests (--dist loadgroup), each level is compiled by one of them.
EMULATED = [pytest.param(level, marks=pytest.mark.xdist_group(level)) for level in LEVELS]


@pytest.mark.full
@pytest.mark.parametrize("level", EMULATED)
@pytest.mark.parametrize(("kernel", "case"), SMALL_CASES)
def test_schedules_of_every_emulated_level_agree_with_reference(emulated, level, kernel, case):
    results = emulated(level)[f"{kernel.name}: {case.name}"]
    compare(kernel, case, made_inputs(case), results)


@pytest.mark.full
@pytest.mark.parametrize(
    ("level", "lower"),
    [("avx512", "avx2"), ("avx2", "x86-64-v2"), ("neon-i8mm", "neon-dotprod"),
     ("neon-dotprod", "neon")],
)  # fmt: skip
def test_the_cpu_of_a_lower_level_cannot_run_it(tmp_path, level, lower):
    """Else an instruction in the wrong level would not be seen."""
    cpu = open_cpu(lower)
    calls = KernelCalls(tmp_path)
    for case in LINEAR_I8.cases:
        calls.add(LINEAR_I8, case)
    calls.write()
    with pytest.raises(AssertionError, match="Illegal instruction"):
        calls.run(cpu, calls.compile(level))
    calls.run(cpu, calls.compile(lower))


@pytest.mark.parametrize("kernel", EVERY_OF_CPUS)
def test_cpu_results_do_not_depend_on_thread_count(harness, kernel):
    case = max(kernel.cases, key=lambda case: case.bytes)
    inputs = made_inputs(case)
    two = harness.run(kernel, inputs, case.static)
    with harness.threads(1):
        one = harness.run(kernel, inputs, case.static)
    for ours, theirs in zip(one, two, strict=True):
        np.testing.assert_array_equal(ours.view(np.uint8), theirs.view(np.uint8))


@pytest.mark.parametrize("kernel", EVERY)
def test_registered_completely(kernel):
    assert callable(kernel.reference)
    assert len(kernel.cases) >= 3
    assert len({case.name for case in kernel.cases}) == len(kernel.cases)
    targets = [*(resolve(f"cpu:{level.name}").kernels for level in CPU_LEVELS), *GPUS]
    for schedule in kernel.schedules:
        case = next(case for case in kernel.cases if schedule.fits(**case.static))
        target = next(target for target in targets if schedule.needs <= target.features)
        attributes = kernel.build(target, schedule, **case.static).attrs
        assert attributes["tirx.is_scheduled"]
        assert attributes["mxforge.kernel"] == kernel.name
        assert attributes["mxforge.schedule"] == schedule.name


@pytest.mark.parametrize(("kernel", "case"), CASES)
def test_cases_and_reference_follow_the_signature(kernel, case):
    signature = kernel.signature(**case.static)
    inputs = made_inputs(case)
    assert list(inputs) == [tensor.name for tensor in signature.inputs]
    sizes = signature.solve([array.shape for array in inputs.values()])
    for tensor, array in zip(signature.inputs, inputs.values(), strict=True):
        assert array.shape == tensor.sizes(sizes), tensor.name
        assert array.dtype.name == tensor.dtype, tensor.name
    assert set(signature.updated) <= set(inputs)


@pytest.mark.parametrize("kernel", EVERY_OF_CPUS)
def test_some_schedule_fits_every_cpu(kernel):
    for level in CPU_LEVELS:
        for case in kernel.cases:
            kernel.choose(resolve(f"cpu:{level.name}").kernels, **case.static)


def test_registry_holds_every_kernel_once():
    found = {}
    for info in pkgutil.walk_packages(mxforge.schedules.__path__, "mxforge.schedules."):
        for value in vars(importlib.import_module(info.name)).values():
            for kernel in value.values() if isinstance(value, dict) else [value]:
                if isinstance(kernel, Kernel):
                    assert found.setdefault(kernel.name, kernel) is kernel, "two of one name"
    assert found == KERNELS


@pytest.mark.parametrize("level", AARCH64_LEVELS)
@pytest.mark.parametrize("kernel", EVERY_OF_CPUS)
def test_cpu_code_generates_for_aarch64(harness, kernel, level):
    target = resolve(f"cpu:{level}")
    func = kernel.build(target.kernels, **kernel.cases[0].static)
    tvm.compile(harness.module(func), target.tvm)


@pytest.mark.parametrize("kernel", EVERY)
def test_cuda_code_generates(harness, kernel):
    if not kernel.runs_on(CUDA):
        pytest.skip("has no CUDA schedule")
    func = kernel.build(CUDA, **kernel.cases[0].static)
    assert "__global__" in harness.device_source(harness.module(func), TVM_CUDA)


@pytest.mark.parametrize("kernel", EVERY)
def test_metal_code_generates(harness, kernel):
    if not kernel.runs_on(METAL):
        pytest.skip("has no Metal schedule")
    func = kernel.build(METAL, **kernel.cases[0].static)
    source = harness.device_source(harness.module(func), {"kind": "metal"})
    assert "kernel void" in source
    assert "double" not in source  # Metal has none


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_nvcc_compiles_every_kernel(harness, monkeypatch):
    """In one module: nvcc takes longer to start than to compile a kernel."""
    from tvm.support.nvcc import compile_cuda

    functions = {}
    for kernel in KERNELS.values():
        if kernel.runs_on(CUDA):
            func = kernel.build(CUDA, **kernel.cases[0].static)
            functions[kernel.name] = func.with_attr("global_symbol", kernel.name)
    source = harness.device_source(tvm.IRModule(functions), TVM_CUDA)
    monkeypatch.setenv("TVM_CUDA_NVCC_NO_FAST_MATH", "1")  # we keep denormals and division
    with tvm.target.Target(TVM_CUDA):
        assert compile_cuda(source, target_format="cubin", compiler="nvcc")
