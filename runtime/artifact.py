"""The artifact: a folder with one compiled model, how it is opened and verified.

    <name>/
      manifest.json           everything about the others; see `mxforge.manifest`
      model.so                the library: kernels of a CPU; of several, model-<level>.so;
                              of GPUs model.fatbin, model.metal or model.spirv
      model.plan              its launch plan; see `mxforge.plan`
      weights-*.safetensors   packed weights; none where random weights are made at load
      tokenizer/              see `mxforge.tokenizer`

The compiler writes it: see `mxforge.compile.artifact_writer`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import (
    ArtifactCorruptError,
    ArtifactError,
    ArtifactTargetError,
    SafetensorsError,
    UsageError,
)
from .machine import host_system, knows_cpu_features, missing_cpu_features
from .manifest import MANIFEST, REMEDY, FileInfo, LibraryInfo, Manifest, short

if TYPE_CHECKING:
    from .safetensors import Safetensors
    from .tokenizer import Tokenizer

CPU_VARIABLE = "MXFORGE_CPU"
_TOKENIZER_FOLDER = "tokenizer"
_CHUNK = 8 << 20


@dataclass(frozen=True)
class Artifact:
    """An opened artifact; `weight_files` maps relative paths to memory-mapped weight files,
    `variant` is that of its libraries which runs here."""

    path: Path
    manifest: Manifest
    weight_files: Mapping[str, Safetensors]
    variant: LibraryInfo

    @property
    def library(self) -> Path:
        """The compiled library."""
        return self.path / self.variant.file

    def load_tokenizer(self) -> Tokenizer:
        """The model's tokenizer; TokenizerError where it is unreadable."""
        from .tokenizer import load_tokenizer

        return load_tokenizer(self.path / _TOKENIZER_FOLDER, self.manifest.tokenizer.kind)


def read_manifest(path: str | Path) -> Manifest:
    """The manifest of the artifact in the folder `path`; errors as of `open_artifact`."""
    path = Path(path)
    try:
        text = (path / MANIFEST).read_bytes()
    except OSError as error:
        if not path.exists():
            found = "there is nothing at that path"
        elif (path / "config.json").exists():
            found = "it looks like a checkpoint, which compile-model turns into an artifact"
        else:
            found = f"its {MANIFEST} cannot be read ({error.strerror})"
        raise ArtifactError(f"{path} should be the folder of an artifact, but {found}.") from None
    return Manifest.from_json(text, str(path / MANIFEST))


def open_artifact(path: str | Path) -> Artifact:
    """Open the artifact in the folder `path` for running.

    Checks the manifest, that this machine can run it, that every file is there with its size, the
    hashes of all but the weights, and the weight files' headers against the manifest. The weights
    themselves are left to `verify`. Raises ArtifactError (no artifact), ArtifactVersionError,
    ArtifactTargetError, ArtifactCorruptError; UsageError where MXFORGE_CPU asks for a library
    that the artifact does not have.
    """
    path = Path(path)
    manifest = read_manifest(path)
    variant = choose_library(manifest)
    weight_files = {}
    for name, info in manifest.files.items():
        if problem := _problem(path / name, info, whole=False):
            raise ArtifactCorruptError(f"{path / name} {problem}; {REMEDY}")
        if info.header_sha256 is not None:
            weight_files[name] = _open_weights(path / name)
    _check_weights(path, manifest, weight_files)
    return Artifact(path, manifest, weight_files, variant)


def _problem(path: Path, info: FileInfo, whole: bool, bar: Any = None) -> str:
    """What is wrong with a file, or nothing; hashes weights only if `whole`."""
    try:
        size = path.stat().st_size
        if size != info.bytes:
            return f"should have {info.bytes} bytes, but has {size}"
        if info.header_sha256 is not None and header_sha256(path) != info.header_sha256:
            return "has another header than was written"
        if (whole or info.header_sha256 is None) and file_sha256(path, bar) != info.sha256:
            return "has another content than was written"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return ""


def file_sha256(path: Path, bar: Any = None) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            if bar is not None:
                bar.update(len(chunk))
    return digest.hexdigest()


def header_sha256(path: Path) -> str:
    """Hash of a .safetensors file's first eight bytes and the header whose length they tell."""
    with path.open("rb") as file:
        length = file.read(8)
        # A damaged length would ask for anything; what is there bounds it.
        size = min(int.from_bytes(length, "little"), os.fstat(file.fileno()).st_size)
        return hashlib.sha256(length + file.read(size)).hexdigest()


def _open_weights(path: Path) -> Safetensors:
    from .safetensors import open_safetensors

    try:
        return open_safetensors(path)
    except SafetensorsError as error:
        raise ArtifactCorruptError(f"{error} It is part of an artifact: {REMEDY}") from error


