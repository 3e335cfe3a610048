"""The module format: what it keeps, and that no byte string harms the process."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import struct
from typing import Any

import numpy as np
import pytest
from support.vulkan_device import (
    AFFINE,
    DYNAMIC,
    HEADER,
    VERSION,
    VulkanDevice,
    module_bytes,
    spirv,
)


def packed(text: bytes, code: bytes = b"", version: int = VERSION) -> bytes:
    text += b" " * (-len(text) % 4)
    return HEADER + struct.pack("<II", version, len(text)) + text + code


def changed(path: str, value: Any, drop: bool = False) -> bytes:
    """A module of one kernel with one field changed; the path's parts are keys or indices."""
    data = module_bytes([AFFINE])
    length = struct.unpack("<I", data[12:16])[0]
    root = json.loads(data[16 : 16 + length])
    at: Any = root
    *parents, last = [int(p) if p.isdigit() else p for p in path.split(".")]
    for part in parents:
        at = at[part]
    if drop:
        del at[last]
    else:
        at[last] = value
    return packed(json.dumps(root).encode(), data[16 + length :])


def test_a_module_is_saved_as_it_was_read(vulkan: VulkanDevice) -> None:
    data = module_bytes([AFFINE, DYNAMIC])
    module = vulkan.hook("module")(data)
    assert module.kind == "vulkan"
    loaded = vulkan.ffi.get_global_func("ffi.Module.load_from_bytes.vulkan")(data)
    for each in (module, loaded):
        names = json.loads(each.inspect_source("json"))["kernels"]
        assert [name["name"] for name in names] == ["affine", "dynamic"]
        assert each.implements_function("affine")
        assert not each.implements_function("nothing")


@pytest.mark.parametrize(("data", "message"), [
    (b"", "it has 0 bytes"),
    (HEADER + b"\1\0", "10 bytes, less than its header"),
    (b"\x7fELF" + bytes(60), "does not begin with MXFSPIRV"),
    (packed(b"{}", version=1), "version 1, and this runtime reads version 3"),
    (HEADER + struct.pack("<II", VERSION, 1 << 31), "2147483648 bytes, but 0 are there"),
    (HEADER + struct.pack("<II", VERSION, 3) + b"{} ", "3 bytes"),
    (packed(b"{"), "is not readable JSON"),
    (packed(b"\xff\xfe\x00"), "is not readable JSON"),
    (packed(b"[" * 100_000), "nested too deeply"),
    (packed(b"[]"), "the JSON should be an object"),
    (packed(b"{}"), 'lacks "kernels"'),
    (packed(b'{"kernels": 3}'), "kernels should be a list"),
    (packed(b'{"kernels": [3]}'), r"kernels\[0\] should be an object"),
])  # fmt: skip
def test_damaged_bytes_are_refused(vulkan: VulkanDevice, data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vulkan.hook("module")(data)


@pytest.mark.parametrize(("path", "value", "message"), [
    ("kernels.0.name", "", "empty name"),
    ("kernels.0.name", 3, "name should be a text"),
    ("kernels.0.code", [0], r"should be \[offset, bytes\]"),
    ("kernels.0.code", [0, 1 << 31], "outside the"),
    ("kernels.0.code", [-4, 8], "code is -4, outside 0"),
    ("kernels.0.code", [4294967292, 8], "outside the"),
    ("kernels.0.code", [2, 8], "misaligned"),
    ("kernels.0.code", [0, 24], "no compute entry point|cut off"),
    ("kernels.0.code", [4, 40], "is not SPIR-V"),
    ("kernels.0.code", [0.0, 8], "should be an integer"),
    ("kernels.0.argument_bytes", 16, "outside a block of 16 bytes"),
    ("kernels.0.argument_bytes", 33, "no multiple of 8"),
    ("kernels.0.argument_bytes", 256, "more than the 128"),
    ("kernels.0.argument_bytes", 1 << 40, "outside 0 to 65536"),
    ("kernels.0.argument_buffer", 1, "true or false"),
    ("kernels.0.arguments.0.offset", 4, "misaligned"),
    ("kernels.0.arguments.0.kind", "soul", "pointer or scalar"),
    ("kernels.0.arguments.0.alignment", 0, "alignment is 0, no power of two"),
    ("kernels.0.arguments.0.alignment", 24, "alignment is 24, no power of two"),
    ("kernels.0.arguments.0.alignment", 8192, "outside 0 to 4096"),
    ("kernels.0.arguments.2.dtype", "int7", "unknown dtype int7"),
    ("kernels.0.launch_params", ["blockIdx.w"], "unknown extent blockIdx.w"),
    ("kernels.0.launch_params", ["blockIdx.x"] * 2, "twice"),
    ("kernels.0.local_size", [0, 0, 1], "left to the launch"),
    ("kernels.0.local_size", [1, 1], "3 numbers"),
    ("kernels.0.requirements", None, "requirements should be an object"),
    ("kernels.0.requirements.features", [1], "should be a text"),
    ("kernels.0.requirements.subgroup_size", "8", "should be an integer"),
    ("kernels.0.requirements.matrices", [8], "should be an object"),
    ("kernels.0.requirements.matrices", [{"m": 1 << 20}], "outside 0 to 65536"),
])  # fmt: skip
def test_wrong_fields_are_named(vulkan: VulkanDevice, path: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vulkan.hook("module")(changed(path, value))


def test_every_field_is_missed(vulkan: VulkanDevice) -> None:
    for field in AFFINE:
        with pytest.raises(ValueError, match=f'lacks "{field}"'):
            vulkan.hook("module")(changed(f"kernels.0.{field}", None, drop=True))


def test_two_kernels_of_one_name_are_refused(vulkan: VulkanDevice) -> None:
    with pytest.raises(ValueError, match="two kernels affine"):
        vulkan.hook("module")(module_bytes([AFFINE, copy.deepcopy(AFFINE)]))


def test_truncated_and_mangled_modules_do_no_harm(vulkan: VulkanDevice) -> None:
    """Any prefix and any few changed bytes: an error or a module, never a crash."""
    data = module_bytes([AFFINE, DYNAMIC])
    load = vulkan.hook("module")
    rng = random.Random(4)
    text_end = 16 + struct.unpack("<I", data[12:16])[0]
    for length in range(0, len(data) - 1, 7):
        with pytest.raises(ValueError, match="no module of Vulkan kernels"):
            load(data[:length])
    for _ in range(2000):
        mangled = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            mangled[rng.randrange(text_end)] = rng.choice(b'{}[]",:0129-e \xff\x00truefalsn')
        with contextlib.suppress(ValueError):
            load(bytes(mangled))


def test_mangled_code_is_walked_before_the_driver_sees_it(vulkan: VulkanDevice) -> None:
    code = bytearray(spirv(AFFINE["code"]))
    words = np.frombuffer(code, np.uint32).copy()
    words[5] |= 0xFFFF0000  # the first instruction's length
    with pytest.raises(ValueError, match="cut off or damaged"):
        vulkan.hook("module")(module_bytes([{**AFFINE, "code": words.tobytes()}]))
