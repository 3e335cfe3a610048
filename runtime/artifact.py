"""The artifact: a folder with one compiled model, how it is written, opened and verified.

    <name>/
      manifest.json           everything about the others; see `Manifest`
      model.so                the library
      weights-*.safetensors   packed weights; none where random weights are made at load
      tokenizer/              see `mxforge.tokenizer`

The compiler writes it through `ArtifactWriter`, which shows nothing until all is there. Equal
inputs give equal bytes: no times, no machine names, keys sorted.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import subprocess
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from ._version import __version__
from .errors import (
    ArtifactCorruptError,
    ArtifactError,
    ArtifactTargetError,
    ArtifactVersionError,
    OutputError,
    SafetensorsError,
)

if TYPE_CHECKING:
    from .safetensors import Safetensors, SafetensorsWriter
    from .tokenizer import Tokenizer

FORMAT_VERSION = 1
ABI_VERSION = 1
MANIFEST = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"

# Data begins on a page of every system, so that a mapping can be handed to a device.
DATA_ALIGNMENT = 16 << 10
TENSOR_ALIGNMENT = 64

_CHUNK = 8 << 20
_AGAIN = "compile the model again, or copy the artifact again."


# ---------------------------------------------------------------------------------- the manifest


def host_system() -> str:
    """The system and CPU architecture of this machine, such as ``linux-x86_64``."""
    machine = platform.machine().lower()
    return f"{platform.system().lower()}-{_ARCHITECTURES.get(machine, machine)}"


_ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}


@dataclass(frozen=True)
class TargetInfo:
    """What the library was compiled for.

    `features` are the CPU's, in LLVM's spelling; `host` is the system and architecture of the
    machine that loads the library (`host_system`).
    """

    kind: str
    name: str
    features: tuple[str, ...] = ()
    host: str = field(default_factory=host_system)


@dataclass(frozen=True)
class PrecisionInfo:
    """Number formats by name: activations between kernels, the KV pages, the experts' inputs."""

    activations: str
    kv_dtype: str
    experts: str


@dataclass(frozen=True)
class Limits:
    """Upper bounds planned into the library: sequences, tokens a step, positions a sequence."""

    max_batch: int
    prefill_chunk: int
    context: int


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes: all weights; one KV page of all layers of a kind; what a step needs beside them."""

    weights_bytes: int
    kv_bytes_per_page_full: int
    kv_bytes_per_page_sliding: int
    workspace_bytes: int


@dataclass(frozen=True)
class KernelInfo:
    """One kernel and how it was scheduled; `functions` are the library's names of its uses."""

    name: str
    target: str
    schedule: str
    tile: str
    functions: tuple[str, ...]


@dataclass(frozen=True)
class WeightInfo:
    """One argument of the library.

    `dtype` is NumPy's (or ml_dtypes') name. `file` is None where the weight is made at load from
    the random seed, as `fill` says.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str | None
    fill: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class FileInfo:
    """One file; `header_sha256` covers the header of a .safetensors file, all that is hashed of it
    when the artifact is opened."""

    sha256: str
    bytes: int
    header_sha256: str | None = None


@dataclass(frozen=True)
class SourceInfo:
    """Where the model came from: the checkpoint's format, and a hash over what was read of it."""

    format: str
    sha256: str


@dataclass(frozen=True)
class TokenizerInfo:
    """Which tokenizer the model has; see `mxforge.tokenizer`."""

    kind: Literal["o200k_harmony", "tokenizers"] | None


