"""What tests of the scripts bench* share: runs of them, made-up results, rows of their tables."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.figures import FIGURES

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"

STAMP = {"date": "2026-11-22 10:00 UTC", "commit": "0123456789ab", "versions": {"mxforge": "0.1.0"}}
MACHINE = {
    "cpu": "a CPU",
    "cores": 2,
    "memory_gib": 23.5,
    "system": "Linux x86_64",
    "python": "3.11.7",
}


def run(script: str, *arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, SCRIPTS / script, *arguments]
    result = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stderr[-2000:]
    assert "Traceback" not in result.stderr
    return result


def figure(name: str, engine: str, pair: int, value: float, gb_s: float = 30.0) -> dict[str, Any]:
    """A sample."""
    return {
        "figure": name,
        "engine": engine,
        "pair": pair,
        "value": value,
        "cached": 1.0,
        "bandwidth_gb_s": [gb_s - 1, gb_s + 1],
        "others_cpu_cores": 0.01,
    }


def peers(samples: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """Results of bench_peers with these samples; a decode step reads 3 GB."""
    step = {"tokens": 1, "bytes": 3e9, "flops": 0}
    prompt = {"tokens": 128, "bytes": 11e9, "flops": 128 * 6e9}
    named = {"prefill_128": prompt, "decode": step, "decode_1k": step, "decode_32k": step}
    floors = {
        "bandwidth_gb_s": 30.0,
        "f32_matrix_gflop_s": 200.0,
        "int8_matrix_gop_s": 600.0,
        "flops_per_prompt_token": 6_000_000_000,
        "work": {"mxforge": named, "llama.cpp": named},
    }
    return {
        "kind": "peers",
        "shape": "20b",
        "machine": MACHINE,
        **STAMP,
        "complete": True,
        "target": "cpu:avx512vnni",
        "numerics": "fast",
        "no_peer_because": "",
        "figures": list(FIGURES),
        "planned_bytes": 14 << 30,
        "floors": floors,
        "samples": samples,
        **changes,
    }


def rendered(folder: Path, result: dict[str, Any], script: str, page: str) -> str:
    """What the script makes of a result."""
    (folder / "a-cpu-20b.json").write_text(json.dumps(result))
    run(script, "--render", "--results", folder)
    return (folder / page).read_text()


def row(text: str, label: str) -> list[str]:
    """The cells of the first table row that begins with `label`."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {label}"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def of_tiny(work: Path, results: Path) -> list[str]:
    return ["--shape", "tiny", "--work", str(work), "--results", str(results)]


def interrupted(
    folder: Path, pattern: str, samples: Callable[[Any], list[Any]], script: str, *options: str
) -> tuple[str, dict[str, Any]]:
    """What a script said that was stopped after two samples, and the results that it left."""
    words = [sys.executable, str(SCRIPTS / script), *options]
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and process.poll() is None:
            files = list(folder.glob(pattern))
            if files and len(samples(json.loads(files[0].read_text()))) >= 2:
                break
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
        said, told = process.communicate(timeout=60)
    assert process.returncode == 130, told[-2000:]
    assert "Traceback" not in told
    assert "interrupted" in told
    (file,) = folder.glob(pattern)
    found: dict[str, Any] = json.loads(file.read_text())
    return said, found
