"""mxforge export-onnx: the model as an ONNX graph, for other runtimes and as a second oracle.

    token_ids i64 [n]  →  logits f32 [n, V]

One sequence from position 0, without a KV cache, computed in float32; the model's family makes the
graph. Weights lie as the checkpoint stores them in OUT.data beside the graph, so that file is as
large as the checkpoint: dense tensors in bf16 (or f16, f32) are cast where they are used, experts
stay MXFP4.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 (bf16 tensors need it; without it, fail here)
import numpy as np
import onnx
from onnx import TensorProto, helper
from tqdm import tqdm

from mxforge._version import __version__
from mxforge.errors import OutputError, UsageError

from .checkpoint import Checkpoint, check_scales, open_checkpoint
from .checkpoint.fingerprint import Fingerprint
from .config import ModelConfig
from .models.family import Family
from .onnx_builder import Graph, Stored, Weights

OLDEST_OPSET = 18  # reductions take their axes as an input from here on
FLOAT4_OPSET = 24  # the first whose DequantizeLinear takes FLOAT8E8M0 scales
NEWEST_OPSET = FLOAT4_OPSET

_ALIGNMENT = 4096  # of every tensor in the data file, so that it can be mapped by itself
_CHUNK = 1 << 24
_GRAPH_ROOM = 64 << 20  # what the graph may take on disk


def export_onnx(
    checkpoint: str | Path,
    output: str | Path,
    *,
    opset: int = OLDEST_OPSET,
    force: bool = False,
    announce: Callable[[str], None] = lambda text: None,
    progress: bool = False,
) -> Path:
    """Write the model of the folder `checkpoint` to `output`, its weights to `output`.data.

    opset     18 to 24: what the graph may use; onnxruntime's CPU runs all but 24
    force     replace what is there
    announce  is told what is being done; `progress` shows a bar on stderr

    Both files appear when they are complete. Returns `output`. Raises CheckpointError and its
    subclasses, ConfigError, OutputError, UsageError.
    """
    if type(opset) is not int or not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise UsageError(
            f"opset must be a whole number from {OLDEST_OPSET} to {NEWEST_OPSET}, found {opset!r}."
        )
    announce("checking the checkpoint")
    source = open_checkpoint(checkpoint)
    source.check()
    stored = _layout(source)
    with _Output(Path(output), force) as files:
        files.reserve(max(entry.end for entry in stored.values()) + _GRAPH_ROOM)
        announce("writing the weights")
        digest = _write_data(source, stored, files.data, progress)
        announce("writing the graph")
        graph = Graph(Weights(stored, files.data.name, opset >= FLOAT4_OPSET))
        model = _model(graph, source.family, source.config, opset)
        helper.set_model_props(model, _metadata(source, digest))
        files.graph.write_bytes(model.SerializeToString(deterministic=True))
        onnx.checker.check_model(files.graph, full_check=True)
        files.publish()
    return Path(output)


def _metadata(checkpoint: Checkpoint, source_sha256: str) -> dict[str, str]:
    """Notes in the graph; `source_sha256` is the one in the manifest of a compiled artifact."""
    config = json.dumps(checkpoint.config.to_dict(), sort_keys=True)
    return {
        "config": config,
        "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
        "source_sha256": source_sha256,
        "stop_token_ids": json.dumps(checkpoint.generation_config.eos_token_ids),
    }


def _model(graph: Graph, family: Family[Any], config: ModelConfig, opset: int) -> onnx.ModelProto:
    token_ids, logits = "token_ids", "logits"
    family.add_onnx(graph, config, token_ids, logits)
    made = helper.make_graph(
        graph.nodes,
        family.name,
        [helper.make_tensor_value_info(token_ids, TensorProto.INT64, ["n"])],
        [helper.make_tensor_value_info(logits, TensorProto.FLOAT, ["n", config.vocab_size])],
        graph.weights.initializers,
    )
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(
        made,
        producer_name="mxforge",
        producer_version=__version__,
        opset_imports=opsets,
        ir_version=helper.find_min_ir_version_for(opsets),
    )


# -- writing it ------------------------------------------------------------------------------------


def _layout(checkpoint: Checkpoint) -> dict[str, Stored]:
    """The place of every tensor in the data file, in the order in which the model uses them."""
    stored, end = {}, 0
    for name in checkpoint.family.tensors(checkpoint.config):
        tensor = checkpoint.tensor(name)
        begin = end + -end % _ALIGNMENT
        end = begin + tensor.nbytes
        stored[name] = Stored(tensor.dtype.name, tensor.shape, begin, end)
    return stored


def _write_data(
    checkpoint: Checkpoint, stored: dict[str, Stored], path: Path, progress: bool
) -> str:
    """Copy the tensors to their places, one at a time; returns the checkpoint's fingerprint."""
    fingerprint = Fingerprint(checkpoint.config, checkpoint.generation_config.eos_token_ids)
    tensors = checkpoint.family.tensors(checkpoint.config)
    size = sum(entry.end - entry.begin for entry in stored.values())
    with (
        path.open("wb") as file,
        tqdm(total=size, unit="B", unit_scale=True, disable=not progress) as bar,
    ):
        for name, entry in stored.items():
            tensor = checkpoint.tensor(name)
            if tensors[name].role == "scales":
                check_scales(name, tensor)
            content = tensor.reshape(-1).view(np.uint8)
            file.seek(entry.begin)
            for start in range(0, content.size, _CHUNK):
                chunk = content[start : start + _CHUNK]
                file.write(chunk.data)
                bar.update(chunk.size)
            fingerprint.add(name, tensor)
            checkpoint.drop(name)
    return fingerprint.hexdigest()