@dataclass(frozen=True)
class Manifest:
    """manifest.json. `config` is the model's (ModelConfig.to_dict()), left to the compiler to read.

    weights         every argument of the library, with or without a file
    weights_order   their names in the library's argument order
    files           every file beside the manifest, by path relative to the folder
    random_seed     what weights without a file are made from; None where all have one
    """

    name: str
    config: Mapping[str, Any]
    target: TargetInfo
    numerics: Literal["exact", "fast"]
    precision: PrecisionInfo
    limits: Limits
    stop_token_ids: tuple[int, ...]
    memory: MemoryPlan
    kernels: tuple[KernelInfo, ...]
    weights: tuple[WeightInfo, ...]
    weights_order: tuple[str, ...]
    source: SourceInfo
    tokenizer: TokenizerInfo
    random_seed: int | None = None
    files: Mapping[str, FileInfo] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    abi_version: int = ABI_VERSION
    mxforge_version: str = __version__

    def to_json(self) -> str:
        """The manifest as text: sorted keys, the same for equal manifests."""
        return json.dumps(asdict(self), indent=1, sort_keys=True, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: str = MANIFEST) -> Manifest:
        """Parse and check; `where` names the source in errors.

        Raises ArtifactVersionError for another format or ABI, ArtifactCorruptError naming the
        field for anything that is not as this version writes it.
        """
        try:
            content = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else error
            message = f"{where} is not readable JSON ({reason}); {_AGAIN}"
            raise ArtifactCorruptError(message) from None
        if not isinstance(content, dict):
            raise ArtifactCorruptError(
                f"{where} should hold a JSON object, but holds {_short(content)}; {_AGAIN}"
            )
        for name, known in (("format_version", FORMAT_VERSION), ("abi_version", ABI_VERSION)):
            version = content.get(name)
            if type(version) is int and version != known:
                raise ArtifactVersionError(
                    f"{where} has {name} {version}, this mxforge ({__version__}) reads {known}; "
                    f"compile the model again, or use the mxforge that wrote it "
                    f"({_short(content.get('mxforge_version', 'unknown'))})."
                )
        try:
            manifest: Manifest = _decode(cls, content, "")
            manifest._check()
        except _FieldError as error:
            raise ArtifactCorruptError(f"{where}: {error}; {_AGAIN}") from None
        return manifest

    def _check(self) -> None:
        """What the types do not say."""
        for path, info in self.files.items():
            if not is_inside(path) or path == MANIFEST:
                raise _FieldError(f"files should name paths inside the folder, not {_short(path)}")
            for label, digest in (("sha256", info.sha256), ("header_sha256", info.header_sha256)):
                if digest is not None and not re.fullmatch(r"[0-9a-f]{64}", digest):
                    raise _FieldError(f"files[{_short(path)}].{label} should be 64 hex digits")
            if (info.header_sha256 is not None) != path.endswith(".safetensors"):
                raise _FieldError(f"files[{_short(path)}].header_sha256 belongs to weight files")
        names = {weight.name for weight in self.weights}
        if len(names) != len(self.weights) or sorted(names) != sorted(self.weights_order):
            raise _FieldError("weights_order should name each of weights once")
        for weight in self.weights:
            if weight.file is not None and weight.file not in self.files:
                raise _FieldError(f"weights[{_short(weight.name)}].file is not among files")
            if weight.file is None and self.random_seed is None:
                raise _FieldError(f"weights[{_short(weight.name)}] has neither file nor seed")
        sizes = {
            **{f"limits.{k}": v - 1 for k, v in asdict(self.limits).items()},
            **{f"memory.{k}": v for k, v in asdict(self.memory).items()},
            **{f"files[{_short(k)}].bytes": v.bytes for k, v in self.files.items()},
            **{f"weights[{_short(w.name)}].shape": min((0, *w.shape)) for w in self.weights},
            "stop_token_ids": min((0, *self.stop_token_ids)),
        }
        for label, size in sizes.items():
            if size < 0:
                raise _FieldError(f"{label} is too small")


class _FieldError(Exception):
    """A field of a manifest is wrong; the message names it."""


T = TypeVar("T")


def _decode(kind: Any, value: Any, where: str) -> Any:
    """`value`, out of JSON, as the type `kind` of a manifest's field called `where`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if is_dataclass(kind):
        return _decode_dataclass(typing.cast(type, kind), value, where)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (kind,) = (argument for argument in arguments if argument is not type(None))
        return _decode(kind, value, where)
    if origin is Literal:
        if value not in [a for a in arguments if type(a) is type(value)]:
            raise _FieldError(f"{where} should be one of {arguments}, but is {_short(value)}")
        return value
    if origin is tuple:
        _expect(list, value, where)
        return tuple(_decode(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is Mapping:
        _expect(dict, value, where)
        return {k: _decode(arguments[1], v, f"{where}[{_short(k)}]") for k, v in value.items()}
    _expect(kind, value, where)
    return value


def _decode_dataclass(kind: type[T], value: Any, where: str) -> T:
    _expect(dict, value, where or "the manifest")
    names = [f.name for f in fields(typing.cast(Any, kind))]
    prefix = f"{where}." if where else ""
    if missing := [name for name in names if name not in value]:
        raise _FieldError(f"the field {prefix}{missing[0]} is missing")
    if extra := sorted(value.keys() - set(names)):
        raise _FieldError(f"the field {prefix}{_short(extra[0])[1:-1]} is unknown")
    kinds = _type_hints(typing.cast(Any, kind))
    return kind(**{name: _decode(kinds[name], value[name], prefix + name) for name in names})


@cache
def _type_hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


_KINDS = {dict: "an object", list: "a list", str: "a string", int: "a whole number"}


def _expect(kind: type, value: Any, where: str) -> None:
    if type(value) is not kind:  # True is no number here
        raise _FieldError(f"{where} should be {_KINDS[kind]}, but is {_short(value)}")
    if isinstance(value, str) and not value.isprintable():  # it may be shown
        raise _FieldError(f"{where} should be printable, but is {_short(value)}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number")


def _short(value: Any) -> str:
    """ascii(), so that no foreign file can garble a terminal, cut to a readable length."""
    text = ascii(value)
    return text if len(text) <= 80 else text[:60] + "..." + text[-1]


def is_inside(path: str) -> bool:
    """Whether a manifest's path stays in its folder: relative, normal, forward slashes.

    Symbolic links are the owner's business (a download cache may be made of them).
    """
    pure = PurePosixPath(path)
    return (
        path.isprintable()
        and str(pure) == path
        and pure.parts != ()
        and not pure.is_absolute()
        and ".." not in pure.parts
        and "\\" not in path
        and ":" not in path
    )


# --------------------------------------------------------------------------------------- opening


@dataclass(frozen=True)
class Artifact:
    """An opened artifact; `weight_files` maps relative paths to memory-mapped weight files."""

    path: Path
    manifest: Manifest
    weight_files: Mapping[str, Safetensors]

    @property
    def library(self) -> Path:
        """The compiled library."""
        return self.path / _library(self.path, self.manifest)

    @property
    def device_code(self) -> dict[str, Path]:
        """Files of compiled GPU code, by `device_code_name`."""
        return {
            name: self.path / name
            for name in self.manifest.files
            if name.startswith("device-") and "/" not in name
        }

    def load_tokenizer(self) -> Tokenizer:
        """The model's tokenizer; TokenizerError where it is unreadable."""
        from .tokenizer import load_tokenizer

        return load_tokenizer(self.path / TOKENIZER_FOLDER, self.manifest.tokenizer.kind)


