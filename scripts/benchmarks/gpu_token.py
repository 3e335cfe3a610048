"""One decoded token, kernel by kernel, on the device of an artifact.

A kit has the calls of a token on a tape (absent_gpus/token.py). Played once, the tape leaves real
values in every tensor. Then each kernel is timed with all its calls of the token in turn, so that
every call finds weights of its own; where the layers do not have enough of them to fill a cache,
there are copies.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from mxforge.artifact import Artifact, open_artifact
from mxforge.kv import KVPages, SequencePages, page_needs
from mxforge.kv_layout import PAGE_TOKENS
from mxforge.library import Library, default_threads
from mxforge.model import Model
from mxforge.sampling import SampleRow, SamplingParams, TokenHistory, sample_arguments

from .gpu_device import Device, Probe, timed

ROTATED_BYTES = 512 << 20  # of weights and cache, before a kernel meets the same again
COPIED_BYTES = 512 << 20  # at most, for that
MOST_CALLS = 512  # in one turn of a kernel, however small its weights
SAMPLES, LEAST_SAMPLES, SAMPLE_S, KERNEL_S = 7, 3, 0.01, 2.0


@dataclass
class Tape:
    """The calls of a library's function, bound to tensors.

    resident   tensors that stay from token to token, weights and cache, by their numbers
    """

    calls: list[tuple[str, list[int], int]]
    tensors: list[Any]
    resident: set[int]
    result: Any
    functions: dict[str, Any]

    @classmethod
    def of(cls, library: Library, told: dict[str, Any], given: list[Any], inputs: int) -> Tape:
        """`given` are the function's arguments, of which the first `inputs` belong to one token."""
        made = told["values"][told["parameters"] :]
        tensors = [*given, *(library.empty(shape, dtype) for _name, shape, dtype in made)]
        functions = {name: library.kernel(name) for name, *_ in told["calls"]}
        resident = set(range(inputs, len(given)))
        return cls(told["calls"], tensors, resident, tensors[told["result"]], functions)

    def play(self) -> None:
        for name, numbers, _bytes in self.calls:
            self.functions[name](*(self.tensors[number] for number in numbers))


def token_of(artifact: Artifact, tapes: dict[str, Any], context: int) -> tuple[Model, list[Tape]]:
    """The model, and the tapes of decoding and of sampling one token behind `context` others."""
    Library.use_threads(default_threads())
    manifest = artifact.manifest
    memory, window = manifest.memory, int(manifest.config["sliding_window"])
    page_bytes = (memory.kv_bytes_per_page_full, memory.kv_bytes_per_page_sliding)
    chunk = manifest.limits.prefill_chunk
    needs = page_needs(context + 1, 1, chunk, window, *page_bytes)
    model = Model(artifact, needs)
    kv, pages = KVPages(needs.full_pages, needs.sliding_pages, window), SequencePages()
    _fill(model, kv, pages, context, chunk)
    kv.prepare(pages, 1)
    library = model.library
    step = [library.tensor(np.array([value], np.int32)) for value in (1, context, 0)]
    step += model._tables(kv.tables([pages]))
    given = [*step, *model.kv, *model._ordered]
    decode = Tape.of(library, tapes["decode"], given, len(step))
    row = SampleRow(SamplingParams(temperature=0), TokenHistory(), 0, 0)
    arguments = map(library.tensor, sample_arguments([row], model.vocab_size))
    given = [decode.result, *arguments]
    sample = Tape.of(library, tapes["sample"], given, len(given))
    return model, [decode, sample]


def _fill(model: Model, kv: KVPages, pages: SequencePages, context: int, chunk: int) -> None:
    """Keys and values of `context` positions: of one page computed, of the others copies."""
    known = range(PAGE_TOKENS)
    kv.prepare(pages, PAGE_TOKENS)
    model.forward(list(known), list(known), [0] * PAGE_TOKENS, [], kv.tables([pages]))
    kv.commit(pages, PAGE_TOKENS)
    while pages.length < context:
        before = {"full": list(pages.full), "sliding": list(pages.sliding)}
        count = min(chunk, context - pages.length)
        kv.prepare(pages, count)
        for kind, listed in (("full", pages.full), ("sliding", pages.sliding)):
            fresh = listed[len(before[kind]) :]
            model.copy_pages(kind, list(zip(cycle(before[kind]), fresh, strict=False)))
        kv.commit(pages, count)


