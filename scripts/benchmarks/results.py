"""Results: their files in docs/bench, and the tables and sections of pages written from them."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _setup import ROOT
from benchmarks.machine import QUIET_CORES

RESULTS = ROOT / "docs" / "bench"
README = ROOT / "README.md"
NUMERICS = ROOT / "docs" / "numerics.md"
NOT_MEASURED = "not measured"


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write it complete or not at all, whatever interrupts."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        work.write_text(text, encoding="utf-8")
        work.replace(path)
    finally:
        work.unlink(missing_ok=True)


def read_results(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Every tracked result of a kind ("model", "peers", "formats" …), by file name."""
    values = [
        json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))
    ]
    return [value for value in values if value.get("kind") == kind]


def section(name: str, script: str, parts: Iterable[str]) -> str:
    """A part of a page that a script writes, between marks that `with_section` finds."""
    begin = f"<!-- {name}: written by scripts/{script} from docs/bench; do not edit -->"
    return "\n".join([begin, *parts, f"<!-- /{name} -->"])


def with_section(text: str, section: str) -> str:
    """The text with a `section` in place of the one of its name."""
    begin, end = section.partition(":")[0], section.rpartition("\n")[2]
    before, _, rest = text.partition(f"{begin}:")
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"the page should have a section {begin}: … --> … {end}")
    return before + section + after


def write_section(page: Path, section: str) -> Path:
    """Put a `section` into its page."""
    write_text(page, with_section(page.read_text(encoding="utf-8"), section))
    return page


def busy_samples(samples: Sequence[dict[str, Any]]) -> str:
    """The beginning of a sentence: how many samples had the machine to themselves."""
    busy = sum((sample.get("others_cpu_cores") or 0) > QUIET_CORES for sample in samples)
    return f"Of {len(samples)} samples, {busy} ran while others took more than {QUIET_CORES} cores"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table; the first column is text, the others are numbers."""
    align = ["---"] + ["---:"] * (len(header) - 1)
    lines = [header, align, *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float | None, unit: str = "", digits: int = 3) -> str:
    """A value with its unit, to so many significant digits; None was not measured."""
    if value is None:
        return NOT_MEASURED
    places = 0 if not value else digits - 1 - int(np.floor(np.log10(abs(value))))
    text = f"{value:.{max(0, places)}f}"
    return f"{text} {unit}".rstrip()


def spread(values: Sequence[float], unit: str = "") -> str:
    """Median (least … greatest) of some samples."""
    if not values:
        return NOT_MEASURED
    text = number(statistics.median(values))
    if len(values) > 1:
        text += f" ({number(min(values))} … {number(max(values))})"
    return f"{text} {unit}".rstrip()


def described(result: dict[str, Any]) -> str:
    """One line on the machine of a result."""
    m = result["machine"]
    return f"{m['cpu']}, {m['cores']} cores, {m['memory_gib']} GiB, {m['system']}"


def measured_when(section: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in section["versions"].items())
    return f"{section['date']}, commit {section['commit']}; {versions}"
