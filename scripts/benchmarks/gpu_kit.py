"""Pack a kit for scripts/bench_gpu: all that a machine with a GPU needs, and no compiler.

run.py, README.md      the command, and what to do with it
kit.json               what the files below are
mxforge/, scripts/, support/   the runtime and the runner
cases/                 a library for each schedule; inputs and expected results of each case
nano/, 20b/, …         artifacts
20b-kernels.plan, …    the kernels of a token, each alone
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import re
import shutil
import time
import tomllib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from _setup import ROOT
from absent_gpus.token import Token
from benchmarks import gpu_kernels
from benchmarks.figures import Figure, Traffic, work
from benchmarks.machine import provenance
from checkpoints.shapes import SHAPES, hf_config
from nano.compact import expand
from support.kernels import Call, call_of, made_inputs, runs
from support.prompts import NANO_PROMPTS

from mxforge import Engine, SamplingParams, compile_model
from mxforge.compile import kernels as code
from mxforge.compile import linker
from mxforge.compile.launches import Hosts
from mxforge.compile.models.gpt_oss.config import GptOssConfig
from mxforge.compile.plan_values import Values
from mxforge.compile.targets import CompileTarget, Numerics, resolve
from mxforge.errors import UsageError
from mxforge.native import build
from mxforge.plan import Function, Plan, Role, Step, Tensor
from mxforge.schedules.kernel import Case, Kernel, Schedule

NUMERICS: Numerics = "fast"  # of the models; nano has to write what the CPU writes, in exact ones
MODELS: dict[str, dict[str, Any]] = {"120b": hf_config("120b-2layers", {"num_hidden_layers": 36})}
MODELS |= {name: hf_config(name) for name in SHAPES}
DEFAULT_PARTS = ("cases", "nano", "20b")

LARGE_BYTES = 1 << 20  # of a case's arrays: beyond, contents repeat, so that they compress
PERIOD = 13  # rows; prime, so that no tile and no stride meets the same ones again
PAST = 1024  # tokens before the one whose kernels are timed
PROMPT, NEW = 16, 64
NANO_NEW = 64
FIGURES = (  # sequences, depth; most valuable first
    (1, 0), (16, 0), (64, 0), (4, 0), (1, 32768),
)  # fmt: skip
RUNTIME = (
    "*.py", "py.typed", "data/*", "native/*.py", "native/*/*.[ch]*", "native/*/*.mm",
    "native/*/*/*.[ch]*",
)  # fmt: skip
RUNNER = {
    "scripts": (
        "_setup.py",
        "benchmarks/gpu_[!km]*.py",
        "benchmarks/machine.py",
        "benchmarks/results.py",
    ),
    "support": ("agreement.py",),
}


def pack(
    target_name: str,
    folder: Path,
    *,
    parts: Iterable[str] = DEFAULT_PARTS,
    kernels: Iterable[str] = (),
    case_bytes: int = 5 << 20,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Write the kit into a new folder; returns what kit.json tells.

    kernels     only cases of these; all where there are none
    case_bytes  a case is left out whose compressed arrays are larger
    """
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} should be a new folder, but has something in it.")
    target = resolve(target_name)
    folder.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {
        "target": target.name,
        "made": time.strftime("%Y-%m-%d"),
        **{key: value for key, value in provenance().items() if key != "date"},
        "cases": [],
        "left_out": [],
        "nano": None,
        "models": {},
    }
    _copy_runner(folder)
    chosen = list(parts)
    if "cases" in chosen:
        _pack_cases(folder / "cases", target, set(kernels), case_bytes, about, say)
    if "nano" in chosen:
        about["nano"] = _pack_nano(folder / "nano", target, say)
    for name in chosen:
        if name in MODELS:
            say(f"compiling {name}")
            about["models"][name] = _pack_model(folder / name, name, target)
    (folder / "kit.json").write_text(json.dumps(about) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_readme(about), encoding="utf-8")
    return about


def check_parts(parts: Iterable[str]) -> list[str]:
    """UsageError where there is no such part."""
    known = ("cases", "nano", *MODELS)
    found = list(parts)
    if unknown := [part for part in found if part not in known]:
        raise UsageError(f"--parts takes some of {','.join(known)}, found {','.join(unknown)}.")
    return found


# -- the runner -----------------------------------------------------------------------------------


def _copy_runner(folder: Path) -> None:
    copies = {"mxforge": (ROOT / "runtime", RUNTIME)}
    copies |= {
        name: ((ROOT / "scripts" if name == "scripts" else ROOT / "tests" / name), patterns)
        for name, patterns in RUNNER.items()
    }
    for name, (source, patterns) in copies.items():
        for pattern in patterns:
            for path in source.glob(pattern):
                copy = folder / name / path.relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
    shutil.copyfile(ROOT / "scripts" / "benchmarks" / "gpu_main.py", folder / "run.py")
    built = folder / "mxforge" / "native" / build.CORE.output.name
    if build.CORE.up_to_date():
        shutil.copyfile(build.CORE.output, built)
    else:
        build.build(build.CORE, built)


