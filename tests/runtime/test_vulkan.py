"""The device API: launches, copies, memory, streams, pipelines, on whatever Vulkan is here."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from support.vulkan_device import (
    AFFINE,
    DYNAMIC,
    SPIN,
    VulkanDevice,
    kernel,
    pointer,
    scalar,
    spirv,
)

UNHEARD_OF = {  # a product that no device has
    "m": 48, "n": 48, "k": 48,
    "a": "float16", "b": "float16", "c": "float32", "result": "float32",
}  # fmt: skip
DEFAULTS = {
    "direct_copies": 1,
    "batch_commands": 256,
    "first_batch_commands": 32,
    "batch_milliseconds": 100,
    "batches_in_flight": 8,
    "staging_chunk_bytes": 4 << 20,
    "staging_chunks": 4,
}


@pytest.fixture
def device(vulkan: VulkanDevice) -> Iterator[VulkanDevice]:
    """The device with its usual settings, before and after."""
    yield vulkan
    vulkan.configure(**DEFAULTS)
    vulkan.sync()


@pytest.fixture(params=["direct", "staged"])
def copying(request: pytest.FixtureRequest, device: VulkanDevice) -> VulkanDevice:
    """The device, copying by the host's own hand or through small staging buffers."""
    if request.param == "staged":
        device.configure(direct_copies=0, staging_chunk_bytes=4096, staging_chunks=3)
    return device


