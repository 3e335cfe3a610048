"""What takes a process of its own: the choice of a device, its loss, exits, caches, layers."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from support.vulkan_device import VulkanDevice, run_apart

START = """
import numpy as np
from mxforge import vulkan
from mxforge.errors import VulkanError
"""
LAUNCH = (
    START
    + """
vk = VulkanDevice()
module = vk.module(AFFINE, SPIN, DYNAMIC)
a, b = vk.tensor(np.ones(64, np.float32)), vk.empty([64])
def launch():
    module["affine"](a, b, 64, 2.0, 1.0, 1, 64)
"""
)


@pytest.fixture(autouse=True)
def _built(vulkan: VulkanDevice) -> None:
    """The processes use the library that the session has built."""


def said(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 0, result.stderr + result.stdout
    return result.stdout.strip()


def refusal(**environment: str) -> str:
    code = START + "\ntry:\n    print(vulkan.check().name)\nexcept VulkanError as e:\n    print(e)"
    return said(run_apart(code, **environment))


def test_a_device_is_chosen_by_index_name_or_type(vulkan: VulkanDevice) -> None:
    described = json.loads(vulkan.hook("devices")())
    name, kind = described[0]["name"], described[0]["type"]
    for choice in ("0", name, name[1:6].upper(), kind):
        assert refusal(MXFORGE_VULKAN_DEVICE=choice) == name


@pytest.mark.parametrize("choice", ["99", "no such GPU"])
def test_a_choice_that_matches_nothing_lists_what_there_is(
    vulkan: VulkanDevice, choice: str
) -> None:
    name = json.loads(vulkan.hook("devices")())[0]["name"]
    message = refusal(MXFORGE_VULKAN_DEVICE=choice)
    assert f"MXFORGE_VULKAN_DEVICE={choice}" in message
    assert f"0 {name}" in message


def test_no_loader_says_what_to_install() -> None:
    assert "libvulkan1" in refusal(MXFORGE_VULKAN_LOADER="/nowhere/libvulkan.so")


def test_no_driver_says_what_to_install() -> None:
    nothing = {"VK_ICD_FILENAMES": "/nowhere.json", "VK_DRIVER_FILES": "/nowhere.json"}
    assert "mesa-vulkan-drivers" in refusal(**nothing)


def test_a_library_that_is_not_there_says_how_to_build_it() -> None:
    code = "VulkanDevice()"
    message = run_apart(code, MXFORGE_VULKAN_LIBRARY="/nowhere/lib.so").stderr
    assert "python -m mxforge.native.build" in message
    assert "libvulkan-dev" in message


def test_loading_beside_the_whole_of_tvm() -> None:
    code = "import tvm\n" + LAUNCH + "launch(); print(vk.numpy(b)[0], tvm.vulkan(0).exist)"
    assert said(run_apart(code)) == "3.0 True"


def test_tvm_asks_the_device_for_its_attributes() -> None:
    code = "import tvm\n" + LAUNCH + (
        "d = tvm.vulkan(0)\n"
        "print(d.max_threads_per_block > 0, d.warp_size > 0, len(d.device_name) > 0, "
        "d.total_global_memory > 0, tvm.vulkan(77).exist)"
    )  # fmt: skip
    assert said(run_apart(code)) == "True True True True False"


def test_a_lost_device_takes_no_more_work() -> None:
    code = (
        LAUNCH
        + """
vk.hook("simulate")(0, "device_lost", 1)
for action in (lambda: (launch(), vk.sync()), launch, lambda: vk.empty([1]), lambda: vk.numpy(a)):
    try:
        action()
    except RuntimeError as error:
        print(error)
del a, b, module
"""
    )
    lines = said(run_apart(code)).splitlines()
    assert len(lines) == 4
    assert "was lost in vkQueueSubmit" in lines[0]
    assert all("was lost earlier" in line for line in lines[1:])


def test_the_first_cause_of_a_loss_is_kept() -> None:
    code = (
        LAUNCH
        + """
vk.hook("simulate")(0, "out_of_memory_at_submit", 1)
for action in (lambda: (launch(), vk.sync()), launch, lambda: vk.empty([1])):
    try:
        action()
    except RuntimeError as error:
        print(error)
