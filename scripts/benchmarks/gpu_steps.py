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
from mxforge.artifact import open_artifact
from mxforge.bench import Rounds, peak_rss, since_process_start
from mxforge.devices import devices
from mxforge.library import Library, device_memory

from . import gpu_token
from .gpu_device import Device, Probe

DISAGREES = 3  # exit code: a case could not be run, and the device may not be usable any more
ROUNDS, LEAST_ROUNDS, ROUNDS_S = 7, 3, 30.0
PROGRESS_S = 5.0
PR_SET_PDEATHSIG = 1
AGREE = 1e-5  # of the tape's logits with those of the same kernels in the library's function


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

    @classmethod
    def open(cls, folder: Path) -> Kit:
        return cls(folder, json.loads((folder / "kit.json").read_text(encoding="utf-8")))


def machine(kit: Kit, report: Report, _start: int) -> int:
    """The devices of the target's kind, and how fast one copies with nothing else on it."""
    kind = kit.about["target"].partition(":")[0]
    report.put(devices=[asdict(each) for each in devices() if each.kind == kind])
    if tool := shutil.which("nvidia-smi") if kind == "cuda" else None:
        asked = "--query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem,power.limit"
        said = subprocess.run([tool, asked, "--format=csv"], capture_output=True, text=True)
        report.put(nvidia_smi=said.stdout.splitlines())
    probe = Probe(Device(_some_library(kit)))
    report.put(copies_gb_s=[probe.gb_s() for _ in range(5)])
    return 0


def _some_library(kit: Kit) -> Library:
    if kit.about["cases"]:
        return _library(kit, kit.about["cases"][0]["library"])
    artifact = next(iter(kit.about["models"]), "nano")
    return Library(open_artifact(kit.folder / artifact).library, kit.about["target"])


# -- cases ----------------------------------------------------------------------------------------


def cases(kit: Kit, report: Report, start: int) -> int:
    """Every case from number `start` on against its expected result."""
    libraries: dict[str, Library] = {}
    every = kit.about["cases"]
    for number, case in enumerate(every[start:], start):
        report.put(at=number)
        name = case["library"]
        try:
            if name not in libraries:
                libraries.clear()  # the cases of one stand together
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


def _library(kit: Kit, name: str) -> Library:
    folder = kit.folder / "cases"
    code = {path.name: path for path in folder.glob("device-*")}
    return Library(folder / name, kit.about["target"], device_code=code)


def _case(kit: Kit, case: dict[str, Any], library: Library) -> float:
    """The largest relative error of the outputs; AssertionError where one is too large."""
    with lzma.open(kit.folder / "cases" / case["data"]) as file:
        stored = np.load(io.BytesIO(file.read()))
    device = Device(library)
    arguments = []
    for argument in case["arguments"]:
        nbytes, key = argument["bytes"], argument["key"]
        content = np.full(nbytes, 0xFF, np.uint8) if key is None else stored[key]
        arguments.append(device.tensor(content, argument["shape"], argument["dtype"]))
    library.kernel(case["function"])(*arguments)
    errors = []
    for index, (at, key) in enumerate(zip(case["written"], case["expected"], strict=True)):
        argument = case["arguments"][at]
        content = device.bytes(arguments[at], argument["bytes"])
        ours = as_numbers(content, argument["dtype"]).reshape(argument["shape"])
        errors.append(check(ours, stored[key], case["tolerance"], f"output {index}"))
    return max(errors)


def as_numbers(content: np.ndarray, dtype: str) -> np.ndarray:
    """Bytes as numbers of a dtype, which NumPy knows unless it is bfloat16."""
    if dtype == "bfloat16":
        return (content.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return content.view(dtype)


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
    target = kit.about["target"]
    before = device_memory(target)
    started = time.perf_counter()
    report.put(at="loading")
    with Engine.load(kit.folder / model, context_length=context, max_batch=batch) as engine:
        report.put(at="warming up", load_s=time.perf_counter() - started)
        rounds = Rounds(engine, batch)
        report.put(first_token_s=since_process_start(), at="measuring")
        probe = Probe(Device(Library(open_artifact(kit.folder / model).library, target)))
        began = time.perf_counter()
        gb_s = probe.gb_s()
        for number in range(ROUNDS):
            if number >= LEAST_ROUNDS and time.perf_counter() - began > ROUNDS_S:
                break
            sample = rounds.take(prompt, new, depth)
            after = probe.gb_s()
            report.append(samples={**sample, "gb_s": [gb_s, after]})
            gb_s = after
        memory = {"device_bytes_before": before, "device_bytes_after": device_memory(target)}
        report.put(peak_rss_bytes=peak_rss(), **memory)
    return 0


def start(kit: Kit, report: Report, _start: int, model: str, figure: dict[str, Any]) -> int:
    """From the start of this process to the first token of a short prompt, and what it takes."""
    context = -(-(figure["prompt"] + figure["new"] + 1) // 256) * 256
    target = kit.about["target"]
    before = device_memory(target)
    loading = time.perf_counter()
    with Engine.load(kit.folder / model, context_length=context, max_batch=1) as engine:
        load_s = time.perf_counter() - loading
        Rounds(engine)
        first = since_process_start()
        after = device_memory(target)
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
    for what, found in gpu_token.measure(kit.folder / model, told["tape"], told["past"]):
        if what == "kernel":
            report.append(kernels=found)
        else:
            report.put(**{what: found})
        if what == "agrees" and (found is None or found > AGREE):
            report.put(problem="the kernels called one by one give other logits than the model")
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
