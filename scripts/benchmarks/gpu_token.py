"""One decoded token, kernel by kernel, on the device of an artifact: see gpu_kernels.py.

The functions of the token's plan are called in its order, so that every kernel finds what a token
has left for it. Weights, keys and values are random, as the manifest says.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mxforge.artifact import open_artifact
from mxforge.core import CoreLibrary, device_has
from mxforge.manifest import Manifest
from mxforge.plan import Feature, Function

from .gpu_device import Probe, open_library

SAMPLES, LEAST_SAMPLES, SAMPLE_S, KERNEL_S = 7, 3, 0.01, 2.0
STRETCH = (1 << 22) - 1  # random elements before they repeat; odd, so that rows do not line up
CACHE = {"normal": 1.0}  # keys and values


class Contents:
    """What a function's arguments hold: inputs as they are told, all else random. Layers share
    arrays here, and have memory of their own on the device."""

    def __init__(self, manifest: Manifest, told: Mapping[str, Any]) -> None:
        self.inputs: dict[str, Any] = dict(told["inputs"])
        self._sizes: dict[str, int] = told["sizes"]
        self._weights = {weight.name: weight for weight in manifest.weights}
        self._made: dict[Any, np.ndarray] = {}

    def of(self, function: Function) -> list[np.ndarray]:
        """Arrays for its arguments, in order; bfloat16 as uint16."""
        values = function.evaluate(self._sizes)
        found = []
        for tensor in function.arguments:
            name = tensor.name.partition(" ")[0]  # behind it is the number of a copy
            shape = tuple(values[extent] for extent in tensor.shape)
            dtype = np.dtype("uint16" if tensor.dtype == "bfloat16" else tensor.dtype)
            weight = self._weights.get(name)
            if weight is None and not name.startswith("kv_"):
                found.append(np.full(shape, self.inputs.get(name, 0), dtype))
                continue
            fill = CACHE if weight is None else weight.fill
            assert fill is not None  # a kit's models have random weights
            key = (repr(fill), tensor.dtype, shape, None if weight else tensor.name)
            if key not in self._made:
                size = math.prod(shape) * dtype.itemsize
                self._made[key] = filled(size, tensor.dtype, fill).view(dtype).reshape(shape)
            found.append(self._made[key])
        return found


def filled(size: int, dtype: str, fill: Mapping[str, Any]) -> np.ndarray:
    """So many bytes, u8, random as a manifest's `fill` of a weight says."""
    rng, drawn = np.random.default_rng(0), min(size, STRETCH)
    ((kind, value),) = (item for item in fill.items() if item[0] != "of")
    if kind == "bytes":
        return np.resize(rng.integers(*value, drawn, np.uint8, endpoint=True), size)
    numbers = rng.standard_normal(drawn, np.float32) * value if kind == "normal" else value
    numbers = np.atleast_1d(np.asarray(numbers, np.float32))
    of = fill.get("of", dtype)
    if of == "bfloat16":  # rounding enough for noise
        return np.resize((numbers.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8), size)
    return np.resize(numbers.astype(of).view(np.uint8), size)


def measure(folder: Path, plan: Path, told: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """What is found, one by one; `told` is gpu_kernels.py's.

    agrees        how far the logits are from the library's where every tensor has memory of its
                  own; None: some are no numbers
    token         seconds of the library's functions decode and sample, as samples
    kernel        one kernel: seconds a call and seconds until it was issued, as samples; the bytes
                  that a call reads; the bandwidth before and after
    """
    artifact = open_artifact(folder)
    library = open_library(artifact.variant.target, plan, artifact.library)
    probe, contents = Probe(library), Contents(artifact.manifest, told)
    seconds: dict[str, list[float]] = {}
    for name in ("decode", "sample"):
        arguments = contents.of(library[name])
        (expected,) = library.call(name, arguments)
        seconds[f"{name}_s"] = [done for _, done in _samples(library)]
        apart = f"{name} apart"
        (found,) = library.call(apart, contents.of(library[apart]))
        if name == "decode":
            contents.inputs["logits"] = expected
            scale = float(np.linalg.norm(expected)) or 1.0
            error = float(np.linalg.norm(found.astype(np.float64) - expected)) / scale
            yield "agrees", error if math.isfinite(error) else None
    yield "token", {**seconds, "gb_s": probe.gb_s()}
    kind = artifact.variant.target.partition(":")[0]
    for kernel in told["kernels"]:
        function = library[kernel["function"]]
        if _runs(function, kind):
            yield "kernel", _kernel(library, kernel, contents.of(function), probe)


def _runs(function: Function, kind: str) -> bool:
    """Whether any of its steps does, on this device."""
    wanted = {value.name for value in function.values if isinstance(value, Feature)}
    values = function.evaluate({}, {name for name in wanted if device_has(kind, name)})
    return any(step.when is None or values[step.when] for step in function.steps)


def _samples(library: CoreLibrary) -> list[tuple[float, float]]:
    """Seconds of the function that was called last, until it was issued and until it was done: the
    means of as many runs as take a while."""
    library.repeat(1)  # drivers keep what they are asked for again
    runs = max(1, round(SAMPLE_S / library.repeat(1)[1]))
    taken: list[tuple[float, float]] = []
    began = time.perf_counter()
    while len(taken) < LEAST_SAMPLES or (
        len(taken) < SAMPLES and time.perf_counter() - began < KERNEL_S
    ):
        issued, done = library.repeat(runs)
        taken.append((issued / runs, done / runs))
    return taken


def _kernel(
    library: CoreLibrary, told: dict[str, Any], arguments: list[np.ndarray], probe: Probe
) -> dict[str, Any]:
    steps = len(library[told["function"]].steps)
    library.call(told["function"], arguments)
    before = probe.gb_s()
    taken = _samples(library)
    return {
        **{key: told[key] for key in ("kernel", "calls", "bytes", "rotated_bytes")},
        "call_s": [done / steps for _, done in taken],
        "issue_s": [issued / steps for issued, _ in taken],
        "gb_s": [before, probe.gb_s()],
    }
