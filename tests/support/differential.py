"""Runs random programs in both forms, on Vulkan and on the CPU, and compares."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm
from support.program_forms import Form, Serial, Threaded
from support.random_programs import Program
from support.spirv_programs import TARGET, device
from support.vulkan_device import new_validation_messages
from tvm import tirx
from tvm.tirx.build import split_host_device_mods, tir_to_runtime

_HOST = {"kind": "llvm", "opt-level": 0}


@dataclass(frozen=True)
class Outcome:
    """Seeds: refused by TVM, with its message; and failed, with what differed."""

    refused: dict[int, str]
    failed: dict[int, str]


def compare(seeds: Sequence[int]) -> Outcome:
    """Run the programs of some seeds in both forms."""
    programs: dict[int, Program] = {}
    lowered: dict[int, tuple[tvm.IRModule, tvm.IRModule]] = {}
    outcome = Outcome({}, {})
    where = device()
    for seed in seeds:
        program = programs[seed] = Program(seed)
        try:
            lowered[seed] = _lowered(program, Serial), _lowered(program, Threaded)
        except Exception as error:
            outcome.refused[seed] = _last_line(error)
    on_cpu = _built_some(lowered, Serial, outcome.refused)
    on_device = _built_some({seed: lowered[seed] for seed in on_cpu}, Threaded, outcome.failed)
    for seed, library in on_device.items():
        expected = _results(programs[seed], on_cpu[seed], tvm.cpu())
        found = _results(programs[seed], library, where)
        if said := new_validation_messages():
            outcome.failed[seed] = f"the validation layers say: {said[0]}"
            continue
        for out, ours, theirs in zip(programs[seed].outputs, found, expected, strict=True):
            if not np.array_equal(ours, theirs):
                at = np.flatnonzero(ours != theirs)
                outcome.failed[seed] = (
                    f"{out.name}[{at[0]}] and {len(at) - 1} more differ: {ours[at[0]]} on Vulkan, "
                    f"{theirs[at[0]]} on the CPU"
                )
    return outcome


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]


def _target(form: type[Form]) -> tvm.target.Target:
    return tvm.target.Target(TARGET if form is Threaded else _HOST, host=_HOST)


def _lowered(program: Program, form: type[Form]) -> tvm.IRModule:
    """One function after TVM's passes: each alone, so that one it refuses spoils no other."""
    target = _target(form)
    module = tvm.IRModule({program.name: form(program).function()})
    module = tirx.transform.BindTarget(target)(module)
    with target:
        return tirx.get_default_tir_pipeline(target)[0](module)


def _built_some(
    lowered: dict[int, tuple[tvm.IRModule, tvm.IRModule]], form: type[Form], errors: dict[int, str]
) -> dict[int, Any]:
    """A library for each seed, one for as many as will go together; errors of those that will
    not be built go to `errors`."""
    if not lowered:
        return {}
    try:
        library = _built([both[form is Threaded] for both in lowered.values()], form)
    except Exception as error:
        if len(lowered) == 1:
            errors[next(iter(lowered))] = _last_line(error)
            return {}
        items = list(lowered.items())
        halves = dict(items[: len(items) // 2]), dict(items[len(items) // 2 :])
        first, second = (_built_some(half, form, errors) for half in halves)
        return first | second
    return dict.fromkeys(lowered, library)


def _built(modules: Sequence[tvm.IRModule], form: type[Form]) -> Any:
    """One library of many functions: LLVM and the driver are started once."""
    target = _target(form)
    _, host_passes, device_passes = tirx.get_default_tir_pipeline(target)
    host, kernels = tvm.IRModule({}), tvm.IRModule({})
    for module in modules:
        on_host, on_device = split_host_device_mods(module)
        host.update(on_host)
        for part in on_device.values():
            kernels.update(part)
    host = host_passes()(host)
    on_devices = {target: device_passes()(kernels)} if len(kernels.functions) else {}
    return tir_to_runtime(host, on_devices, tvm.target.Target(_HOST))


def _results(program: Program, library: Any, where: Any) -> list[np.ndarray]:
    arrays = [*program.data(), *(np.full(out.size, 99, out.dtype) for out in program.outputs)]
    passed = [tvm.runtime.tensor(array, where) for array in arrays]
    library[program.name](*passed, *(value for _, _, value in program.scalars))
    where.sync()
    return [tensor.numpy() for tensor in passed[len(program.inputs) :]]
