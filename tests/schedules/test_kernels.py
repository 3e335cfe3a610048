"""Every kernel of the registry: each case against the reference, and code for every target."""

from __future__ import annotations

import importlib
import pkgutil
import shutil
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache

import numpy as np
import pytest
import tvm
from qemu import LEVELS, KernelCalls, open_cpu

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
GPUS = [kind for kind in TARGET_KINDS if Target(kind).is_gpu]
AARCH64_LEVELS = [level.name for level in CPU_LEVELS if level.machine == "aarch64"]
CUDA = {"kind": "cuda", "arch": "sm_90a"}


def made_inputs(case: Case) -> dict[str, np.ndarray]:
    """The same inputs whichever test asks, and in whatever order."""
    return case.inputs(np.random.default_rng(zlib.crc32(case.name.encode())))


def relative_error(ours: np.ndarray, reference: np.ndarray) -> float:
    """‖ours - reference‖ / ‖reference‖ over what is finite in the reference; NaN and infinity
    must stand in the same places."""
    ours, reference = ours.astype(np.float64), reference.astype(np.float64)
    finite = np.isfinite(reference)
    np.testing.assert_array_equal(ours[~finite], reference[~finite])
    error = np.linalg.norm(ours[finite] - reference[finite])
    norm = np.linalg.norm(reference[finite])
    return float(error / norm) if norm else float(error)


def compare(kernel: Kernel, case: Case, inputs, results: list[np.ndarray]) -> None:
    expected = kernel.reference(
        **{name: value.copy() for name, value in inputs.items()}, **case.static
    )
    assert len(results) == len(expected)
    for index, (ours, reference) in enumerate(zip(results, expected, strict=True)):
        assert ours.shape == reference.shape, f"output {index}"
        if np.issubdtype(reference.dtype, np.integer):  # not of rounded numbers kept as integers
            np.testing.assert_array_equal(ours, reference, err_msg=f"output {index}")
        else:
            assert relative_error(ours, reference) <= case.tolerance, f"output {index}"


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
def emulated(
    harness, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], dict[str, list[np.ndarray]]]]:
    """emulated(level) -> the results of every case, by kernel and case."""
    calls = KernelCalls(tmp_path_factory.mktemp("emulated"))
    for kernel in KERNELS.values():
        for case in kernel.cases:
            inputs = made_inputs(case)
            calls.add(kernel, case, inputs, harness.fresh(kernel, inputs, case.static))
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
@pytest.mark.parametrize(("kernel", "case"), CASES)
def test_schedules_of_every_emulated_level_agree_with_reference(emulated, level, kernel, case):
    results = emulated(level)[f"{kernel.name}: {case.name}"]
    compare(kernel, case, made_inputs(case), results)


@pytest.mark.full
@pytest.mark.parametrize(
    ("level", "lower"),
    [("avx512", "avx2"), ("avx2", "x86-64-v2"), ("neon-i8mm", "neon-dotprod"),
     ("neon-dotprod", "neon")],
)  # fmt: skip
def test_the_cpu_of_a_lower_level_cannot_run_it(harness, tmp_path, level, lower):
    """Else an instruction in the wrong level would not be seen."""
    cpu = open_cpu(lower)
    calls = KernelCalls(tmp_path)
    for case in LINEAR_I8.cases:
        inputs = made_inputs(case)
        calls.add(LINEAR_I8, case, inputs, harness.fresh(LINEAR_I8, inputs, case.static))
    calls.write()
    with pytest.raises(AssertionError, match="Illegal instruction"):
        calls.run(cpu, calls.compile(level))
    calls.run(cpu, calls.compile(lower))


@pytest.mark.parametrize(("kernel", "case"), CASES)
def test_items_of_simple_gpu_schedule_agree_with_reference(harness, kernel, case):
    if not set(GPUS) & set(kernel.targets):
        pytest.skip("has no GPU schedule")
    inputs = made_inputs(case)
    compare(kernel, case, inputs, harness.run_items(kernel, inputs, case.static))


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