def device_code_name(source: str) -> str:
    """The file in an artifact that holds the compiled form of this CUDA source."""
    return f"device-{hashlib.sha256(source.encode()).hexdigest()[:16]}.fatbin"


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
    ArtifactTargetError, ArtifactCorruptError.
    """
    path = Path(path)
    manifest = read_manifest(path)
    check_target(manifest.target)
    weight_files = {}
    for name, info in manifest.files.items():
        if problem := _problem(path / name, info, whole=False):
            raise ArtifactCorruptError(f"{path / name} {problem}; {_AGAIN}")
        if info.header_sha256 is not None:
            weight_files[name] = _open_weights(path / name)
    _check_weights(path, manifest, weight_files)
    _library(path, manifest)
    return Artifact(path, manifest, weight_files)


def _library(path: Path, manifest: Manifest) -> str:
    names = [name for name in manifest.files if name.startswith("model.")]
    if len(names) != 1:
        raise ArtifactCorruptError(
            f"{path / MANIFEST} should list one library model.*, but lists {len(names)}; {_AGAIN}"
        )
    return names[0]


def _problem(path: Path, info: FileInfo, whole: bool, bar: Any = None) -> str:
    """What is wrong with a file, or nothing; hashes weights only if `whole`."""
    try:
        size = path.stat().st_size
        if size != info.bytes:
            return f"should have {info.bytes} bytes, but has {size}"
        if info.header_sha256 is not None and _header_sha256(path) != info.header_sha256:
            return "has another header than was written"
        if (whole or info.header_sha256 is None) and _sha256(path, bar) != info.sha256:
            return "has another content than was written"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return ""


def _sha256(path: Path, bar: Any = None) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
            if bar is not None:
                bar.update(len(chunk))
    return digest.hexdigest()


def _header_sha256(path: Path) -> str:
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
        raise ArtifactCorruptError(f"{error} It is part of an artifact: {_AGAIN}") from error


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
                f"{path / weight.file}: the weight {_short(weight.name)} should be {expected}, but "
                f"is {actual}; {_AGAIN}"
            )


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
            f"{label} {', '.join(map(_short, names))}"
            for label, names in (
                ("changed:", self.changed),
                ("missing:", self.missing),
                ("not part of it:", self.extra),
            )
            if names
        ]
        if found:
            raise ArtifactCorruptError(
                f"The artifact is not as it was written; {'; '.join(found)}. {_AGAIN.capitalize()}"
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


# ---------------------------------------------------------------------------------- this machine


def check_target(target: TargetInfo) -> None:
    """Raise ArtifactTargetError where this machine cannot run what was compiled for `target`."""
    if target.host != host_system():
        raise ArtifactTargetError(
            f"The artifact was compiled for {_short(target.host)}, but this machine is "
            f"{host_system()}; compile the model here."
        )
    check_cpu_features(target.features)


def check_cpu_features(required: Iterable[str]) -> None:
    """Raise ArtifactTargetError naming what of `required` (LLVM's spelling) this CPU lacks.

    Passes where the system does not tell its CPU's features.
    """
    if missing := missing_cpu_features(required):
        raise ArtifactTargetError(
            f"The artifact was compiled for a CPU with {', '.join(map(_plain, missing))}, which "
            "this one lacks; compile the model on this machine, or for an older CPU level."
        )


def missing_cpu_features(required: Iterable[str]) -> tuple[str, ...]:
    """What of `required` (instruction sets, LLVM's spelling) this CPU lacks, sorted."""
    present = _cpu_flags()
    names = _FEATURE_NAMES.get(host_system(), {})
    if not present:
        return ()
    return tuple(sorted(f for f in set(required) if names.get(f, f) not in present))


def _plain(name: str) -> str:
    return _short(name)[1:-1]


@cache
def _cpu_flags() -> frozenset[str]:
    """The CPU's features by the system's names; empty where it does not tell."""
    try:
        if sys.platform == "darwin":
            output = subprocess.run(
                ["sysctl", "-a"], capture_output=True, text=True, check=True, timeout=10
            )
            return parse_sysctl(output.stdout)
        return parse_cpuinfo(Path("/proc/cpuinfo").read_text(errors="replace"))
    except (OSError, subprocess.SubprocessError):
        return frozenset()


def parse_cpuinfo(text: str) -> frozenset[str]:
    """The features that all processors of Linux's /proc/cpuinfo have.

    All, because a big.LITTLE phone may list different ones and threads move between them.
    """
    lines = re.findall(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return frozenset.intersection(*map(frozenset, map(str.split, lines))) if lines else frozenset()


def parse_sysctl(text: str) -> frozenset[str]:
    """The features in the output of macOS's ``sysctl -a``.

    Intel: the lower-cased words of machdep.cpu.*features; Apple: names under hw.optional whose
    value is 1.
    """
    words = re.findall(r"^machdep\.cpu\.(?:leaf7_)?features: (.*)$", text, re.MULTILINE)
    optional = re.findall(r"^hw\.optional\.(?:arm\.)?(\w+): 1$", text, re.MULTILINE)
    return frozenset(" ".join(words).lower().split()) | frozenset(optional)


# Of each system: LLVM's name -> the system's, where they differ.
_FEATURE_NAMES = {
    "linux-x86_64": {
        "64bit": "lm",
        "amx-bf16": "amx_bf16",
        "amx-int8": "amx_int8",
        "amx-tile": "amx_tile",
        "avx512bf16": "avx512_bf16",
        "avx512bitalg": "avx512_bitalg",
        "avx512fp16": "avx512_fp16",
        "avx512vbmi2": "avx512_vbmi2",
        "avx512vnni": "avx512_vnni",
        "avx512vp2intersect": "avx512_vp2intersect",
        "avx512vpopcntdq": "avx512_vpopcntdq",
        "avxvnni": "avx_vnni",
        "avxvnniint8": "avx_vnni_int8",
        "crc32": "sse4_2",
        "lzcnt": "abm",
        "pclmul": "pclmulqdq",
        "prfchw": "3dnowprefetch",
        "rdrnd": "rdrand",
        "sahf": "lahf_lm",
        "sha": "sha_ni",
        "sse3": "pni",
        "sse4.1": "sse4_1",
        "sse4.2": "sse4_2",
        "x87": "fpu",
    },
    "linux-aarch64": {
        "crc": "crc32",
        "dotprod": "asimddp",
        "fp-armv8": "fp",
        "fp16fml": "asimdfhm",
        "fullfp16": "asimdhp",
        "lse": "atomics",
        "neon": "asimd",
        "rcpc": "lrcpc",
        "rdm": "asimdrdm",
    },
    "darwin-x86_64": {"avx": "avx1.0", "pclmul": "pclmulqdq", "rdrnd": "rdrand"},
    "darwin-aarch64": {
        "bf16": "FEAT_BF16",
        "crc": "armv8_crc32",
        "dotprod": "FEAT_DotProd",
        "fp-armv8": "floatingpoint",
        "fp16fml": "FEAT_FHM",
        "fullfp16": "FEAT_FP16",
        "i8mm": "FEAT_I8MM",
        "lse": "FEAT_LSE",
        "neon": "AdvSIMD",
        "rcpc": "FEAT_LRCPC",
        "rdm": "FEAT_RDM",
        "sme": "FEAT_SME",
        "sme2": "FEAT_SME2",
    },
}


# --------------------------------------------------------------------------------------- writing


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
            sha256 or _sha256(path),
            path.stat().st_size,
            _header_sha256(path) if name.endswith(".safetensors") else None,
        )

    @contextlib.contextmanager
    def weights(
        self, name: str, infos: Iterable[tuple[str, str, Sequence[int]]]
    ) -> Iterator[SafetensorsWriter]:
        """A writer of the weight file `name`, aligned and hashed on the way.

        `infos` as `SafetensorsWriter` takes them: (name, safetensors dtype, shape).
        """
        from .safetensors import SafetensorsWriter

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
