"""A Vulkan device for tests: the library built where needed, tensors, and modules out of GLSL."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

HEADER = b"MXFSPIRV"
VERSION = 3
PREAMBLE = """#version 460
#extension GL_EXT_buffer_reference : require
#extension GL_EXT_shader_explicit_arithmetic_types : require
layout(buffer_reference, std430, buffer_reference_align = 4) buffer F { float v[]; };
layout(buffer_reference, std430, buffer_reference_align = 4) buffer U { uint v[]; };
"""


def unavailable(reason: str) -> Any:
    """Skip; or fail, where MXFORGE_REQUIRE_VULKAN says that everything is installed."""
    if os.environ.get("MXFORGE_REQUIRE_VULKAN") == "1":
        pytest.fail(f"MXFORGE_REQUIRE_VULKAN=1, but {reason}")
    pytest.skip(reason, allow_module_level=True)  # kernels are compiled on import


def built_library() -> Path:
    """The library that is chosen, or one that is kept under build/native."""
    from mxforge.native import build

    chosen = os.environ.get("MXFORGE_VULKAN_LIBRARY")
    if chosen:
        return Path(chosen)
    output = Path(__file__).parents[2] / "build" / "native" / build.VULKAN.output.name
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output.with_suffix(".lock")):
            if not build.VULKAN.up_to_date(output):
                build.build(build.VULKAN, output)
        return output
    except build.BuildError as error:
        unavailable(str(error))
        raise


@cache
def spirv(source: str) -> bytes:
    """The SPIR-V of a compute shader in GLSL, behind PREAMBLE."""
    compiler = shutil.which("glslangValidator")
    if compiler is None:
        unavailable("glslangValidator is missing; Debian has it in glslang-tools")
    result = subprocess.run(
        [str(compiler), "--stdin", "-S", "comp", "--target-env", "vulkan1.2", "-o", "/dev/stdout",
         "--quiet"],
        input=(PREAMBLE + source).encode(), capture_output=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr.decode() + result.stdout.decode(errors="replace")
    return result.stdout


def pointer(name: str, offset: int, access: str, alignment: int = 4) -> dict[str, Any]:
    return {
        "kind": "pointer", "name": name, "offset": offset,
        "read": "r" in access, "write": "w" in access, "alignment": alignment,
    }  # fmt: skip


def scalar(name: str, dtype: str, offset: int) -> dict[str, Any]:
    return {"kind": "scalar", "name": name, "dtype": dtype, "offset": offset}


def kernel(name: str, source: str, arguments: Sequence[dict[str, Any]], **fields: Any) -> Any:
    """A kernel's entry, its code in GLSL; `fields` replace the usual ones."""
    end = max((each["offset"] + 8 for each in arguments), default=0)
    return {
        "name": name,
        "code": source,
        "arguments": list(arguments),
        "argument_bytes": (end + 7) // 8 * 8,
        "argument_buffer": False,
        "launch_params": ["blockIdx.x", "threadIdx.x"],
        "local_size": [64, 1, 1],
        "shared_bytes": 0,
        "requirements": {
            "features": ["bufferDeviceAddress"], "extensions": [], "subgroup_operations": [],
            "subgroup_size": None, "matrices": [], **fields.pop("requirements", {}),
        },
        **fields,
    }  # fmt: skip


def module_bytes(kernels: Sequence[dict[str, Any]]) -> bytes:
    """The module format: header, JSON, SPIR-V."""
    code, entries = b"", []
    for each in kernels:
        own = each["code"] if isinstance(each["code"], bytes) else spirv(each["code"])
        entries.append({**each, "code": [len(code), len(own)]})
        code += own
    text = json.dumps({"kernels": entries}).encode()
    text += b" " * (-len(text) % 4)
    return HEADER + struct.pack("<II", VERSION, len(text)) + text + code


AFFINE = kernel(
    "affine",
    "layout(local_size_x = 64) in;"
    "layout(push_constant) uniform P { F x; F y; int n; float scale; float shift; } p;"
    "void main() { uint i = gl_GlobalInvocationID.x;"
    " if (i < p.n) p.y.v[i] = p.x.v[i] * p.scale + p.shift; }",
    [pointer("x", 0, "r"), pointer("y", 8, "w"), scalar("n", "int32", 16),
     scalar("scale", "float32", 20), scalar("shift", "float32", 24)],
)  # fmt: skip
SPIN = kernel(
    "spin",
    "layout(local_size_x = 64) in;"
    "layout(push_constant) uniform P { F x; int n; } p;"
    "void main() { uint i = gl_GlobalInvocationID.x; float f = p.x.v[i];"
    " for (int k = 0; k < p.n; ++k) f = fract(f * 1.37 + 0.1); p.x.v[i] = f; }",
    [pointer("x", 0, "rw"), scalar("n", "int32", 8)],
)
DYNAMIC = kernel(
    "dynamic",
    "layout(local_size_x_id = 0, local_size_y_id = 1) in;"
    "layout(push_constant) uniform P { U x; } p;"
    "void main() { uint i = gl_WorkGroupID.x; uint t = gl_LocalInvocationIndex;"
    " if (t == 0) p.x.v[i] = gl_WorkGroupSize.x * 1000 + gl_WorkGroupSize.y; }",
    [pointer("x", 0, "w")],
    local_size=[0, 0, 1],
    launch_params=["blockIdx.x", "threadIdx.x", "threadIdx.y"],
)

