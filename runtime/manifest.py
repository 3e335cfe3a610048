"""manifest.json: what an artifact is, as frozen dataclasses; its JSON, parsed field by field."""

from __future__ import annotations

import json
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import PurePosixPath
from typing import Any, Literal, TypeVar

from ._version import __version__
from .errors import ArtifactCorruptError, ArtifactVersionError
from .kv_layout import KV_BYTES

FORMAT_VERSION = 3
ABI_VERSION = 3
MANIFEST = "manifest.json"

REMEDY = "compile the model again, or copy the artifact again."

# What the runtime reads of a model's config -> the most it can be.
CONFIG_SIZES = {
    "vocab_size": 1 << 24,
    "num_key_value_heads": 4096,
    "head_dim": 1024,
}
WEIGHT_BYTES = {
    "bfloat16": 2, "float16": 2, "float32": 4, "int8": 1, "uint8": 1, "uint32": 4,
}  # fmt: skip


@dataclass(frozen=True)
class TargetInfo:
    """What the artifact was compiled for.

    `host` is the system and architecture that a CPU's libraries are for, as
    `mxforge.machine.host_system` tells it; None for GPUs, whose code runs on any.
    """

    kind: str
    name: str
    host: str | None


@dataclass(frozen=True)
class LibraryInfo:
    """One compiled library.

    target      what it is for, such as cpu:avx2
    file        its code
    plan        the file of its launch plan; see `mxforge.plan`
    features    what it needs of a CPU, in LLVM's spelling
    """

    target: str
    file: str
    plan: str
    features: tuple[str, ...]


@dataclass(frozen=True)
class PrecisionInfo:
    """Number formats by name: activations between kernels, the KV pages, the experts' inputs, the
    weights of attention and of the output layer."""

    activations: str
    kv_dtype: str
    experts: str
    dense: str


@dataclass(frozen=True)
class Limits:
    """Upper bounds planned into the library: sequences, tokens a step, positions a sequence."""

    max_batch: int
    prefill_chunk: int
    context: int


# What any artifact may be compiled for.
MOST = Limits(max_batch=1024, prefill_chunk=8192, context=1 << 24)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes: all weights; what a step needs beside them and the cache, with whichever library."""

    weights_bytes: int
    workspace_bytes: int


@dataclass(frozen=True)
class KvGroup:
    """Layers that see the same of the past, and so share a page table.

    name        of the library's arguments <name>_table and <name>_first
    window      keys that a query sees, its own included; None: all
    layers      by number; their caches are the arguments kv_<layer>
    dtype       of the cache, NumPy's name
    page_shape  of a page of PAGE_TOKENS tokens in one layer; in a layer's tensor, the number of
                pages comes before the last of these
    """

    name: str
    window: int | None
    layers: tuple[int, ...]
    dtype: str
    page_shape: tuple[int, ...]

    @property
    def layer_page_bytes(self) -> int:
        """Bytes of a page in one layer."""
        return math.prod(self.page_shape) * KV_BYTES[self.dtype]

    @property
    def page_bytes(self) -> int:
        """Bytes of a page in all layers."""
        return len(self.layers) * self.layer_page_bytes


@dataclass(frozen=True)
class KernelInfo:
    """One kernel and how it was scheduled for the library of `target`; `functions` are that
    library's names of its uses."""

    name: str
    target: str
    schedule: str
    tile: str
    functions: tuple[str, ...]


