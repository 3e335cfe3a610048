"""Small Vulkan programs for tests: lowering, validation, disassembly, and runs on a device."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from support.vulkan_device import open_device, unavailable
from tvm import tirx
from tvm.tirx import stmt
from tvm.tirx.build import split_host_device_mods

from mxforge.compile.spirv import KernelCode, generate, register, unpack

# thread_warp_size 1: larger ones make TVM write code that counts on the subgroup's size.
TARGET = {"kind": "vulkan", "thread_warp_size": 1, "max_num_threads": 256, "host": "llvm"}
THREADS = 32  # of a block of `elementwise`
DTYPES = (
    "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "float32", "float64",
)  # fmt: skip


def lowered(function: tirx.PrimFunc) -> tvm.IRModule:
    """The device functions of a scheduled PrimFunc, as target.build.vulkan gets them."""
    target = tvm.target.Target(TARGET)
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    module = tirx.transform.BindTarget(target)(module)
    pipeline, _, finalize = tirx.get_default_tir_pipeline(target)
    with target:
        module = pipeline(module)
    (device,) = split_host_device_mods(module)[1].values()
    return finalize()(device)


def kernels(function: tirx.PrimFunc) -> list[KernelCode]:
    """The generated kernels of a scheduled PrimFunc, each valid."""
    return checked(generate(lowered(function)))


def checked(data: bytes) -> list[KernelCode]:
    """The kernels of a module, after spirv-val has seen each that it knows: cooperative matrices
    are for newer ones, with which scripts/test --mesa comes."""
    found = unpack(data)
    for kernel in found:
        if kernel.reflection["requirements"]["matrices"] and not knows_matrices():
            continue
        result = _tool("spirv-val", "--target-env", "vulkan1.2", code=kernel.spirv)
        assert result.returncode == 0, f"{kernel.name}: {result.stderr.decode()}"
    return found


@functools.cache
def knows_matrices() -> bool:
    """Whether spirv-val is new enough for cooperative matrices."""
    version = _tool("spirv-val", "--version", code=b"").stdout.decode()
    year = re.search(r"v(\d{4})\.", version)
    return year is not None and int(year.group(1)) >= 2024


def disassembled(kernel: KernelCode) -> str:
    return _tool("spirv-dis", "--no-color", code=kernel.spirv).stdout.decode()


def _tool(name: str, *options: str, code: bytes) -> subprocess.CompletedProcess[bytes]:
    if shutil.which(name) is None:
        unavailable(f"{name} is missing; Debian has it in spirv-tools")
    return subprocess.run([name, *options, "-"], input=code, capture_output=True)


@functools.cache
def device() -> Any:
    """vulkan:0 with our generator registered; skips, saying why, where there is none."""
    open_device(Path(tempfile.mkdtemp(prefix="mxforge-tests-")))
    register(prefer=True)
    return tvm.device("vulkan", 0)


def run(function: tirx.PrimFunc, *arguments: Any) -> list[Any]:
    """All arguments, arrays and scalars, after the function has run on the device."""
    where = device()
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    library = tvm.compile(module, tvm.target.Target(TARGET))
    passed = [
        tvm.runtime.tensor(np.ascontiguousarray(argument), where)
        if isinstance(argument, np.ndarray)
        else argument
        for argument in arguments
    ]
    library["main"](*passed)
    where.sync()
    return [value.numpy() if hasattr(value, "numpy") else value for value in passed]


def elementwise(
    operations: Sequence[Callable[..., Any]],
    inputs: Sequence[str],
    output: str,
    n: int,
    lanes: int = 1,
) -> tirx.PrimFunc:
    """out[k·n + i] = operations[k](in0[i], in1[i], …) in vectors of `lanes`.

    n is a multiple of THREADS·lanes.

    inputs: a dtype for each array of n elements that the function takes before `out`.
    """
    block, thread = tirx.Var("block", "int32"), tirx.Var("thread", "int32")
    arrays = [tirx.decl_buffer((n,), dtype, f"in{number}") for number, dtype in enumerate(inputs)]
    out = tirx.decl_buffer((len(operations) * n,), output, "out")
    stores = []
    for number, operation in enumerate(operations):
        lane = tirx.Var("lane", "int32")
        place = (block * THREADS + thread) * lanes + lane
        value = operation(*[tirx.BufferLoad(array, [place]) for array in arrays])
        store = stmt.BufferStore(out, value, [place + number * n])
        stores.append(stmt.For(lane, 0, lanes, stmt.ForKind.VECTORIZED, store))
    body = bound(thread, "threadIdx.x", THREADS, stmt.stmt_seq(*stores))
    body = bound(block, "blockIdx.x", n // lanes // THREADS, body)
    return tirx.PrimFunc([*arrays, out], body).with_attr("s_tir", True)


def bound(variable: tirx.Var, tag: str, extent: Any, body: stmt.Stmt) -> stmt.Stmt:
    """`body` for every value of a thread or block index."""
    index = tirx.IterVar(None, variable, tirx.IterVar.ThreadIndex, tag)
    return stmt.AttrStmt(index, "thread_extent", tirx.convert(extent), body)


def results(
    operations: Sequence[Callable[..., Any]],
    inputs: Sequence[np.ndarray],
    output: str,
    lanes: int = 1,
) -> np.ndarray:
    """What `elementwise` computes on the device, [len(operations), n]; n need not fit lanes."""
    n = len(inputs[0])
    padded = [np.resize(array, n + -n % (THREADS * lanes)) for array in inputs]
    count = len(operations)
    dtypes = [str(array.dtype) for array in inputs]
    function = elementwise(operations, dtypes, output, len(padded[0]), lanes)
    out = np.full(count * len(padded[0]), 99, output)
    return run(function, *padded, out)[-1].reshape(count, -1)[:, :n]


def ulps(ours: np.ndarray, exact: np.ndarray) -> np.ndarray:
    """|ours - exact| in units of the last place of float32 (or float16) at `exact`."""
    smallest = np.finfo(ours.dtype).smallest_normal
    size = np.maximum(np.abs(exact).astype(ours.dtype), smallest)
    return np.asarray(np.abs(ours.astype(np.longdouble) - exact) / np.spacing(size))
