"""This machine: its name, what it can do, and whether it is quiet while something is measured."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from _setup import ROOT

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