def _check_weights(path: Path, manifest: Manifest, files: Mapping[str, Safetensors]) -> None:
    """Each weight's shape and dtype in its file's header, as the manifest has them."""
    if not files:
        return
    from .safetensors import _DTYPES  # by name: the arrays' dtypes would need ml_dtypes

    for weight in manifest.weights:
        if weight.file is None:
            continue
        tensors = files[weight.file].tensors if weight.file in files else {}
        found = tensors.get(weight.name)
        expected = f"{weight.dtype} {list(weight.shape)}"
        actual = f"{_DTYPES[found.dtype][1]} {list(found.shape)}" if found else "not there"
        if actual != expected:
            raise ArtifactCorruptError(
                f"{path / weight.file}: the weight {short(weight.name)} should be {expected}, but "
                f"is {actual}; {REMEDY}"
            )


def choose_library(manifest: Manifest) -> LibraryInfo:
    """The best library for this machine, or the one that MXFORGE_CPU names.

    Raises ArtifactTargetError where this machine can run none (of those asked for), UsageError
    where MXFORGE_CPU names none.
    """
    host = manifest.target.host
    if host is not None and host != host_system():
        raise ArtifactTargetError(
            f"The artifact was compiled for {short(host)}, but this machine is "
            f"{host_system()}; compile the model here."
        )
    candidates = _asked_for(manifest)
    missing = {library.target: missing_cpu_features(library.features) for library in candidates}
    fitting = [library for library in candidates if not missing[library.target]]
    if not fitting:
        lacking = "; ".join(
            f"{_plain(name)} needs {_plain(*lack)}" for name, lack in missing.items()
        )
        remedy = (
            "Compile the model on this machine, for an older CPU level, or for cpu:portable."
            if candidates == list(manifest.libraries)
            else f"Unset {CPU_VARIABLE}, or name another."
        )
        raise ArtifactTargetError(
            f"The artifact was compiled for a CPU with more than this one has: {lacking}. {remedy}"
        )
    # An instruction that is not there ends the process, so the unknown CPU gets the plainest code.
    return fitting[0] if knows_cpu_features() else fitting[-1]


def _asked_for(manifest: Manifest) -> list[LibraryInfo]:
    """The libraries to choose from: all, or the one that MXFORGE_CPU names."""
    level = os.environ.get(CPU_VARIABLE)
    if not level or manifest.target.kind != "cpu":
        return list(manifest.libraries)
    asked = [library for library in manifest.libraries if library.target == f"cpu:{level}"]
    if not asked:
        known = _plain(*(library.target.removeprefix("cpu:") for library in manifest.libraries))
        raise UsageError(
            f"{CPU_VARIABLE} should name a CPU level of the artifact ({known}), but is "
            f"{short(level)}; name one of these, or unset it."
        )
    return asked


def _plain(*names: str) -> str:
    """Names out of a manifest, without quotes."""
    return ", ".join(short(name)[1:-1] for name in names)


@dataclass(frozen=True)
class Verification:
    """What `verify` found, by paths relative to the folder."""

    files: int
    bytes: int
    changed: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not (self.changed or self.missing or self.extra)

    def check(self) -> None:
        """Raise ArtifactCorruptError naming every file that is not as it was written."""
        found = [
            f"{label} {', '.join(map(short, names))}"
            for label, names in (
                ("changed:", self.changed),
                ("missing:", self.missing),
                ("not part of it:", self.extra),
            )
            if names
        ]
        if found:
            raise ArtifactCorruptError(
                f"The artifact is not as it was written; {'; '.join(found)}. {REMEDY.capitalize()}"
            )


def verify(path: str | Path, progress: bool = True) -> Verification:
    """Hash every file of the artifact, weights included, and look for files that do not belong.

    `progress` shows a bar on stderr. Raises as `read_manifest`; what the files are like is in the
    result.
    """
    from tqdm import tqdm

    path = Path(path)
    manifest = read_manifest(path)
    total = sum(info.bytes for info in manifest.files.values())
    changed, missing = [], []
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=not progress) as bar:
        for name, info in sorted(manifest.files.items()):
            problem = _problem(path / name, info, whole=True, bar=bar)
            if problem == "is missing":
                missing.append(name)
            elif problem:
                changed.append(name)
    present = {p.relative_to(path).as_posix() for p in path.rglob("*") if not p.is_dir()}
    extra = present - manifest.files.keys() - {MANIFEST}
    return Verification(
        len(manifest.files), total, tuple(changed), tuple(missing), tuple(sorted(extra))
    )
