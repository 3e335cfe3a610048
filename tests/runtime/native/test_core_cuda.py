"""libmxforge on NVIDIA's GPUs, with the SIMT harness for a GPU: the same numbers as elsewhere,
steps that are submitted ahead, graphs, and devices that fail.

What it cannot show: that a real driver takes these calls, times, and whether launches overlap.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PROCESS = Path(__file__).with_name("cuda_process.py")
EXACT = 1e-4
AFTER_LOSS = "CUDA lets this process use the device no more; start it again."
SEQUENCES, PAGES = 2, 2
RING_PAGES = 20_000  # of a cache that fills the staging memory more than once: 41 MB


@pytest.fixture(scope="module")
def harness(once: Callable[..., Path]) -> Path:
    from support.simt.session import runtime

    return runtime(once)


@pytest.fixture(scope="module")
def built(harness: Path, once: Callable[..., Path]) -> Path:
    """A folder with the fake driver, and one small model for it and for the CPU."""
    from support.simt.driver import build_driver, compiling
    from support.small import MAX_BATCH, PREFILL_CHUNK, small_checkpoint

    from mxforge.compile import compile_model

    def make(folder: Path) -> None:
        build_driver(folder / "driver")
        options: Any = {
            "numerics": "exact", "max_batch": MAX_BATCH, "prefill_chunk": PREFILL_CHUNK,
        }  # fmt: skip
        checkpoint = small_checkpoint(folder)
        compile_model(checkpoint, "cpu", folder / "cpu", **options)
        with compiling(pytest.MonkeyPatch, harness, folder / "sources"):
            compile_model(checkpoint, "cuda:sm_90a", folder / "cuda", **options)

    return once("core-cuda", make)


def run(scenario: str, folder: Path, *more: str) -> Any:
    command = [sys.executable, str(PROCESS), scenario, str(folder), *more]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def answers(built: Path) -> Any:
    return run("answers", built)


@pytest.fixture(scope="module")
def expected(built: Path) -> Any:
    return run("answers", built, "cpu")


def test_functions_give_what_the_harness_gives(built: Path, harness: Path) -> None:
    """Bit for bit, from a prompt of two sequences to logits and caches."""
    from support.simt.harness import Simt
    from support.simt.model import SimtModel

    from mxforge.compile.checkpoint import open_checkpoint
    from mxforge.compile.targets import gpu_target, resolve

    checkpoint = open_checkpoint(built / "small")
    precision = resolve("cuda:sm_90a").precision("exact", checkpoint.config)
    model = SimtModel(
        Simt(harness), "cuda", checkpoint, checkpoint.config, precision, SEQUENCES, PAGES,
        gpu_target("cuda"),
    )  # fmt: skip
    inputs = {
        "tokens": [1, 2, 3, 4, 5, 9, 8, 7],
        "positions": [0, 1, 2, 3, 4, 0, 1, 2],
        "token_seq": [0, 0, 0, 0, 0, 1, 1, 1],
        "logit_indices": [4, 7, 0],
    }
    given = model.arguments("forward", **inputs)
    plain = {name: np.array(array).view(_plain(array)) for name, array in given.items()}
    np.savez(built / "call-forward.npz", function="forward", **_dotted(built, "forward", plain))
    two, heads, _pages, row = given["kv_1"].shape
    drawn = np.random.default_rng(0).integers(0, 2**31, (two, heads, RING_PAGES, row), np.int32)
    cache = drawn.view(np.float32)  # any bits
    copied = {"source": [RING_PAGES - 1, 2], "destination": [0, 5]}
    pages: dict[str, Any] = {name: np.array(rows, np.int32) for name, rows in copied.items()}
    np.savez(built / "call-pages.npz", function="kv_copy_pages_full", kv_1=cache, **pages)

    assert run("functions", built) == 0  # nothing is left
    logits = model.forward(*(inputs[key] for key in list(inputs)[:3]), inputs["logit_indices"])
    with np.load(built / "result-call-forward.npz") as found:
        assert found["output"].tobytes() == logits.tobytes()
        after = model.arguments("forward", **inputs)
        for layer in ("kv_0", "kv_1"):
            assert found[layer].tobytes() == after[layer].tobytes()
    cache[:, :, pages["destination"]] = cache[:, :, pages["source"]]
    with np.load(built / "result-call-pages.npz") as found:
        assert found["kv_1"].tobytes() == cache.tobytes()


def _plain(array: np.ndarray) -> str:
    """A dtype that an archive keeps; bfloat16 is none."""
    return "uint16" if array.dtype.name == "bfloat16" else array.dtype.name


def _dotted(built: Path, function: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """By the plan's names, which are the official ones."""
    from mxforge.plan import Plan

    plan = Plan.from_bytes((built / "cuda" / "model.plan").read_bytes())
    return {each.name: arrays[each.name.replace(".", "_")] for each in plan[function].arguments}