@dataclass(frozen=True)
class WeightInfo:
    """One argument of the library.

    dtype   NumPy's (or ml_dtypes') name
    file    None where the weight is made at load from the random seed, as `fill` says
    access  mapped: it is read where its file is mapped; sparse: so it is, a few rows a step;
            uploaded: it is copied to the device
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: str | None
    access: Literal["mapped", "sparse", "uploaded"]
    fill: Mapping[str, Any] | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * WEIGHT_BYTES[self.dtype]


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
    """manifest.json; fields that this version does not know are left alone.

    config          the model's (ModelConfig.to_dict()); only `CONFIG_SIZES` are checked, which the
                    runtime reads, the rest is left to the compiler

    libraries       best first; all take the same weights. More than one only for CPUs
    kv_groups       every layer is in one of them
    weights         of the libraries, in the order of their arguments, with or without a file
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
    libraries: tuple[LibraryInfo, ...]
    kernels: tuple[KernelInfo, ...]
    kv_groups: tuple[KvGroup, ...]
    weights: tuple[WeightInfo, ...]
    source: SourceInfo
    tokenizer: TokenizerInfo
    random_seed: int | None = None
    files: Mapping[str, FileInfo] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    abi_version: int = ABI_VERSION
    mxforge_version: str = __version__

    @property
    def layer_groups(self) -> list[str]:
        """The name of each layer's KV group."""
        named = {layer: group.name for group in self.kv_groups for layer in group.layers}
        return [named[layer] for layer in sorted(named)]

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
            message = f"{where} is not readable JSON ({reason}); {REMEDY}"
            raise ArtifactCorruptError(message) from None
        if not isinstance(content, dict):
            raise ArtifactCorruptError(
                f"{where} should hold a JSON object, but holds {short(content)}; {REMEDY}"
            )
        for name, known in (("format_version", FORMAT_VERSION), ("abi_version", ABI_VERSION)):
            version = content.get(name)
            if type(version) is int and version != known:
                raise ArtifactVersionError(
                    f"{where} has {name} {short(version)}, this mxforge ({__version__}) reads "
                    f"{known}; compile the model again, or use the mxforge that wrote it "
                    f"({short(content.get('mxforge_version', 'unknown'))})."
                )
        try:
            manifest: Manifest = _decode(cls, content, "")
            manifest._check()
        except _FieldError as error:
            raise ArtifactCorruptError(f"{where}: {error}; {REMEDY}") from None
        return manifest

    def _check(self) -> None:
        """What the types do not say."""
        for path, info in self.files.items():
            if not is_inside(path) or path == MANIFEST:
                raise _FieldError(f"files should name paths inside the folder, not {short(path)}")
            for label, digest in (("sha256", info.sha256), ("header_sha256", info.header_sha256)):
                if digest is not None and not re.fullmatch(r"[0-9a-f]{64}", digest):
                    raise _FieldError(f"files[{short(path)}].{label} should be 64 hex digits")
            if (info.header_sha256 is not None) != path.endswith(".safetensors"):
                raise _FieldError(f"files[{short(path)}].header_sha256 belongs to weight files")
        self._check_libraries()
        if len({weight.name for weight in self.weights}) != len(self.weights):
            raise _FieldError("weights should each have another name")
        self._check_kv_groups()
        for weight in self.weights:
            if weight.file is not None and weight.file not in self.files:
                raise _FieldError(f"weights[{short(weight.name)}].file is not among files")
            if weight.file is None:
                self._check_fill(weight)
        made = sum(weight.nbytes for weight in self.weights if weight.file is None)
        if self.memory.weights_bytes < made:
            raise _FieldError(
                f"memory.weights_bytes should be at least {made}, but is "
                f"{self.memory.weights_bytes}"
            )
        self._check_config()
        sizes = {
            **{f"limits.{k}": v - 1 for k, v in asdict(self.limits).items()},
            **{f"memory.{k}": v for k, v in asdict(self.memory).items()},
            **{f"files[{short(k)}].bytes": v.bytes for k, v in self.files.items()},
            **{f"weights[{short(w.name)}].shape": min((0, *w.shape)) for w in self.weights},
            "stop_token_ids": min((0, *self.stop_token_ids)),
            "random_seed": self.random_seed or 0,
        }
        for label, size in sizes.items():
            if size < 0:
                raise _FieldError(f"{label} is too small")
        for label, most in asdict(MOST).items():
            if getattr(self.limits, label) > most:
                raise _FieldError(f"limits.{label} is beyond {most}")

    def _check_libraries(self) -> None:
        libraries = self.libraries
        if not libraries:
            raise _FieldError("libraries should list one library at least, but lists none")
        if len(libraries) > 1 and self.target.kind != "cpu":
            raise _FieldError(
                f"libraries should list one library for {short(self.target.kind)}, but lists "
                f"{len(libraries)}"
            )
        for label, values in (
            ("target", [library.target for library in libraries]),
            ("file", [library.file for library in libraries]),
        ):
            if len(set(values)) != len(values):
                raise _FieldError(f"libraries should each have another {label}")
        for index, library in enumerate(libraries):
            if library.file not in self.files:
                raise _FieldError(f"libraries[{index}].file is not among files")
            if library.plan not in self.files:
                raise _FieldError(f"libraries[{index}].plan is not among files")

    def _check_kv_groups(self) -> None:
        for index, group in enumerate(self.kv_groups):
            where = f"kv_groups[{index}]"
            if group.dtype not in KV_BYTES:
                raise _FieldError(
                    f"{where}.dtype should be one of {', '.join(KV_BYTES)}, but is "
                    f"{short(group.dtype)}"
                )
            if group.window is not None and not 1 <= group.window <= MOST.context:
                raise _FieldError(f"{where}.window should be from 1 to {MOST.context}")
            if not group.page_shape or min(group.page_shape) < 1 or max(group.page_shape) > 1 << 24:
                raise _FieldError(f"{where}.page_shape should be sizes, but is {group.page_shape}")
        if len({group.name for group in self.kv_groups}) != len(self.kv_groups):
            raise _FieldError("kv_groups should each have another name")
        layers = sorted(layer for group in self.kv_groups for layer in group.layers)
        if layers != list(range(len(layers))):
            raise _FieldError("kv_groups should have each layer once")

    def _check_config(self) -> None:
        for name, most in CONFIG_SIZES.items():
            size = self.config.get(name)
            if type(size) is not int or not 1 <= size <= most:
                raise _FieldError(
                    f"config.{name} should be a whole number from 1 to {most}, but is {short(size)}"
                )

    def _check_fill(self, weight: WeightInfo) -> None:
        label = f"weights[{short(weight.name)}]"
        if self.random_seed is None:
            raise _FieldError(f"{label} has neither file nor seed")
        if weight.dtype not in WEIGHT_BYTES:
            raise _FieldError(f"{label}.dtype should be one of {', '.join(WEIGHT_BYTES)}")
        if not _is_fill(weight.fill or {}):
            raise _FieldError(f"{label}.fill cannot be {short(weight.fill)}")


