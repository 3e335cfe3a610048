"""The steps of a kit's run, each in a process of its own: a crash takes no other step with it.

A step tells what it finds while it runs, so that what it has found is not lost with it. See
gpu_run.py for who listens.
"""

from __future__ import annotations

import ctypes
import io
import json
import lzma
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from support.agreement import check

from mxforge import Engine, SamplingParams
from mxforge.bench import Rounds, peak_rss, since_process_start
from mxforge.core import CoreLibrary, device_memory
from mxforge.devices import devices
from mxforge.plan import Role

from . import gpu_token
from .gpu_device import Probe, library_of, open_library

DISAGREES = 3  # exit code: a case could not be run, and the device may not be usable any more
ROUNDS, LEAST_ROUNDS, ROUNDS_S = 7, 3, 30.0
PROGRESS_S = 5.0
PR_SET_PDEATHSIG = 1
AGREE = 1e-5  # of logits by tensors with memory of their own, and by those of the library


@dataclass(frozen=True)
class Report:
    """Tells the listening process, a line each."""

    file: Any

    def put(self, **values: Any) -> None:
        """Values of the step's result."""
        self._write({"put": values})

    def append(self, **values: Any) -> None:
        """One more element for lists in the step's result."""
        self._write({"append": values})

    def _write(self, message: dict[str, Any]) -> None:
        self.file.write(json.dumps(message) + "\n")
        self.file.flush()


@dataclass(frozen=True)
class Kit:
    """A kit's folder, and what its kit.json tells."""

    folder: Path
    about: dict[str, Any]

    @property
    def kind(self) -> str:
        """Of the target's devices."""
        return str(self.about["target"].partition(":")[0])

    @classmethod
    def open(cls, folder: Path) -> Kit:
        return cls(folder, json.loads((folder / "kit.json").read_text(encoding="utf-8")))


def machine(kit: Kit, report: Report, _start: int) -> int:
    """The devices of the target's kind, and how fast one copies with nothing else on it."""
    report.put(devices=[asdict(each) for each in devices() if each.kind == kit.kind])
    if tool := shutil.which("nvidia-smi") if kit.kind == "cuda" else None:
        asked = "--query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem,power.limit"
        said = subprocess.run([tool, asked, "--format=csv"], capture_output=True, text=True)
        report.put(nvidia_smi=said.stdout.splitlines())
    probe = Probe(_some_library(kit))
    report.put(copies_gb_s=[probe.gb_s() for _ in range(5)])
    return 0


def _some_library(kit: Kit) -> CoreLibrary:
    if kit.about["cases"]:
        return _library(kit, kit.about["cases"][0]["library"])
    return library_of(kit.folder / next(iter(kit.about["models"]), "nano"))


# -- cases ----------------------------------------------------------------------------------------


def cases(kit: Kit, report: Report, start: int) -> int:
    """Every case from number `start` on against its expected result."""
    libraries: dict[str, CoreLibrary] = {}
    every = kit.about["cases"]
    for number, case in enumerate(every[start:], start):
        report.put(at=number)
        name = case["library"]
        try:
            if name not in libraries:  # the cases of one stand together
                while libraries:
                    libraries.popitem()[1].close()
                libraries[name] = _library(kit, name)
            error = _case(kit, case, libraries[name])
        except AssertionError as differs:
            told = " ".join(str(differs).split())[:300]
            report.append(results={"case": number, "state": "wrong", "problem": told})
        except Exception as failed:
            lines = str(failed).strip().splitlines() or [type(failed).__name__]
            report.append(results={"case": number, "state": "failed", "problem": lines[-1][:300]})
            return DISAGREES
        else:
            report.append(results={"case": number, "state": "right", "error": error})
    return 0


def _library(kit: Kit, name: str) -> CoreLibrary:
    plan = kit.folder / "cases" / f"{name}.plan"
    (kernels,) = (path for path in plan.parent.glob(f"{name}.*") if path != plan)
    return open_library(kit.about["target"], plan, kernels)


def _case(kit: Kit, case: dict[str, Any], library: CoreLibrary) -> float:
    """The largest error, relative to what is tolerated; AssertionError where one is too large."""
    with lzma.open(kit.folder / "cases" / case["data"]) as file:
        stored = np.load(io.BytesIO(file.read()))
    function = library[case["case"]]
    values, arguments = function.evaluate({}), []
    for tensor in function.arguments:
        dtype = np.dtype("uint16" if tensor.dtype == "bfloat16" else tensor.dtype)
        array = np.empty([values[extent] for extent in tensor.shape], dtype)
        array.reshape(-1).view(np.uint8)[...] = stored.get(tensor.name, 0xFF)  # NaN, or -1
        arguments.append(array)
    library.call(function.name, arguments)
    return max(
        check(
            as_numbers(array, tensor.dtype),
            stored[tensor.name.replace("argument", "expected")],
            case["tolerance"],
            tensor.name,
        )
        for tensor, array in zip(function.arguments, arguments, strict=True)
        if tensor.role is Role.KV
    )


