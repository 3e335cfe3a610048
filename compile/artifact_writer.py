"""Writing an artifact: nothing is to be seen of it until all is there.

Equal inputs give equal bytes: no times, no machine names, keys sorted.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from mxforge.artifact import file_sha256, header_sha256
from mxforge.errors import OutputError
from mxforge.manifest import MANIFEST, FileInfo, Manifest, is_inside
from mxforge.safetensors import SafetensorsWriter

# Data begins on a page of every system, so that a mapping can be handed to a device.
DATA_ALIGNMENT = 16 << 10
TENSOR_ALIGNMENT = 64


class ArtifactWriter:
    """Writes an artifact beside its place and moves it there when it is complete.

        with ArtifactWriter(output, force=False) as writer:
            writer.reserve(total_bytes)
            writer.write("tokenizer/special_tokens.json", data)
            with writer.weights("weights-00001.safetensors", infos) as weights:
                weights.write("lm_head.weight", array)
            library.export(writer.path("model.so"))
            writer.add("model.so")
            manifest = writer.finish(manifest)

    Until `finish` nothing is to be seen but a hidden folder ``.<name>.partial-<pid>-<random>``;
    leaving the block without it, by an error or not, removes that. What killed runs left behind is
    removed at the next start: a lock on the folder tells who still lives. An existing artifact is
    refused unless `force`, and replaced only by a complete one; if the process dies between the
    two renames of that, the next start puts the old one back.

    OutputError where the output exists, is no artifact to replace, cannot be written, or the disk
    is full.
    """

    def __init__(self, output: str | Path, force: bool = False) -> None:
        self.output = Path(output).resolve()  # a link stays, what it points to is written
        self.force = force
        self._files: dict[str, FileInfo] = {}
        self._reserved = 0
        self._locks: list[int] = []
        self._partial: Path | None = None

    def __enter__(self) -> ArtifactWriter:
        parent = self.output.parent
        if not self.output.name:
            raise OutputError(f"{self.output} cannot be an output; name a folder to be made.")
        try:
            parent.mkdir(parents=True, exist_ok=True)
            self._clean_up()
            self._check_replaceable()
            self._partial = self._make_partial()
        except OSError as error:
            raise self._failed(error) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        _traceback: types.TracebackType | None,
    ) -> None:
        partial, self._partial = self._partial, None
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        self._unlock()
        # Writers below tell that the disk is full, but not what was needed. Other errors are ours
        # only where they are about our files: the block reads a checkpoint, too.
        cause = _os_error(error)
        if cause is not None and (cause.errno in _DISK_FULL or _names(cause, partial)):
            raise self._failed(cause) from error

    def reserve(self, size: int) -> None:
        """Say that `size` bytes will be written in all; OutputError where they are not free."""
        self._reserved = size
        free = self._free()
        if size > free:
            raise OutputError(self._full(free))

    def path(self, name: str) -> Path:
        """Where to write the file `name` (relative, forward slashes); its folder is made."""
        if not is_inside(name) or name == MANIFEST:
            raise ValueError(f"{name!r} is no path inside an artifact")
        if self._partial is None:
            raise ValueError("the writer is not open")
        path = self._partial / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write(self, name: str, data: bytes) -> None:
        """Write a whole file."""
        self.path(name).write_bytes(data)
        self.add(name, hashlib.sha256(data).hexdigest())

    def add(self, name: str, sha256: str | None = None) -> None:
        """Take in a file that was written to `path(name)`; without its hash it is read for one."""
        path = self.path(name)
        self._files[name] = FileInfo(
            sha256 or file_sha256(path),
            path.stat().st_size,
            header_sha256(path) if name.endswith(".safetensors") else None,
        )

    @contextlib.contextmanager
    def weights(
        self, name: str, infos: Iterable[tuple[str, str, Sequence[int]]]
    ) -> Iterator[SafetensorsWriter]:
        """A writer of the weight file `name`, aligned and hashed on the way.

        `infos` as `SafetensorsWriter` takes them: (name, safetensors dtype, shape).
        """
        with SafetensorsWriter(
            self.path(name),
            infos,
            data_start_alignment=DATA_ALIGNMENT,
            tensor_alignment=TENSOR_ALIGNMENT,
            digest=True,
        ) as writer:
            yield writer
        self.add(name, writer.sha256)

    def finish(self, manifest: Manifest) -> Manifest:
        """Write the manifest with `files` filled in, and move the artifact to its place."""
        if self._partial is None:
            raise ValueError("the writer is not open")
        manifest = replace(manifest, files=dict(self._files))
        text = manifest.to_json()
        Manifest.from_json(text)  # never write what could not be read
        (self._partial / MANIFEST).write_text(text, encoding="utf-8")
        unknown = {p.relative_to(self._partial).as_posix() for p in _files_in(self._partial)}
        if unknown := unknown - self._files.keys() - {MANIFEST}:
            raise ValueError(f"written, but not added: {sorted(unknown)}")
        for path in (*self._partial.rglob("*"), self._partial):
            _sync(path)
        self._publish(self._partial)
        self._partial = None
        return manifest

    def _publish(self, partial: Path) -> None:
        old = None
        if self.output.exists():
            self._check_replaceable()
            old = self.output.with_name(f".{self.output.name}.old-{_suffix()}")
            self._lock(self.output)
            self.output.rename(old)
        try:
            partial.rename(self.output)
        except OSError as error:
            if old is not None:
                old.rename(self.output)
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
                raise OutputError(
                    f"{self.output} came into being while the artifact was compiled; remove it "
                    "and compile again."
                ) from error
            raise
        _sync(self.output.parent)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)

    def _check_replaceable(self) -> None:
        if not self.output.exists():
            return
        if not self.output.is_dir():
            raise OutputError(f"{self.output} is a file; name a folder to be made.")
        if not any(self.output.iterdir()):
            return
        if not self.force:
            raise OutputError(
                f"{self.output} exists already; choose another output, or --force to replace it."
            )
        if not (self.output / MANIFEST).exists():
            raise OutputError(
                f"{self.output} is not an artifact (it holds no {MANIFEST}) and is not replaced "
                "even with --force; choose another output."
            )

    def _make_partial(self) -> Path:
        while True:
            partial = self.output.with_name(f".{self.output.name}.partial-{_suffix()}")
            partial.mkdir()
            self._lock(partial)
            # Between the two lines a process that starts could have taken it for abandoned.
            if partial.exists():
                return partial

    def _lock(self, folder: Path) -> None:
        """Hold a lock on the folder until the end; the system drops it if the process dies."""
        descriptor = os.open(folder, os.O_RDONLY)
        self._locks.append(descriptor)
        with contextlib.suppress(OSError):  # some network file systems have none
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def _unlock(self) -> None:
        for descriptor in self._locks:
            os.close(descriptor)
        self._locks.clear()

    def _clean_up(self) -> None:
        """Remove what dead processes left here; put back an artifact caught between two renames."""
        hidden = f".{self.output.name}."
        for path in sorted(self.output.parent.iterdir()):
            kind = path.name.removeprefix(hidden).partition("-")[0]
            if not path.name.startswith(hidden) or kind not in ("partial", "old"):
                continue
            if not _abandoned(path):
                continue
            if kind == "old" and not self.output.exists():
                path.rename(self.output)
            else:
                shutil.rmtree(path, ignore_errors=True)

    def _free(self) -> int:
        return shutil.disk_usage(self.output.parent).free

    def _full(self, free: int) -> str:
        return (
            f"{self.output} needs {_size(self._reserved)}, but {_size(free)} are free on its disk; "
            "free some space or choose another output."
        )

    def _failed(self, error: OSError) -> OutputError:
        if error.errno in _DISK_FULL:
            return OutputError(f"The disk is full: {self._full(self._free())}")
        return OutputError(
            f"{self.output} cannot be written ({error.strerror or error}); choose another output."
        )


_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def _os_error(error: BaseException | None) -> OSError | None:
    """The OSError at the bottom of an exception, if it is one or was raised from one."""
    while error is not None:
        if isinstance(error, OSError):
            return error
        error = error.__cause__
    return None


def _names(error: OSError, folder: Path | None) -> bool:
    """Whether the error is about the folder or something in it."""
    names = (name for name in (error.filename, error.filename2) if isinstance(name, (str, Path)))
    return folder is not None and any(Path(name).is_relative_to(folder) for name in names)


def _abandoned(folder: Path) -> bool:
    """Whether no living process holds the folder's lock; not where that cannot be told."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(descriptor)
    except OSError:
        return False
    return True


def _suffix() -> str:
    return f"{os.getpid()}-{secrets.token_hex(4)}"


def _files_in(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if not path.is_dir())


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _size(count: int) -> str:
    return f"{count} bytes ({count / 2**30:.2f} GiB)"