# The environment of a process under the validation layers, which tell of a wild address.
WATCHED = {
    "VK_INSTANCE_LAYERS": "VK_LAYER_KHRONOS_validation",
    "VK_LAYER_ENABLES": ":".join([
        "VK_VALIDATION_FEATURE_ENABLE_GPU_ASSISTED_EXT",
        "VK_VALIDATION_FEATURE_ENABLE_SYNCHRONIZATION_VALIDATION_EXT",
    ]),
}  # fmt: skip
_heard = 0  # messages that `new_validation_messages` has returned


def new_validation_messages() -> list[str]:
    """What the validation layers have said since the last call; nothing where they are off."""
    global _heard
    if "validation" not in os.environ.get("VK_INSTANCE_LAYERS", ""):
        return []
    from mxforge.compile.tvm_vulkan import tvm_ffi

    ask = tvm_ffi.get_global_func("mxforge.vulkan.validation_messages", allow_missing=True)
    if ask is None:  # no test has come to Vulkan yet
        return []
    report = json.loads(ask())
    if not report["watching"]:
        return ["VK_INSTANCE_LAYERS asks for the validation layers, which are not there"]
    _heard, before = len(report["messages"]), _heard
    return list(report["messages"][before:])


class VulkanDevice:
    """vulkan:0 with NumPy on one side of it."""

    def __init__(self, device_id: int = 0) -> None:
        from mxforge.compile import tvm_vulkan as vulkan
        from mxforge.compile.tvm_vulkan import tvm_ffi

        vulkan.load()
        self.ffi = tvm_ffi
        self.id = device_id
        self.device = tvm_ffi.device("vulkan", device_id)
        self.hook = vulkan.function
        self._allocate = tvm_ffi.get_global_func("runtime.TVMTensorAllocWithScope")
        self._from_bytes = tvm_ffi.get_global_func("runtime.TVMTensorCopyFromBytes")
        self._to_bytes = tvm_ffi.get_global_func("runtime.TVMTensorCopyToBytes")
        self.copy = tvm_ffi.get_global_func("runtime.TVMTensorCopyFromTo")

    def module(self, *kernels: dict[str, Any]) -> Any:
        return self.hook("module")(module_bytes(kernels))

    def empty(self, shape: Sequence[int], dtype: str = "float32") -> Any:
        return self._allocate(
            self.ffi.Shape(tuple(shape)), self.ffi.dtype(dtype), self.device, None
        )

    def fill(self, tensor: Any, array: np.ndarray) -> None:
        array = np.ascontiguousarray(array)
        self._from_bytes(tensor, array.ctypes.data_as(ctypes.c_void_p), array.nbytes)

    def tensor(self, array: np.ndarray) -> Any:
        tensor = self.empty(array.shape, array.dtype.name)
        self.fill(tensor, array)
        return tensor

    def numpy(self, tensor: Any) -> np.ndarray:
        array = np.empty(tuple(tensor.shape), str(tensor.dtype))
        self._to_bytes(tensor, array.ctypes.data_as(ctypes.c_void_p), array.nbytes)
        return array

    def sync(self) -> None:
        self.device_api("StreamSync")(self.device, 0)

    def device_api(self, name: str) -> Any:
        return self.ffi.get_global_func(f"runtime.Device_{name}")

    def statistics(self) -> dict[str, Any]:
        return dict(json.loads(self.hook("statistics")(self.id)))

    def configure(self, **settings: int) -> None:
        for name, value in settings.items():
            self.hook("configure")(self.id, name, value)


def open_device(scratch: Path) -> VulkanDevice:
    """vulkan:0; skips (or fails, see `unavailable`) where there is no such thing."""
    from mxforge.errors import VulkanError

    os.environ["MXFORGE_VULKAN_LIBRARY"] = str(built_library())
    os.environ.setdefault("MXFORGE_CACHE_DIR", str(scratch / "cache"))
    try:
        from mxforge import vulkan

        vulkan.check()
    except VulkanError as error:
        unavailable(str(error))
    return VulkanDevice()


def run_apart(
    code: str, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Python code in a process of its own, with this module's names and `vk`, a VulkanDevice."""
    script = "from support.vulkan_device import *\n" + code
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
