"""The floors of what scripts/bench_peers measures, and the tables made of its samples.

Results are a JSON object: what was measured on (machine, commit, versions, target), `floors`, and
`samples`, each of one figure, one engine and one pair.
"""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.figures import (
    CHUNK,
    CONTEXT,
    FIGURES,
    Bound,
    Figure,
    Traffic,
    flops_per_token,
    work,
)
from benchmarks.results import (
    NOT_MEASURED,
    busy_samples,
    described,
    measured_when,
    number,
    section,
    spread,
    table,
)

from mxforge.compile.models.gpt_oss.config import GptOssConfig

OURS, THEIRS = "mxforge", "llama.cpp"
LONG_SHARE = 60  # % that decoding at 32k has to keep of the speed at 1k


# -- floors ---------------------------------------------------------------------------------------


def floors_of(
    config: GptOssConfig,
    traffic: Mapping[str, Traffic],
    figures: Iterable[str],
    bandwidth_gb_s: float,
    f32_gflop_s: float,
    int8_gop_s: float | None,
) -> dict[str, Any]:
    """The section `floors` of the results."""
    speeds = [name for name in figures if FIGURES[name].unit == "tok/s"]
    return {
        "bandwidth_gb_s": bandwidth_gb_s,
        "f32_matrix_gflop_s": f32_gflop_s,
        "int8_matrix_gop_s": int8_gop_s,
        "flops_per_prompt_token": flops_per_token(config),
        "work": {
            engine: {name: work(FIGURES[name], config, its) for name in speeds}
            for engine, its in traffic.items()
        },
    }


def most_tok_s(floors: Mapping[str, Any], engine: str, name: str, bandwidth_gb_s: float) -> float:
    """What memory and arithmetic allow, at a bandwidth."""
    one = floors["work"][engine][name]
    rate = max(floors["f32_matrix_gflop_s"], floors["int8_matrix_gop_s"] or 0)
    seconds = max(one["bytes"] / bandwidth_gb_s, one["flops"] / rate) / 1e9
    return float(one["tokens"] / seconds)


def floors_text(floors: Mapping[str, Any]) -> str:
    """The floors before anything is measured, for the terminal."""
    int8 = number(floors["int8_matrix_gop_s"], "GOP/s")
    lines = [
        f"memory reads {floors['bandwidth_gb_s']:.1f} GB/s; matrix products "
        f"{floors['f32_matrix_gflop_s']:.0f} GFLOP/s in f32, {int8} in 8 bits; "
        f"a prompt token takes {floors['flops_per_prompt_token'] / 1e9:.2f} GFLOP"
    ]
    for engine, named in floors["work"].items():
        for name, one in named.items():
            most = most_tok_s(floors, engine, name, floors["bandwidth_gb_s"])
            what = "the prompt" if FIGURES[name].kind == "prefill" else "a step"
            lines.append(
                f"  floor of {engine:9} {name:13} {one['bytes'] / 1e9:7.3f} GB {what:10} "
                f"→ at most {most:8.1f} tok/s"
            )
    return "\n".join(lines)


def expected_minutes(
    floors: Mapping[str, Any], config: GptOssConfig, samples: int, disk_gb_s: float = 0.15
) -> float:
    """Roughly how long a run takes, of speeds that were seen: for the impatient."""
    rate = floors["f32_matrix_gflop_s"] * 1e9
    seconds = 1.5 * (samples + 1) * config.weight_bytes / (disk_gb_s * 1e9)  # warm passes
    for engine, named in floors["work"].items():
        relative = 1.5 if engine == OURS else 0.45  # of NumPy's matrix product
        for name, one in named.items():
            figure = FIGURES[name]
            prompt = figure.batch * figure.prompt + (CHUNK if figure.depth else 0)
            seconds += samples * prompt * floors["flops_per_prompt_token"] / (relative * rate)
            if figure.kind == "decode":
                step = one["bytes"] / (floors["bandwidth_gb_s"] * 1e9)
                seconds += samples * figure.new * 2 * step
            seconds += samples * 4  # processes, contexts, probes
    return seconds / 60


# -- samples --------------------------------------------------------------------------------------


def turns(engines: Sequence[str], samples: int) -> list[tuple[str, list[int]]]:
    """Who measures which pairs: A, B B, A A, B B … so that each pair is two neighbours."""
    found: list[tuple[str, list[int]]] = []
    for pair in range(samples):
        for engine in engines if pair % 2 == 0 else reversed(engines):
            if found and found[-1][0] == engine:
                found[-1][1].append(pair)
            else:
                found.append((engine, [pair]))
    return found


def samples_of(result: Mapping[str, Any], name: str, engine: str) -> list[dict[str, Any]]:
    return [s for s in result["samples"] if (s["figure"], s["engine"]) == (name, engine)]