"""
    )
    lines = said(run_apart(code)).splitlines()
    assert len(lines) == 3
    assert "takes no more work" in lines[0]
    for line in lines:
        assert "vkQueueSubmit answered VK_ERROR_OUT_OF_DEVICE_MEMORY" in line
        assert "DEVICE_LOST" not in line


@pytest.mark.parametrize("end", ["", "import sys; sys.exit(3)", "import os; os._exit(4)",
                                 "1 / 0"])  # fmt: skip
@pytest.mark.parametrize("submitted", [False, True])
def test_a_process_may_end_with_work_pending(end: str, submitted: bool) -> None:
    code = LAUNCH + "module['spin'](a, 30_000_000, 1, 64)\n"
    if submitted:
        code += "vk.configure(batch_commands=1)\nmodule['spin'](a, 30_000_000, 1, 64)\n"
    expected = {"": 0, "1 / 0": 1}.get(end) if "exit" not in end else int(end[-2])
    assert run_apart(code + end).returncode == expected


def test_pipelines_come_from_the_cache_the_next_time(tmp_path: Path) -> None:
    code = LAUNCH + "launch(); vk.sync(); s = vk.statistics()\n" + (
        "print(s['pipeline_cache_status'], s['pipeline_cache_loaded_bytes'], vk.numpy(b)[0])"
    )  # fmt: skip

    def run() -> list[str]:
        return said(run_apart(code, MXFORGE_CACHE_DIR=str(tmp_path))).split()

    assert run() == ["absent", "0", "3.0"]
    (file,) = (tmp_path / "vulkan").iterdir()
    assert file.suffix == ".bin"
    whole = file.read_bytes()
    status, size, value = run()
    assert (status, value) == ("loaded", "3.0")
    assert int(size) == len(whole) - 24
    damages = {
        "corrupt": [b"", whole[:-1], whole[:30], whole[:40] + b"\xff" + whole[41:], whole * 2],
        "foreign": [_with_other_vendor(whole)],
    }
    for expected, contents in damages.items():
        for content in contents:
            file.write_bytes(content)
            assert run() == [expected, "0", "3.0"]
            assert file.read_bytes()[:24] == whole[:24], "rebuilt"
    assert list((tmp_path / "vulkan").iterdir()) == [file], "nothing temporary is left"


def test_the_cache_is_not_written_anew_for_every_size_of_a_launch(tmp_path: Path) -> None:
    code = LAUNCH + (
        "c = vk.tensor(np.zeros(5, np.uint32))\n"
        "for x in range(1, 13): module['dynamic'](c, 5, x, 1)\n"
        "print(vk.statistics()['pipeline_cache_saves'], vk.numpy(c)[0])"
    )
    assert said(run_apart(code, MXFORGE_CACHE_DIR=str(tmp_path))) == "1 12001"


def _with_other_vendor(whole: bytes) -> bytes:
    """A file for another GPU, with its checksum right."""
    data = bytearray(whole[24:])
    data[8] ^= 0xFF
    checksum = 0xCBF29CE484222325
    for byte in data:
        checksum = (checksum ^ byte) * 0x100000001B3 % (1 << 64)
    return whole[:16] + checksum.to_bytes(8, "little") + bytes(data)


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    code = LAUNCH + "launch(); print(vk.numpy(b)[0])"
    assert said(run_apart(code, MXFORGE_CACHE_DIR=str(tmp_path / "file"))) == "3.0"


WORK = (
    LAUNCH
    + """
