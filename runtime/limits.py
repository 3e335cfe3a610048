"""The limits that an engine is loaded with: checked, and what they are where nobody says."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import UsageError
from .machine import default_threads, usable_cores
from .manifest import Manifest

DEFAULT_CONTEXT = 8192  # tokens; a model with less takes its own
DEFAULT_MAX_WAITING = 1024  # requests; prompts of 8,192 tokens take 64 KiB each
DEFAULT_MIXED_CHUNK = 128  # tokens


@dataclass(frozen=True)
class EngineLimits:
    """What `Engine.load` is asked for; max_batch is None where memory has to tell."""

    threads: int
    context_length: int
    max_batch: int | None
    prefill_chunk: int
    mixed_chunk: int
    max_waiting: int


def checked_limits(
    manifest: Manifest,
    *,
    threads: int | None,
    context_length: int,
    max_batch: int | None,
    prefill_chunk: int | None,
    mixed_chunk: int | None,
    max_waiting: int,
) -> EngineLimits:
    """The limits; UsageError where one cannot be."""
    compiled = manifest.limits
    if context_length == DEFAULT_CONTEXT > compiled.context:
        context_length = compiled.context
    if prefill_chunk is None:
        prefill_chunk = compiled.prefill_chunk
    _limit("prefill_chunk", prefill_chunk, compiled.prefill_chunk)
    if mixed_chunk is None:
        mixed_chunk = min(DEFAULT_MIXED_CHUNK, prefill_chunk)
    return EngineLimits(
        _threads(threads),
        _limit("context_length", context_length, compiled.context),
        None if max_batch is None else _limit("max_batch", max_batch, compiled.max_batch),
        prefill_chunk,
        _limit("mixed_chunk", mixed_chunk, prefill_chunk, "the prefill_chunk"),
        checked_whole("max_waiting", max_waiting, 0, 2**31 - 1),
    )


def checked_whole(name: str, value: int, least: int, most: int) -> int:
    """`value`; UsageError where it is no whole number in this range."""
    if type(value) is not int or not least <= value <= most:
        raise UsageError(f"{name} must be a whole number from {least} to {most}, found {value!r}.")
    return value


def _threads(threads: int | None) -> int:
    if threads is None:
        return default_threads()
    most = usable_cores()
    if type(threads) is not int or not 1 <= threads <= most:
        raise UsageError(
            f"threads must be from 1 to {most}, the cores usable here; found {threads!r}."
        )
    return threads


def _limit(name: str, value: int, most: int, of: str = "as compiled") -> int:
    if type(value) is not int or value < 1:
        raise UsageError(f"{name} must be a whole number of at least 1, found {value!r}.")
    if value > most:
        raise UsageError(f"{name} must be at most {most}, {of}; found {value}.")
    return value