def affine(device: VulkanDevice) -> Any:
    function = device.module(AFFINE)["affine"]

    def call(x: Any, y: Any, scale: float = 2.0, shift: float = 1.0) -> None:
        n = x.shape[0]
        function(x, y, n, scale, shift, (n + 63) // 64, 64)

    return call


@pytest.mark.parametrize("n", [1, 63, 64, 65, 1000, 100_003])
def test_a_kernel_runs_over_what_was_copied(copying: VulkanDevice, n: int) -> None:
    x = np.random.default_rng(n).standard_normal(n).astype(np.float32)
    a, b = copying.tensor(x), copying.empty([n])
    affine(copying)(a, b)
    np.testing.assert_array_equal(copying.numpy(b), x * 2 + 1)


@pytest.mark.parametrize("size", [1, 3, 4095, 4096, 4097, 12_289, 100_001])
def test_bytes_of_any_number_come_back(copying: VulkanDevice, size: int) -> None:
    data = np.random.default_rng(size).integers(0, 256, size).astype(np.uint8)
    tensor = copying.tensor(data)
    np.testing.assert_array_equal(copying.numpy(tensor), data)
    copying.fill(tensor, data[::-1])
    np.testing.assert_array_equal(copying.numpy(tensor), data[::-1])


@pytest.mark.parametrize(("offset", "size"), [(0, 7), (1, 1), (3, 4098), (4095, 9000)])
def test_views_copy_at_odd_offsets(copying: VulkanDevice, offset: int, size: int) -> None:
    view = copying.ffi.get_global_func("runtime.TVMTensorCreateView")
    data = np.arange(20_000, dtype=np.uint32).astype(np.uint8)
    base = copying.tensor(data)
    part = view(base, copying.ffi.Shape((size,)), copying.ffi.dtype("uint8"), offset)
    np.testing.assert_array_equal(copying.numpy(part), data[offset : offset + size])
    copying.fill(part, np.full(size, 7, np.uint8))
    data[offset : offset + size] = 7
    np.testing.assert_array_equal(copying.numpy(base), data)


def test_copies_within_the_device_may_overlap(copying: VulkanDevice) -> None:
    view = copying.ffi.get_global_func("runtime.TVMTensorCreateView")
    data = np.arange(10_000, dtype=np.uint32).astype(np.uint8)
    base, other = copying.tensor(data), copying.empty([10_000], "uint8")
    copying.copy(base, other)
    np.testing.assert_array_equal(copying.numpy(other), data)

    def part(offset: int) -> Any:
        return view(base, copying.ffi.Shape((5001,)), copying.ffi.dtype("uint8"), offset)

    copying.copy(part(3), part(1000))
    expected = data.copy()
    expected[1000:6001] = data[3:5004]
    np.testing.assert_array_equal(copying.numpy(base), expected)


def test_upload_waits_its_turn_behind_kernels(copying: VulkanDevice) -> None:
    """A tensor is overwritten while kernels that read it may still run."""
    run, n = affine(copying), 4096
    a, outs = copying.empty([n]), [copying.empty([n]) for _ in range(20)]
    for k, out in enumerate(outs):
        copying.fill(a, np.full(n, k, np.float32))
        run(a, out)
    for k, out in enumerate(outs):
        assert (copying.numpy(out) == 2 * k + 1).all()


def test_chains_of_thousands_of_dispatches(device: VulkanDevice) -> None:
    run, before = affine(device), device.statistics()
    a, b = device.tensor(np.zeros(64, np.float32)), device.empty([64])
    for _ in range(2500):
        run(a, b, 1.0, 1.0)
        run(b, a, 1.0, 1.0)
    assert (device.numpy(a) == 5000).all()
    after = device.statistics()
    assert after["dispatches"] - before["dispatches"] == 5000
    assert after["submits"] - before["submits"] < 200, "batches, not one submit a kernel"


def test_scalars_of_every_type_arrive(device: VulkanDevice) -> None:
    dtypes = ["int8", "uint8", "int16", "float16", "int32", "uint32", "bool", "float32", "int64",
              "float64"]  # fmt: skip
    offset, arguments = 8, [pointer("x", 0, "w")]
    for dtype in dtypes:
        size = 4 if dtype == "bool" else np.dtype(dtype).itemsize
        offset = (offset + size - 1) // size * size
        arguments.append(scalar(dtype, dtype, offset))
        offset += size
    words = (offset + 7) // 8 * 2
    source = (
        "layout(local_size_x = 1) in;"
        f"layout(push_constant) uniform P {{ U x; uint w[{words - 2}]; }} p;"
        f"void main() {{ for (int i = 0; i < {words - 2}; ++i) p.x.v[i] = p.w[i]; }}"
    )
    entry = kernel("scalars", source, arguments, local_size=[1, 1, 1],
                   argument_bytes=words * 4, launch_params=["blockIdx.x"])  # fmt: skip
    values = [-3, 200, -30_000, 0.1, -2_000_000_000, 4_000_000_000, True, 1e-3, -(1 << 60), 1 / 3]
    out = device.empty([words - 2], "uint32")
    device.module(entry)["scalars"](out, *values, 1)
    block = bytes(8) + device.numpy(out).tobytes()
    for dtype, argument, value in zip(dtypes, arguments[1:], values, strict=True):
        kind = "uint32" if dtype == "bool" else dtype
        found = np.frombuffer(block, kind, 1, argument["offset"])[0]
        assert found == np.dtype(kind).type(value), dtype


@pytest.mark.parametrize("value", [
    0.0, -0.0, 1.0, 65504, 65519.9, 65520, -1e9, 6e-8, 2.9e-8, 2.98023223876953125e-8, 6.1e-5,
    1 + 2**-11, 1 + 3 * 2**-11, float("inf"), 2047.5, 0.333333333333,
])  # fmt: skip
def test_half_arguments_round_to_nearest_even(device: VulkanDevice, value: float) -> None:
    source = (
        "layout(local_size_x = 1) in;"
        "layout(push_constant) uniform P { U x; uint w; } p; void main() { p.x.v[0] = p.w; }"
    )
    entry = kernel("half", source, [pointer("x", 0, "w"), scalar("h", "float16", 8)],
                   local_size=[1, 1, 1], launch_params=["blockIdx.x"])  # fmt: skip
    out = device.empty([1], "uint32")
    device.module(entry)["half"](out, value, 1)
    with np.errstate(over="ignore"):
        assert device.numpy(out)[0] & 0xFFFF == np.float16(value).view(np.uint16)


def test_more_arguments_than_push_constants_hold(device: VulkanDevice) -> None:
    count = 30
    names = [f"x{i}" for i in range(count)]
    source = (
        "layout(local_size_x = 64) in;"
        "layout(buffer_reference, std430, buffer_reference_align = 16) buffer B {"
        + "".join(f" F {name};" for name in names)
        + " F out_; int n; };"
        "layout(push_constant) uniform P { B b; } p;"
        "void main() { uint i = gl_GlobalInvocationID.x; if (i >= p.b.n) return; p.b.out_.v[i] = "
        + " + ".join(f"p.b.{name}.v[i]" for name in names)
        + "; }"
    )
    arguments = [pointer(name, 8 * i, "r") for i, name in enumerate(names)]
    arguments += [pointer("out_", 8 * count, "w"), scalar("n", "int32", 8 * count + 8)]
    entry = kernel("sum", source, arguments, argument_buffer=True)
    function = device.module(entry)["sum"]
    before = device.statistics()["argument_buffers"]
    data = [np.full(100, i, np.float32) for i in range(count)]
    inputs = [device.tensor(each) for each in data]
    out = device.empty([100])
    for _ in range(400):  # more than one chunk of argument memory, more than one batch
        function(*inputs, out, 100, 2, 64)
    np.testing.assert_array_equal(device.numpy(out), sum(data))
    assert device.statistics()["argument_buffers"] == before + 400


def test_block_sizes_known_at_launch(device: VulkanDevice) -> None:
    function = device.module(DYNAMIC)["dynamic"]
    for x, y in [(1, 1), (32, 4), (7, 3), (32, 4)]:
        out = device.tensor(np.zeros(5, np.uint32))
        function(out, 5, x, y)
        assert (device.numpy(out) == x * 1000 + y).all()
    with pytest.raises(RuntimeError, match=r"dynamic has blocks of 1000000 threads in x"):
        function(out, 5, 1_000_000, 1)


def test_an_empty_launch_does_nothing(device: VulkanDevice) -> None:
    before = device.statistics()["dispatches"]
    a = device.tensor(np.ones(4, np.float32))
    device.module(AFFINE)["affine"](a, a, 0, 1.0, 0.0, 0, 64)
    assert device.statistics()["dispatches"] == before


def test_wrong_calls_are_refused(device: VulkanDevice) -> None:
    function = device.module(AFFINE)["affine"]
    a = device.empty([64])
    with pytest.raises(TypeError, match="5 arguments and 2 extents of its launch but got 3"):
        function(a, a, 1)
    with pytest.raises(TypeError, match="takes an integer for n but got float"):
        function(a, a, 1.5, 1.0, 0.0, 1, 64)
    with pytest.raises(TypeError, match="takes a pointer for x but got int"):
        function(3, a, 1, 1.0, 0.0, 1, 64)
    with pytest.raises(RuntimeError, match="blocks of 64 threads in x but was launched with 32"):
        function(a, a, 1, 1.0, 0.0, 1, 32)
    with pytest.raises(RuntimeError, match=r"launched with 70000000000 blocks in x, but .* allows"):
        function(a, a, 1, 1.0, 0.0, 70_000_000_000, 64)
    host = np.zeros(64, np.float32)
    with pytest.raises(RuntimeError, match="for x, where vulkan:0 .* has no tensor"):
        function(device.ffi.from_dlpack(host), a, 1, 1.0, 0.0, 1, 64)


@pytest.mark.parametrize(("offset", "alignment", "refused"), [
    (4, 4, False), (4, 8, True), (4, 16, True), (16, 16, False), (2, 4, True), (0, 64, False),
])  # fmt: skip
def test_misaligned_addresses_are_refused(
    device: VulkanDevice, offset: int, alignment: int, refused: bool
) -> None:
    view = device.ffi.get_global_func("runtime.TVMTensorCreateView")
    base, y = device.tensor(np.arange(72, dtype=np.float32)), device.empty([64])
    x = view(base, device.ffi.Shape((64,)), device.ffi.dtype("float32"), offset)
    arguments = [pointer("x", 0, "r", alignment), *AFFINE["arguments"][1:]]
    run = device.module({**AFFINE, "arguments": arguments})["affine"]
    address = base.data_ptr() + offset
    if not refused:
        run(x, y, 64, 2.0, 1.0, 1, 64)
        np.testing.assert_array_equal(device.numpy(y), np.arange(64) * 2 + offset // 4 * 2 + 1)
        return
    message = (
        f"Kernel affine needs a multiple of {alignment} as the address of x, its argument 0, but "
        f"got {address}, a multiple of {offset} only"
    )
    with pytest.raises(RuntimeError, match=message):
        run(x, y, 64, 2.0, 1.0, 1, 64)
    run(None, y, 0, 2.0, 1.0, 1, 64)  # what is not there is aligned


def test_freed_memory_waits_for_the_commands_that_use_it(device: VulkanDevice) -> None:
    spin, run = device.module(SPIN)["spin"], affine(device)
    a, b = device.tensor(np.full(64, 0.5, np.float32)), device.empty([64])
    before = device.statistics()
    spin(a, 2_000_000, 1, 64)
    run(a, b)
    del a
    during = device.statistics()
    assert during["deferred_frees"] == before["deferred_frees"] + 1
    assert during["pending_frees"] == before["pending_frees"] + 1
    assert np.isfinite(device.numpy(b)).all()
    device.sync()
    assert device.statistics()["pending_frees"] == 0


def test_streams_run_in_the_order_that_is_asked_for(device: VulkanDevice) -> None:
    spin, run = device.module(SPIN)["spin"], affine(device)
    create, free = device.device_api("StreamCreate"), device.device_api("StreamFree")
    use, after = device.device_api("SetStream"), device.device_api("StreamSyncFromTo")
    a, b, c = (device.tensor(np.zeros(64, np.float32)) for _ in range(3))
    first, second = create(device.device), create(device.device)
    try:
        for round_ in range(10):
            use(device.device, first)
            spin(c, 100_000, 1, 64)
            run(a, b, 1.0, 1.0)
            after(device.device, first, second)
            use(device.device, second)
            run(b, a, 1.0, 1.0)
            after(device.device, second, first)
            assert device.statistics()["streams"] == 3, round_
        assert (device.numpy(a) == 20).all()
    finally:
        use(device.device, 0)
        free(device.device, first)
        free(device.device, second)
    assert device.statistics()["streams"] == 1
    with pytest.raises(RuntimeError, match="has no stream"):
        free(device.device, first)


@pytest.fixture
def streams(device: VulkanDevice) -> Iterator[list[Any]]:
    """Three streams beside the default one."""
    made = [device.device_api("StreamCreate")(device.device) for _ in range(3)]
    yield made
    device.device_api("SetStream")(device.device, 0)
    for stream in made:
        device.device_api("StreamFree")(device.device, stream)


@pytest.mark.parametrize("through", [1, 2])
def test_order_reaches_through_streams_without_work(
    device: VulkanDevice, streams: list[Any], through: int
) -> None:
    """A before B before C: waiting for the last is waiting for A, though nothing else has work."""
    spin = device.module(SPIN)["spin"]
    use, sync = device.device_api("SetStream"), device.device_api("StreamSync")
    after = device.device_api("StreamSyncFromTo")
    a = device.tensor(np.full(64, 0.5, np.float32))
    spin(a, 1, 1, 64)
    device.sync()
    use(device.device, streams[0])
    for _ in range(20):
        spin(a, 1_000_000, 1, 64)
    use(device.device, 0)
    for source, target in itertools.pairwise(streams[: through + 1]):
        after(device.device, source, target)
    begin = time.perf_counter()
    sync(device.device, streams[through])
    waited = time.perf_counter() - begin
    begin = time.perf_counter()
    sync(device.device, streams[0])
    rest = time.perf_counter() - begin
    assert waited > 0.02
    assert rest < waited / 4, "the first stream had ended when the last had"


def test_what_the_host_waited_for_is_visible_to_every_stream(
    device: VulkanDevice, streams: list[Any]
) -> None:
    """Kernel on one stream, host waits, kernel on another: that one waits for the semaphore."""
    run, use = affine(device), device.device_api("SetStream")
    a, b, c = (device.tensor(np.zeros(64, np.float32)) for _ in range(3))
    device.sync()
    for stream in (0, streams[0], 0, streams[1]):  # the rest of earlier tests is waited for
        use(device.device, stream)
        run(c, c)
        device.sync()

    def waits(stream: Any, x: Any, y: Any) -> int:
        use(device.device, stream)
        before = device.statistics()["semaphore_waits"]
        run(x, y)
        device.sync()
        return int(device.statistics()["semaphore_waits"]) - before

    assert waits(streams[0], a, b) == 2, "for what two others have done since"
    assert waits(streams[1], b, c) == 1, "for the first's new work"
    assert waits(streams[1], b, c) == 0, "there is nothing new"
    assert (device.numpy(c) == 3).all()


def test_a_stream_may_be_freed_while_another_thread_waits_for_it(device: VulkanDevice) -> None:
    spin = device.module(SPIN)["spin"]
    create, free = device.device_api("StreamCreate"), device.device_api("StreamFree")
    use, sync = device.device_api("SetStream"), device.device_api("StreamSync")
    a = device.tensor(np.full(64, 0.5, np.float32))
    for _ in range(5):
        stream = create(device.device)
        use(device.device, stream)
        spin(a, 2_000_000, 1, 64)
        use(device.device, 0)
        reads: list[Any] = []

        def wait(stream: Any = stream) -> None:
            with contextlib.suppress(RuntimeError):  # who comes late finds no stream
                sync(device.device, stream)

        def read(into: list[Any] = reads) -> None:
            into.append(device.numpy(a))

        waiting = [threading.Thread(target=wait), threading.Thread(target=read)]
        for thread in waiting:
            thread.start()
        time.sleep(0.002)
        free(device.device, stream)
        again = create(device.device)
        for thread in waiting:
            thread.join()
        free(device.device, again)
        assert np.isfinite(reads[0]).all()
    assert device.statistics()["streams"] == 1


def test_threads_share_the_device(device: VulkanDevice) -> None:
    module = device.module(AFFINE, DYNAMIC)
    results: dict[int, Any] = {}

    def work(index: int) -> None:
        function = module["affine"]
        x = np.full(2000, index, np.float32)
        for _ in range(30):
            a, b = device.tensor(x), device.empty([2000])
            for _ in range(10):
                function(a, b, 2000, 1.0, 1.0, 32, 64)
                function(b, a, 2000, 1.0, 1.0, 32, 64)
            results[index] = device.numpy(a)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(6):
        assert (results[index] == index + 20).all()


@pytest.mark.parametrize(("needs", "message"), [
    ({"features": ["shaderMagic"]}, r"feature shaderMagic \(unknown to this runtime\)"),
    ({"extensions": ["VK_XYZ_none"]}, "extension VK_XYZ_none"),
    ({"subgroup_operations": ["telepathy"]}, r"subgroup operation telepathy \(it has .*basic.*\)"),
    ({"subgroup_size": 1000}, r"subgroup size 1000 \(it has"),
    ({"matrices": [UNHEARD_OF]}, r"matrices 48x48x48 float16 float16 float32 float32 \(it has "),
])  # fmt: skip
def test_missing_requirements_are_named(device: VulkanDevice, needs: Any, message: str) -> None:
    requirements = {**AFFINE["requirements"], **needs}
    function = device.module({**AFFINE, "requirements": requirements})["affine"]
    a = device.empty([64])
    with pytest.raises(RuntimeError, match=f"Kernel affine cannot run on .*{message}"):
        function(a, a, 1, 1.0, 0.0, 1, 64)


def test_a_module_runs_without_the_variants_that_the_device_lacks(device: VulkanDevice) -> None:
    """Whose code the driver never sees: that of this one is not for drivers."""
    requirements = {**AFFINE["requirements"], "matrices": [UNHEARD_OF], "subgroup_size": 4}
    code = spirv(AFFINE["code"]) + struct.pack("<I", 1 << 16 | 0xFFFF)  # no such instruction
    variant = {**AFFINE, "name": "variant", "code": code, "requirements": requirements}
    module = device.module(AFFINE, variant)
    a, b = device.tensor(np.ones(64, np.float32)), device.empty([64])
    module["affine"](a, b, 64, 2.0, 1.0, 1, 64)
    assert (device.numpy(b) == 3).all()
    device.hook("check")(module, 0)
    (told,) = json.loads(device.hook("variants")(module, 0))
    assert told["kernel"] == "variant"
    assert told["matrices"] == ["48x48x48 float16 float16 float32 float32"]
    assert told["subgroup_size"] == 4
    assert told["why_not"].startswith("Kernel variant cannot run on vulkan:0 ")
    with pytest.raises(RuntimeError, match="Kernel variant cannot run on vulkan:0"):
        module["variant"](a, b, 64, 2.0, 1.0, 1, 64)


def test_the_device_says_what_it_multiplies(device: VulkanDevice) -> None:
    from mxforge.vulkan import check

    multiplies = device.hook("multiplies")
    (least, most), matrices = check().subgroup_size, check().matrices
    for product in matrices:
        assert re.fullmatch(r"\d+x\d+x\d+( \w+){4}", product)
        assert multiplies(product, most) == 1
        assert multiplies(product, 2 * most) == multiplies(product, least // 2) == 0
    assert multiplies("48x48x48 float16 float16 float32 float32", most) == 0


def test_too_much_shared_memory_is_refused(device: VulkanDevice) -> None:
    function = device.module({**AFFINE, "shared_bytes": 1 << 24})["affine"]
    a = device.empty([64])
    with pytest.raises(RuntimeError, match="lacks: 16777216 bytes of shared memory"):
        function(a, a, 1, 1.0, 0.0, 1, 64)


def test_a_required_subgroup_size_is_used(device: VulkanDevice) -> None:
    described = json.loads(device.hook("devices")())[0]
    smallest = described["subgroup_size"][0]
    source = (
        "#extension GL_KHR_shader_subgroup_basic : require\nlayout(local_size_x = 64) in;"
        "layout(push_constant) uniform P { U x; } p;"
        "void main() { p.x.v[gl_GlobalInvocationID.x] = gl_SubgroupSize; }"
    )
    needs = {"subgroup_size": smallest, "subgroup_operations": ["basic"]}
    entry = kernel("subgroup", source, [pointer("x", 0, "w")], requirements=needs)
    out = device.empty([64], "uint32")
    device.module(entry)["subgroup"](out, 1, 64)
    assert (device.numpy(out) == smallest).all()


def test_full_subgroups_need_blocks_that_fill_them(device: VulkanDevice) -> None:
    smallest = json.loads(device.hook("devices")())[0]["subgroup_size"][0]
    needs = {"subgroup_size": smallest, "features": ["bufferDeviceAddress", "computeFullSubgroups"]}
    source = (
        "layout(local_size_x_id = 0) in; layout(push_constant) uniform P { U x; } p;"
        "void main() { p.x.v[gl_LocalInvocationIndex] = gl_LocalInvocationIndex; }"
    )
    entry = kernel("full", source, [pointer("x", 0, "w")], requirements=needs,
                   local_size=[0, 1, 1])  # fmt: skip
    out = device.empty([4 * smallest], "uint32")
    run = device.module(entry)["full"]
    run(out, 1, 4 * smallest)
    np.testing.assert_array_equal(device.numpy(out), np.arange(4 * smallest))
    message = (
        f"full has blocks of {smallest + 1} threads in x, but needs full subgroups, "
        f"a multiple of {smallest}"
    )
    with pytest.raises(RuntimeError, match=message):
        run(out, 1, smallest + 1)


def test_kernels_are_timed(device: VulkanDevice) -> None:
    spin, run = device.module(SPIN)["spin"], affine(device)
    a, b = device.tensor(np.zeros(64, np.float32)), device.empty([64])
    device.hook("profile")(0, True)
    try:
        for _ in range(3):
            spin(a, 10_000_000, 1, 64)  # long enough to stand out of a busy machine's noise
            run(a, b)
        times = json.loads(device.hook("profile_read")(0))
    finally:
        device.hook("profile")(0, False)
    assert times["spin"]["count"] == times["affine"]["count"] == 3
    assert times["spin"]["ns"] > times["affine"]["ns"] > 0


def test_devices_are_described(vulkan: VulkanDevice) -> None:
    from mxforge.vulkan import check, devices

    listed = devices()
    assert check() in listed
    for index, device in enumerate(listed):
        assert device.index == index
        assert device.usable == (device.reason == "")
        assert device.type in ("discrete", "integrated", "virtual", "cpu", "other")
    assert "bufferDeviceAddress" in check().features
    assert check().heaps[0].bytes > 0
    assert 1 <= check().subgroup_size[0] <= check().subgroup_size[1]


def test_pointers_of_another_stage_of_life(device: VulkanDevice) -> None:
    """A module may go before what it recorded has run."""
    a, b = device.tensor(np.ones(64, np.float32)), device.empty([64])
    for _ in range(50):
        affine(device)(a, b)
    assert (device.numpy(b) == 3).all()


@pytest.mark.parametrize(("limit", "batches", "expected"), [
    pytest.param(32, [[31, 1.0]] * 4, [64, 64, 64, 64], id="grows only where it was used"),
    pytest.param(32, [[32, 1.0], [64, 1.0], [128, 1.0], [256, 1.0]], [64, 128, 256, 256],
                 id="up to what is set"),
    pytest.param(32, [[32, 1600.0]], [2], id="shrinks at once"),
    pytest.param(32, [[1, 5000.0]], [1], id="never below one command"),
    pytest.param(1, [[1, 5000.0], [1, 1.0], [2, 1.0]], [1, 2, 4], id="recovers"),
    pytest.param(32, [[32, 80.0]], [40], id="to what fits"),
    pytest.param(32, [[3, 0.001]], [32], id="a small batch says little"),
    pytest.param(32, [[3, 90.0]], [3], id="unless it was slow"),
    pytest.param(32, [[32, 0.0]], [64], id="faster than the clock"),
])  # fmt: skip
def test_batches_shrink_and_grow_with_the_time_they_take(
    vulkan: VulkanDevice, limit: int, batches: list[list[float]], expected: list[int]
) -> None:
    simulate = vulkan.hook("batch_limit_simulate")
    assert json.loads(simulate(json.dumps([limit, 100.0, 256, batches]))) == expected


def test_long_kernels_make_small_batches(device: VulkanDevice) -> None:
    spin, run = device.module(SPIN)["spin"], affine(device)
    a, b = device.empty([16 * 64]), device.empty([64])
    c = device.tensor(np.zeros(64, np.float32))
    device.configure(batch_milliseconds=1)
    for _ in range(36):
        spin(a, 60_000, 16, 64)  # 10 ms and more
    device.sync()
    assert device.statistics()["batch_limit"] == 1
    before = device.statistics()["submits"]
    for _ in range(5):
        spin(a, 60_000, 16, 64)
    assert device.statistics()["submits"] == before + 5
    device.sync()
    device.configure(batch_milliseconds=100_000)
    for _ in range(600):
        run(c, b)
    device.sync()
    assert device.statistics()["batch_limit"] > 32
    device.configure(batch_milliseconds=0)
    device.sync()
    before = device.statistics()["submits"]
    for _ in range(100):
        run(c, b)
    device.sync()
    assert device.statistics()["submits"] <= before + 3, "only the number counts"
    assert (device.numpy(b) == 1).all()


def test_unknown_settings_are_refused(device: VulkanDevice) -> None:
    with pytest.raises(ValueError, match="no setting speed"):
        device.configure(speed=11)
