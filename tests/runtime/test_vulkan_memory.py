"""The device's memory: blocks that tensors share, what there is no room for, types of memory."""

from __future__ import annotations

import ctypes
import itertools
import json
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from support.vulkan_device import AFFINE, SPIN, VulkanDevice

BLOCK = 64 << 20
SMALL = 1 << 20  # of blocks here; a tensor of up to an eighth shares one


@pytest.fixture
def device(vulkan: VulkanDevice) -> Iterator[VulkanDevice]:
    """The device with small blocks, none of them in use by tensors that will be freed."""
    vulkan.configure(block_bytes=SMALL)
    vulkan.sync()
    yield vulkan
    vulkan.hook("simulate")(0, "allocation_limit", 0)
    vulkan.hook("simulate")(0, "out_of_memory", 0)
    vulkan.configure(block_bytes=BLOCK)
    vulkan.sync()


def place(tensor: Any) -> tuple[int, int]:
    """Its first byte's address, and that of the byte behind its last."""
    bytes_ = int(np.prod(tuple(tensor.shape))) * np.dtype(str(tensor.dtype)).itemsize
    return tensor.data_ptr(), tensor.data_ptr() + bytes_


def test_tensors_come_and_go_without_overlap(device: VulkanDevice) -> None:
    before = device.statistics()
    rng = random.Random(1)
    kept: list[tuple[Any, np.ndarray]] = []
    for step in range(3000):
        growing = step // 500 % 2 == 0
        if kept and rng.random() < (0.3 if growing else 0.7):
            tensor, content = kept.pop(rng.randrange(len(kept)))
            np.testing.assert_array_equal(device.numpy(tensor), content)
            del tensor
        else:
            size = rng.choice([0, 1, 3, 64, 65, 1000, rng.randrange(200_000)])
            content = np.full(size, rng.randrange(256), np.uint8)
            kept.append((device.tensor(content), content))
        if step % 100 == 0:
            places = sorted(place(tensor) for tensor, _ in kept)
            assert all(begin % 64 == 0 for begin, _ in places)
            for (_, end), (begin, _) in itertools.pairwise(places):
                assert end <= begin
            now = device.statistics()
            assert now["blocks"] > 0
            assert now["allocated_bytes"] <= now["reserved_bytes"]
    kept.clear()
    device.sync()
    after = device.statistics()
    assert after["allocated_bytes"] == before["allocated_bytes"]
    assert after["live_allocations"] == before["live_allocations"]
    assert after["blocks"] <= before["blocks"] + 1, "one empty block is kept"
    assert after["reserved_bytes"] <= before["reserved_bytes"] + SMALL


def test_more_tensors_than_drivers_allow_allocations(device: VulkanDevice) -> None:
    device.configure(block_bytes=BLOCK)
    before = device.statistics()["device_allocations"]
    kept = [device.empty([256]) for _ in range(10_000)]
    assert device.statistics()["device_allocations"] <= before + 1
    assert len({tensor.data_ptr() for tensor in kept}) == len(kept)
    content = np.arange(256, dtype=np.float32)
    device.fill(kept[5000], content)
    run = device.module(AFFINE)["affine"]
    run(kept[5000], kept[4999], 256, 2.0, 1.0, 4, 64)
    np.testing.assert_array_equal(device.numpy(kept[4999]), content * 2 + 1)
    np.testing.assert_array_equal(device.numpy(kept[5000]), content)


