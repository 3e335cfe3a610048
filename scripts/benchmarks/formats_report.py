"""The table that scripts/bench_formats makes of its results.

Results are a JSON object: what was measured on (machine, target, shape), and `choices`. Each has
the `options` of compile-model, the `formats` that they come to, `bytes` of the published model,
`errors` (the worst tensor of each odd shape) and `samples`: the default beside the choice, in one
figure and one pair.
"""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.figures import FIGURES
from benchmarks.results import NOT_MEASURED, busy_samples, described, number, section, spread, table

DEFAULT = "default"
CONTROL = "control"  # the default once more: how far apart equal engines are measured
MEASURED = ("decode_1k", "decode_32k", "prefill_512")
BYTES_OF = "20b"  # the shape whose bytes are counted

Choice = Mapping[str, Any]


def words(options: Mapping[str, str]) -> str:
    """The options as compile-model takes them."""
    return " ".join(f"--{option} {value}" for option, value in options.items())


def ratios(choice: Choice, figure: str) -> list[float]:
    """How many times as fast as the default the choice is, within each pair."""
    return [s["value"] / s["default"] for s in choice["samples"] if s["figure"] == figure]


def default_speeds(result: Mapping[str, Any], figure: str) -> list[float]:
    """What the default reached beside all the others, tok/s."""
    choices = result["choices"].values()
    return [s["default"] for c in choices for s in c["samples"] if s["figure"] == figure]


def worst(choice: Choice) -> dict[str, Any] | None:
    """The largest error of all shapes."""
    return max(choice["errors"], key=lambda found: found["error"], default=None)


def formats_table(result: Mapping[str, Any]) -> str:
    bound = f"{result['bound']:.0e}".replace("e-0", "e-")
    rows = [_row(result, name, choice) for name, choice in result["choices"].items()]
    header = [f"`mxforge compile`, {result['target']}"]
    header += [FIGURES[name].label for name in MEASURED]
    return table(
        [*header, "weights, GB a token", "cache, kB a token", "worst error", f"within {bound}"],
        rows,
    )


def _row(result: Mapping[str, Any], name: str, choice: Choice) -> list[str]:
    if name == DEFAULT:
        formats = ", ".join(f"{option} {value}" for option, value in choice["formats"].items())
        row = [f"the default: {formats}"]
        for figure in MEASURED:
            speeds = default_speeds(result, figure)
            middle = number(statistics.median(speeds), "tok/s") if speeds else NOT_MEASURED
            row.append(f"1 ({middle})")
    else:
        named = f"`{words(choice['options'])}`"
        row = ["the default again, as a control" if name == CONTROL else named]
        row += [spread(ratios(choice, figure), "×") for figure in MEASURED]
    row.append(number(choice["bytes"]["weights_a_token"] / 1e9))
    row.append(number(choice["bytes"]["cache_a_token"] / 1e3))
    found = worst(choice)
    if found is None:
        return [*row, NOT_MEASURED, ""]
    row.append(f"{found['error']:.1e}".replace("e-0", "e-"))
    return [*row, "yes" if found["error"] <= result["bound"] else "**no**"]


def notes(result: Mapping[str, Any]) -> str:
    """What the table shows, on what it was measured, and how quiet it was."""
    choices = result["choices"].values()
    samples = [sample for choice in choices for sample in choice["samples"]]
    shapes = sorted({found["shape"] for choice in choices for found in choice["errors"]})
    dates = sorted({choice["date"].split()[0] for choice in choices if "date" in choice})
    commits = sorted({choice["commit"] for choice in choices if "commit" in choice})
    pairs = [len(ratios(choice, MEASURED[0])) for choice in choices if choice["samples"]]
    text = (
        f"{described(dict(result))}; {', '.join(dates)}, commit {', '.join(commits)}. "
        "Speeds are relative to the default's, above 1 where the choice is faster: median (least … "
        f"greatest) of {_counted(pairs)}, measured in turns in one process. The control is the "
        "default a second time, compiled and loaded apart: its spread is that of the measurement. "
        f"The weights are random, in the shape {result['shape']}: {result['shape_is']}. With fewer "
        "layers the output layer is a larger part of decoding: with all layers the cache and the "
        "experts matter more, and dense weights less. Bytes are those of "
        f"gpt-oss-{BYTES_OF} with all its layers: weights that a decoded token reads, and what "
        "each token adds to the cache of full layers (the others keep a window). The error is "
        "the relative one of the worst tensor of any layer, on the input that the reference gives "
        f"that layer: {', '.join(shapes) or 'no shape'}. `fast` promises {result['bound']:g}; a "
        f"choice that does not keep it is marked **no**. {busy_samples(samples)}. Every sample: "
        "[bench/formats.json](bench/formats.json)."
    )
    return textwrap.fill(text, 100, break_on_hyphens=False)


def _counted(pairs: list[int]) -> str:
    if not pairs:
        return "no pairs"
    fewest, most = min(pairs), max(pairs)
    count = f"{most}" if fewest == most else f"{fewest} to {most}"
    return f"{count} pair{'' if most == 1 else 's'}"


def result_text(result: Mapping[str, Any]) -> str:
    return formats_table(result) + "\n\n" + notes(result)


def page_section(results: Iterable[Mapping[str, Any]]) -> str:
    return section("formats", "bench_formats", map(result_text, results))
