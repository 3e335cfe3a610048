"""A lowered module's kernels, without the functions that call them: a launch plan does that."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tvm
import tvm_ffi
from tvm import tirx
from tvm.tirx.build import split_host_device_mods

from . import cuda, linker, metal
from .launches import Hosts
from .pipeline import write_dump
from .spirv import generate
from .targets import CompileTarget

_SPLIT = "tirx.SplitHostDevice"


def of_cpu(
    module: tvm.IRModule, target: CompileTarget, dump: Path | None = None
) -> tvm.runtime.Module:
    """Machine code of each, by the name that plans call it by; LLVM's text goes into `dump`."""
    whole = tvm.target.Target(target.tvm)
    built = tirx.build(_alone(module), target=whole, pipeline="default")
    if dump is not None:
        write_dump(dump / "code-llvm.txt", str(built.inspect_source()))
    return built


def write_library(built: tvm.runtime.Module, path: Path, host: str) -> None:
    """Link a CPU's kernels into a library for `host`; TargetError where nothing here can."""
    with tempfile.TemporaryDirectory(prefix="kernels-", dir=path.parent) as scratch:
        compiled = Path(scratch, "kernels.o")
        built.write_to_file(str(compiled), "o")
        linker.link([compiled], host, path)


@dataclass(frozen=True)
class DeviceKernels:
    """A GPU's kernels, lowered, and how they are launched."""

    hosts: Hosts
    functions: tvm.IRModule
    target: tvm.target.Target


def of_gpu(module: tvm.IRModule, target: CompileTarget) -> DeviceKernels:
    """TVM's lowering up to its code generators, once for all kernels."""
    split: list[tvm.IRModule] = []

    @tvm.instrument.pass_instrument
    class AfterSplit:
        def run_after_pass(self, after: tvm.IRModule, info: tvm.transform.PassInfo) -> None:
            if info.name == _SPLIT:
                split.append(after)

    whole = tvm.target.Target(target.tvm)
    lowering, _finish_host, finish_device = tirx.get_tir_pipeline("default")
    with tvm.transform.PassContext(instruments=[AfterSplit()]):
        lowered = lowering(tirx.transform.BindTarget(whole)(_alone(module)))
    _hosts, devices = split_host_device_mods(lowered)
    ((bound, functions),) = devices.items()
    return DeviceKernels(Hosts.of(split[0]), finish_device()(functions), bound)


def _alone(module: tvm.IRModule) -> tvm.IRModule:
    return tvm.IRModule(
        {
            var: function.with_attr("global_symbol", var.name_hint)
            for var, function in module.functions.items()
            if isinstance(function, tirx.PrimFunc)
        }
    )


@dataclass(frozen=True)
class _Format:
    """What a driver takes: how its file's name ends, and how it is made."""

    suffix: str
    code: Callable[[DeviceKernels, CompileTarget, Path, Path | None], bytes]


def device_suffix(target: CompileTarget) -> str:
    """How the name of a file of the target's device code ends."""
    return _FORMATS[target.kernels.kind].suffix


def device_code(
    kernels: DeviceKernels, target: CompileTarget, folder: Path, dump: Path | None = None
) -> bytes:
    """What the device's driver takes; TargetError where it cannot be made.

    `folder` is for what compilers need meanwhile; into `dump` goes what they are given.
    """
    return _FORMATS[target.kernels.kind].code(kernels, target, folder, dump)


def _cuda(kernels: DeviceKernels, target: CompileTarget, folder: Path, dump: Path | None) -> bytes:
    with cuda.overlapping() if cuda.all_overlap(target.archs) else contextlib.nullcontext():
        text = _source(kernels, dump)
    return cuda.compiled(text, target.archs, folder)


def _metal(
    kernels: DeviceKernels, _target: CompileTarget, _folder: Path, dump: Path | None
) -> bytes:
    text = _source(kernels, dump)
    metal.check(text)
    return text.encode()


def _vulkan(
    kernels: DeviceKernels, _target: CompileTarget, _folder: Path, _dump: Path | None
) -> bytes:
    return generate(kernels.functions, kernels.target)


def _source(kernels: DeviceKernels, dump: Path | None) -> str:
    """As TVM's code generator of the target's kind writes it."""
    kind = kernels.target.kind.name
    build = tvm_ffi.get_global_func(f"target.build.{kind}")
    text = str(build(kernels.functions, kernels.target).inspect_source())
    if dump is not None:
        write_dump(dump / f"code-{kind}.txt", text)
    return text


_FORMATS = {
    "cuda": _Format("fatbin", _cuda),
    "metal": _Format("metal", _metal),
    "vulkan": _Format("spirv", _vulkan),
}
