"""The backend as TVM sees it: `target.build.vulkan`."""

from __future__ import annotations

import math
import os
from typing import Any

import tvm
import tvm_ffi

from mxforge.errors import VulkanCodegenError

from .container import KernelCode, pack
from .errors import Refusal
from .kernel import generate_kernel

BUILD_FUNCTION = "target.build.vulkan"
# Set to 1 to have this generator even where TVM brings one of its own.
PREFER_VARIABLE = "MXFORGE_VULKAN_CODEGEN"


def generate(module: tvm.IRModule, target: Any = None) -> bytes:
    """The bytes of a module of kernels (`container`) from TVM's lowered device functions.

    What the target says of its limits is held: max_threads_per_block, max_shared_memory_per_block,
    and supports_float16 where that is false.

    VulkanCodegenError, naming function and construct, where a function holds what SPIR-V for
    Vulkan cannot say. Equal functions give equal bytes.
    """
    functions = {}
    for variable, function in module.functions.items():
        symbol = (function.attrs or {}).get("global_symbol", variable.name_hint)
        functions[str(symbol)] = function
    kernels = [generate_kernel(name, functions[name]) for name in sorted(functions)]
    for kernel in kernels:
        _check_limits(kernel, {} if target is None else dict(target.attrs))
    return pack(kernels)


def _check_limits(kernel: KernelCode, limits: dict[str, Any]) -> None:
    """VulkanCodegenError where the kernel needs more than its target has."""
    threads = math.prod(kernel.reflection["local_size"])  # 0: known at launch, and checked there
    shared = kernel.reflection["shared_bytes"]
    features = kernel.reflection["requirements"]["features"]
    found = None
    if threads > limits.get("max_threads_per_block", threads):
        found = f"{threads} threads a block", limits["max_threads_per_block"]
    elif shared > limits.get("max_shared_memory_per_block", shared):
        found = f"{shared} bytes of shared memory", limits["max_shared_memory_per_block"]
    elif "shaderFloat16" in features and not limits.get("supports_float16", True):
        found = "arithmetic in float16", "none"
    if found is not None:
        refusal = Refusal(found[0], f"{found[1]} at most, by its target", "Schedule it smaller.")
        raise refusal.of(kernel.name)


def build(module: tvm.IRModule, target: Any = None) -> Any:
    """A runtime module of the device functions: what TVM calls as target.build.vulkan.

    The native library makes the module, and is loaded for it; see `mxforge.compile.tvm_vulkan`.
    """
    data = generate(module, target)
    from ..tvm_vulkan import function

    return function("module")(data)


def register(prefer: bool | None = None) -> bool:
    """Make `build` TVM's code generator for the target kind vulkan; whether it is now.

    Where TVM has one already it stays, unless `prefer` (by default: the environment variable
    MXFORGE_VULKAN_CODEGEN=1) asks for ours.
    """
    if prefer is None:
        prefer = os.environ.get(PREFER_VARIABLE, "") == "1"
    present = tvm_ffi.get_global_func(BUILD_FUNCTION, allow_missing=True)
    if present is not None and not prefer:
        return False
    tvm_ffi.register_global_func(BUILD_FUNCTION, build, override=True)
    # TVM calls `build` from C++: unknown errors would come out as RuntimeError.
    tvm_ffi.register_error("VulkanCodegenError", VulkanCodegenError)
    return True
