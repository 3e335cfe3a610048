"""What compilers said of kernels: gates, comparison with what is tracked, and tables.

Results of one compiler are a JSON object:

    kind       "gpu-statistics"
    compiler   its name and version
    model      the shapes, such as "20b"; numerics
    gpus       GPU -> kernel -> statistics, or {"failed": why} where it does not compile

Statistics are numbers by name. Those of ESTIMATES are the compiler's guesses, which are shown;
all others are counted and do not change as long as code and compiler are the same, unless a
compiler is not quite the same from run to run (`spread`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.results import table

KIND = "gpu-statistics"
ESTIMATES = frozenset({"cycles", "predicted_us"})
# What no kernel should have any of.
UNWANTED = ("spills", "scratch_bytes", "local_accesses")

Results = dict[str, Any]
# (GPU, kernel) -> why it may have what UNWANTED lists, until somebody mends it.
Exceptions = Mapping[tuple[str, str], str]


def results(compiler: str, model: str, numerics: str, gpus: Mapping[str, Any]) -> Results:
    return {
        "kind": KIND, "compiler": compiler, "model": model, "numerics": numerics,
        "gpus": dict(gpus),
    }  # fmt: skip


def text(found: Results) -> str:
    """The object as JSON with a line for each kernel, so that a change shows as lines."""
    lines = json.dumps({**found, "gpus": {}}, indent=1).splitlines()[:-2]
    gpus = []
    for gpu, kernels in found["gpus"].items():
        each_kernel = (f"   {json.dumps(name)}: {json.dumps(kernels[name])}" for name in kernels)
        gpus.append(f"  {json.dumps(gpu)}: {{\n" + ",\n".join(each_kernel) + "\n  }")
    return "\n".join([*lines, ' "gpus": {', ",\n".join(gpus), " }", "}"]) + "\n"


def each(found: Results) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(GPU, kernel, statistics) of all."""
    for gpu, kernels in found["gpus"].items():
        for kernel, statistics in kernels.items():
            yield gpu, kernel, statistics


def broken_gates(found: Results, exceptions: Exceptions) -> list[str]:
    """A sentence for each kernel that does not compile, or that has what UNWANTED lists without
    being an exception; and for each exception of these GPUs that is none any more."""
    problems, needed = [], set()
    for gpu, kernel, statistics in each(found):
        if "failed" in statistics:
            problems.append(f"{kernel} does not compile for {gpu}: {statistics['failed']}")
        for name in UNWANTED:
            if statistics.get(name, 0):
                needed.add((gpu, kernel))
                if (gpu, kernel) not in exceptions:
                    problems.append(f"{kernel} on {gpu} should have no {name}: {statistics[name]}")
    for gpu, kernel in sorted(set(exceptions) - needed):
        if gpu in found["gpus"]:
            problems.append(f"{kernel} on {gpu} needs no exception any more; remove it")
    return problems


def differences(
    tracked: Results, fresh: Results, spread: Mapping[str, float]
) -> tuple[list[str], list[str]]:
    """What differs, one line each: what has to be explained; and what has not, since it is an
    estimate, or differs by no more than this part of it, as it does from run to run."""
    counted = [
        f"{name}: {tracked[name]} -> {fresh[name]}"
        for name in ("compiler", "model", "numerics")
        if tracked[name] != fresh[name]
    ]
    harmless: list[str] = []
    before, after = ({(g, k): s for g, k, s in each(one)} for one in (tracked, fresh))
    for key in sorted(before.keys() | after.keys()):
        where = " ".join(key)
        if key not in before or key not in after:
            counted.append(f"{where}: {'new' if key in after else 'gone'}")
            continue
        for name in sorted(before[key].keys() | after[key].keys()):
            old, new = before[key].get(name), after[key].get(name)
            if old != new:
                close = old and new and abs(new - old) <= spread.get(name, 0) * old
                lines = harmless if close or name in ESTIMATES else counted
                lines.append(f"{where}: {name} {old} -> {new}")
    return counted, harmless


# (statistic, heading, what it tells)
COLUMNS = (
    ("registers", "Registers", "of one thread, in the compiler's units"),
    ("waves", "Waves", "most at the same time, on what the compiler counts them for"),
    ("instructions", "Instructions", "of the whole kernel, loops once"),
    ("cycles", "Cycles", "the compiler's estimate; never compared across compilers or GPUs"),
    ("wide_loads", "Loads of 128 bits", "of global memory, beside those of any width"),
    (
        "matrix_instructions",
        "Matrix instructions",
        "of the whole kernel, loops once, in kernels that multiply matrices",
    ),
    (
        "instructions_a_weight",
        "Instructions a weight",
        "of a thread, all that one token executes, in kernels that multiply weights on tensor "
        "cores",
    ),
    (
        "wide_loads_ahead",
        "Loads ahead",
        "loads of 128 bits that a thread has sent when it needs the first",
    ),
)


def page(title: str, about: str, found: Results, exceptions: Exceptions) -> str:
    """The tables as Markdown."""
    parts = [
        f"# {title}",
        f"Written by `scripts/gpu_statistics`; do not edit. {about}",
        f"{found['compiler']}; gpt-oss-{found['model']}, {found['numerics']} numerics.",
        "## Gates\n\n" + _gates(exceptions),
    ]
    for name, heading, meaning in COLUMNS:
        if any(name in statistics for _, _, statistics in each(found)):
            parts.append(f"## {heading}\n\n{meaning[0].upper()}{meaning[1:]}.\n")
            parts[-1] += "\n" + _table(found, name)
    return "\n\n".join(parts) + "\n"


def _gates(exceptions: Exceptions) -> str:
    kept = "Every kernel compiles, and none spills or has scratch or local memory"
    if not exceptions:
        return f"{kept}."
    reasons: dict[tuple[str, str], list[str]] = {}
    for (gpu, kernel), why in exceptions.items():
        reasons.setdefault((kernel, why), []).append(gpu)
    lines = [f"- {kernel} on {', '.join(on)}: {why}" for (kernel, why), on in reasons.items()]
    return "\n".join([f"{kept}, but for", "", *lines])


def _table(found: Results, name: str) -> str:
    gpus: Sequence[str] = list(found["gpus"])
    kernels = sorted({kernel for _, kernel, _ in each(found)})
    rows = []
    for kernel in kernels:
        cells = [found["gpus"][gpu].get(kernel, {}) for gpu in gpus]
        rows.append([kernel, *(_cell(statistics, name) for statistics in cells)])
    return table(["", *gpus], rows)


def _cell(statistics: Mapping[str, Any], name: str) -> str:
    if name not in statistics:
        return "failed" if "failed" in statistics else ""
    value = f"{statistics[name]:,}"
    return f"{value} of {statistics['loads']:,}" if name == "wide_loads" else value