for direct in (1, 0):
    vk.configure(direct_copies=direct, staging_chunk_bytes=4096, staging_chunks=2,
                 block_bytes=0 if direct else 64 << 20)
    x = np.arange(10_001, dtype=np.float32)
    c, d = vk.tensor(x), vk.empty([10_001])
    for _ in range(300):
        module["affine"](c, d, 10_001, 2.0, 1.0, 157, 64)
        module["affine"](d, c, 10_001, 0.5, -0.5, 157, 64)
    vk.copy(c, d)
    assert np.array_equal(vk.numpy(d), x)
    e = vk.tensor(np.zeros(7, np.uint32))
    module["dynamic"](e, 5, 8, 4)
    module["dynamic"](e, 5, 16, 2)
    assert vk.numpy(e)[0] == 16002
    vk.hook("profile")(0, True)
    launch()
    vk.hook("profile_read")(0)
    vk.hook("profile")(0, False)
    use, create = vk.device_api("SetStream"), vk.device_api("StreamCreate")
    stream = create(vk.device)
    launch()
    vk.device_api("StreamSyncFromTo")(vk.device, 0, stream)
    use(vk.device, stream)
    launch()
    vk.sync()
    use(vk.device, 0)
    vk.device_api("StreamFree")(vk.device, stream)
names = ["p%d" % i for i in range(20)]
source = "layout(local_size_x = 64) in; layout(buffer_reference, std430, " \\
    "buffer_reference_align = 16) buffer B { F p[20]; }; " \\
    "layout(push_constant) uniform P { B b; } p; " \\
    "void main() { p.b.p[19].v[gl_GlobalInvocationID.x] = p.b.p[3].v[gl_GlobalInvocationID.x]; }"
many = kernel("many", source, [pointer(n, 8 * i, "rw") for i, n in enumerate(names)],
              argument_buffer=True)
vk.module(many)["many"](*[a] * 19, b, 1, 64)
assert vk.numpy(b)[0] == 1
del c, d, e
vk.sync()
"""
)
REPORT = """
import json
report = json.loads(vk.hook("validation_messages")())
print("watching", report["watching"])
for message in report["messages"]:
    print(message)
"""


def test_the_validation_layers_have_nothing_to_say(watched: dict[str, str]) -> None:
    result = run_apart(WORK + REPORT, **watched)
    assert said(result) == "watching True"
    assert result.stderr == ""


def test_the_validation_layers_do_watch(watched: dict[str, str]) -> None:
    """A kernel that reads far outside is told of: the silence above means something."""
    code = LAUNCH + "module['affine'](a, b, 1 << 20, 1.0, 1.0, 1 << 10, 64)\nvk.sync()\n" + REPORT
    result = run_apart(code, **watched)
    assert "out of bounds" in result.stdout.lower(), result.stdout + result.stderr


def test_staging_outlives_the_stream_that_used_it() -> None:
    """The next stream may lie where a freed one lay; what was in use by that one is free."""
    code = (
        LAUNCH
        + """
vk.configure(direct_copies=0, staging_chunk_bytes=4096, staging_chunks=2)
use, create, free = (vk.device_api(n) for n in ("SetStream", "StreamCreate", "StreamFree"))
data = np.arange(1024, dtype=np.float32)
tensor = vk.empty([1024])
for _ in range(3):
    stream = create(vk.device)
    use(vk.device, stream)
    for _ in range(6):
        vk.fill(tensor, data)
    vk.sync()
    use(vk.device, 0)
    free(vk.device, stream)
    other = create(vk.device)
    for _ in range(6):
        vk.fill(tensor, data)
    free(vk.device, other)
print(np.array_equal(vk.numpy(tensor), data))
"""
    )
    assert said(run_apart(code)) == "True"


def test_a_module_lives_on_after_a_loss(vulkan: VulkanDevice) -> None:
    """Its pipelines are made again on the device opened anew, and destroyed with the lost one."""
    code = """
import numpy as np
vk = VulkanDevice()
module = vk.module(AFFINE, DYNAMIC)
def run():
    x, y = vk.tensor(np.ones(64, np.float32)), vk.empty([64])
    count = vk.tensor(np.zeros(5, np.uint32))
    module["affine"](x, y, 64, 2.0, 1.0, 1, 64)
    module["dynamic"](count, 5, 8, 4)
    return vk.numpy(y)[0], vk.numpy(count)[0]
vk.configure(staging_chunks=3)
for how in ("", "device_lost", "device_lost_at_wait", "device_lost"):
    if how:
        vk.hook("simulate")(0, how, 1)
        try:
            run()
        except RuntimeError as error:
            print("lost" in str(error))
    print(*run())
"""
    result = run_apart(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[:-1] == ["3.0 8004", *["True", "3.0 8004"] * 3]