@pytest.mark.parametrize("what", ["greedy", "random", "another begins", "penalized"])
def test_answers_are_those_of_the_cpu(what: str, answers: Any, expected: Any) -> None:
    found, wanted = np.array(answers[what]), np.array(expected[what])
    assert np.array_equal(found[..., 0], wanted[..., 0])
    np.testing.assert_allclose(found[..., 1], wanted[..., 1], atol=EXACT)


def test_memory_is_freed_behind_the_steps_that_use_it(answers: Any, expected: Any) -> None:
    drawn, logits, waits = answers["grown"]
    wanted, wanted_logits, _ = expected["grown"]
    assert waits == 0
    assert [token for token, _ in drawn] == [token for token, _ in wanted]
    np.testing.assert_allclose(logits, wanted_logits, atol=EXACT)


def test_logits_are_those_of_the_cpu(answers: Any, expected: Any) -> None:
    np.testing.assert_allclose(answers["logits"], expected["logits"], atol=EXACT)


def test_steps_submitted_ahead_give_the_same(answers: Any) -> None:
    """A step that goes on with tokens which the host does not know, and one that waits for them."""
    assert answers["random"] == answers["random, in turn"]


def test_a_step_ahead_survives_that_nothing_was_drawn(answers: Any) -> None:
    """It reads no row -1 of the embedding: that would be outside of its memory."""
    *drawn, then = answers["nothing"]
    assert drawn == [-1, -1]
    assert then.startswith("UsageError: No token was drawn")


def test_tokens_drawn_ahead_are_known_afterwards(answers: Any) -> None:
    """12 of a prompt and 6 of its answer are found again, but for the last, which starts a step."""
    assert answers["reused"] == 12 + 6 - 1


def test_all_is_given_back(answers: Any) -> None:
    assert answers["live"] == 0


def test_the_host_does_not_wait_between_steps(built: Path) -> None:
    seen = run("ahead", built)
    submitted, awaited = seen[::2], seen[1::2]
    assert all(each["waits"] == 0 and each["kernels"] == 0 for each in submitted)
    assert all(each["waits"] == 1 for each in awaited)
    # The first step launches, the second records the same, and from the third on there is no launch
    # but for functions of one kernel: the next tokens, and log-probabilities.
    first, second, *others = submitted
    assert first["cuGraphLaunch"] == 0
    assert first["overlapping"] == first["cuLaunchKernelEx"] == second["cuLaunchKernelEx"]
    graphs = 2  # decode and sample
    for each in (second, *others):
        assert each["cuGraphLaunch"] == graphs
    for each in others:
        assert each["cuLaunchKernelEx"] == 2
    kernels = {each["kernels"] for each in awaited[1:]}
    assert kernels == {first["cuLaunchKernelEx"]}  # a replayed step is a launched one


def test_graphs_are_kept_for_the_shapes_used_last(built: Path) -> None:
    *rounds, live = run("graphs", built)
    assert [same for *_counts, same in rounds] == [True] * 5
    # The first time of each shape is not recorded, nor one that others have displaced since.
    assert [counts for *counts, _same in rounds] == [[0, 0], [10, 10], [0, 10], [0, 10], [0, 0]]
    assert live == 0


def test_tables_of_pages_have_few_widths(built: Path) -> None:
    """A graph of `sample`, and four of `decode`: one, two and four columns, and four beside two
    where the window has."""
    assert run("columns", built) == 5


def test_a_lost_device_fails_every_call_and_the_process_lives(built: Path) -> None:
    said = run("loss", built)
    assert len(said) == 5
    for each in said:
        assert each.startswith("DeviceLostError: ")
        assert each.count("CUDA_ERROR_ILLEGAL_ADDRESS") == 1
        assert each.endswith("encountered). " + AFTER_LOSS)


def test_what_a_device_refuses_is_told_and_nothing_stays(built: Path) -> None:
    said = run("refusals", built)
    memory = (
        "DeviceMemoryError: {} failed: CUDA_ERROR_OUT_OF_MEMORY (out of memory). "
        "Load the model with a smaller context or batch. (0)"
    )
    assert said["memory"] == memory.format("cuMemAlloc")
    assert said["host memory"] == memory.format("cuMemHostAlloc")
    assert said["older"] == (
        "ArtifactTargetError: The artifact's code is for GPUs of sm_90a and no others, but Fake "
        "GPU is of sm_80; compile the model for cuda:sm_80. (0)"
    )
    assert said["code"].startswith("ArtifactTargetError: cuModuleLoadData failed: ")
    assert said["code"].endswith("Compile the model for this GPU. (0)")
    for what in ("cut off", "no code"):
        assert said[what] == (
            "ArtifactCorruptError: The library's code for the GPU is cut off; copy it again. (0)"
        )
    assert said["kernel"] == (
        "ArtifactCorruptError: The library lacks the kernel i32_next_tokens_kernel; "
        "copy it again. (0)"
    )
    assert said["whole"] == said["shared"] == "done (0)"
    assert said["less shared"] == (
        "ArtifactTargetError: The kernel i32_next_tokens_kernel needs 60000 bytes of shared "
        "memory, but Fake GPU has 50000; compile the model for this GPU. (0)"
    )
    assert said["no graphs"] is True
