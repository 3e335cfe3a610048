"""scripts/bench_gpu: what a kit holds; how a run of it goes, ends early, and tells of faults."""

from __future__ import annotations

import io
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks import gpu_device, gpu_kernels, gpu_kit, gpu_report, gpu_run, gpu_token
from support.bench_runs import run

from mxforge.errors import UsageError
from mxforge.plan import Plan
from mxforge.schedules import KERNELS

KERNEL = "f32_rms_norm"
# A kit's own copy of `check` does this for cases whose tolerance asks for it.
FAULTS = """
import os, time
_check = check
def check(ours, reference, tolerance, what):
    if tolerance == -1:
        os.abort()
    if tolerance == -2:
        time.sleep(60)
    return _check(ours, reference, tolerance, what)
"""
CRASHES, HANGS = -1, -2


@pytest.fixture(scope="session")
def packed(once: Callable[..., Path]) -> Path:
    """A kit for the CPU, with cases of one kernel."""
    return once(
        "kit", lambda folder: gpu_kit.pack("cpu", folder, parts=["cases"], kernels=[KERNEL])
    )


@pytest.fixture
def kit(packed: Path, tmp_path: Path) -> Path:
    """A kit to spoil."""
    return Path(shutil.copytree(packed, tmp_path / "kit"))


