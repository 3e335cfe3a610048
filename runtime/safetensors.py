"""Reading and writing .safetensors files: memory-mapped in, streamed out.

The format (github.com/huggingface/safetensors): eight bytes of little-endian header length, a
JSON object naming each tensor's dtype, shape and byte range, then the data. A file comes from
outside, so nothing in its header is believed before it has been checked; afterwards the tensors
cover the data exactly, without holes or overlap, and every array is a view into the mapping.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from .errors import OutputError, SafetensorsError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_DIMENSIONS = 32
PADDING_PREFIX = "__padding_"

# safetensors name -> (bytes of an element, numpy's name, or ml_dtypes' where numpy has none)
_DTYPES: dict[str, tuple[int, str]] = {
    "BOOL": (1, "bool"),
    "U8": (1, "uint8"),
    "I8": (1, "int8"),
    "U16": (2, "uint16"),
    "I16": (2, "int16"),
    "U32": (4, "uint32"),
    "I32": (4, "int32"),
    "U64": (8, "uint64"),
    "I64": (8, "int64"),
    "F16": (2, "float16"),
    "F32": (4, "float32"),
    "F64": (8, "float64"),
    "BF16": (2, "bfloat16"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E5M2": (1, "float8_e5m2"),
    "F8_E8M0": (1, "float8_e8m0fnu"),
}
_NAMES = {numpy_name: name for name, (_, numpy_name) in _DTYPES.items()}


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The NumPy dtype of a safetensors dtype name; ml_dtypes is imported only where needed."""
    numpy_name = _DTYPES[name][1]
    found: np.dtype[Any]
    if numpy_name == "bool" or hasattr(np, numpy_name):
        found = np.dtype(numpy_name)
    else:
        import ml_dtypes

        found = np.dtype(getattr(ml_dtypes, numpy_name))
    return found


def dtype_name(dtype: Any) -> str:
    """The safetensors name of a NumPy (or ml_dtypes) dtype; SafetensorsError where it has none."""
    numpy_name = np.dtype(dtype).name
    if numpy_name not in _NAMES:
        raise SafetensorsError(f"safetensors has no dtype for {numpy_name}; convert the array.")
    return _NAMES[numpy_name]


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file: dtype by safetensors name, and its bytes [begin, end) in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


class Safetensors:
    """An open file. The mapping lives as long as this object or any array taken from it.

    tensors   name -> TensorInfo, in the order of the data, without padding tensors
    metadata  the file's own string -> string notes
    """

    def __init__(
        self,
        path: Path,
        tensors: dict[str, TensorInfo],
        metadata: dict[str, str],
        data_start: int,
        mapping: mmap.mmap,
    ) -> None:
        self.path = path
        self.tensors = tensors
        self.metadata = metadata
        self.data_start = data_start
        self._mapping = mapping

    def array(self, name: str) -> np.ndarray:
        """The tensor as a read-only view of the mapping; nothing is read before it is touched."""
        info = self.tensors.get(name)
        if info is None:
            raise SafetensorsError(f"{self.path} holds no tensor {_short(name)}.")
        flat = np.frombuffer(self._mapping, np.uint8, info.nbytes, info.begin)
        return flat.view(numpy_dtype(info.dtype)).reshape(info.shape)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __len__(self) -> int:
        return len(self.tensors)

    def will_need(self, name: str) -> None:
        """Ask the system to begin reading the tensor's pages; a hint, silently without effect."""
        self._advise(name, "MADV_WILLNEED")

    def drop(self, name: str) -> None:
        """Let go of the tensor's resident pages; they come back from the file when touched."""
        self._advise(name, "MADV_DONTNEED")

    def _advise(self, name: str, advice: str) -> None:
        info = self.tensors[name]
        option = getattr(mmap, advice, None)
        if option is not None and info.nbytes:
            begin = info.begin // mmap.PAGESIZE * mmap.PAGESIZE
            self._mapping.madvise(option, begin, info.end - begin)


