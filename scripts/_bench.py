"""What the scripts bench* share: this machine, what it can do, child processes, tables."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mxforge.errors import UsageError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "bench"
README = ROOT / "README.md"
NOT_MEASURED = "not measured"

_PACKAGES = ("mxforge", "apache-tvm", "apache-tvm-ffi", "numpy", "onnxruntime", "llama-cpp-python")
_SOURCES = ("compile", "runtime", "schedules")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine() -> dict[str, Any]:
    """What a number depends on, and nothing that names one machine."""
    return {
        "cpu": _cpu_name(),
        "cores": cores(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def slug(about: dict[str, Any]) -> str:
    """A file name for results of this kind of machine."""
    words = re.sub(
        r"\((r|tm)\)|@.*| CPU| Processor|\d+-Core", "", about["cpu"], flags=re.IGNORECASE
    )
    return re.sub(r"[^a-z0-9]+", "-", f"{words} {about['cores']} cores".lower()).strip("-")


def provenance() -> dict[str, Any]:
    """When, with what, and of which source a section was measured."""
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "commit": _commit(),
        "versions": {name: version for name in _PACKAGES if (version := installed(name))},
    }


def installed(package: str) -> str | None:
    """The installed version of a distribution; None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    """The checkout's commit, marked where the measured sources differ from it."""

    def git(*words: str) -> str:
        result = subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return result.stdout.strip() if result.returncode == 0 else ""

    commit = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--", *_SOURCES)
    return (commit + (" with changes" if changed else "")) if commit else "unknown"


