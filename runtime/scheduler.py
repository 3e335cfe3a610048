"""The worker: one thread that owns the library, the KV pages and all running requests.

It repeats one step: admit waiting requests, put the next prompt chunks and one token of every
running sequence into one call of the library, sample, and hand each request what is new.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import numpy as np

from .artifact import Artifact
from .errors import CancelledError, DeviceLostError, NumericsError
from .failures import named
from .kv import KVPages, PageNeeds, PageTables, SequencePages
from .kv_layout import PAGE_TOKENS
from .library import Library, frees_after_loss
from .model import Model
from .results import Piece, Timings, TokenLogprob, Usage
from .sampling import SampleRow, SamplingParams, TokenHistory, sample_arguments
from .text import TextStream

# Rows of logits in one step when all are wanted, of all requests together: 64 of a 201,088
# vocabulary are 51 MB.
LOGITS_CHUNK = 64
LETTING_GO_S = 5.0  # longer than any engine needs to notice that its device is lost
MIN_PREFIXES = 32  # prompt beginnings kept for reuse; at least one for each running sequence


@dataclass(eq=False)
class Request:
    """One prompt on its way. After submission only the worker touches it, except the events."""

    tokens: list[int]
    prompt_length: int
    params: SamplingParams | None  # None: the logits of every prompt position are wanted
    max_tokens: int = 0
    token_bytes: Callable[[int], bytes] = lambda token: b""
    history: TokenHistory = field(default_factory=TokenHistory)
    seed: int = 0
    text: TextStream = field(default_factory=TextStream)
    abandoned: threading.Event = field(default_factory=threading.Event)  # no reader is left
    cancel: threading.Event | None = None  # the caller's, perhaps of many requests
    inbox: queue.SimpleQueue[Piece | np.ndarray | BaseException] = field(
        default_factory=queue.SimpleQueue
    )
    pages: SequencePages = field(default_factory=SequencePages)
    cached: int = 0
    made_up: int = 0  # for benchmarks, see Worker._make_up
    submitted: float = field(default_factory=time.perf_counter)
    admitted: float = 0.0
    first_token: float = 0.0

    @property
    def cancelled(self) -> bool:
        return self.abandoned.is_set() or (self.cancel is not None and self.cancel.is_set())

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def waiting(self) -> int:
        """Tokens whose keys and values are not computed yet."""
        return len(self.tokens) - self.pages.length


@dataclass(frozen=True)
class DeviceCheck:
    """Sent in place of a request: see whether the device is still there."""


Submitted = Request | DeviceCheck | None  # None: end


@dataclass(frozen=True)
class _Part:
    """What one request contributes to a step.

    Its next `count` tokens; of the last `logits` of them, the logits are computed.
    """

    request: Request
    count: int
    logits: int


class Worker:
    """Runs in its own thread until None arrives in `requests`.

    Where the device is lost, all its requests fail, and nothing is kept of the model, so that the
    device can be opened anew; the next request loads it again. `on_loss` is called in between.
    """

    def __init__(
        self,
        artifact: Artifact,
        requests: queue.SimpleQueue[Submitted],
        needs: PageNeeds,
        *,
        threads: int,
        context_length: int,
        max_batch: int,
        prefill_chunk: int,
        on_loss: Callable[[], None] = lambda: None,
    ) -> None:
        self._artifact = artifact
        self._requests = requests
        self._needs = needs
        self._threads = threads
        self._context_length = context_length
        self._max_batch = max_batch
        self._prefill_chunk = prefill_chunk
        self._on_loss = on_loss
        manifest = artifact.manifest
        self._vocab_size = int(manifest.config["vocab_size"])
        self._stop_ids = frozenset(manifest.stop_token_ids)
        self._kv = self._empty_pages()
        self._waiting: deque[Request] = deque()
        self._running: list[Request] = []
        self._closing = False
        self._model: Model  # where it is not lost
        self._lost = False

    def _empty_pages(self) -> KVPages:
        return KVPages(
            self._needs.full_pages,
            self._needs.sliding_pages,
            int(self._artifact.manifest.config["sliding_window"]),
            prefixes=max(MIN_PREFIXES, self._max_batch),
        )

    def run(self, ready: queue.SimpleQueue[BaseException | None]) -> None:
        """Load, tell `ready`, then serve."""
        try:
            Library.use_threads(self._threads)
            self._load()
        except BaseException as error:  # the caller's thread raises it
            ready.put(named(error, self._artifact.variant.target))
            return
        ready.put(None)
        while not self._closing:
            try:
                self._receive()
                if not self._closing:
                    self._step()
            except Exception as error:  # every running request hears of it, none hangs
                self._fail_all(named(error, self._artifact.variant.target))
        if not self._lost:
            self._model.close()
        for request in (*self._running, *self._waiting):
            request.inbox.put(CancelledError("The engine was closed while it answered."))

    def _load(self) -> None:
        """Load the model; where others still let go of a lost device, in a moment."""
        target = self._artifact.variant.target
        patience = time.monotonic() + LETTING_GO_S
        while True:
            try:
                self._model = Model(self._artifact, self._needs)
                return
            except Exception as error:
                failure = named(error, target)
                lost = isinstance(failure, DeviceLostError) and frees_after_loss(target)
                if not lost or time.monotonic() > patience:
                    raise failure from failure.__cause__
            time.sleep(0.02)

    def _fail_all(self, error: BaseException) -> None:
        """End what runs; where there is no model any more, also what waits for it."""
        for request in self._running:
            self._kv.release(request.pages)
        failed = list(self._running)
        self._running.clear()
        if isinstance(error, DeviceLostError) and not self._lost:
            self._lost = True
            self._model.forsake()
            del self._model
            self._kv = self._empty_pages()
            self._on_loss()
        if self._lost:
            failed += self._waiting
            self._waiting.clear()
        for request in failed:  # last: whoever hears of it may load an engine at once
            request.inbox.put(error)

    def _receive(self) -> None:
        """Take what was submitted; wait only when there is nothing else to do."""
        while True:
            idle = not self._running and not self._waiting
            try:
                request = self._requests.get(block=idle)
            except queue.Empty:
                break
            if request is None:
                self._closing = True
                return
            if isinstance(request, DeviceCheck):
                if not self._lost:
                    self._model.library.synchronize()
            else:
                self._waiting.append(request)

    def _admit(self) -> None:
        """Let waiting requests run where there is room; those that were cancelled end here."""
        for request in [r for r in self._waiting if r.cancelled]:
            self._waiting.remove(request)
            self._running.append(request)  # for a moment: where every request ends
        for request in [r for r in self._running if r.cancelled]:
            self._finish(request, "cancelled")
        while self._waiting and len(self._running) < self._max_batch:
            request = self._waiting.popleft()
            self._running.append(request)
            request.admitted = time.perf_counter()
            if request.params is not None:
                request.pages = self._kv.start(request.tokens)
                self._make_up(request)
                request.cached = request.pages.length

    def _make_up(self, request: Request) -> None:
        """Let the first `made_up` tokens count as computed: their pages are copies of earlier ones.

        So a benchmark stands far into a context at once, at the price of writing the pages. What
        is known of the prompt by then is copied over and over, and must fill whole pages.
        """
        pages = request.pages
        if pages.length < request.made_up and (not pages.length or pages.length % PAGE_TOKENS):
            raise ValueError(f"{pages.length} known positions are not whole pages to copy from")
        while pages.length < request.made_up:
            known = {"full": list(pages.full), "sliding": list(pages.sliding)}
            count = min(self._prefill_chunk, request.made_up - pages.length)
            self._kv.prepare(pages, count)
            for kind, listed in (("full", pages.full), ("sliding", pages.sliding)):
                fresh = listed[len(known[kind]) :]
                self._model.copy_pages(kind, list(zip(cycle(known[kind]), fresh, strict=False)))
            self._kv.commit(pages, count)

    def _step(self) -> None:
        if self._lost:
            self._load()
            self._lost = False
        self._admit()
        parts = self._plan()
        if not parts:
            return
        for part in parts:
            copies = self._kv.prepare(part.request.pages, part.count)
            self._model.copy_pages("full", copies.full)
            self._model.copy_pages("sliding", copies.sliding)
        tables = self._kv.tables([part.request.pages for part in parts])
        logits = self._forward(parts, tables)
        for part in parts:
            self._kv.commit(part.request.pages, part.count)
        self._deliver(parts, logits)

    def _plan(self) -> list[_Part]:
        """One token of every generating sequence, then prompt chunks up to the step's bound.

        Generating sequences come first, so that their logits come first.
        """
        parts = [
            _Part(request, 1, 1)
            for request in self._running
            if request.params is not None and request.waiting == 1
        ]
        budget, logits_budget, logits_wanted = self._prefill_chunk, LOGITS_CHUNK, []
        for request in self._running:
            if request.params is None:
                if count := min(budget, request.waiting, logits_budget):
                    logits_wanted.append(_Part(request, count, count))
                    logits_budget -= count
            elif request.waiting > 1:
                if count := min(budget, request.waiting):
                    parts.append(_Part(request, count, int(count == request.waiting)))
            else:
                continue
            budget -= count
        return parts + logits_wanted

    def _forward(self, parts: Sequence[_Part], tables: PageTables) -> Any:
        tokens: list[int] = []
        positions: list[int] = []
        token_seq: list[int] = []
        logit_indices: list[int] = []
        for index, part in enumerate(parts):
            start = part.request.pages.length
            tokens += part.request.tokens[start : start + part.count]
            positions += range(start, start + part.count)
            token_seq += [index] * part.count
            logit_indices += range(len(tokens) - part.logits, len(tokens))
        if len(tokens) == len(parts) == len(logit_indices):
            return self._model.decode(tokens, positions, token_seq, tables)
        return self._model.forward(tokens, positions, token_seq, logit_indices, tables)

    def _deliver(self, parts: Sequence[_Part], logits: Any) -> None:
        sampled = [
            part.request for part in parts if part.logits and part.request.params is not None
        ]
        if sampled:
            self._sample(sampled, logits)
        row = len(sampled)
        for part in parts:
            if part.request.params is None:
                block = self._model.read_logits(logits, row, part.logits)
                row += part.logits
                part.request.inbox.put(block)
                if part.request.waiting == 0:
                    self._drop(part.request)

    def _sample(self, requests: list[Request], logits: Any) -> None:
        rows = [
            SampleRow(request.params, request.history, request.seed, request.generated)
            for request in requests
            if request.params is not None
        ]
        ids, logprobs = self._model.sample(
            logits,
            sample_arguments(rows, self._vocab_size),
            logprobs=any(row.params.logprobs is not None for row in rows),
        )
        now = time.perf_counter()
        for index, (request, token) in enumerate(zip(requests, ids, strict=True)):
            if token < 0:
                self._fail(
                    request,
                    NumericsError(
                        "The logits hold no number to choose by (all are NaN or forbidden); check "
                        "the bitmask, and the checkpoint with `mxforge diff`."
                    ),
                )
                continue
            if not request.first_token:
                request.first_token = now
                # A later prompt may begin as this one did and go on otherwise.
                self._kv.insert_prefix(request.pages, request.tokens)
            logprob = logprobs[index] if logprobs is not None else None
            self._append(request, token, logprob)

    def _append(self, request: Request, token: int, logprob: TokenLogprob | None) -> None:
        params = request.params
        assert params is not None
        request.tokens.append(token)
        if params.penalized:
            request.history.add(token)
        stops = token in params.stop_token_ids or (
            token in self._stop_ids and not params.ignore_eos
        )
        text = "" if stops else request.text.push(request.token_bytes(token))
        reason = None
        if stops or request.text.stopped:
            reason = "stop"
        elif request.generated >= request.max_tokens:
            reason = "length"
        listed: tuple[TokenLogprob, ...] = ()
        if params.logprobs is not None and logprob is not None:
            listed = (
                TokenLogprob(logprob.token_id, logprob.logprob, logprob.top[: params.logprobs]),
            )
        if reason is None:
            request.inbox.put(Piece(text, (token,), listed))
        else:
            self._finish(request, reason, text, (token,), listed)

    def _finish(
        self,
        request: Request,
        reason: str,
        text: str = "",
        tokens: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
    ) -> None:
        if request.params is None:
            self._fail(request, CancelledError("The request was cancelled."))
            return
        now = time.perf_counter()
        admitted = request.admitted or now
        first = request.first_token or now
        usage = Usage(request.prompt_length, request.generated, request.cached)
        decode = now - first
        timings = Timings(
            queue_s=admitted - request.submitted,
            prefill_s=first - admitted,
            decode_s=decode,
            decode_tok_s=(request.generated - 1) / decode if decode > 0 else 0.0,
        )
        self._kv.insert_prefix(request.pages, request.tokens)
        self._drop(request)
        text += request.text.finish()
        request.inbox.put(Piece(text, tokens, logprobs, reason, usage, timings))

    def _fail(self, request: Request, error: Exception) -> None:
        self._drop(request)
        request.inbox.put(error)

    def _drop(self, request: Request) -> None:
        self._running.remove(request)
        self._kv.release(request.pages)