def open_safetensors(path: str | Path) -> Safetensors:
    """Map the file and check its whole header; SafetensorsError says what is wrong with it."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 8:
                raise _broken(path, f"expected at least 8 bytes, found {size}: it is truncated")
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise _broken(
                    path, f"its header claims {length} bytes, {MAX_HEADER_BYTES} are allowed"
                )
            if 8 + length > size:
                raise _broken(
                    path, f"its header needs {8 + length} bytes, found {size}: it is truncated"
                )
            header = file.read(length)
            mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise SafetensorsError(
            f"{path} cannot be read: {error.strerror or error}. Check the path and permissions."
        ) from error
    tensors, metadata = _parse_header(path, header, size)
    return Safetensors(path, tensors, metadata, 8 + length, mapping)


def _broken(path: Path, problem: str) -> SafetensorsError:
    return SafetensorsError(f"{path} is not a valid safetensors file: {problem}. Fetch it again.")


def _short(name: object) -> str:
    """repr, so that control characters and lone surrogates of hostile names stay printable."""
    try:
        text = repr(name)
    except RecursionError:  # close to it, the parser can still take what cannot be shown
        text = "something nested too deeply"
    return text if len(text) <= 120 else text[:100] + "…" + text[-1]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number")


def _parse_header(
    path: Path, header: bytes, size: int
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    try:
        parsed = json.loads(
            header.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_constant
        )
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"its header is not the expected JSON ({_reason(error)})") from error
    if not isinstance(parsed, dict):
        raise _broken(path, "its header is not a JSON object")
    metadata = parsed.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _broken(path, "__metadata__ must map strings to strings")

    data_start = 8 + len(header)
    infos = {name: _tensor_info(path, name, entry, data_start) for name, entry in parsed.items()}
    ordered = dict(sorted(infos.items(), key=lambda item: (item[1].begin, item[1].end)))
    at = data_start
    for name, info in ordered.items():
        if info.begin != at:
            what = "overlaps the tensor before it" if info.begin < at else "leaves a hole before it"
            raise _broken(path, f"tensor {_short(name)} {what}")
        at = info.end
    if at != size:
        what = "it is truncated" if at > size else "bytes follow the last tensor"
        raise _broken(path, f"its tensors end at byte {at}, the file at {size}: {what}")
    return {k: v for k, v in ordered.items() if not k.startswith(PADDING_PREFIX)}, metadata


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else _short(str(error))[1:-1]


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _tensor_info(path: Path, name: str, entry: object, data_start: int) -> TensorInfo:
    label = f"tensor {_short(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise _broken(path, f"{label} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _broken(path, f"{label} has the unknown dtype {_short(dtype)}")
    if (
        not isinstance(shape, list)
        or len(shape) > MAX_DIMENSIONS
        or not all(_is_size(v) for v in shape)
        # NumPy's limit, which holds for empty arrays, too.
        or math.prod(max(v, 1) for v in shape) * _DTYPES[dtype][0] >= 1 << 63
    ):
        raise _broken(path, f"{label} has the impossible shape {_short(shape)}")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(_is_size(v) for v in offsets)
        or offsets[0] > offsets[1]
    ):
        raise _broken(path, f"{label} has the impossible data_offsets {_short(offsets)}")
    expected = math.prod(shape) * _DTYPES[dtype][0]
    if expected != offsets[1] - offsets[0]:
        raise _broken(
            path,
            f"{label}, {dtype} {_short(shape)}, needs {expected} bytes "
            f"and claims {offsets[1] - offsets[0]}",
        )
    return TensorInfo(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


class SafetensorsWriter:
    """Writes a file front to back in constant memory: the header first, then bytes in chunks.

        with SafetensorsWriter(path, [("w", "BF16", (4, 8))]) as writer:
            writer.write("w", first_half)
            writer.write("w", second_half)

    infos                 (name, safetensors dtype, shape) in the order of the data
    data_start_alignment  the header is padded with spaces so that the data begins on a multiple
    tensor_alignment      tensors begin on multiples of this, counted from the data's begin;
                          where one would not, a u8 tensor named __padding_N stands before it,
                          since readers refuse holes
    digest                hash on the way: `sha256` is set after close()
    sync                  close() returns only when the bytes are on the disk

    OutputError where the file cannot be written; SafetensorsError where the chunks do not add up.
    An exception inside the `with` block, or a failed close, removes the file.
    """

    def __init__(
        self,
        path: str | Path,
        infos: Iterable[tuple[str, str, Sequence[int]]],
        metadata: Mapping[str, str] | None = None,
        *,
        data_start_alignment: int = 8,
        tensor_alignment: int = 1,
        digest: bool = False,
        sync: bool = False,
    ) -> None:
        self.path = Path(path)
        self.sha256: str | None = None
        self._hash = hashlib.sha256() if digest else None
        self._sync = sync
        header, self._plan = _layout(infos, metadata, data_start_alignment, tensor_alignment)
        self._next = 0  # index into the plan
        self._left = 0  # bytes that the tensor being written still needs
        try:
            self._file = self.path.open("wb")
        except OSError as error:
            raise self._failed(error) from error
        self._put(header)
        self._advance()

    def write(self, name: str, data: np.ndarray | bytes | bytearray | memoryview) -> None:
        """Append bytes to the tensor `name`; tensors come in the order of `infos`."""
        if isinstance(data, np.ndarray):
            # Through uint8, because ml_dtypes arrays have no buffer protocol.
            data = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        current = self._plan[self._next][0] if self._next < len(self._plan) else None
        if name != current:
            if view.nbytes == 0 and name in {entry[0] for entry in self._plan}:
                return
            raise SafetensorsError(
                f"{self.path}: expected bytes of tensor {_short(current)}, "
                f"found bytes of {_short(name)}; write the tensors in the announced order."
            )
        if view.nbytes > self._left:
            raise SafetensorsError(
                f"{self.path}: tensor {_short(name)} has {self._left} bytes left to write, "
                f"found {view.nbytes}; check its dtype and shape."
            )
        self._put(view)
        self._left -= view.nbytes
        if self._left == 0:
            self._next += 1
            self._advance()

    def close(self) -> None:
        """Finish the file; SafetensorsError where a tensor is incomplete."""
        if self._file.closed:
            return
        if self._next < len(self._plan):
            self.abort()
            name = self._plan[self._next][0]
            raise SafetensorsError(
                f"{self.path}: tensor {_short(name)} still lacks {self._left} bytes; "
                "every announced tensor must be written."
            )
        try:
            self._file.flush()
            if self._sync:
                os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            self.abort()
            raise self._failed(error) from error
        if self._hash is not None:
            self.sha256 = self._hash.hexdigest()

    def abort(self) -> None:
        """Give up: close and remove the file."""
        # What is left in the buffer may not fit on the disk; the file goes away anyhow.
        with contextlib.suppress(OSError):
            self._file.close()
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _advance(self) -> None:
        """Move to the next tensor that takes bytes from the caller, writing padding on the way."""
        while self._next < len(self._plan):
            name, self._left = self._plan[self._next]
            if name.startswith(PADDING_PREFIX):
                self._put(bytes(self._left))
            elif self._left:
                return
            self._next += 1

    def _put(self, data: bytes | memoryview) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            self.abort()
            raise self._failed(error) from error
        if self._hash is not None:
            self._hash.update(data)

    def _failed(self, error: OSError) -> OutputError:
        return OutputError(
            f"{self.path} cannot be written: {error.strerror or error}. "
            "Free disk space or choose another place."
        )


def _layout(
    infos: Iterable[tuple[str, str, Sequence[int]]],
    metadata: Mapping[str, str] | None,
    data_start_alignment: int,
    tensor_alignment: int,
) -> tuple[bytes, list[tuple[str, int]]]:
    """The header's bytes, and (name, bytes) of everything that follows it, padding included."""
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    plan: list[tuple[str, int]] = []
    at = 0

    def add(name: str, dtype: str, shape: Sequence[int]) -> None:
        nonlocal at
        if dtype not in _DTYPES:
            raise SafetensorsError(f"Tensor {_short(name)} has the unknown dtype {dtype!r}.")
        if name in entries or name == "__metadata__":
            raise SafetensorsError(f"Tensor {_short(name)} is announced twice.")
        nbytes = math.prod(shape) * _DTYPES[dtype][0]
        entries[name] = {
            "dtype": dtype,
            "shape": [int(v) for v in shape],
            "data_offsets": [at, at + nbytes],
        }
        plan.append((name, nbytes))
        at += nbytes

    paddings = 0
    for name, dtype, shape in infos:
        if name.startswith(PADDING_PREFIX):
            raise SafetensorsError(f"{PADDING_PREFIX}… is reserved; rename tensor {_short(name)}.")
        if gap := -at % tensor_alignment:
            add(f"{PADDING_PREFIX}{paddings}", "U8", (gap,))
            paddings += 1
        add(name, dtype, shape)
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % data_start_alignment)
    if len(text) > MAX_HEADER_BYTES:
        raise SafetensorsError(
            f"The header would take {len(text)} bytes, {MAX_HEADER_BYTES} are allowed; "
            "spread the tensors over several files."
        )
    return len(text).to_bytes(8, "little") + text, plan