def changed(kit: Path, change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """kit.json after a change of what it tells."""
    about = json.loads((kit / "kit.json").read_text())
    change(about)
    (kit / "kit.json").write_text(json.dumps(about))
    return about


def with_fault(kit: Path, case: int, fault: int) -> dict[str, Any]:
    agreement = kit / "support" / "agreement.py"
    agreement.write_text(agreement.read_text() + FAULTS)
    return changed(kit, lambda about: about["cases"][case].update(tolerance=fault))


def started(kit: Path, *options: str) -> subprocess.Popen[str]:
    words = [sys.executable, kit / "run.py", "--json", kit / "out.json", *options]
    return subprocess.Popen(
        [str(word) for word in words], cwd=kit, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def result_of(kit: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((kit / "out.json").read_text())
    return found


def ran(kit: Path, *options: str, code: int = 0) -> dict[str, Any]:
    """The result of a run."""
    with started(kit, *options) as process:
        said, told = process.communicate(timeout=200)
    assert process.returncode == code, told[-2000:]
    assert (kit / "out.md").read_text() == said[:-1]
    return result_of(kit)


def states(found: dict[str, Any]) -> list[str]:
    return [result["state"] for result in found["steps"]["cases"]["results"]]


# -- packing --------------------------------------------------------------------------------------


def test_kit_has_every_case_and_what_it_needs_to_run(packed: Path):
    about = json.loads((packed / "kit.json").read_text())
    assert [case["case"] for case in about["cases"]] == [c.name for c in KERNELS[KERNEL].cases]
    assert about["left_out"] == []
    assert sum(path.stat().st_size for path in packed.rglob("*")) < 4 << 20
    readme = (packed / "README.md").read_text()
    assert "'numpy>=" in readme
    assert f"{len(about['cases'])} cases" in readme


def test_runner_imports_its_own_runtime_and_no_compiler(packed: Path, tmp_path: Path):
    code = (
        f"import sys; sys.path[:0] = [{str(packed)!r}, {str(packed / 'scripts')!r}]; "
        "import benchmarks.gpu_run, benchmarks.gpu_steps, mxforge; "
        "print('tvm' in sys.modules, mxforge.__file__, benchmarks.gpu_steps.__file__)"
    )
    words = [sys.executable, "-c", code]
    told = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    compiler, *files = told.split()
    assert compiler == "False"
    assert all(Path(file).is_relative_to(packed) for file in files)


def test_case_that_is_too_large_is_left_out_and_named(tmp_path: Path):
    about = gpu_kit.pack("cpu", tmp_path, parts=["cases"], kernels=[KERNEL], case_bytes=5000)
    assert about["left_out"]
    assert len(about["cases"]) + len(about["left_out"]) == len(KERNELS[KERNEL].cases)
    files = list((tmp_path / "cases").glob("*.xz"))
    assert len(files) == len(about["cases"])
    assert max(file.stat().st_size for file in files) <= 5000
    readme = (tmp_path / "README.md").read_text()
    assert f"- {KERNEL}: {about['left_out'][0]['case']}" in readme


def test_large_arrays_repeat_and_keep_what_must_not_be_read():
    kernel = KERNELS["f32_paged_attention"]
    case = next(case for case in kernel.cases if case.name.startswith("20b full layer, one token"))
    inputs = case.inputs(np.random.default_rng(0))
    repeating = gpu_kit._repeating(kernel, case, inputs)
    assert inputs.keys() == repeating.keys()
    large = [name for name, array in inputs.items() if array.nbytes > gpu_kit.LARGE_BYTES // 4]
    assert large
    for name, array in inputs.items():
        finite = np.isfinite(array.astype(np.float32))
        np.testing.assert_array_equal(np.isfinite(repeating[name].astype(np.float32)), finite)
        distinct = np.unique(repeating[name].reshape(-1, array.shape[-1]).view(np.uint8), axis=0)
        if name in large:
            assert len(distinct) < array.size // array.shape[-1]
        else:
            np.testing.assert_array_equal(repeating[name], array)


def test_what_cannot_be_packed_is_said(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="should be a new folder"):
        gpu_kit.pack("cpu", tmp_path)
    with pytest.raises(UsageError, match=r"takes some of cases,nano,120b,20b.*found 21b"):
        gpu_kit.check_parts(["cases", "21b"])
    result = run("bench_gpu", "pack", "cpu", tmp_path / "kit", "--parts", "21b", code=2)
    assert "found 21b" in result.stderr
    assert "has no run.py" in run("bench_gpu", "run", tmp_path, code=2).stderr


# -- running --------------------------------------------------------------------------------------


def test_run_of_a_kit(kit: Path):
    found = ran(kit)
    assert [*found["steps"]] == ["machine", "cases"]
    assert {step["state"] for step in found["steps"].values()} == {"done"}
    assert states(found) == ["right"] * len(KERNELS[KERNEL].cases)
    assert found["kit"]["target"].startswith("cpu:")
    assert min(found["steps"]["machine"]["copies_gb_s"]) > 0
    assert f"{len(states(found))} right of {len(states(found))}" in (kit / "out.md").read_text()


def test_wrong_case_is_named_and_the_rest_goes_on(kit: Path):
    about = json.loads((kit / "kit.json").read_text())
    case = about["cases"][1]
    data = kit / "cases" / case["data"]
    with np.load(io.BytesIO(lzma.decompress(data.read_bytes()))) as stored:
        arrays = dict(stored)
    (expected,) = (name for name in arrays if name.startswith("expected"))
    arrays[expected].flat[0] += 1
    changed_data = io.BytesIO()
    np.savez(changed_data, **arrays)
    data.write_bytes(lzma.compress(changed_data.getvalue(), preset=1))
    found = ran(kit, code=1)
    assert states(found) == ["right", "wrong", *["right"] * (len(about["cases"]) - 2)]
    assert found["steps"]["cases"]["state"] == "wrong"
    page = (kit / "out.md").read_text()
    assert f"- {KERNEL} · {case['case']} · {case['schedule']}: wrong, argument" in page


def test_case_that_cannot_be_run_is_named_and_the_rest_goes_on(kit: Path):
    changed(kit, lambda about: about["cases"][0].update(data="missing"))
    found = ran(kit, code=1)
    assert states(found)[0] == "failed"
    assert set(states(found)[1:]) == {"right"}
    assert "missing" in found["steps"]["cases"]["results"][0]["problem"]


@pytest.mark.parametrize(("fault", "state", "said"), [
    (CRASHES, "crashed", "SIGABRT"),
    pytest.param(HANGS, "hung", "nothing was heard", marks=pytest.mark.slow),
])  # fmt: skip
def test_crash_takes_no_other_case_with_it(kit: Path, fault: int, state: str, said: str):
    about = with_fault(kit, 2, fault)
    found = ran(kit, "--only", "cases", "--silence", "15", code=1)
    expected = ["right"] * len(about["cases"])
    expected[2] = state
    assert states(found) == expected
    assert said in found["steps"]["cases"]["results"][2]["problem"]


def test_step_that_dies_at_once_fails(kit: Path):
    steps = kit / "scripts" / "benchmarks" / "gpu_steps.py"
    steps.write_text(steps.read_text().replace('"cases": cases', '"cases": None'))
    found = ran(kit, code=1)
    assert [step["state"] for step in found["steps"].values()] == ["done", "failed"]
    assert "TypeError" in found["steps"]["cases"]["problem"]


def test_without_the_device_nothing_else_is_tried(kit: Path):
    changed(kit, lambda about: about.update(target="opencl"))
    found = ran(kit, code=1)
    machine, cases = found["steps"].values()
    assert machine["state"] == "failed"
    assert "opencl" in machine["problem"]
    assert cases == {"state": "skipped", "problem": "the device does not work, see machine"}


def test_steps_are_skipped_by_name_when_the_minutes_are_over(kit: Path):
    found = ran(kit, "--minutes", "0")
    assert {name: step["state"] for name, step in found["steps"].items()} == {
        "machine": "skipped", "cases": "skipped",
    }  # fmt: skip
    assert "| cases | skipped |" in (kit / "out.md").read_text()


@pytest.mark.slow
def test_step_is_cut_when_the_minutes_are_over(kit: Path):
    with_fault(kit, 1, HANGS)
    found = ran(kit, "--only", "cases", "--minutes", "0.4")
    assert states(found) == ["right"]
    assert found["steps"]["cases"]["state"] == "cut"
    assert found["steps"]["cases"]["problem"] == "the minutes were over"


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_what_was_found_outlives_the_run(kit: Path, stop: signal.Signals):
    with_fault(kit, 2, HANGS)
    with started(kit, "--only", "cases") as process:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not _two_results(kit):
            time.sleep(0.05)
        os.kill(process.pid, stop)
        process.communicate(timeout=30)
    found = result_of(kit)
    assert states(found) == ["right", "right"]
    killed = stop is signal.SIGKILL
    assert process.returncode == (-signal.SIGKILL if killed else 130)
    assert found["steps"]["cases"]["state"] == ("running" if killed else "interrupted")
    assert "right of" in gpu_report.markdown(found)


def _two_results(kit: Path) -> bool:
    cases = result_of(kit)["steps"].get("cases", {}) if (kit / "out.json").exists() else {}
    return len(cases.get("results", ())) == 2


def test_unknown_step(kit: Path):
    with started(kit, "--only", "case") as process:
        _said, told = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "found case" in told


def test_order_of_the_steps():
    figures = [{"name": name} for name in ("first", "second")]
    models = {"20b": {"figures": figures}, "120b": {"figures": figures}}
    steps = gpu_run.steps_of({"cases": [1], "nano": {}, "models": models})
    assert [step["name"] for step in steps] == [
        "machine", "cases", "20b: first", "20b: kernels of a token", "20b: second",
        "20b: start-up", "120b: first", "120b: kernels of a token", "120b: second",
        "120b: start-up",
    ]  # fmt: skip


# -- the kernels of a token ----------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny(once: Callable[..., Path]) -> Path:
    """A kit for the CPU, of a tiny model alone."""
    return once("kit-tiny", lambda folder: gpu_kit.pack("cpu", folder, parts=["tiny"]))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure as little as possible."""
    monkeypatch.setattr(gpu_device, "PROBE_BYTES", 1 << 16)
    monkeypatch.setattr(gpu_device, "PROBE_S", 0)
    monkeypatch.setattr(gpu_token, "SAMPLE_S", 0)


def measured(tiny: Path, plan: Path) -> Iterator[tuple[str, Any]]:
    told = json.loads((tiny / "kit.json").read_text())["models"]["tiny"]["token"]
    return gpu_token.measure(tiny / "tiny", plan, told)


def test_every_kernel_of_a_token_is_timed_alone(tiny: Path, quick: None):
    about = json.loads((tiny / "kit.json").read_text())["models"]["tiny"]
    found: dict[str, list[Any]] = {}
    for what, value in measured(tiny, tiny / "tiny-kernels.plan"):
        found.setdefault(what, []).append(value)
    assert found["agrees"] == [0]
    model = Plan.from_bytes((tiny / "tiny" / "model.plan").read_bytes())
    steps = Counter(step.kernel for name in ("decode", "sample") for step in model[name].steps)
    assert {kernel["kernel"]: kernel["calls"] for kernel in found["kernel"]} == steps
    assert [kernel["kernel"] for kernel in found["kernel"]] == [
        kernel["kernel"] for kernel in about["token"]["kernels"]
    ]
    assert min(min(kernel["call_s"]) for kernel in found["kernel"]) > 0
    # As much as the floor of the whole step, but for the rows of prompt and new tokens.
    read = sum(kernel["calls"] * kernel["bytes"] for kernel in found["kernel"])
    assert read == pytest.approx(about["figures"][0]["bytes"], rel=0.1)


def test_calls_of_a_kernel_meet_weights_of_their_own(tiny: Path):
    plan = Plan.from_bytes((tiny / "tiny-kernels.plan").read_bytes())
    experts = next(function for function in plan.functions if "moe_down" in function.name)
    assert len(experts.steps) == gpu_kernels.MOST_CALLS
    weights = [tensor.name for tensor in experts.tensors if ".experts." in tensor.name]
    assert len(set(weights)) == len(weights) >= gpu_kernels.MOST_CALLS
    taken = {argument for step in experts.steps for argument in step.arguments}
    assert taken == set(range(len(experts.tensors)))


def test_a_library_repeats_what_was_called(tiny: Path):
    library = gpu_device.library_of(tiny / "tiny")
    with pytest.raises(UsageError, match="call a function"):
        library.repeat(1)
    assert library.time_copies(1 << 16, 2) > 0
    with pytest.raises(UsageError, match="bytes to copy"):
        library.time_copies(0, 1)
    with pytest.raises(UsageError, match="runs should be"):
        library.time_copies(1 << 16, -1)
    library.close()


def test_other_logits_are_noticed(tiny: Path, quick: None, tmp_path: Path):
    plan = Plan.from_bytes((tiny / "tiny-kernels.plan").read_bytes())
    assert plan["decode apart"].steps[0].kernel == "f32_rope_table"
    spoiled = tmp_path / "spoiled.plan"
    spoiled.write_bytes(
        replace(
            plan,
            functions=tuple(
                replace(function, steps=function.steps[1:])
                if function.name == "decode apart"
                else function
                for function in plan.functions
            ),
        ).to_bytes()
    )
    what, error = next(measured(tiny, spoiled))
    assert what == "agrees"
    assert error > 0.01


# -- everything -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_whole_kit_on_a_vulkan_device(vulkan: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    kit = tmp_path / "kit"
    monkeypatch.setattr(gpu_kernels, "MOST_CALLS", 16)  # a CPU would take long
    gpu_kit.pack("vulkan", kit, parts=["cases", "nano", "tiny"], kernels=[KERNEL])

    def shorten(about: dict[str, Any]) -> None:
        nano, tiny = about["nano"], about["models"]["tiny"]
        nano |= {"prompts": nano["prompts"][:3], "new": 4}
        nano["tokens"] = [tokens[:4] for tokens in nano["tokens"][:3]]
        tiny["figures"] = [{**tiny["figures"][number], "new": 4} for number in (0, 3)]

    about = changed(kit, shorten)
    found = ran(kit)
    steps = found["steps"]
    assert {step["state"] for step in steps.values()} == {"done"}
    assert [result["state"] for result in steps["nano"]["results"]] == ["right"] * 3
    assert len(steps["tiny: decode of 4 sequences"]["samples"]) >= 3
    kernels = steps["tiny: kernels of a token"]
    packed = about["models"]["tiny"]["token"]["kernels"]
    assert [k["kernel"] for k in kernels["kernels"]] == [k["kernel"] for k in packed]
    assert min(min(k["call_s"]) for k in kernels["kernels"]) > 0
    assert kernels["agrees"] <= 1e-5
    assert len(steps["tiny: start-up"]["samples"]) == gpu_run.STARTS
    page = (kit / "out.md").read_text()
    assert "| tiny: decode of 1 sequence |" in page
    assert "| process start to first token |" in page
    # A token that the CPU would not write.
    changed(kit, lambda about: about["nano"]["tokens"][1].__setitem__(2, 1))
    found = ran(kit, "--only", "nano", code=1)
    assert "token 2 differs" in found["steps"]["nano"]["results"][1]["problem"]
