"""libmxforge in Python: models, sequences and steps, as native/core/mxforge.h tells them.

A model, or a library, is for one thread at a time. Calls let go of the interpreter while they run.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .artifact import Artifact
from .errors import (
    ArtifactCorruptError,
    ArtifactTargetError,
    DeviceLostError,
    DeviceMemoryError,
    KVMemoryError,
    MxforgeError,
    UsageError,
)
from .native.build import CORE
from .results import TokenLogprob
from .steps import Draw, Part, Result

if TYPE_CHECKING:
    from .plan import Function

TOP = 20  # tokens that log-probabilities are listed of

# By mxf_status.
_ERRORS: dict[int, type[MxforgeError]] = {
    1: UsageError,
    2: ArtifactCorruptError,
    3: ArtifactTargetError,
    4: DeviceMemoryError,
    5: KVMemoryError,
    6: UsageError,
    7: DeviceLostError,
    8: MxforgeError,
}
_AFTER_LOSS = {"cuda": "CUDA lets this process use the device no more; start it again."}

LIBRARY_VARIABLE = "MXFORGE_LIBRARY"
_BITS = {"bfloat16": "uint16"}  # as what NumPy holds a format that it does not know


@cache
def load() -> ctypes.CDLL:
    """libmxforge: the one that MXFORGE_LIBRARY names, or that of the package.

    MxforgeError where it is not there, or was built from other sources than those beside it.
    """
    chosen = os.environ.get(LIBRARY_VARIABLE)
    path = Path(chosen) if chosen else CORE.output
    try:
        core = ctypes.CDLL(str(path))
        core.mxf_build_id.restype = ctypes.c_char_p
        core.mxf_error.restype = ctypes.c_char_p
        core.mxf_model_close.restype = core.mxf_library_close.restype = None
    except (OSError, AttributeError) as error:
        raise MxforgeError(
            f"{path} should be libmxforge, but does not load ({error}); build it with: "
            "python -m mxforge.native.build"
        ) from error
    expected, found = CORE.build_id(), core.mxf_build_id().decode()
    if not chosen and expected and found != expected:
        raise MxforgeError(
            f"{path} was built from other sources ({found or 'unknown'}) than those beside it "
            f"({expected}); run: python -m mxforge.native.build"
        )
    return core


def devices(kind: str) -> list[dict[str, Any]]:
    """What the driver of a kind of devices, such as vulkan, says of each, the best first.

    ArtifactTargetError, with the reason, where there is no driver.
    """
    core, text = load(), ctypes.c_char_p()
    _check(core, core.mxf_devices(kind.encode(), ctypes.byref(text)))
    found: list[dict[str, Any]] = json.loads(text.value or b"[]")
    return found


def device_memory(kind: str, index: int = 0) -> int | None:
    """Bytes that may still be allocated on a device; None where it does not tell.

    ArtifactTargetError where there is no such device.
    """
    core, left = load(), ctypes.c_int64()
    _check(core, core.mxf_device_memory(kind.encode(), index, ctypes.byref(left)))
    return left.value if left.value >= 0 else None


def device_has(kind: str, feature: str, index: int = 0) -> bool:
    """Whether a device has a feature that a launch plan asks for; ArtifactTargetError as above."""
    core, has = load(), ctypes.c_int32()
    _check(core, core.mxf_device_has(kind.encode(), index, feature.encode(), ctypes.byref(has)))
    return bool(has.value)


class _Options(ctypes.Structure):
    _fields_ = [
        ("threads", ctypes.c_int32),
        ("context", ctypes.c_int64),
        ("max_batch", ctypes.c_int32),
        ("prefill_chunk", ctypes.c_int32),
        ("device", ctypes.c_int32),
        ("library", ctypes.c_char_p),
    ]


class _Sampling(ctypes.Structure):
    _fields_ = [
        ("temperature", ctypes.c_float),
        ("top_p", ctypes.c_float),
        ("min_p", ctypes.c_float),
        ("top_k", ctypes.c_int32),
        ("repetition_penalty", ctypes.c_float),
        ("presence_penalty", ctypes.c_float),
        ("frequency_penalty", ctypes.c_float),
        ("logprobs", ctypes.c_int32),
        ("seed", ctypes.c_uint64),
        ("bias_tokens", ctypes.c_void_p),
        ("biases", ctypes.c_void_p),
        ("bias_count", ctypes.c_int32),
        ("mask", ctypes.c_void_p),
    ]


class _Info(ctypes.Structure):
    _fields_ = [
        ("vocab_size", ctypes.c_int64),
        ("context", ctypes.c_int64),
        ("max_batch", ctypes.c_int32),
        ("prefill_chunk", ctypes.c_int32),
        ("stop_token_ids", ctypes.POINTER(ctypes.c_int32)),
        ("stop_count", ctypes.c_int32),
        ("runs_behind", ctypes.c_int32),
    ]


# An mxf_part: packed by one call, which setting fields of a ctypes.Structure is slower than.
_PART = struct.Struct("@qPiiP")  # sequence, tokens, count, logits, sampling


class _Result(ctypes.Structure):
    _fields_ = [
        ("token", ctypes.c_int32),
        ("logprob", ctypes.c_float),
        ("top_tokens", ctypes.POINTER(ctypes.c_int32)),
        ("top_logprobs", ctypes.POINTER(ctypes.c_float)),
        ("logits", ctypes.POINTER(ctypes.c_float)),
    ]


class _Array(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("ndim", ctypes.c_int32),
    ]


_TOKEN_BYTES = ctypes.sizeof(ctypes.c_int32)
_RESULT_INTS = ctypes.sizeof(_Result) // ctypes.sizeof(ctypes.c_int32)


@dataclass(slots=True)
class _Sampler:
    """How tokens of a sequence are drawn, as the core takes it."""

    draw: Draw
    struct: _Sampling
    address: int
    arrays: list[np.ndarray]  # that it points to
    mask: np.ndarray | None = None  # as well


class CoreSequences:
    """The sequences of one artifact, run by the core; see `mxforge.steps.Sequences`."""

    def __init__(
        self, artifact: Artifact, *, threads: int, context: int, max_batch: int, prefill_chunk: int
    ) -> None:
        self._core = load()
        self._model = ctypes.c_void_p()
        target = artifact.variant.target
        self._kind = target.partition(":")[0]
        options = _Options(threads, context, max_batch, prefill_chunk, 0, target.encode())
        opened = self._core.mxf_model_open(
            os.fsencode(artifact.path), ctypes.byref(options), ctypes.byref(self._model)
        )
        _check(self._core, opened, self._kind)
        info = _Info()
        self._call("mxf_model_get_info", ctypes.byref(info))
        self._vocab_size = info.vocab_size
        self.runs_behind = bool(info.runs_behind)
        # What a step is told and tells is kept, since making it takes longer than filling it.
        most = info.max_batch
        self._tokens = (ctypes.c_int32 * (info.prefill_chunk + most))()
        self._parts = ctypes.create_string_buffer(_PART.size * most)
        self._results = (_Result * most)()
        self._drawn = memoryview(self._results).cast("B").cast("i")
        self._samplers: dict[int, _Sampler] = {}  # by sequence
        self._submitted: deque[Sequence[Part]] = deque()  # the oldest step first

    def close(self) -> None:
        self._core.mxf_model_close(self._model)
        self._model = ctypes.c_void_p()

    forsake = close

    def synchronize(self) -> None:
        self._call("mxf_model_wait")

    def create(self, tokens: Sequence[int]) -> tuple[int, int]:
        sequence, reused = ctypes.c_int64(), ctypes.c_int64()
        outputs = (ctypes.byref(sequence), ctypes.byref(reused))
        self._call("mxf_sequence_create", *_i32(tokens), *outputs)
        return sequence.value, reused.value

    def fork(self, sequence: int) -> int:
        fork = ctypes.c_int64()
        self._call("mxf_sequence_fork", ctypes.c_int64(sequence), ctypes.byref(fork))
        return fork.value

    def pretend(self, sequence: int, tokens: Sequence[int]) -> None:
        self._call("mxf_sequence_pretend", ctypes.c_int64(sequence), *_i32(tokens))

    def keep(self, sequence: int) -> None:
        self._call("mxf_sequence_keep", ctypes.c_int64(sequence))

    def free(self, sequence: int) -> None:
        self._samplers.pop(sequence, None)
        self._call("mxf_sequence_free", ctypes.c_int64(sequence))

    def submit(self, parts: Sequence[Part]) -> None:
        tokens, at, address = self._tokens, 0, ctypes.addressof(self._tokens)
        for index, part in enumerate(parts):
            if part.tokens is None:
                count, where = 1, 0
            else:
                count, where = len(part.tokens), address + at * _TOKEN_BYTES
                tokens[at : at + count] = part.tokens
            sampling = 0 if part.draw is None else self._sampling(part, part.draw)
            _PART.pack_into(
                self._parts, index * _PART.size, part.sequence, where, count, part.logits, sampling
            )
            at += count
        self._call("mxf_step_submit", self._parts, len(parts))
        self._submitted.append(parts)

    def wait(self) -> list[Result]:
        parts = self._submitted.popleft()
        self._call("mxf_step_wait", self._results)
        drawn = self._drawn[: len(parts) * _RESULT_INTS : _RESULT_INTS].tolist()
        return [
            Result(token)
            if not part.logits and (part.draw is None or part.draw.params.logprobs is None)
            else self._result(part, result)
            for part, token, result in zip(parts, drawn, self._results, strict=False)
        ]

    def _sampling(self, part: Part, draw: Draw) -> int:
        """The address of an mxf_sampling."""
        sampler = self._samplers.get(part.sequence)
        if sampler is None or sampler.draw is not draw:
            sampling, arrays = _sampling(draw)
            sampler = _Sampler(draw, sampling, ctypes.addressof(sampling), arrays)
            self._samplers[part.sequence] = sampler
        if part.mask is not sampler.mask:
            sampler.mask = part.mask
            sampler.struct.mask = None if part.mask is None else part.mask.ctypes.data
        return sampler.address

    def _result(self, part: Part, result: _Result) -> Result:
        if part.logits:
            rows = np.ctypeslib.as_array(result.logits, (part.logits, self._vocab_size))
            return Result(logits=rows.copy())
        top = tuple(
            (result.top_tokens[i], result.top_logprobs[i])
            for i in range(TOP)
            if result.top_tokens[i] >= 0
        )
        return Result(result.token, TokenLogprob(result.token, result.logprob, top))

    def _call(self, name: str, *arguments: Any) -> None:
        _check(self._core, getattr(self._core, name)(self._model, *arguments), self._kind)


def _i32(numbers: Sequence[int]) -> tuple[Any, ctypes.c_int64]:
    """A pointer to them, and how many they are."""
    array = (ctypes.c_int32 * len(numbers))(*numbers)
    return array, ctypes.c_int64(len(numbers))


def _sampling(draw: Draw) -> tuple[_Sampling, list[np.ndarray]]:
    """The struct, and the arrays that it points to."""
    params, biases = draw.params, draw.params.logit_bias or {}
    tokens = np.array(sorted(biases), np.int32)
    values = np.array([biases[token] for token in sorted(biases)], np.float32)
    return _Sampling(
        params.temperature, params.top_p, params.min_p, params.top_k, params.repetition_penalty,
        params.presence_penalty, params.frequency_penalty,
        -1 if params.logprobs is None else params.logprobs, draw.seed, tokens.ctypes.data,
        values.ctypes.data, len(tokens), None,
    ), [tokens, values]  # fmt: skip


class CoreLibrary:
    """A compiled library alone: its functions, from arrays to arrays.

    `target` is what it was compiled for, such as cpu:avx2. Raises as a model does.
    """

    def __init__(self, target: str, plan: Path, kernels: Path, threads: int) -> None:
        from .plan import Plan

        self._core = load()
        self._library = ctypes.c_void_p()
        self.plan = Plan.from_bytes(plan.read_bytes(), str(plan))
        _check(
            self._core,
            self._core.mxf_library_open(
                target.partition(":")[0].encode(), 0, os.fsencode(plan), os.fsencode(kernels),
                threads, ctypes.byref(self._library),
            ),
        )  # fmt: skip

    def close(self) -> None:
        """Free its memory; of no use afterwards."""
        self._core.mxf_library_close(self._library)
        self._library = ctypes.c_void_p()

    def __getitem__(self, name: str) -> Function:
        return self.plan[name]

    def call(self, name: str, arguments: Sequence[np.ndarray]) -> list[np.ndarray]:
        """A function's outputs, copied; arguments are in the plan's order, and contiguous. Caches
        among them are updated. bfloat16 may come as uint16.

        UsageError where an argument has another shape or dtype than the plan says.
        """
        function = self.plan[name]
        for tensor, array in zip(function.arguments, arguments, strict=True):
            known = (tensor.dtype, _BITS.get(tensor.dtype))
            if array.dtype.name not in known or not array.flags.c_contiguous:
                raise UsageError(
                    f"{tensor.name} of {name} should be contiguous {tensor.dtype}, but is "
                    f"{array.dtype.name}."
                )
        given = (_Array * len(arguments))(*map(_array, arguments))
        outputs = (_Array * len(function.outputs))()
        status = self._core.mxf_call(
            self._library, name.encode(), given, len(given), outputs, len(outputs)
        )
        _check(self._core, status)
        tensors = [function.tensors[output] for output in function.outputs]
        return [_copied(o, t.dtype) for o, t in zip(outputs, tensors, strict=True)]

    def repeat(self, runs: int) -> tuple[float, float]:
        """Run the function that was called last again, on the arguments that it left on the device.

        Seconds until all runs were asked for, and until all were done. A CPU reads the arguments
        where they are: keep them. UsageError where no call has succeeded.
        """
        times = ctypes.c_int64(), ctypes.c_int64()
        status = self._core.mxf_repeat(self._library, runs, *map(ctypes.byref, times))
        _check(self._core, status)
        issued, done = (time.value / 1e9 for time in times)
        return issued, done

    def time_copies(self, size: int, runs: int) -> float:
        """Seconds in which `size` bytes are copied within the device's memory, `runs` times."""
        taken = ctypes.c_int64()
        status = self._core.mxf_time_copies(
            self._library, ctypes.c_int64(size), runs, ctypes.byref(taken)
        )
        _check(self._core, status)
        return taken.value / 1e9


def _array(array: np.ndarray) -> _Array:
    shape = (ctypes.c_int64 * array.ndim)(*array.shape)
    return _Array(array.ctypes.data, shape, array.ndim)


def _copied(array: _Array, dtype: str) -> np.ndarray:
    shape = array.shape[: array.ndim]
    result = np.empty(shape, dtype)
    ctypes.memmove(result.ctypes.data, array.data, math.prod(shape) * result.itemsize)
    return result


def _check(core: ctypes.CDLL, status: int, kind: str = "") -> None:
    """Raise what a call for a kind of devices failed with."""
    if not status:
        return
    error, message = _ERRORS[status], core.mxf_error().decode(errors="replace")
    if error is DeviceLostError:
        again = "Ask again: the next request loads the model anew."
        message += f" {_AFTER_LOSS.get(kind, again)}"
    raise error(message)