# -- cases ----------------------------------------------------------------------------------------


def _pack_cases(
    folder: Path,
    target: CompileTarget,
    kernels: set[str],
    case_bytes: int,
    about: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    folder.mkdir()
    by_code: dict[tuple[str, str], list[tuple[Kernel, Case, Schedule]]] = {}
    for kernel, case, schedule in runs(target.kernels):
        if not kernels or kernel.name in kernels:
            by_code.setdefault((kernel.name, schedule.name), []).append((kernel, case, schedule))
    for (kernel_name, schedule_name), its in by_code.items():
        say(f"{kernel_name}: {schedule_name}")
        functions: dict[tvm.tirx.PrimFunc, str] = {}
        packed: dict[str, tuple[str, Call]] = {}  # by case: its kernel in the library, and its call
        stem = _slug(kernel_name, schedule_name)
        for kernel, case, schedule in its:
            name = {"kernel": kernel.name, "case": case.name, "schedule": schedule.name}
            call, data = _packed_case(target, kernel, case, schedule)
            if len(data) > case_bytes:
                about["left_out"].append({**name, "bytes": len(data)})
                continue
            file = f"{_slug(kernel.name, case.name, schedule.name)}.npz.xz"
            (folder / file).write_bytes(data)
            function = kernel.build(target.kernels, schedule, **case.static)
            packed[case.name] = functions.setdefault(function, f"kernel{len(functions)}"), call
            about["cases"].append(
                {**name, "library": stem, "data": file, "tolerance": case.tolerance}
            )
        if packed:
            _write_library(folder, stem, target, functions, packed)


def _write_library(
    folder: Path,
    stem: str,
    target: CompileTarget,
    functions: dict[tvm.tirx.PrimFunc, str],
    packed: dict[str, tuple[str, Call]],
) -> None:
    """Kernels, and a plan with a function for each case."""
    module = tvm.IRModule({name: function for function, name in functions.items()})
    hosts = None
    if target.kernels.kind == "cpu":
        file = folder / f"{stem}{linker.known_host(target.host).suffix}"
        code.write_library(code.of_cpu(module, target), file, target.host)
    else:
        on_device = code.of_gpu(module, target)
        hosts = on_device.hosts
        file = folder / f"{stem}.{code.device_suffix(target)}"
        file.write_bytes(code.device_code(on_device, target, folder))
    plan = Plan(
        tuple(_function(case, kernel, call, hosts) for case, (kernel, call) in packed.items()), 0
    )
    (folder / f"{stem}.plan").write_bytes(plan.to_bytes())


def _function(case: str, kernel: str, call: Call, hosts: Hosts | None) -> Function:
    """A call as a plan's function: what comes back is a cache to it, which is filled before."""
    values, back = Values(), {*call.outputs, *call.updated}
    shapes = [tuple(map(values.constant, array.shape)) for array in call.arrays]
    tensors = tuple(
        Tensor(
            Role.KV if number in back else Role.INPUT, array.dtype.name, shape, f"argument{number}"
        )
        for number, (array, shape) in enumerate(zip(call.arrays, shapes, strict=True))
    )
    places = tuple(range(len(tensors)))
    if hosts is None:
        steps = [Step(kernel, places)]
    else:
        steps = hosts.launches(kernel, places, shapes, values)
    return Function(case, values.all(), tensors, (), tuple(steps), ())


def _packed_case(
    target: CompileTarget, kernel: Kernel, case: Case, schedule: Schedule
) -> tuple[Call, bytes]:
    """The call of a case, and its arrays, compressed.

    argument0, …  bytes, u8, as the kernel takes them; what a kernel writes only has no array
    expected0, …  of arguments that it writes, as numbers
    """
    inputs = made_inputs(case)
    call = call_of(kernel, target.kernels, inputs, case.static, schedule)
    if sum(array.nbytes for array in call.arrays) > LARGE_BYTES:
        inputs = _repeating(kernel, case, inputs)
        call = call_of(kernel, target.kernels, inputs, case.static, schedule)
    outputs = kernel.reference(**{n: a.copy() for n, a in inputs.items()}, **case.static)
    fresh = {*call.outputs, *call.scratch}
    arrays = {
        f"argument{number}": np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        for number, array in enumerate(call.arrays)
        if number not in fresh
    }
    for number, output in zip((*call.outputs, *call.updated), outputs, strict=True):
        real = not np.issubdtype(output.dtype, np.integer)
        arrays[f"expected{number}"] = output.astype(np.float32) if real else output
    stored = io.BytesIO()
    np.savez(stored, **arrays)
    return call, lzma.compress(stored.getvalue(), preset=1)


def _repeating(kernel: Kernel, case: Case, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The inputs, where the rows of large weights and of large real arrays repeat.

    Rows with NaN or infinity stay as they are: they stand for what must not be read.
    """
    weights = {
        tensor.name
        for tensor in kernel.signature(**case.static).inputs
        if all(isinstance(size, int) for size in tensor.shape)
    }
    changed = {}
    for name, array in inputs.items():
        real = array.dtype.kind not in "iub"
        if array.nbytes > LARGE_BYTES // 4 and (real or name in weights):
            array = array.copy()
            rows = array.reshape(-1, array.shape[-1])
            finite = np.isfinite(rows.astype(np.float32)).all(axis=1)
            where = np.flatnonzero(finite)
            rows[where] = rows[where[np.arange(len(where)) % PERIOD]]
        changed[name] = array
    return changed


def _slug(*words: str) -> str:
    """A file name for these words, and no other words."""
    text = re.sub(r"[^a-z0-9]+", "-", " ".join(words).lower()).strip("-")[:80]
    return f"{text}-{hashlib.sha256(chr(0).join(words).encode()).hexdigest()[:6]}"


# -- models ---------------------------------------------------------------------------------------


def _pack_nano(folder: Path, target: CompileTarget, say: Callable[[str], None]) -> dict[str, Any]:
    """nano for the target, its weights compressed, and what the CPU writes."""
    say("compiling nano, and asking it on this CPU")
    checkpoint, on_cpu = folder.with_name("nano-checkpoint"), folder.with_name("nano-cpu")
    try:
        expand(ROOT / "artifacts" / "nano", checkpoint)
        compile_model(checkpoint, "cpu", on_cpu, numerics="exact")
        compile_model(checkpoint, target.name, folder, numerics="exact")
        params = SamplingParams(temperature=0, max_tokens=NANO_NEW, ignore_eos=True)
        with Engine.load(on_cpu, context_length=512) as engine, ThreadPoolExecutor(16) as pool:
            prompts = [engine.encode(prompt) for prompt in NANO_PROMPTS]
            answers = list(pool.map(lambda prompt: engine.generate(prompt, params), prompts))
    finally:
        for scratch in (checkpoint, on_cpu):
            shutil.rmtree(scratch, ignore_errors=True)
    for weights in folder.glob("*.safetensors"):
        with weights.open("rb") as source, lzma.open(f"{weights}.xz", "wb", preset=1) as packed:
            shutil.copyfileobj(source, packed, 1 << 20)
        weights.unlink()
    tokens = [list(answer.token_ids) for answer in answers]
    return {"prompts": prompts, "tokens": tokens, "new": NANO_NEW}


def _pack_model(folder: Path, name: str, target: CompileTarget) -> dict[str, Any]:
    """A model with random weights, and how its figures and kernels are measured."""
    raw = MODELS[name]
    file = folder.with_name(f"{name}-config.json")
    file.write_text(json.dumps(raw))
    batch = max(sequences for sequences, _depth in FIGURES)
    try:
        compile_model(file, target.name, folder, NUMERICS, random_weights=True, max_batch=batch)
    finally:
        file.unlink()
    config = GptOssConfig.from_hf(raw)
    traffic = Traffic.of_model(config, target, target.precision(NUMERICS, config))
    figures = []
    for sequences, depth in FIGURES:
        if depth + PROMPT + NEW >= config.max_position_embeddings:
            continue
        plural = "s" if sequences > 1 else ""
        label = f"decode of {sequences} sequence{plural}" + (f", depth {depth}" if depth else "")
        figure = Figure(label, "decode", PROMPT, NEW, sequences, depth)
        figures.append(
            {
                "name": label, "prompt": PROMPT, "new": NEW, "batch": sequences, "depth": depth,
                "bytes": work(figure, config, traffic)["bytes"],
            }
        )  # fmt: skip
    plan = Plan.from_bytes((folder / "model.plan").read_bytes())
    token = Token.of(plan, config, target, NUMERICS, 1, PAST + 1)
    alone, told = gpu_kernels.of_token(token)
    folder.with_name(f"{name}-kernels.plan").write_bytes(alone.to_bytes())
    return {"figures": figures, "token": told, "past": PAST}


# -- what the kit says of itself ------------------------------------------------------------------


def _readme(about: dict[str, Any]) -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    packages = " ".join(f"'{package}'" for package in project["dependencies"])
    left_out = "".join(
        f"\n- {case['kernel']}: {case['case']} ({case['schedule']})" for case in about["left_out"]
    )
    return f"""\
# A kit of mxforge for {about["target"]}

Checks mxforge's kernels on the GPU of this machine, then measures how fast gpt-oss runs. It needs
the GPU's driver, Python {project["requires-python"]} and these packages, and no compiler:

    pip install {packages}

Then:

    python run.py --minutes 30

The result is bench-gpu.json, and as tables bench-gpu.md; send both back. They are written while it
runs, so that a run that ends early is worth something too. `python run.py --list` names the steps,
`--only STEP` does one of them.

Made on {about["made"]} of commit {about["commit"]}: {len(about["cases"])} cases of kernels;
{len(about["left_out"])} left out for their size.{left_out}
"""
