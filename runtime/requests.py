"""Requests on their way from any thread to the worker, and what comes back to their inboxes.

Whoever submits a request hears of its end: its last piece, or an error; also where the worker
itself ends.
"""

from __future__ import annotations

import operator
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from .errors import QueueFullError, UsageError
from .results import Piece
from .sampling import SamplingParams, new_seed
from .steps import Draw
from .text import TextStream

Item = Piece | np.ndarray | BaseException  # an array holds rows of logits


class Inbox(Protocol):
    """Where the worker puts what is new."""

    def put(self, item: Item, /) -> None:
        """Take it; never waits. RuntimeError where nobody can read it any more."""
        ...


@dataclass(eq=False, slots=True)
class Request:
    """One answer to a prompt. After submission only the worker touches it, but for `abandoned`.

    tokens      of the prompt, then of the answer
    params      None: the logits of every position of the prompt are wanted
    stops       tokens that end the answer
    priority    a smaller one runs first
    index       of the answer, where several were asked for; these share all that `first` has
    first       of the answers to the same prompt, itself or another; None: there is one answer
    cancel      the caller's, perhaps of many requests
    made_up     for benchmarks: so many tokens are to count as computed
    """

    tokens: list[int]
    params: SamplingParams | None
    max_tokens: int = 0
    seed: int = 0
    stops: frozenset[int] = frozenset()
    token_bytes: Callable[[int], bytes] = lambda token: b""
    text: TextStream = field(default_factory=TextStream)
    priority: int = 0
    index: int = 0
    first: Request | None = None
    cancel: threading.Event | None = None
    inbox: Inbox = field(default_factory=lambda: queue.SimpleQueue[Item]())
    made_up: int = 0
    abandoned: bool = False  # no reader is left
    sequence: int = 0  # while it runs
    computed: int = 0  # tokens of it
    cached: int = 0
    submitted: float = field(default_factory=time.perf_counter)
    admitted: float = 0.0
    first_token: float = 0.0
    prompt_length: int = field(init=False)
    draw: Draw | None = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)
        self.draw = None if self.params is None else Draw(self.params, self.seed)

    @property
    def cancelled(self) -> bool:
        """Whether nobody wants what is left of it."""
        return self.abandoned or (self.cancel is not None and self.cancel.is_set())

    @property
    def generated(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - self.prompt_length

    @property
    def waiting(self) -> int:
        """Tokens whose keys and values are not computed yet."""
        return len(self.tokens) - self.computed

    @property
    def prompt_left(self) -> int:
        """Tokens of the prompt that may be computed before others can begin with it.

        Where several answers are wanted they part before its last token, after which each draws.
        """
        return self.waiting - (self.first is not None)


def requests_of(
    tokens: Sequence[int],
    params: SamplingParams,
    count: int,
    *,
    room: int,
    stop_ids: frozenset[int],
    token_bytes: Callable[[int], bytes],
    priority: int,
    cancel: threading.Event | None,
    inbox: Inbox,
) -> list[Request]:
    """A request for each of `count` answers to a prompt, which have `room` tokens each.

    stop_ids    the model's own
    """
    seed = new_seed() if params.seed is None else params.seed
    own = frozenset[int]() if params.ignore_eos else stop_ids
    requests = [
        Request(
            tokens=list(tokens),
            params=params,
            max_tokens=min(room, params.max_tokens or room),
            seed=(seed + index) % 2**64,
            stops=own.union(params.stop_token_ids),
            token_bytes=token_bytes,
            text=TextStream(params.stop_strings),
            priority=priority,
            index=index,
            cancel=cancel,
            inbox=inbox,
        )
        for index in range(count)
    ]
    if count > 1:
        for request in requests:
            request.first = requests[0]
    return requests


def token_ids(prompt: Sequence[int]) -> list[int]:
    """The ids of a prompt that is not text; UsageError where it is no sequence of whole numbers."""
    found: object = prompt
    try:
        if isinstance(prompt, (bytes, bytearray)):
            raise TypeError
        ids = []
        for found in prompt:
            if isinstance(found, bool):
                raise TypeError
            ids.append(operator.index(found))
        return ids
    except TypeError:
        text = repr(found)
        raise UsageError(
            "A prompt must be text or a sequence of whole numbers, its token ids; found "
            f"{text if len(text) <= 60 else text[:57] + '...'}."
        ) from None


@dataclass(frozen=True)
class DeviceCheck:
    """Sent in place of a request: see whether the device is still there."""


Submitted = Request | DeviceCheck | None  # None: end


class Submissions:
    """What a worker is asked for: from any thread, to one.

    max_batch + max_waiting requests may be open at once, running and waiting.
    """

    def __init__(self, max_batch: int, max_waiting: int) -> None:
        self._most = max_batch + max_waiting
        self._queue: queue.SimpleQueue[Submitted] = queue.SimpleQueue()
        self._lock = threading.Lock()  # of those who submit, and of the worker's end
        self._closed = False
        self._submitted = 0
        self.ended = 0  # by the worker alone
        self.refused = 0

    @property
    def open(self) -> int:
        """Requests that run or wait."""
        return self._submitted - self.ended

    def submit(self, requests: Sequence[Request]) -> None:
        """Ask for all of them, or for none.

        Raises QueueFullError where too many are open, UsageError where the worker was told to end.
        """
        with self._lock:
            if self._closed:
                raise UsageError("This engine was closed; load the artifact again.")
            if self.open + len(requests) > self._most:
                self.refused += len(requests)
                raise QueueFullError(
                    f"{self.open} requests run or wait, and the engine takes at most {self._most}, "
                    f"but {len(requests)} more came; ask again later, or load with a larger "
                    "max_waiting."
                )
            self._submitted += len(requests)
            for request in requests:
                self._queue.put(request)

    def check_device(self) -> None:
        """Let the worker see whether its device is still there."""
        self._queue.put(DeviceCheck())

    def close(self) -> None:
        """Let the worker end. Takes no lock, so that a finalizer may call it anywhere."""
        self._closed = True
        self._queue.put(None)

    def take(self, wait: bool) -> Iterator[Submitted]:
        """What was submitted; where nothing was, wait for the first."""
        while wait or not self._queue.empty():
            yield self._queue.get()
            wait = False

    def finish(self) -> list[Request]:
        """Take no more: the worker ends. Returns what it has not taken."""
        with self._lock:
            self._closed = True
        return [item for item in self.take(wait=False) if isinstance(item, Request)]
