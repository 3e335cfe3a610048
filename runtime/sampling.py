"""How the next token is chosen: the parameters, and what the library's `sample` is given.

The library does, for each row of logits (float32 [vocabulary]), in this order:

    1. penalties      over the edited tokens; `seen` = occurs in prompt or output, `count` = times
                      it occurs in the output
                          z[seen] = where(z > 0, z / repetition_penalty, z * repetition_penalty)
                          z -= frequency_penalty * count + presence_penalty * (count > 0)
    2. bias           z += logit_bias
    3. bitmask        z[not allowed] = -inf
    4. temperature    z /= temperature                 (0: take argmax(z) and stop here; the lowest
                                                        id wins ties)
    5. top-k          keep the k largest z             (0: all)
    6. top-p          keep the fewest most probable tokens whose probability, among those that
                      top-k kept, reaches top_p        (1: all; at least one stays)
    7. min-p          keep p >= min_p * max(p)         (0: all)
    8. draw           from softmax(z) of what is kept, by (seed, step): the same seed, step and
                      logits give the same token, whatever else is in the batch

Tokens that tie with the last one kept are kept too. The NumPy references are in
schedules/sample/adjust_logits.py and schedules/sample/sample_token.py.
Log-probabilities are those of the raw logits, before step 1.
"""

from __future__ import annotations

import math
import operator
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from .errors import MaskError, SamplingError

MAX_LOGPROBS = 20
MAX_INT32 = 2**31 - 1
MIN_TEMPERATURE = 1e-6

# Of the tokens generated so far, which ones may be next.
MaskFunction = Callable[[Sequence[int]], "np.ndarray | None"]


