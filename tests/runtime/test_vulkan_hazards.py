"""Barriers: every one that is recorded is needed, and with them nothing is left unguarded."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from support.vulkan_device import AFFINE, VulkanDevice
from support.vulkan_hazards import barriers, unguarded, without

Simulate = Callable[[list[Any]], list[dict[str, Any]]]


@pytest.fixture
def simulate(vulkan: VulkanDevice) -> Simulate:
    """The log that the tracker makes of a list of commands, which run nowhere."""
    return lambda commands: json.loads(vulkan.hook("hazard_simulate")(json.dumps(commands)))


def assert_sound_and_minimal(log: list[dict[str, Any]]) -> None:
    assert list(unguarded(log)) == []
    for index in barriers(log):
        # Only what came before the barrier can miss it, and it is missed at once: look there first.
        near = without(log[: index + 40], index)
        missed = any(unguarded(near)) or any(unguarded(without(log, index)))
        assert missed, f"nothing needs {log[index]}"


def reads(resource: int, begin: int = 0, end: int = 64) -> list[Any]:
    return [resource, "r", begin, end]


def writes(resource: int, begin: int = 0, end: int = 64) -> list[Any]:
    return [resource, "w", begin, end]


@pytest.mark.parametrize(("commands", "expected"), [
    pytest.param([["compute", [reads(0)]], ["compute", [reads(0)]]], [], id="two reads"),
    pytest.param([["compute", [writes(0)]], ["compute", [writes(1)]]], [], id="two buffers"),
    pytest.param([["compute", [writes(0, 0, 8)]], ["compute", [reads(0, 8, 64)]]], [],
                 id="two ranges"),
    pytest.param([["compute", [writes(0)]], ["compute", [reads(0)]]],
                 [(["compute"], ["compute"], "compute")], id="read after write"),
    pytest.param([["compute", [writes(0)]], ["transfer", [writes(0)]]],
                 [(["compute"], ["compute"], "transfer")], id="write after write"),
    pytest.param([["transfer", [reads(0)]], ["compute", [writes(0)]]],
                 [(["transfer"], [], "compute")], id="write after read orders execution only"),
    pytest.param([["compute", [reads(0)]], ["wait"], ["compute", [writes(0)]]], [],
                 id="a wait is enough for a write after a read"),
    pytest.param([["compute", [writes(0)]], ["wait"], ["compute", [reads(0)]]],
                 [(["compute"], ["compute"], "compute")], id="a wait makes nothing visible"),
    pytest.param([["compute", [writes(0)]], ["host", [reads(0)]], ["host", [reads(0)]]],
                 [(["compute"], ["compute"], "host")], id="the host reads twice"),
    pytest.param([["host", [writes(0)]], ["compute", [reads(0)]]], [], id="submits show the host"),
    pytest.param([["compute", [writes(0), writes(1)]], ["compute", [reads(0)]],
                  ["compute", [reads(1)]]],
                 [(["compute"], ["compute"], "compute")], id="one barrier for two buffers"),
    pytest.param([["compute", [writes(0)]], ["transfer", [reads(0), writes(1)]],
                  ["compute", [reads(1)]], ["compute", [reads(0)]]],
                 [(["compute"], ["compute"], "transfer"), (["transfer"], ["transfer"], "compute")],
                 id="barriers chain"),
    pytest.param([["compute", [writes(0)]], ["transfer", [writes(1)]],
                  ["compute", [reads(0), reads(1)]]],
                 [(["compute", "transfer"], ["compute", "transfer"], "compute")],
                 id="one barrier for two stages"),
])  # fmt: skip
def test_small_chains(simulate: Simulate, commands: list[Any], expected: list[Any]) -> None:
    log = simulate(commands)
    found = [log[index] for index in barriers(log)]
    assert [(b["execution"], b["memory"], b["to"]) for b in found] == expected
    assert_sound_and_minimal(log)


@pytest.mark.parametrize("seed", range(40))
def test_random_chains(simulate: Simulate, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(8):
        commands: list[Any] = []
        for _ in range(rng.randint(5, 40)):
            kind = rng.choice(["compute", "compute", "transfer", "host", "wait"])
            accesses = []
            for _ in range(rng.randint(1, 3)):
                begin = rng.choice([0, 0, 0, 4, 8])
                end = rng.choice([16, 16, 16, begin + 4])
                accesses.append([rng.randint(0, 3), rng.choice("rw"), begin, end])
            commands.append([kind] if kind == "wait" else [kind, accesses])
        assert_sound_and_minimal(simulate(commands))


@pytest.mark.parametrize("seed", range(10))
def test_recordings_follow_anything(simulate: Simulate, seed: int) -> None:
    """With the barrier that each begins with, and no other in front of it."""
    rng = random.Random(seed)
    kinds = ["compute", "transfer", "recording", "wait", "host"]
    commands: list[Any] = []
    for kind in rng.choices(kinds, [3, 3, 3, 1, 1], k=60):
        touched = [rng.choice([reads, writes])(r) for r in rng.sample(range(5), rng.randint(1, 3))]
        commands.append([kind] if kind == "wait" else [kind, touched])
    log = simulate(commands)
    assert list(unguarded(log)) == []
    own = [
        index
        for index in barriers(log)
        if log[index]["execution"] == log[index]["memory"] == ["compute", "transfer"]
        and log[index]["to"] == "compute"
        and log[index + 1]["event"] == "command"
    ]
    assert len(own) >= sum(command[0] == "recording" for command in commands)
    # And without these barriers something is missed.
    bare = log
    for index in reversed(own):
        bare = without(bare, index)
    assert list(unguarded(bare)) != []


def test_more_ranges_than_are_remembered(simulate: Simulate) -> None:
    """Many small accesses become one large one: perhaps a barrier too many, never one too few."""
    rng = random.Random(0)
    commands = []
    for _ in range(300):
        begin = rng.randrange(0, 1000, 2)
        commands.append(["transfer", [[0, rng.choice("rw"), begin, begin + 1]]])
    assert list(unguarded(simulate([*commands, ["compute", [reads(0, 0, 1000)]]]))) == []


@pytest.fixture
def logged(vulkan: VulkanDevice) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """Log what the device records during a test; call it for the log."""
    vulkan.sync()
    vulkan.hook("hazard_log")(0, True)
    yield lambda: json.loads(vulkan.hook("hazard_log_read")(0))
    vulkan.hook("hazard_log")(0, False)
    vulkan.configure(direct_copies=1, staging_chunk_bytes=4 << 20, staging_chunks=4)


@pytest.mark.parametrize("direct", [0, 1])
@pytest.mark.parametrize("seed", range(4))
def test_what_is_really_recorded(
    vulkan: VulkanDevice, logged: Callable[[], list[dict[str, Any]]], seed: int, direct: int
) -> None:
    """Kernels and copies of both kinds over a few tensors, with their results checked too."""
    vulkan.configure(direct_copies=direct, staging_chunk_bytes=256, staging_chunks=2)
    rng = random.Random(seed)
    run = vulkan.module(AFFINE)["affine"]
    n = 200
    expected = [np.full(n, i, np.float32) for i in range(4)]
    tensors = [vulkan.tensor(each) for each in expected]
    for _ in range(60):
        i, j = rng.sample(range(4), 2)
        kind = rng.choice(["kernel", "kernel", "kernel", "copy", "upload", "download"])
        if kind == "kernel":
            run(tensors[i], tensors[j], n, 0.5, 1.0, 4, 64)
            expected[j] = expected[i] * np.float32(0.5) + np.float32(1)
        elif kind == "copy":
            vulkan.copy(tensors[i], tensors[j])
            expected[j] = expected[i]
        elif kind == "upload":
            expected[j] = np.full(n, rng.random(), np.float32)
            vulkan.fill(tensors[j], expected[j])
        else:
            np.testing.assert_array_equal(vulkan.numpy(tensors[i]), expected[i])
    for tensor, values in zip(tensors, expected, strict=True):
        np.testing.assert_array_equal(vulkan.numpy(tensor), values)
    log = logged()
    assert len(barriers(log)) > 10
    assert_sound_and_minimal(log)