def _is_fill(fill: Mapping[str, Any]) -> bool:
    """Whether the core can make a weight of it."""
    of = fill.get("of", "uint8")
    if type(of) is not str or of not in WEIGHT_BYTES or len(fill) != 1 + ("of" in fill):
        return False
    kind, value = next(item for item in fill.items() if item[0] != "of")
    if kind in ("constant", "normal"):
        return type(value) in (int, float)
    if type(value) is not list or not value:
        return False
    if kind == "values":
        return all(type(number) in (int, float) for number in value)
    whole = kind == "bytes" and all(type(number) is int for number in value)
    return whole and len(value) == 2 and 0 <= value[0] <= value[1] <= 255


class _FieldError(Exception):
    """A field of a manifest is wrong; the message names it."""


T = TypeVar("T")


def _decode(kind: Any, value: Any, where: str) -> Any:
    """`value`, out of JSON, as the type `kind` of a manifest's field called `where`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return _plain(value, where)
    if is_dataclass(kind):
        return _decode_dataclass(typing.cast(type, kind), value, where)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (kind,) = (argument for argument in arguments if argument is not type(None))
        return _decode(kind, value, where)
    if origin is Literal:
        if value not in [a for a in arguments if type(a) is type(value)]:
            raise _FieldError(f"{where} should be one of {arguments}, but is {short(value)}")
        return value
    if origin is tuple:
        _expect(list, value, where)
        return tuple(_decode(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is Mapping:
        _expect(dict, value, where)
        for key in value:
            _expect(str, key, f"a name in {where}")
        return {k: _decode(arguments[1], v, f"{where}[{short(k)}]") for k, v in value.items()}
    _expect(kind, value, where)
    return value


def _decode_dataclass(kind: type[T], value: Any, where: str) -> T:
    _expect(dict, value, where or "the manifest")
    names = [f.name for f in fields(typing.cast(Any, kind))]
    prefix = f"{where}." if where else ""
    if missing := [name for name in names if name not in value]:
        raise _FieldError(f"the field {prefix}{missing[0]} is missing")
    kinds = _type_hints(typing.cast(Any, kind))
    return kind(**{name: _decode(kinds[name], value[name], prefix + name) for name in names})


@cache
def _type_hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _plain(value: Any, where: str) -> Any:
    """`value` where it is a scalar or a list of scalars: nothing else stands in open fields."""
    for entry in value if isinstance(value, list) else [value]:
        if entry is None or (type(entry) in (bool, float) and math.isfinite(entry)):
            continue
        if type(entry) not in (int, str):
            raise _FieldError(f"{where} should be plain and finite, but is {short(value)}")
        _expect(type(entry), entry, where)
    return value


_KINDS = {dict: "an object", list: "a list", str: "a string", int: "a whole number"}


def _expect(kind: type, value: Any, where: str) -> None:
    if type(value) is not kind:  # True is no number here
        raise _FieldError(f"{where} should be {_KINDS[kind]}, but is {short(value)}")
    if isinstance(value, str) and not value.isprintable():  # it may be shown
        raise _FieldError(f"{where} should be printable, but is {short(value)}")
    if isinstance(value, int) and abs(value) >= 1 << 63:
        raise _FieldError(f"{where} should fit into 64 bits, but is {short(value)}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number")


def short(value: Any) -> str:
    """ascii(), so that no foreign file can garble a terminal, cut to a readable length."""
    try:
        text = ascii(value)
    except RecursionError:  # close to it, a parser can still take what cannot be shown
        text = "something nested too deeply"
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