def measure(folder: Path, tapes: dict[str, Any], context: int) -> Iterator[tuple[str, Any]]:
    """What is found, one by one.

    agrees        how far the tape's logits are from those of the library's function; None: some
                  are no numbers
    token         seconds of all kernels of a token in order, and of the library's function
                  decode, as samples
    kernel        one kernel: seconds a call and seconds until it was issued, as samples; the bytes
                  that a call reads; the bandwidth before and after
    """
    model, (decode, sample) = token_of(open_artifact(folder), tapes, context)
    device = Device(model.library)
    probe = Probe(device)
    decode.play()
    given = decode.tensors[: tapes["decode"]["parameters"]]
    expected = model.library.numpy(model.library["decode"](*given))
    found = model.library.numpy(decode.result)
    scale = float(np.linalg.norm(expected)) or 1.0
    error = float(np.linalg.norm(found.astype(np.float64) - expected)) / scale
    yield "agrees", error if math.isfinite(error) else None
    sample.play()

    def both() -> None:
        decode.play()
        sample.play()

    yield (
        "token",
        {
            "kernels_s": _samples(device, both),
            "decode_s": _samples(device, lambda: model.library["decode"](*given)),
            "gb_s": probe.gb_s(),
        },
    )
    for tape in (decode, sample):
        for name in dict.fromkeys(name for name, *_ in tape.calls):
            yield "kernel", _kernel(device, tape, name, probe)


def _samples(device: Device, work: Any) -> list[float]:
    """Seconds of single runs of `work`."""
    work()
    once = timed(device, work)[0]
    repeats = max(1, round(SAMPLE_S / once))

    def several() -> None:
        for _ in range(repeats):
            work()

    return [timed(device, several)[0] / repeats for _ in range(SAMPLES)]


def _kernel(device: Device, tape: Tape, name: str, probe: Probe) -> dict[str, Any]:
    calls = [numbers for called, numbers, _bytes in tape.calls if called == name]
    rotated = sum(nbytes for called, _numbers, nbytes in tape.calls if called == name)
    function = tape.functions[name]
    turn = [[tape.tensors[n] for n in numbers] for numbers in calls]
    copies = _copies(device, tape, calls, rotated)
    for _ in range(copies - 1):
        turn += [
            [
                device.copy_of(t) if n in tape.resident else t
                for n, t in zip(numbers, own, strict=True)
            ]
            for numbers, own in zip(calls, turn, strict=False)
        ]

    def once() -> None:
        for arguments in turn:
            function(*arguments)

    bandwidth = [probe.gb_s()]
    once()
    seconds = timed(device, once)[0]
    repeats = max(1, round(SAMPLE_S / seconds))
    taken: list[tuple[float, float]] = []
    began = time.perf_counter()
    while len(taken) < LEAST_SAMPLES or (
        len(taken) < SAMPLES and time.perf_counter() - began < KERNEL_S
    ):

        def several() -> None:
            for _ in range(repeats):
                once()

        taken.append(timed(device, several))
    bandwidth.append(probe.gb_s())
    each = repeats * len(turn)
    return {
        "kernel": name,
        "calls": len(calls),
        "bytes": rotated / len(calls),
        "rotated_bytes": rotated * copies,
        "call_s": [whole / each for whole, _ in taken],
        "issue_s": [issued / each for _, issued in taken],
        "gb_s": bandwidth,
    }


def _copies(device: Device, tape: Tape, calls: list[list[int]], rotated: int) -> int:
    """How many times the tensors of a kernel's calls should be there."""
    held = sum(
        device.nbytes(tape.tensors[n]) for numbers in calls for n in numbers if n in tape.resident
    )
    if not rotated or not held:
        return 1
    wanted, most = -(-ROTATED_BYTES // rotated), max(1, MOST_CALLS // len(calls))
    return min(wanted, most, 1 + COPIED_BYTES // held)