class Probe:
    """How fast all cores together read memory, now: GB/s (10⁹ bytes a second).

    Every core sums its share of 512 MB, far beyond the caches. What a measurement can use swings
    widely on shared machines, so that each gets a probe of its own.
    """

    BYTES = 512 << 20

    def __init__(self) -> None:
        count = cores()
        self._pool = ThreadPoolExecutor(count)
        self._parts = np.array_split(np.ones(self.BYTES // 8, np.int64), count)
        self._read()  # starts the threads

    def _read(self) -> float:
        started = time.perf_counter()
        for total in self._pool.map(np.add.reduce, self._parts):
            assert total > 0
        return time.perf_counter() - started

    def read_gb_s(self, passes: int = 9) -> float:
        """The median of some passes, about a quarter of a second in all."""
        return self.BYTES / statistics.median(self._read() for _ in range(passes)) / 1e9

    def flush_caches(self) -> None:
        """Read enough other memory that nothing useful is left in any cache."""
        self._read()


QUIET_CORES = 0.2  # what others may take of the CPU while something is measured


def wait_for_quiet(patience_s: float) -> None:
    """Sleep until others take less than QUIET_CORES for a second, or patience ends."""
    deadline = time.perf_counter() + patience_s
    while time.perf_counter() < deadline:
        others = _OthersCpu()
        time.sleep(1)
        if (others.cores() or 0) < QUIET_CORES:
            return


class _OthersCpu:
    """How many cores were busy for neither this process nor its children, since it was made."""

    def __init__(self) -> None:
        self._busy, self._own, self._started = self._now()

    def cores(self) -> float | None:
        """None where the system does not tell."""
        busy, own, at = self._now()
        if busy is None or self._busy is None:
            return None
        return max(0.0, (busy - self._busy - own + self._own) / (at - self._started))

    @staticmethod
    def _now() -> tuple[float | None, float, float]:
        return _busy_seconds(), sum(os.times()[:4]), time.perf_counter()


@contextlib.contextmanager
def beside(probe: Probe, patience_s: float = 0) -> Iterator[dict[str, Any]]:
    """Waits for a quiet moment; fills in, when the body has ended, what stood beside it.

    bandwidth_gb_s    right before and right after
    others_cpu_cores  how many cores were busy for neither this process nor its children
    """
    wait_for_quiet(patience_s)
    found: dict[str, Any] = {}
    before = probe.read_gb_s()
    others = _OthersCpu()
    yield found
    found["others_cpu_cores"] = others.cores()
    found["bandwidth_gb_s"] = [round(before, 2), round(probe.read_gb_s(), 2)]


def _busy_seconds() -> float | None:
    """CPU seconds of all processes together since boot, stolen ones included."""
    try:
        line = Path("/proc/stat").read_text().split("\n", 1)[0]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, line.split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def matrix_gflop_s(size: int = 2048, repeats: int = 5) -> float:
    """The f32 matrix product of NumPy, GFLOP/s: what plain arithmetic reaches here."""
    a = np.ones((size, size), np.float32)
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(seconds) / 1e9


def int8_matrix_gop_s(size: int = 2048, repeats: int = 5) -> float | None:
    """The same of onnxruntime's 8-bit matrix product; None where it is not installed."""
    if installed("onnxruntime") is None or installed("onnx") is None:
        return None
    import onnxruntime
    from onnx import TensorProto, helper

    shape = [size, size]
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["a", "b"], ["c"])],
        "product",
        [helper.make_tensor_value_info("a", TensorProto.UINT8, shape)],
        [helper.make_tensor_value_info("c", TensorProto.INT32, shape)],
        [helper.make_tensor("b", TensorProto.INT8, shape, np.ones(shape, np.int8).tobytes(), True)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cores()
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    a = np.ones(shape, np.uint8)
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        session.run(None, {"a": a})
        seconds.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(seconds[1:]) / 1e9


# -- child processes ------------------------------------------------------------------------------


def say(text: str) -> None:
    """What is being done, on stderr (above a progress bar): stdout belongs to the result."""
    tqdm.write(f"== {time.strftime('%H:%M:%S')} {text}", file=sys.stderr)


@dataclass
class Child:
    """What a process did: stdout, stderr lines and memory samples with seconds since its start."""

    output: str
    lines: list[tuple[float, str]]
    memory: list[tuple[float, int]]  # anonymous and shared bytes: all that is not page cache
    seconds: float


def run_child(command: list[str], *, watch_every_s: float = 0.25, echo: bool = False) -> Child:
    """Run to its end, looking at its memory so often; UsageError where it fails."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        cwd=ROOT,
    )
    assert process.stdout is not None and process.stderr is not None
    lines: list[tuple[float, str]] = []
    memory: list[tuple[float, int]] = []

    def listen(stream: Any) -> None:
        for line in stream:
            lines.append((time.perf_counter() - started, line.rstrip("\n")))
            if echo:
                print(f"   {line.rstrip()}", file=sys.stderr, flush=True)

    def watch() -> None:
        while process.poll() is None:
            if found := _memory_of(process.pid):
                memory.append((time.perf_counter() - started, found))
            time.sleep(watch_every_s)

    helpers = [
        threading.Thread(target=listen, args=(process.stderr,)),
        threading.Thread(target=watch),
    ]
    for helper in helpers:
        helper.start()
    try:
        output = process.stdout.read()
    except BaseException:  # Ctrl-C
        process.kill()
        raise
    finally:
        code = process.wait()
        seconds = time.perf_counter() - started
        for helper in helpers:
            helper.join()
    _check_exit(command, code, [text for _, text in lines])
    return Child(output, lines, memory, seconds)


def child_lines(command: list[str]) -> Iterator[str]:
    """The lines that a process prints, as they come; UsageError where it fails."""
    with tempfile.TemporaryFile("w+") as messages:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=messages, text=True, cwd=ROOT
        )
        assert process.stdout is not None
        try:
            yield from process.stdout
            code = process.wait()
        finally:  # Ctrl-C, or nobody wants more
            process.kill()
            process.wait()
        messages.seek(0)
        _check_exit(command, code, messages.read().splitlines())


def _check_exit(command: list[str], code: int, messages: list[str]) -> None:
    if code != 0:
        tail = " | ".join(messages[-3:])
        raise UsageError(
            f"{' '.join(command)[:200]} should succeed, found exit code {code}: {tail}"
        )


def _memory_of(pid: int) -> int | None:
    """Bytes that a process holds beyond the page cache now."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    sizes = re.findall(r"^(?:RssAnon|RssShmem):\s*(\d+) kB$", status, re.MULTILINE)
    return sum(map(int, sizes)) * 1024 if len(sizes) == 2 else None  # otherwise it ends just now


# -- results --------------------------------------------------------------------------------------


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
    """A part of the README that a script writes, between marks that `with_section` finds."""
    begin = f"<!-- {name}: written by scripts/{script} from docs/bench; do not edit -->"
    return "\n".join([begin, *parts, f"<!-- /{name} -->"])


def with_section(text: str, section: str) -> str:
    """The text with a `section` in place of the one of its name."""
    begin, end = section.partition(":")[0], section.rpartition("\n")[2]
    before, _, rest = text.partition(f"{begin}:")
    _, found, after = rest.partition(end)
    if not found:
        raise ValueError(f"the README should have a section {begin}: … --> … {end}")
    return before + section + after


def write_section(section: str) -> Path:
    """Put a `section` into the README."""
    write_text(README, with_section(README.read_text(encoding="utf-8"), section))
    return README


def disturbance(samples: Sequence[dict[str, Any]]) -> str:
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
