"""The compiler: a checkpoint in, an artifact out. See `compile_model`."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

from mxforge.errors import CheckpointError, UsageError, needs_compiler
from mxforge.manifest import MOST

if TYPE_CHECKING:
    from .targets import Numerics

DEFAULT_OUTPUT = Path("artifacts")
MAX_BATCH = MOST.max_batch
MAX_PREFILL_CHUNK = MOST.prefill_chunk

Announce = Callable[[str], None]


def compile_model(
    checkpoint: str | Path,
    target: str = "cpu",
    output: str | Path | None = None,
    numerics: str = "fast",
    *,
    host: str | None = None,
    kv: str | None = None,
    activations: str | None = None,
    dense: str | None = None,
    max_batch: int = 16,
    prefill_chunk: int = 512,
    random_weights: bool = False,
    debug_dump: str | Path | None = None,
    force: bool = False,
    announce: Announce = lambda text: None,
    progress: bool = False,
) -> Path:
    """Compile `checkpoint` for `target` into an artifact; returns its folder.

    checkpoint      a folder in Hugging Face's layout or OpenAI's original one; with
                    `random_weights` a config.json of either layout is enough
    target          cpu, cpu:LEVEL, cpu:portable, cuda, cuda:sm_XX, vulkan, vulkan:PROFILE or metal
    output          the artifact's folder; None: artifacts/<checkpoint's name>-<target>, and
                    -<host> where one is given
    numerics        "exact" (f32 throughout) or "fast" (number formats chosen for speed)
    host            the system that runs it: linux-x86_64, linux-aarch64, android-aarch64,
                    darwin-aarch64, darwin-x86_64, windows-x86_64; None: this machine's, or Linux
                    where the target is a CPU of another architecture
    kv              format of the cache: "f32", "f16", "bf16", "int8"; None: that of `numerics`
    activations     format of the experts' inputs: "f32", "bf16", "int8", "mxfp8"; None: that of
                    `numerics`
    dense           format of the other large weights: "bf16", "int8"; None: that of `numerics`
    max_batch       most sequences in one step
    prefill_chunk   most prompt tokens in one step
    random_weights  leave the weights out; the runtime makes random ones from a seed
    debug_dump      a folder for the program after every phase, and the generated code
    force           replace an existing artifact
    announce        is called with a line of text at each step
    progress        show a bar on stderr while packing

    Nothing is left behind where it fails. Raises CheckpointError and its subclasses, ConfigError,
    TargetError, OutputError, TokenizerError, UsageError; CompilerMissingError where only the
    runtime is installed.
    """
    source = Path(checkpoint)
    _check_arguments(source, numerics, max_batch, prefill_chunk, random_weights)

    # Imported here so that most usage errors come at once: TVM takes a second.
    with needs_compiler("Compiling a model"):
        from .formats import Formats
        from .job import Job

    formats = Formats.of(numerics, kv=kv, activations=activations, dense=dense)
    own = "-".join(filter(None, [_name(source), target.replace(":", "-"), host]))
    folder = Path(output) if output is not None else DEFAULT_OUTPUT / own
    job = Job(
        name=_name(source),
        source=source,
        target_name=target,
        numerics=cast("Numerics", numerics),
        formats=formats,
        max_batch=max_batch,
        prefill_chunk=prefill_chunk,
        random_weights=random_weights,
        dump=Path(debug_dump) if debug_dump is not None else None,
        announce=announce,
        progress=progress,
        host=host,
    )
    job.run(folder, force)
    return folder


def _check_arguments(
    source: Path, numerics: str, max_batch: int, prefill_chunk: int, random_weights: bool
) -> None:
    if numerics not in ("exact", "fast"):
        raise UsageError(f"numerics must be 'exact' or 'fast', found {numerics!r}.")
    for name, value, most in (
        ("max_batch", max_batch, MAX_BATCH),
        ("prefill_chunk", prefill_chunk, MAX_PREFILL_CHUNK),
    ):
        if type(value) is not int or not 1 <= value <= most:
            raise UsageError(f"{name} must be a whole number from 1 to {most}, found {value!r}.")
    if not source.exists():
        raise CheckpointError(
            f"Expected a checkpoint folder or a config.json at {source}, found nothing there."
        )
    if source.is_file() and not random_weights:
        raise UsageError(
            f"{source} is a file, and only a folder holds weights; give the checkpoint's folder, "
            "or add --random-weights to compile a bare config.json."
        )


def _name(source: Path) -> str:
    # Not resolved: a link gives the model its own name.
    path = Path(os.path.abspath(source))  # noqa: PTH100
    folder = path if path.is_dir() else path.parent
    if folder.name == "original" and (folder / "dtypes.json").is_file():
        folder = folder.parent  # OpenAI's files, inside a repository that has the model's name
    return folder.name or path.stem


__all__ = ["compile_model"]
