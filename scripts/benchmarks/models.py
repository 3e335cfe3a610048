"""Random models on disk for scripts/bench and scripts/bench_peers, and their page cache."""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _setup import ROOT
from benchmarks.machine import installed
from benchmarks.processes import Child, run_child, say
from checkpoints.shapes import hf_config
from tqdm import tqdm

from mxforge.compile.models.gpt_oss.config import GptOssConfig
from mxforge.compile.models.registry import read_config
from mxforge.errors import UsageError

PEER_PACKAGES = ("llama-cpp-python", "gguf")


def add_work_option(parser: argparse.ArgumentParser, kept: str = " and kept") -> None:
    """The option that says where models are."""
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "bench", metavar="DIR",
        help=f"where models are made{kept} (default: build/bench)",
    )  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that say where models are."""
    add_work_option(parser)
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="DIR",
        help="checkpoint of that shape to use (default: a random one)",
    )


@dataclass(frozen=True)
class RandomModel:
    """A shape, and where its checkpoint, its artifact and its GGUF are or will be."""

    shape: str
    config: GptOssConfig
    checkpoint: Path
    artifact: Path
    gguf: Path

    @classmethod
    def of(
        cls, shape: str, work: Path, checkpoint: Path | None = None, artifact: Path | None = None
    ) -> RandomModel:
        """Files of the names of the shape in `work`, but for those that are given."""
        work = work.resolve()
        config = GptOssConfig.from_hf(hf_config(shape))
        checkpoint = (checkpoint or work / shape).resolve()
        file = checkpoint / "config.json"
        if file.exists() and read_config(file).config != config:
            raise UsageError(f"{checkpoint} should be of the shape {shape}, and is of another.")
        artifact = (artifact or work / f"{shape}-artifact").resolve()
        return cls(shape, config, checkpoint, artifact, work / f"{shape}.gguf")

    def make_checkpoint(self) -> None:
        """Write the checkpoint if it does not exist."""
        if (self.checkpoint / "config.json").exists():
            return
        _need_space(self.checkpoint.parent, self.config.weight_bytes)
        say(f"making a random checkpoint of the shape {self.shape} in {self.checkpoint}")
        script = ROOT / "scripts" / "make_checkpoint"
        words = [script, self.checkpoint, "--shape", self.shape]
        run_child([sys.executable, *map(str, words)], echo=True)

    def compile(self) -> Child:
        """Compile the checkpoint, whether an artifact is there or not; how that went."""
        self.make_checkpoint()
        say(f"compile-model {self.checkpoint}")
        _need_space(self.artifact.parent, self.config.weight_bytes)
        words = [self.checkpoint, "--output", self.artifact, "--force"]
        command = [sys.executable, "-m", "mxforge.compile.cli", *map(str, words)]
        return run_child(command, watch_every_s=0.02, echo=True)

    def make_gguf(self) -> None:
        """Write the GGUF if it does not exist."""
        if self.gguf.exists():
            return
        from benchmarks.random_gguf import tensors, write_gguf

        _need_space(self.gguf.parent, sum(tensor.nbytes for tensor in tensors(self.config)))
        say(f"making a random GGUF of the same shapes for llama.cpp in {self.gguf}")
        write_gguf(self.gguf, self.config)

    def no_peer_because(self) -> str:
        """Why llama.cpp cannot be measured with this model here; "" where it can."""
        if absent := [name for name in PEER_PACKAGES if installed(name) is None]:
            return (
                f"{' and '.join(absent)} not installed; "
                "`pip install --group bench` in .venv brings what is needed"
            )
        from benchmarks.random_gguf import unsupported

        reason = unsupported(self.config)
        return f"it cannot run the shape: {reason}" if reason else ""


def _need_space(folder: Path, nbytes: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < nbytes + (1 << 30):
        raise UsageError(
            f"{folder} needs {nbytes / 2**30 + 1:.1f} GiB free for this, found "
            f"{free / 2**30:.1f}; choose another place with --work."
        )


# -- page cache -----------------------------------------------------------------------------------


class PageCache:
    """Keeps files in the page cache, or out of it.

    It maps what it keeps, since some machines drop pages that no process maps within a minute.
    """

    CHUNK = 64 << 20

    def __init__(self) -> None:
        self._mapped: list[np.memmap] = []

    def keep(self, files: Iterable[Path]) -> None:
        """Read all of the files; no other file is kept any more."""
        self._mapped.clear()
        self._mapped += [np.memmap(path, np.uint8, "r") for path in _existing(files)]
        chunk = bytearray(self.CHUNK)
        with tqdm(
            total=sum(map(len, self._mapped)), unit="B", unit_scale=True, desc="reading",
            leave=False, disable=not sys.stderr.isatty(),
        ) as bar:  # fmt: skip
            for view in self._mapped:
                with Path(view.filename).open("rb", buffering=0) as file:
                    for start in range(0, len(view), self.CHUNK):
                        file.readinto(chunk)  # faster than by page faults
                        view[start : start + self.CHUNK : mmap.PAGESIZE].max()
                        bar.update(min(self.CHUNK, len(view) - start))

    def drop(self, files: Iterable[Path]) -> None:
        """Keep nothing, and throw these files' pages out."""
        self._mapped.clear()
        for path in _existing(files):
            with path.open("rb") as file:
                os.fsync(file.fileno())  # what is not on disk yet cannot be dropped
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached_share(files: Iterable[Path]) -> float | None:
    """The part of the files' pages that lies in the page cache; None where nothing can tell."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mincore"):
        return None
    resident = pages = 0
    for path in _existing(files):
        size = path.stat().st_size
        count = -(-size // mmap.PAGESIZE)
        flags = np.zeros(count, np.uint8)
        view = np.memmap(path, np.uint8, "r")
        code = libc.mincore(
            ctypes.c_void_p(view.ctypes.data),
            ctypes.c_size_t(size),
            ctypes.c_void_p(flags.ctypes.data),
        )
        if code != 0:
            return None
        resident += int((flags & 1).sum())
        pages += count
    return round(resident / pages, 4) if pages else None


def _existing(files: Iterable[Path]) -> Iterator[Path]:
    return (path for path in files if path.is_file() and path.stat().st_size)