def values_of(result: Mapping[str, Any], name: str, engine: str) -> list[float]:
    return [FIGURES[name].shown(sample["value"]) for sample in samples_of(result, name, engine)]


def ratios(result: Mapping[str, Any], name: str) -> list[float]:
    """How many times better mxforge is, within each pair that both engines have."""
    ours, theirs = (
        {sample["pair"]: sample["value"] for sample in samples_of(result, name, engine)}
        for engine in (OURS, THEIRS)
    )
    return [
        FIGURES[name].advantage(ours[pair], theirs[pair]) for pair in sorted(ours.keys() & theirs)
    ]


def floor_shares(result: Mapping[str, Any], name: str, engine: str) -> list[float]:
    """Reached part of the floor in %, at the bandwidth that stood beside each sample."""
    floors = result["floors"]
    if name not in floors["work"].get(engine, {}):
        return []
    if FIGURES[name].kind == "prefill" and floors["int8_matrix_gop_s"] is None:
        return []  # 8-bit products pass the rate of f32 ones
    return [
        100
        * sample["value"]
        / most_tok_s(floors, engine, name, statistics.fmean(sample["bandwidth_gb_s"]))
        for sample in samples_of(result, name, engine)
    ]


def long_shares(result: Mapping[str, Any], engine: str) -> list[float]:
    """Decoding at 32k beside decoding at 1k, in %, within each of an engine's turns."""
    near, far = (
        {sample["pair"]: sample["value"] for sample in samples_of(result, name, engine)}
        for name in ("decode_1k", "decode_32k")
    )
    return [100 * far[pair] / near[pair] for pair in sorted(near.keys() & far)]


# -- tables ---------------------------------------------------------------------------------------


def _asked(result: Mapping[str, Any], name: str) -> tuple[str, str]:
    """What was asked of a figure, and whether it was reached."""
    figure = FIGURES[name]
    if figure.limit is None:
        return "", ""
    text = f"{'≥' if figure.limit.of == 'ratio' else '≤'} {_shown(figure, figure.limit)}"
    if figure.aim is not None:
        text += f", aim {_shown(figure, figure.aim)}"
    reached = _reached(result, name, figure.limit)
    if not reached:
        return text, "" if reached is None else "**no**"
    return text, "yes, and the aim" if _reached(result, name, figure.aim) else "yes"


def _shown(figure: Figure, bound: Bound) -> str:
    return f"{bound.value:g} {'×' if bound.of == 'ratio' else figure.unit}"


def _reached(result: Mapping[str, Any], name: str, bound: Bound | None) -> bool | None:
    """Whether the median did; None where nothing was measured, or asked."""
    if bound is None:
        return None
    values = ratios(result, name) if bound.of == "ratio" else values_of(result, name, OURS)
    if not values:
        return None
    middle = statistics.median(values)
    return middle >= bound.value if bound.of == "ratio" else middle <= bound.value


def figures_table(result: Mapping[str, Any]) -> str:
    rows = []
    for name, figure in FIGURES.items():
        if name not in result["figures"]:
            continue
        row = [f"{figure.label}, {figure.unit}"]
        row += [spread(values_of(result, name, engine)) for engine in (OURS, THEIRS)]
        row += [spread(ratios(result, name), "×"), *_asked(result, name)]
        for engine in (OURS, THEIRS):
            shares = floor_shares(result, name, engine)
            row.append(spread(shares, "%") if shares else "")
        rows.append(row)
    if {"decode_1k", "decode_32k"} <= set(result["figures"]):
        ours, theirs = (long_shares(result, engine) for engine in (OURS, THEIRS))
        kept = "" if not ours else "yes" if statistics.median(ours) >= LONG_SHARE else "**no**"
        row = ["decode at 32k of decode at 1k, %", spread(ours), spread(theirs), ""]
        rows.append([*row, f"≥ {LONG_SHARE} %", kept, "", ""])
    header = ["", OURS, THEIRS, "ratio", "asked", "reached"]
    return table([*header, *(f"of the floor, {engine}" for engine in (OURS, THEIRS))], rows)


def samples_table(result: Mapping[str, Any]) -> str:
    rows = []
    for sample in result["samples"]:
        figure = FIGURES[sample["figure"]]
        cached = sample.get("cached")
        rows.append(
            (
                f"{sample['pair'] + 1} {sample['engine']}",
                figure.label,
                number(figure.shown(sample["value"]), figure.unit),
                ", ".join(f"{value:.0f}" for value in sample["bandwidth_gb_s"]),
                number(sample.get("others_cpu_cores"), digits=2),
                "" if cached is None else number(100 * cached, "%"),
            )
        )
    header = ("pair, engine", "what", "value", "GB/s beside", "cores others took", "cached")
    return table(header, rows)


