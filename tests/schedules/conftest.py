"""Builds kernels and runs them on inputs in the reference's layout."""

from __future__ import annotations

import os

os.environ["TVM_NUM_THREADS"] = "2"  # before TVM starts its pool; by default it takes half

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import tvm
from support.kernels import call_of

from mxforge.compile.targets import CompileTarget, resolve
from mxforge.schedules.kernel import Kernel, Schedule


class Harness:
    """One compiled function for each PrimFunc, and the conventions of `Kernel` around it."""

    def __init__(self) -> None:
        self.cpu: CompileTarget = resolve("cpu")
        self._compiled: dict[tuple[str, tvm.tirx.PrimFunc], Any] = {}

    def module(self, func: tvm.tirx.PrimFunc) -> tvm.IRModule:
        return tvm.IRModule({"main": func.with_attr("global_symbol", "main")})

    def compiled(self, func: tvm.tirx.PrimFunc, target: CompileTarget) -> Any:
        key = target.name, func
        if key not in self._compiled:
            self._compiled[key] = tvm.compile(self.module(func), target.tvm)["main"]
        return self._compiled[key]

    def run(
        self,
        kernel: Kernel,
        inputs: Mapping[str, np.ndarray],
        static: Mapping[str, Any],
        target: CompileTarget | None = None,
        schedule: Schedule | None = None,
    ) -> list[np.ndarray]:
        """On this CPU, or a level of it; the level's best schedule, or the one given. Returns the
        fresh outputs, then the new values of the inputs that the kernel updates."""
        target = target or self.cpu
        call = call_of(kernel, target.kernels, inputs, static, schedule)
        tensors = [tvm.runtime.tensor(array) for array in call.arrays]
        self.compiled(kernel.build(target.kernels, schedule, **static), target)(*tensors)
        return [tensor.numpy() for tensor in call.results(tensors)]

    @contextmanager
    def threads(self, count: int) -> Iterator[None]:
        """Run the body with so many threads."""
        configure = tvm.get_global_func("runtime.config_threadpool")
        configure(1, count)
        try:
            yield
        finally:
            configure(1, 2)

    def device_source(self, module: tvm.IRModule, target: dict[str, Any]) -> str:
        """The text generated for a GPU; needs neither its compiler nor the GPU."""
        built = tvm.compile(module, target)
        return "\n".join(device.inspect_source() for device in built.mod.imports)


@pytest.fixture(scope="session")
def harness() -> Harness:
    return Harness()
