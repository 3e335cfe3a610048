"""The tables of a run of scripts/bench_gpu, from its result."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.results import NOT_MEASURED, number, spread, table

HOST_BOUND = 0.9  # of a kernel's time is spent issuing it


def markdown(result: dict[str, Any]) -> str:
    """A page with everything that was found, of a run that may not be complete."""
    kit, m, steps = result["kit"], result["machine"], result["steps"]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    parts = [
        f"# {_device_names(steps)}: mxforge for {kit['target']}",
        f"{result['date']}; kit of commit {kit['commit']}, made {kit['made']}. "
        f"{m['cpu']}, {m['cores']} cores, {m['memory_gib']} GiB, {m['system']}, Python "
        f"{m['python']}, {versions}.",
        _machine(steps.get("machine", {})),
        table(
            ("step", "state", "s", "what was wrong"),
            [
                (name, found["state"], number(found.get("seconds")), found.get("problem", ""))
                for name, found in steps.items()
            ],
        ),
        *(_wrong(name, found, kit) for name, found in steps.items() if found.get("results")),
    ]
    if rows := [_decode_row(name, found) for name, found in steps.items() if "samples" in found]:
        parts += ["## Speed", _DECODE, table(_DECODE_HEADER, [row for row in rows if row])]
    for name, found in steps.items():
        if found.get("kernels"):
            waits = not kit["target"].startswith("cpu")  # a CPU's calls return when they are done
            parts += [f"## {name}", *_kernels(found, waits)]
        elif name.endswith("start-up") and found.get("samples"):
            parts += [f"## {name}", _start(found["samples"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def _device_names(steps: dict[str, Any]) -> str:
    found = steps.get("machine", {}).get("devices") or [{"name": "unknown device"}]
    return str(found[0]["name"])


def _machine(found: dict[str, Any]) -> str:
    lines = []
    for device in found.get("devices", ()):
        memory = number((device["memory_bytes"] or 0) / 2**30, "GiB")
        features = " ".join(device["features"])
        lines.append(f"- {device['name']}, {memory}; {device['problem'] or features}")
    lines += [f"- {line}" for line in found.get("nvidia_smi", ())]
    if found.get("copies_gb_s"):
        copies = spread(found["copies_gb_s"], "GB/s")
        lines.append(f"- copies its own memory with {copies}, reads and writes together")
    return "\n".join(lines)


def _wrong(name: str, found: dict[str, Any], kit: dict[str, Any]) -> str:
    results = found["results"]
    right = sum(result["state"] == "right" for result in results)
    text = f"**{name}**: {right} right of {found['count']}"
    left_out = kit["left_out"] if name == "cases" else []
    if left_out:
        text += f", {len(left_out)} left out of the kit for their size"
    lines = []
    for result in results:
        if result["state"] != "right":
            case = result["case"]
            what = " · ".join(kit["cases"][case]) if name == "cases" else f"prompt {case}"
            lines.append(f"- {what}: {result['state']}, {result.get('problem', '')}")
    return "\n".join([text, "", *lines] if lines else [text])


_DECODE = """\
Tokens a second of all sequences together, median (least … greatest) of rounds. The floor is what a
step has to read, at the rate that the device copied its own memory beside each round."""
_DECODE_HEADER = (
    "",
    "tok/s",
    "ms a step",
    "floor, ms",
    "of the floor",
    "prefill, tok/s",
    "copies, GB/s",
)


def _decode_row(name: str, found: dict[str, Any]) -> tuple[str, ...] | None:
    samples, figure = found["samples"], found["figure"]
    if "decode_tok_s" not in samples[0]:
        return None
    rates = [sample["decode_tok_s"] for sample in samples]
    copies = [gb_s for sample in samples for gb_s in sample["gb_s"]]
    step = figure["batch"] / statistics.median(rates)
    floor = figure["bytes"] / statistics.median(copies) / 1e9
    return (
        name,
        spread(rates),
        number(step * 1e3),
        number(floor * 1e3),
        number(100 * floor / step, "%", 2),
        spread([sample["prefill_tok_s"] for sample in samples]),
        spread(copies),
    )


def _start(samples: list[dict[str, Any]]) -> str:
    gib = [s["device_bytes"] / 2**30 for s in samples if s["device_bytes"] is not None]
    rows = [
        ("process start to first token", spread([s["first_token_s"] for s in samples], "s")),
        ("loading", spread([s["load_s"] for s in samples], "s")),
        ("device memory taken", spread(gib, "GiB") if gib else NOT_MEASURED),
        ("memory of the process", spread([s["peak_rss_bytes"] / 2**30 for s in samples], "GiB")),
    ]
    return table(("fresh processes", "median (least … greatest)"), rows)


_KERNELS = """\
µs a call between two synchronizations, calls of one kernel after the other, each with weights of
its own; the floor is what a call reads of weights and cache, at the rate of copies beside it. *
marks what waits for the host: issuing takes as long as everything."""
_KERNELS_HEADER = (
    "kernel", "calls a token", "µs a call", "MB a call", "floor, µs", "of the floor",
    "of the token",
)  # fmt: skip


def _kernels(found: dict[str, Any], may_wait: bool) -> list[str]:
    each = found["kernels"]
    total = sum(_of_token(kernel) for kernel in each)
    rows = []
    for kernel in sorted(each, key=_of_token, reverse=True):
        us = [seconds * 1e6 for seconds in kernel["call_s"]]
        middle = statistics.median(us)
        floor = kernel["bytes"] / statistics.median(kernel["gb_s"]) / 1e3
        issued = statistics.median(kernel["issue_s"]) * 1e6
        waits = may_wait and issued > HOST_BOUND * middle
        rows.append(
            (
                kernel["kernel"] + (" *" if waits else ""),
                str(kernel["calls"]),
                spread(us),
                *(
                    (
                        number(kernel["bytes"] / 1e6),
                        number(floor),
                        number(100 * floor / middle, "%", 2),
                    )
                    if kernel["bytes"]
                    else ("", "", "")
                ),
                number(100 * _of_token(kernel) / total, "%", 2),
            )
        )
    parts = [f"{found['past']} tokens into the context. {_KERNELS}", table(_KERNELS_HEADER, rows)]
    token = found.get("token")
    if token:
        decode, sample = ([s * 1e3 for s in token[f"{what}_s"]] for what in ("decode", "sample"))
        parts.append(
            f"Sum of these: {number(total * 1e3, 'ms')} a token. The library's function decode: "
            f"{spread(decode, 'ms')}; sample: {spread(sample, 'ms')}. Where every tensor has "
            f"memory of its own the logits are the same, but for {found['agrees']:.1g} of their "
            "norm."
        )
    return parts


def _of_token(kernel: dict[str, Any]) -> float:
    """Seconds of a token that a kernel takes."""
    return float(kernel["calls"] * statistics.median(kernel["call_s"]))