class _Output:
    """The two files, written in a hidden folder beside their place and moved when complete.

    graph  where to write the graph; data  where to write the weights

    What a killed run left in the hidden folder is removed by the next one to the same output; a
    lock tells who still lives. OutputError where something is there already (without `force`) or
    cannot be replaced, where nothing can be written, or the disk is full.
    """

    def __init__(self, output: Path, force: bool) -> None:
        self.output = output.resolve()  # a link stays, what it points to is written
        self.force = force
        self._partial = self.output.with_name(f".{self.output.name}.partial")
        self.graph = self._partial / self.output.name
        self.data = self._partial / f"{self.output.name}.data"
        self._needed = 0
        self._lock: int | None = None

    def __enter__(self) -> _Output:
        with self._errors():
            self.output.parent.mkdir(parents=True, exist_ok=True)
            self._check_replaceable()
            self._lock = self._locked_folder()
            for left in self._partial.iterdir():
                left.unlink()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        shutil.rmtree(self._partial, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)
        # Only errors about our files are ours: the block reads a checkpoint, too.
        if isinstance(error, OSError) and self._is_ours(error):
            with self._errors():
                raise error

    def reserve(self, size: int) -> None:
        """Say that `size` bytes will be written in all; OutputError where they are not free."""
        self._needed = size
        if size > self._free():
            raise OutputError(self._full())

    def publish(self) -> None:
        """Move both files to their places."""
        for path in (self.data, self.graph):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        self._check_replaceable()
        # The old graph is removed first, and the new one renamed last: a graph that exists always
        # has its own weights beside it.
        output, data = self._places()
        output.unlink(missing_ok=True)
        self.data.replace(data)
        self.graph.replace(output)

    def _check_replaceable(self) -> None:
        for path in self._places():
            if path.is_dir():
                raise OutputError(f"{path} is a folder; name a file to be made.")
            if path.exists() and not self.force:
                raise OutputError(
                    f"{path} exists already; choose another output, or --force to replace it."
                )

    def _locked_folder(self) -> int:
        """The hidden folder, created if missing, and locked until this process ends."""
        while True:
            self._partial.mkdir(exist_ok=True)
            folder = os.open(self._partial, os.O_RDONLY)
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Another run may have removed it in between, and made a new one.
                if os.path.samestat(os.fstat(folder), self._partial.stat()):
                    return folder
            except BlockingIOError:
                os.close(folder)
                raise OutputError(
                    f"{self.output} is being written by another process; wait for it, or choose "
                    "another output."
                ) from None
            except FileNotFoundError:
                pass
            os.close(folder)

    def _is_ours(self, error: OSError) -> bool:
        ours = {self._partial, self.graph, self.data, *self._places()}
        return error.errno in _DISK_FULL or any(
            isinstance(name, str | Path) and Path(name) in ours
            for name in (error.filename, error.filename2)
        )

    def _places(self) -> tuple[Path, Path]:
        """Where graph and weights belong."""
        return self.output, self.output.with_name(self.data.name)

    def _free(self) -> int:
        return shutil.disk_usage(self.output.parent).free

    def _full(self) -> str:
        return (
            f"{self.output} needs {self._needed} bytes, but {self._free()} are free on its disk; "
            "free some space or choose another output."
        )

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in _DISK_FULL:
                raise OutputError(f"The disk is full: {self._full()}") from error
            raise OutputError(
                f"{self.output} cannot be written ({error.strerror or error}); choose another "
                "output."
            ) from error


_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