def test_large_tensors_have_memory_of_their_own(device: VulkanDevice) -> None:
    before = device.statistics()
    large = device.empty([SMALL // 8 + 1], "uint8")
    now = device.statistics()
    assert now["blocks"] == before["blocks"]
    assert now["reserved_bytes"] - before["reserved_bytes"] == SMALL // 8 + 16, large.shape


def test_neighbours_in_a_block_are_guarded_one_by_one(device: VulkanDevice) -> None:
    """Hazards and the ends of tensors are those of tensors, not of what they lie in."""
    run = device.module(AFFINE)["affine"]
    a, b, c, d = (device.tensor(np.full(64, k, np.float32)) for k in range(4))
    device.sync()
    barriers = device.statistics()["barriers"]
    run(a, b, 64, 2.0, 1.0, 1, 64)
    run(c, d, 64, 2.0, 1.0, 1, 64)
    assert device.statistics()["barriers"] == barriers
    run(b, c, 64, 2.0, 1.0, 1, 64)
    assert device.statistics()["barriers"] == barriers + 1
    assert (device.numpy(c) == 3).all()
    gone = d.data_ptr()
    del d
    device.sync()
    with pytest.raises(RuntimeError, match="for x, where vulkan:0 .* has no tensor"):
        run(ctypes.c_void_p(gone), c, 64, 2.0, 1.0, 1, 64)


def test_what_is_in_use_is_not_given_to_another(device: VulkanDevice) -> None:
    spin = device.module(SPIN)["spin"]
    a = device.tensor(np.full(64, 0.5, np.float32))
    address = a.data_ptr()
    spin(a, 2_000_000, 1, 64)
    del a
    assert device.statistics()["pending_frees"] == 1
    assert all(device.empty([64]).data_ptr() != address for _ in range(20))
    device.sync()
    assert device.statistics()["pending_frees"] == 0


def fill_blocks(device: VulkanDevice) -> list[Any]:
    """Tensors, so that the next small one needs another block."""
    blocks, kept = device.statistics()["blocks"], []
    while device.statistics()["blocks"] == blocks:
        kept.append(device.empty([SMALL // 8], "uint8"))
    kept += [device.empty([SMALL // 8], "uint8") for _ in range(7)]
    return kept


def test_without_room_for_a_block_a_tensor_gets_its_own(device: VulkanDevice) -> None:
    kept = fill_blocks(device)
    before = device.statistics()
    device.hook("simulate")(0, "out_of_memory", 1)
    kept.append(device.empty([SMALL // 8], "uint8"))
    after = device.statistics()
    assert after["reclaims"] == before["reclaims"]
    assert after["blocks"] == before["blocks"]
    assert after["reserved_bytes"] - before["reserved_bytes"] == SMALL // 8


def test_out_of_memory_is_tried_again_after_collecting(device: VulkanDevice) -> None:
    kept = fill_blocks(device)
    before = device.statistics()["reclaims"]
    device.hook("simulate")(0, "out_of_memory", 2)
    kept.append(device.empty([SMALL // 8], "uint8"))
    assert device.statistics()["reclaims"] == before + 1
    device.configure(block_bytes=0)
    device.hook("simulate")(0, "out_of_memory", 1)
    kept.append(device.empty([16]))
    assert device.statistics()["reclaims"] == before + 2
    device.hook("simulate")(0, "out_of_memory", 2)
    with pytest.raises(RuntimeError, match=r"out of memory .*: 1024 bytes .* are available"):
        device.empty([256])
    assert device.numpy(device.tensor(np.ones(3, np.float32))).sum() == 3


def test_an_empty_block_is_given_up_for_what_is_larger(device: VulkanDevice) -> None:
    fill_blocks(device)  # and freed again
    device.sync()
    blocks = device.statistics()["blocks"]
    device.hook("simulate")(0, "out_of_memory", 1)
    large = device.empty([SMALL], "uint8")
    assert device.statistics()["blocks"] == blocks - 1, large.shape


def test_an_allocation_beyond_the_device_is_refused(device: VulkanDevice) -> None:
    with pytest.raises(RuntimeError, match=r"cannot allocate 70368744177664 bytes \(64.00 TiB\)"):
        device.empty([1 << 46], "uint8")


def test_the_number_of_allocations_is_bounded(device: VulkanDevice) -> None:
    device.configure(block_bytes=0)
    count = device.statistics()["device_allocations"]
    device.hook("simulate")(0, "allocation_limit", count + 2)
    kept = [device.empty([16]) for _ in range(2)]
    with pytest.raises(RuntimeError, match=rf"allows {count + 2} .*maxMemoryAllocationCount"):
        device.empty([16])
    kept.pop()
    assert device.empty([16]) is not None


def test_blocks_count_among_the_allocations(device: VulkanDevice) -> None:
    kept = fill_blocks(device)
    count = device.statistics()["device_allocations"]
    device.hook("simulate")(0, "allocation_limit", count)
    with pytest.raises(RuntimeError, match=rf"allows {count} .*maxMemoryAllocationCount"):
        device.empty([SMALL // 8], "uint8")
    kept.pop()
    assert device.empty([SMALL // 8], "uint8") is not None


LOCAL, VISIBLE, COHERENT, CACHED, LAZY, UNCACHED_AMD = 1, 2, 4, 8, 16, 128
SHARED = VISIBLE | COHERENT
DISCRETE = [SHARED, LOCAL, LOCAL | SHARED, SHARED | CACHED, LOCAL | LAZY]
APU = [LOCAL, SHARED, LOCAL | SHARED, SHARED | CACHED, LOCAL | SHARED | CACHED | UNCACHED_AMD]


@pytest.mark.parametrize(("types", "unified", "kind", "expected"), [
    pytest.param(DISCRETE, False, "device", [1, 2], id="discrete"),
    pytest.param(DISCRETE, False, "upload", [0, 3, 2], id="discrete, upload"),
    pytest.param(DISCRETE, False, "readback", [3, 0, 2], id="discrete, readback"),
    pytest.param([LOCAL | SHARED], False, "device", [0], id="all is visible"),
    pytest.param([SHARED], False, "device", [0], id="nothing is local"),
    pytest.param(APU, True, "device", [2, 3, 0, 1], id="a small local heap, then the host's"),
    pytest.param([LOCAL | VISIBLE, LOCAL | SHARED], True, "device", [1, 0], id="coherent first"),
    pytest.param([LOCAL | VISIBLE | CACHED, SHARED], True, "upload", [1], id="always coherent"),
])  # fmt: skip
def test_memory_is_looked_for_in_order(
    vulkan: VulkanDevice, types: list[int], unified: bool, kind: str, expected: list[int]
) -> None:
    plan = vulkan.hook("memory_plan")
    assert json.loads(plan(json.dumps([types, unified, kind]))) == expected