def disturbance(result: Mapping[str, Any]) -> str:
    """How many samples had the machine to themselves, and their files in memory."""
    samples = result["samples"]
    cold = sum(sample.get("cached") is not None and sample["cached"] < 0.99 for sample in samples)
    return f"{busy_samples(samples)}, and {cold} with less than 99 % of their files cached before."


NOTES = f"""\
Written by `scripts/bench_peers`; do not edit. Random weights. Engines take turns, one process at a
time: llama.cpp, twice mxforge, twice llama.cpp and so on, so that the two samples of a pair are
neighbours. A ratio is taken within a pair and is above 1 where mxforge is better: faster, sooner,
smaller. Values are median (least … greatest) of the samples.

- **Warm**: at each turn the other's files leave the page cache and the engine's own are read in
  full. mxforge runs on these pages. llama.cpp reads its file into memory of its own, in its fastest
  layout; its start-up alone is measured with the file mapped, which starts sooner and runs slower.
- **Floors**: bytes that a step cannot do without (active experts, the window on sliding layers),
  counted from the artifact's manifest and the GGUF, ÷ the memory bandwidth right before and after
  the sample; for prefill, where that takes longer, flops ÷ the rate of an 8-bit (onnxruntime) or
  f32 (NumPy) matrix product. Shared machines swing widely: read ratios and shares, not speeds.
- **Depth**: keys and values of {CHUNK} tokens are computed, and copied until the context is as full
  as the figure says; in llama.cpp by restoring a state that consists of such copies.
- **Memory**: of a process with a context of {CONTEXT} tokens, all of it written. llama.cpp's is
  taken once a process, which lasts a turn."""


def result_text(result: Mapping[str, Any]) -> str:
    floors = result["floors"]
    int8 = number(floors["int8_matrix_gop_s"], "GOP/s")
    parts = [
        f"## {result['shape']} — {described(dict(result))}",
        f"{result['target']}, {result['numerics']} numerics; {_pairs(result)} of samples"
        + ("" if result["complete"] else ", **interrupted** before the end")
        + f". {measured_when(dict(result))}",
        figures_table(result),
        f"Matrix products reach {floors['f32_matrix_gflop_s']:.0f} GFLOP/s in f32 and {int8} in 8 "
        f"bits; a prompt token takes {floors['flops_per_prompt_token'] / 1e9:.2f} GFLOP. "
        f"{_bytes_of_a_step(result)} With every weight and every page of the cache touched "
        f"mxforge would hold {result['planned_bytes'] / 2**30:.1f} GiB (computed).",
        disturbance(result),
    ]
    if result["no_peer_because"]:
        parts.append(f"llama.cpp is {NOT_MEASURED}: {result['no_peer_because']}.")
    parts.append("### Every sample\n\n" + samples_table(result))
    return "\n\n".join(parts)


def _pairs(result: Mapping[str, Any]) -> str:
    count = len({sample["pair"] for sample in result["samples"]})
    return "1 pair" if count == 1 else f"{count} pairs"


def _bytes_of_a_step(result: Mapping[str, Any]) -> str:
    """A sentence on what decoding reads, which is what a comparison has to be fair in."""
    read = [
        f"{named['decode']['bytes'] / 1e9:.2f} GB in {engine}"
        for engine, named in sorted(result["floors"]["work"].items(), reverse=True)
        if "decode" in named
    ]
    return f"A decode step reads {' and '.join(read)}." if read else ""


def page(results: Iterable[Mapping[str, Any]]) -> str:
    """docs/bench/peers.md."""
    return "\n\n".join(["# Beside llama.cpp", NOTES, *map(result_text, results)]) + "\n"


# -- the README's performance section -------------------------------------------------------------

README_SHAPE = "20b"


def readme_section(results: Iterable[Mapping[str, Any]]) -> str:
    shown = [result for result in results if result["shape"] == README_SHAPE]
    return section("figures", "bench_peers", map(_readme_table, shown))


def _readme_table(result: Mapping[str, Any]) -> str:
    rows = []
    for name, figure in FIGURES.items():
        ours, theirs = (values_of(result, name, engine) for engine in (OURS, THEIRS))
        if not ours:
            continue
        cells = [number(statistics.median(v)) if v else NOT_MEASURED for v in (ours, theirs)]
        rows.append((f"{figure.label}, {figure.unit}", *cells, spread(ratios(result, name), "×")))
    header = (f"gpt-oss-{result['shape']} shapes, random weights", OURS, THEIRS, "better by")
    text = (
        f"{described(dict(result))}; {result['target']}, `{result['numerics']}` numerics; "
        f"{result['date'].split()[0]}. Medians of {_pairs(result)} of samples, in turns in one "
        f"run; ratios are taken within pairs, with their spread. {_bytes_of_a_step(result)} "
        "Every sample and the floors: [docs/bench/peers.md](docs/bench/peers.md)."
    )
    return table(header, rows) + "\n\n" + textwrap.fill(text, 100, break_on_hyphens=False)
