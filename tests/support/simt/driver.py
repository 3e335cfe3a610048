"""Libraries for the fake CUDA driver (driver.cc): plans, and kernels that the harness compiles.

`compile_for_driver` makes an artifact as `compile_model` does, with the harness's code in place of
NVIDIA's. Another process runs it, for once libmxforge has found a driver it keeps it: there,
`Driver` stands in for libcuda.so.1.
"""

from __future__ import annotations

import ctypes
import re
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .toolchain import COMMON, HERE, RUNTIME, build_kernel, compiler

LIBRARY = "libcuda.so.1"
# What kernels' C++ takes after its parameters, in this order; driver.cc gives it.
LAUNCH = (
    *(f"blockIdx.{axis}" for axis in "xyz"),
    *(f"threadIdx.{axis}" for axis in "xyz"),
    "tirx.use_dyn_shared_memory",
)
_MAGIC, _VERSION, _HEADER = 0xBA55ED50, 1, 16  # of a fatbin
_KERNEL = re.compile(
    r'^extern "C" __global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\(([^)]*)\) \{', re.M
)


def build_driver(folder: Path) -> None:
    """LIBRARY in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [
        *compiler(), *COMMON, "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-shared",
        "-fvisibility=hidden", f"-Wl,-soname,{LIBRARY}", str(HERE / "driver.cc"),
    ]  # fmt: skip
    subprocess.run([*command, "-o", str(folder / LIBRARY), "-ldl"], check=True)


@contextmanager
def compiling(patch: Any, harness: Path, sources: Path, *features: str) -> Iterator[None]:
    """Meanwhile `compile_model` makes artifacts of target cuda:sm_90a for the fake driver.

    `patch` is pytest's MonkeyPatch; `harness` the folder with the built runtime; the kernels' C++
    goes into `sources`. Schedules are those for a GPU with these features: without any, most are
    the simple ones, which compile in a tenth of the time.
    """
    from mxforge.compile import cuda

    from .translate import DeviceFunction, translate

    def compiled(text: str, _archs: Any, _folder: Path) -> bytes:
        sources.mkdir(parents=True)
        lines = [str(harness / RUNTIME)]
        for name, declared in _KERNEL.findall(text):
            dtypes = tuple(map(_dtype, declared.split(",")))
            source = translate("cuda", text, DeviceFunction(name, dtypes, LAUNCH))
            (sources / f"{name}.cc").write_text(source)
            lines.append(f"{name} {','.join(dtypes)}")
        module = "\n".join(lines).encode()
        return struct.pack("<IHHQ", _MAGIC, _VERSION, _HEADER, len(module)) + module

    with patch.context() as during:
        during.setattr(cuda, "find_nvcc", lambda: "")
        during.setattr(cuda, "features", lambda _arch: features)
        during.setattr(cuda, "compiled", compiled)
        yield


def _dtype(declared: str) -> str:
    """Of a kernel's parameter, as in `float* __restrict__ x`, for the harness."""
    if "*" in declared:
        return "handle"
    return {"int": "int32", "int64_t": "int64", "long long": "int64"}[
        declared.strip().rpartition(" ")[0]
    ]


class Driver:
    """The fake driver in this process, before libmxforge looks for one.

    folder    it was built in
    sources   of the kernels' C++
    objects   where they are compiled, when they are first launched
    """

    def __init__(self, folder: Path, sources: Path, objects: Path) -> None:
        self._library = ctypes.CDLL(str(folder / LIBRARY))  # found again by its soname
        self._library.fake_cuda_count.restype = ctypes.c_int64
        self._library.fake_cuda_live.restype = ctypes.c_int64
        self._sources, self._objects = sources, objects
        self._paths: list[Any] = []
        hook = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)
        self._compiler = hook(self._compiled)
        self._library.fake_cuda_compiler(self._compiler)

    def _compiled(self, name: bytes) -> int:
        source = (self._sources / f"{name.decode()}.cc").read_text()
        path = str(build_kernel(source, self._objects)).encode()
        self._paths.append(ctypes.create_string_buffer(path))
        return ctypes.addressof(self._paths[-1])

    def set(self, name: str, value: int) -> None:
        """See `settings` in driver.cc; "fail cuMemAlloc" is the error of that call from now on."""
        self._library.fake_cuda_set(name.encode(), ctypes.c_int64(value))

    def spoil(self, size: int) -> None:
        """Make NaN of all memory that was asked for with so many bytes."""
        self._library.fake_cuda_spoil(ctypes.c_size_t(size))

    def count(self, name: str) -> int:
        """How often a function was called, without its version; or "waits", "kernels" that ran,
        launches that are "overlapping"."""
        return int(self._library.fake_cuda_count(name.encode()))

    @property
    def live(self) -> int:
        """What was made and not given back: memory, contexts, streams, events, graphs, modules."""
        return int(self._library.fake_cuda_live())