@dataclass(frozen=True, eq=False)
class SamplingParams:
    """What a request asks of sampling; checked when made (SamplingError), never changed.

    max_tokens           most tokens to generate; None: as many as the context has room for
    temperature          0 is greedy; else 1e-6 to 100
    top_p, top_k, min_p  cut the tail of the distribution; 1, 0 and 0 keep all of it
    repetition_penalty   above 0 up to 100, 1 is none: divides and multiplies what occurred in
                         the prompt or the output
    presence_penalty     -100 to 100, 0 is none: once for a token that occurs in the output
    frequency_penalty    -100 to 100, 0 is none: for each time that it occurs in the output
    logit_bias           token id -> what is added to its logit, -1e4 to 1e4
    bitmask              which tokens may be drawn: uint32 [ceil(vocabulary / 32)], bit t % 32 of
                         word t // 32 allows token t (`token_bitmask` makes one); None: all.
                         Or a function that is asked before each draw: it is given the tokens
                         generated so far, and returns such an array or None. It runs on the
                         engine's own thread, where every request waits for it; where it raises
                         or returns something else, its request alone ends with MaskError
    seed                 0 to 2**64 - 1; None: a new one for each request
    logprobs             how many of the most likely tokens to report for each position, 0 to 20,
                         beside the chosen one; None: no log-probabilities
    stop                 text that ends the output, and is not part of it
    stop_token_ids       ids that end the output, beside the model's own
    ignore_eos           whether to go on at the model's own stop ids
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    bitmask: np.ndarray | MaskFunction | None = None
    seed: int | None = None
    logprobs: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name, (low, high) in _REALS.items():
            self._set(name, _real(name, getattr(self, name), low, high))
        for name, (low, high, optional) in _INTEGERS.items():
            value = getattr(self, name)
            if value is not None or not optional:
                self._set(name, _integer(name, value, low, high))
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise SamplingError(
                f"temperature must be 0 (greedy) or at least {MIN_TEMPERATURE}, "
                f"but is {self.temperature}; use 0."
            )
        if self.repetition_penalty == 0:
            raise SamplingError("repetition_penalty must be above 0, but is 0; 1 means none.")
        if not isinstance(self.ignore_eos, bool):
            raise SamplingError(f"ignore_eos must be True or False, but is {self.ignore_eos!r}.")
        self._set("logit_bias", _logit_bias(self.logit_bias))
        self._set("bitmask", _bitmask(self.bitmask))
        self._set("stop", _stop(self.stop))
        self._set("stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SamplingParams):
            return NotImplemented
        mine, theirs = (
            [getattr(params, f.name) for f in fields(self) if f.name != "bitmask"]
            for params in (self, other)
        )
        masks = self.bitmask, other.bitmask
        if all(isinstance(mask, np.ndarray) for mask in masks):
            return mine == theirs and np.array_equal(*masks)  # type: ignore[arg-type]
        return mine == theirs and self.bitmask is other.bitmask

    __hash__ = None  # type: ignore[assignment]  # holds a mapping and an array

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, as it is kept."""
        return tuple(self.stop)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0

    @property
    def penalized(self) -> bool:
        """Whether tokens that occurred are treated otherwise."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        )

    def check(self, vocab_size: int) -> None:
        """Raise SamplingError where a token id or the bitmask does not fit the vocabulary."""
        for name, tokens in (
            ("logit_bias", self.logit_bias or ()),
            ("stop_token_ids", self.stop_token_ids),
        ):
            if outside := [token for token in tokens if token >= vocab_size]:
                raise SamplingError(
                    f"{name} must name tokens below {vocab_size}, the vocabulary's size, "
                    f"but names {outside[0]}."
                )
        if isinstance(self.bitmask, np.ndarray):
            _check_bitmask(self.bitmask, vocab_size)

    def mask_after(self, generated: Sequence[int], vocab_size: int) -> np.ndarray | None:
        """The bitmask of the next draw, after these tokens.

        Raises MaskError where the function that tells it fails, or returns no bitmask of this
        vocabulary.
        """
        if self.bitmask is None or isinstance(self.bitmask, np.ndarray):
            return self.bitmask
        try:
            mask = self.bitmask(generated)
        except Exception as error:
            raise MaskError(
                f"The bitmask's function failed after {len(generated)} tokens: "
                f"{type(error).__name__}: {error}"
            ) from error
        if mask is None:
            return None
        try:
            _check_bitmask(_typed_bitmask(mask), vocab_size)
        except SamplingError as error:
            raise MaskError(
                f"The bitmask's function should return a bitmask after {len(generated)} tokens: "
                f"{error}"
            ) from None
        return np.ascontiguousarray(mask)


# name -> lowest and highest value
_REALS: dict[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0, 100),
    "presence_penalty": (-100, 100),
    "frequency_penalty": (-100, 100),
}
# name -> lowest and highest value, and whether it may be None
_INTEGERS: dict[str, tuple[int, int, bool]] = {
    "max_tokens": (1, MAX_INT32, True),
    "top_k": (0, MAX_INT32, False),
    "seed": (0, 2**64 - 1, True),
    "logprobs": (0, MAX_LOGPROBS, True),
}
_BIAS_LIMIT = 1e4
_STOP_STRINGS = 64


def _real(name: str, value: Any, low: float, high: float) -> float:
    expected = f"{name} must be a number from {low:g} to {high:g}"
    if isinstance(value, (bool, np.bool_, str, bytes)) or not hasattr(value, "__float__"):
        raise SamplingError(f"{expected}, but is {value!r}.")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise SamplingError(f"{expected}, but is {value!r}.") from None
    if not (math.isfinite(number) and low <= number <= high):
        raise SamplingError(f"{expected}, but is {number}.")
    return number


def _integer(name: str, value: Any, low: int, high: int) -> int:
    expected = f"{name} must be a whole number from {low} to {high}"
    if isinstance(value, (bool, np.bool_)):
        raise SamplingError(f"{expected}, but is {value!r}.")
    try:
        number = operator.index(value)
    except TypeError:
        raise SamplingError(f"{expected}, but is {value!r}.") from None
    if not low <= number <= high:
        raise SamplingError(f"{expected}, but is {number}.")
    return number


def _logit_bias(bias: Any) -> dict[int, float] | None:
    if bias is None:
        return None
    if not isinstance(bias, Mapping):
        raise SamplingError(f"logit_bias must map token ids to numbers, but is {bias!r}.")
    return {
        _integer("a token id in logit_bias", token, 0, MAX_INT32): _real(
            f"logit_bias[{token}]", value, -_BIAS_LIMIT, _BIAS_LIMIT
        )
        for token, value in bias.items()
    }


def _bitmask(mask: Any) -> np.ndarray | MaskFunction | None:
    if mask is None:
        return None
    if callable(mask):
        function: MaskFunction = mask
        return function
    copy: np.ndarray = _typed_bitmask(mask).copy()
    copy.setflags(write=False)
    return copy


def _typed_bitmask(mask: Any) -> np.ndarray:
    if not isinstance(mask, np.ndarray) or mask.dtype != np.uint32 or mask.ndim != 1:
        found = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, np.ndarray) else type(mask)
        raise SamplingError(f"bitmask must be a uint32 array of one dimension, but is {found}.")
    return mask


def _check_bitmask(mask: np.ndarray, vocab_size: int) -> None:
    words = -(-vocab_size // 32)
    if len(mask) != words:
        raise SamplingError(
            f"bitmask must have {words} words for a vocabulary of {vocab_size}, "
            f"but has {len(mask)}."
        )
    # Bits beyond the vocabulary allow nothing.
    last = int(mask[-1]) & (0xFFFFFFFF >> (-vocab_size % 32))
    if last == 0 and not mask[:-1].any():
        raise SamplingError("bitmask must allow at least one token, but allows none.")


def _stop(stop: Any) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else stop
    if not isinstance(strings, Sequence) or not all(
        isinstance(string, str) and string for string in strings
    ):
        raise SamplingError(f"stop must be one or several non-empty strings, but is {stop!r}.")
    if len(strings) > _STOP_STRINGS:
        raise SamplingError(
            f"stop must hold at most {_STOP_STRINGS} strings, but holds {len(strings)}."
        )
    return tuple(strings)


def _token_ids(name: str, tokens: Any) -> tuple[int, ...]:
    if isinstance(tokens, (str, bytes)) or not isinstance(tokens, Iterable):
        raise SamplingError(f"{name} must be a sequence of token ids, but is {tokens!r}.")
    return tuple(_integer(f"a token id in {name}", token, 0, MAX_INT32) for token in tokens)


def token_bitmask(allowed: Iterable[int], vocab_size: int) -> np.ndarray:
    """uint32 [ceil(vocab_size / 32)] with the bits of the `allowed` token ids set.

    Raises SamplingError where an id lies outside the vocabulary.
    """
    tokens = np.array(_token_ids("allowed", allowed), np.int64)
    if tokens.size and tokens.max() >= vocab_size:
        raise SamplingError(
            f"allowed must name tokens below {vocab_size}, the vocabulary's size, "
            f"but names {tokens.max()}."
        )
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[tokens] = 1
    return np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)


def new_seed() -> int:
    """A seed for a request that names none."""
    return secrets.randbits(64)