def as_numbers(array: np.ndarray, dtype: str) -> np.ndarray:
    """What NumPy knows as numbers: bfloat16, which is held as uint16, as f32."""
    return (array.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else array


# -- nano -----------------------------------------------------------------------------------------


def nano(kit: Kit, report: Report, _start: int) -> int:
    """Greedy tokens of every prompt, all together through the engine, beside the CPU's."""
    told = kit.about["nano"]
    params = SamplingParams(temperature=0, max_tokens=told["new"], ignore_eos=True)
    prompts, found = told["prompts"], [[] for _ in told["prompts"]]
    with Engine.load(kit.folder / "nano", context_length=512) as engine:

        def ask(number: int) -> None:
            for piece in engine.stream(prompts[number], params):
                found[number].extend(piece.token_ids)

        with ThreadPoolExecutor(len(prompts)) as pool:
            asked = [pool.submit(ask, number) for number in range(len(prompts))]
            known = 0
            while wait(asked, timeout=PROGRESS_S).not_done:
                if (written := sum(map(len, found))) > known:
                    report.put(at=f"token {written}")  # it does not hang
                    known = written
            for future in asked:
                future.result()
    for number, (ours, expected) in enumerate(zip(found, told["tokens"], strict=True)):
        differs = next(
            (at for at, (a, b) in enumerate(zip_longest(ours, expected)) if a != b), None
        )
        result = {"case": number, "state": "right" if differs is None else "wrong"}
        if differs is not None:
            result["problem"] = f"token {differs} differs from the CPU's"
        report.append(results=result)
    return 0


# -- speed ----------------------------------------------------------------------------------------


def decode(kit: Kit, report: Report, _start: int, model: str, figure: dict[str, Any]) -> int:
    """Tokens a second of so many sequences, as `mxforge bench` measures them."""
    prompt, new, depth, batch = (figure[name] for name in ("prompt", "new", "depth", "batch"))
    context = -(-(depth + prompt + new + 1) // 256) * 256
    before = device_memory(kit.kind)
    started = time.perf_counter()
    report.put(at="loading")
    with Engine.load(kit.folder / model, context_length=context, max_batch=batch) as engine:
        report.put(at="warming up", load_s=time.perf_counter() - started)
        rounds = Rounds(engine, batch)
        report.put(first_token_s=since_process_start(), at="measuring")
        probe = Probe(library_of(kit.folder / model))
        began = time.perf_counter()
        gb_s = probe.gb_s()
        for number in range(ROUNDS):
            if number >= LEAST_ROUNDS and time.perf_counter() - began > ROUNDS_S:
                break
            sample = rounds.take(prompt, new, depth)
            after = probe.gb_s()
            report.append(samples={**sample, "gb_s": [gb_s, after]})
            gb_s = after
        memory = {"device_bytes_before": before, "device_bytes_after": device_memory(kit.kind)}
        report.put(peak_rss_bytes=peak_rss(), **memory)
    return 0


def start(kit: Kit, report: Report, _start: int, model: str, figure: dict[str, Any]) -> int:
    """From the start of this process to the first token of a short prompt, and what it takes."""
    context = -(-(figure["prompt"] + figure["new"] + 1) // 256) * 256
    before = device_memory(kit.kind)
    loading = time.perf_counter()
    with Engine.load(kit.folder / model, context_length=context, max_batch=1) as engine:
        load_s = time.perf_counter() - loading
        Rounds(engine)
        first = since_process_start()
        after = device_memory(kit.kind)
    taken = None if before is None or after is None else before - after
    report.append(
        samples={
            "first_token_s": first,
            "load_s": load_s,
            "device_bytes": taken,
            "peak_rss_bytes": peak_rss(),
        }
    )
    return 0


def kernels(kit: Kit, report: Report, _start: int, model: str, figure: Any) -> int:
    """Every kernel of one decoded token, alone; of the token whose speed is `figure`'s."""
    told = kit.about["models"][model]
    report.put(at="loading", past=told["past"])
    plan = kit.folder / f"{model}-kernels.plan"
    for what, found in gpu_token.measure(kit.folder / model, plan, told["token"]):
        if what == "kernel":
            report.append(kernels=found)
        else:
            report.put(**{what: found})
        if what == "agrees" and (found is None or found > AGREE):
            report.put(problem="the logits change where tensors have memory of their own")
            return DISAGREES
    return 0


# -- the process ----------------------------------------------------------------------------------

STEPS: dict[str, Callable[..., int]] = {
    "machine": machine, "cases": cases, "nano": nano,
    "decode": decode, "kernels": kernels, "start": start,
}  # fmt: skip


def main(folder: Path, step: dict[str, Any], first: int) -> int:
    """Run one step; its lines go to what stdout was, everything that libraries print to stderr."""
    if sys.platform == "linux":  # a killed run should leave nobody on the device
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    report = Report(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    kit = Kit.open(folder)
    return STEPS[step["kind"]](kit, report, first, **step.get("of", {}))
