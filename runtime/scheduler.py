"""The worker: one thread that owns a model and all running requests.

It repeats one step: admit waiting requests, put one token of every generating sequence and the next
chunks of prompts into one step of the model, and hand each request what is new.
"""

from __future__ import annotations

import contextlib
import heapq
import queue
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count

from .errors import CancelledError, DeviceLostError, MaskError, NumericsError
from .requests import DeviceCheck, Item, Request, Submissions
from .results import Metrics, Piece, Timings, TokenLogprob, Usage
from .steps import Part, Result, Sequences

# Rows of logits in one step when all are wanted, of all requests together: 64 of a 201,088
# vocabulary are 51 MB.
LOGITS_CHUNK = 64
LETTING_GO_S = 5.0  # longer than any engine needs to notice that its device is lost


@dataclass(slots=True)
class _Counters:
    """As `Metrics`; written by the worker alone."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    step_s: float = 0.0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    finished: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("stop", "length", "cancelled", "error"), 0)
    )


class Worker:
    """Runs in its own thread until its submissions are closed.

    open_model     opens the model, on this thread
    target         what the model's library was compiled for, such as cpu:avx2
    vocab_size     of the model
    max_batch      sequences in a step
    prefill_chunk  prompt tokens in a step
    mixed_chunk    prompt tokens in a step in which other sequences generate
    on_loss        called where the device is lost

    Where the device is lost, all its requests fail, and nothing is kept of the model, so that the
    device can be opened anew; the next request opens it again. `on_loss` is called in between.

    Waiting requests run in the order of their priority, then of their arrival, as soon as fewer
    than `max_batch` do. One that runs is never put back: a request waits at most until those that
    run, and those before it in that order, have ended; with a stream of more urgent ones, forever.
    """

    def __init__(
        self,
        open_model: Callable[[], Sequences],
        submissions: Submissions,
        *,
        target: str,
        vocab_size: int,
        max_batch: int,
        prefill_chunk: int,
        mixed_chunk: int,
        on_loss: Callable[[], None] = lambda: None,
    ) -> None:
        self._open_model = open_model
        self._submissions = submissions
        self._target = target
        self._vocab_size = vocab_size
        self._max_batch = max_batch
        self._prefill_chunk = prefill_chunk
        self._mixed_chunk = mixed_chunk
        self._on_loss = on_loss
        self._waiting: list[tuple[int, int, Request]] = []  # a heap
        self._arrivals = count()
        self._running: dict[Request, None] = {}  # in the order of their admission
        self._steps: deque[tuple[list[Request], list[Part]]] = deque()  # submitted, oldest first
        # Requests that have ended, but not the step that has their sequences, and whether what is
        # computed of these is worth keeping.
        self._leaving: list[tuple[Request, bool]] = []
        self._last_results = 0.0  # when they came
        self._closing = False
        self._model: Sequences  # where it is not lost
        self._lost = False
        self._counters = _Counters()

    def run(self, ready: queue.SimpleQueue[BaseException | None]) -> None:
        """Open the model, tell `ready`, then serve."""
        try:
            try:
                self._open()
            except BaseException as error:  # the caller's thread raises it
                ready.put(error)
                return
            ready.put(None)
            while not self._closing:
                try:
                    self._receive()
                    if not self._closing:
                        self._step()
                except Exception as error:  # every running request hears of it, none hangs
                    self._fail_all(error)
            if not self._lost:
                self._model.close()
        finally:
            left = self._submissions.finish()
            for request in (*self._running, *(entry[-1] for entry in self._waiting), *left):
                self._tell(request, CancelledError("The engine was closed while it answered."))

    def metrics(self) -> Metrics:
        """What it did so far; for any thread."""
        counters, running = self._counters, len(self._running)
        return Metrics(
            running=running,
            waiting=max(0, self._submissions.open - running),
            refused=self._submissions.refused,
            finished=dict(counters.finished),
            prompt_tokens=counters.prompt_tokens,
            cached_tokens=counters.cached_tokens,
            generated_tokens=counters.generated_tokens,
            steps=counters.steps,
            step_s=counters.step_s,
            queue_s=counters.queue_s,
            prefill_s=counters.prefill_s,
            decode_s=counters.decode_s,
        )

    def _open(self) -> None:
        """Open the model; where others still let go of a lost device, in a moment."""
        patience = time.monotonic() + LETTING_GO_S
        while True:
            try:
                self._model = self._open_model()
                return
            except Exception as error:
                again = isinstance(error, DeviceLostError) and _frees_after_loss(self._target)
                if not again or time.monotonic() > patience:
                    raise
            time.sleep(0.02)

    def _fail_all(self, error: BaseException) -> None:
        """End what runs; where there is no model any more, also what waits for it."""
        failed = list(self._running)
        leaving = [request for request, _ in self._leaving]
        self._leaving.clear()
        try:
            while self._steps:
                self._steps.popleft()
                if not isinstance(error, DeviceLostError):
                    with contextlib.suppress(Exception):
                        self._model.wait()
            if not self._lost:
                for request in failed + leaving:
                    self._free(request)
            if isinstance(error, DeviceLostError) and not self._lost:
                self._lost = True
                self._model.forsake()
                del self._model
                self._on_loss()
        finally:
            if self._lost:
                failed += [entry[-1] for entry in self._waiting]
                self._waiting.clear()
            for request in failed:  # last: whoever hears of it may load an engine at once
                request.sequence = 0
                self._end(request, "error", error)

    def _receive(self) -> None:
        """Take what was submitted; wait only when there is nothing else to do."""
        idle = not self._running and not self._waiting and not self._steps
        for submitted in self._submissions.take(wait=idle):
            if submitted is None:
                self._closing = True
                return
            if isinstance(submitted, DeviceCheck):
                if not self._lost:
                    self._model.synchronize()
            else:
                entry = (submitted.priority, next(self._arrivals), submitted)
                heapq.heappush(self._waiting, entry)

    def _step(self) -> None:
        if self._lost:
            self._open()
            self._lost = False
        started = time.perf_counter()
        if not self._steps:
            self._admit()
            started = time.perf_counter()
            self._submit(*self._plan())
            if not self._steps:
                return
        if self._model.runs_behind:
            self._submit(*self._plan_ahead())
        requests, parts = self._steps.popleft()
        results = self._model.wait()
        now = time.perf_counter()
        self._counters.steps += 1
        self._counters.step_s += now - max(started, self._last_results)
        self._last_results = now
        while self._leaving:
            self._let_go(*self._leaving.pop())
        for request, part, result in zip(requests, parts, results, strict=True):
            if request not in self._running:  # it ended when this step was submitted already
                continue
            request.computed += 1 if part.tokens is None else len(part.tokens)
            if part.draw is not None:
                self._deliver(request, result, now)
            elif result.logits is not None:
                self._tell(request, result.logits)
                if request.waiting == 0:
                    self._finish(request, "stop")

    def _submit(self, requests: list[Request], parts: list[Part]) -> None:
        if parts:
            self._model.submit(parts)
            self._steps.append((requests, parts))

    def _admit(self) -> None:
        """Let waiting requests run where there is room; those that were cancelled end here."""
        for request in [request for request in self._running if request.cancelled]:
            self._finish(request, "cancelled")
        if not self._waiting:
            return
        cancelled = [entry[-1] for entry in self._waiting if entry[-1].cancelled]
        if cancelled:
            self._waiting = [entry for entry in self._waiting if not entry[-1].cancelled]
            heapq.heapify(self._waiting)
        for request in cancelled:
            self._finish(request, "cancelled")
        while self._waiting and len(self._running) < self._max_batch:
            *_, request = heapq.heappop(self._waiting)
            self._running[request] = None
            request.admitted = time.perf_counter()
            self._counters.queue_s += request.admitted - request.submitted

    def _begin(self, request: Request) -> bool:
        """Make the sequence of an admitted request; False where its prompt is still computed
        for another answer to it."""
        first = request.first
        if first is not None and first is not request and first.sequence:
            if first.prompt_left > 0:
                return False
            if first.prompt_left == 0 and not first.generated:
                request.sequence = self._model.fork(first.sequence)
                request.computed = request.cached = first.computed
        if not request.sequence:
            request.sequence, request.computed = self._model.create(
                request.tokens if request.params is not None else ()
            )
            if request.made_up > request.computed:
                unknown = request.tokens[request.computed : request.made_up]
                self._model.pretend(request.sequence, unknown)
                request.computed = request.made_up
            request.cached = request.computed
        self._counters.prompt_tokens += request.prompt_length
        self._counters.cached_tokens += request.cached
        return True

    def _plan(self) -> tuple[list[Request], list[Part]]:
        """One token of every generating sequence, then chunks of prompts within the step's bound.

        The bound is smaller while others generate, since each of them waits for the whole step.
        """
        requests: list[Request] = []
        parts: list[Part] = []
        prompts: list[Request] = []
        for request in list(self._running):
            if not request.sequence and not self._begin(request):
                continue
            if request.params is None or request.computed < len(request.tokens) - 1:
                prompts.append(request)
            else:
                self._add(request, 1, requests, parts)
        if not prompts:
            return requests, parts
        wanted = [
            request.waiting if request.params is None else request.prompt_left
            for request in prompts
        ]
        # Rows of logits have a bound of their own, which those who want them share.
        rows = [request.params is None for request in prompts]
        bounded = iter(
            shares([left for left, of in zip(wanted, rows, strict=True) if of], LOGITS_CHUNK)
        )
        wanted = [next(bounded) if of else left for left, of in zip(wanted, rows, strict=True)]
        budget = self._mixed_chunk if parts else self._prefill_chunk
        counts = shares(wanted, budget)
        for request, taken in zip(prompts, counts, strict=True):
            if taken:
                self._add(request, taken, requests, parts)
        return requests, parts

    def _plan_ahead(self) -> tuple[list[Request], list[Part]]:
        """The step after the one that runs: a token of every generating sequence, after the one
        that is being drawn.

        What ends with that one is computed in vain. Nothing is planned where the worker has to know
        it first: for a mask, or since a request will begin, end or leave its prompt.
        """
        going = [of for of in zip(*self._steps[0], strict=True) if of[0] in self._running]
        room = self._waiting and len(self._running) < self._max_batch
        if room or len(going) < len(self._running):
            return [], []
        requests: list[Request] = []
        parts: list[Part] = []
        for request, part in going:
            if part.draw is None or not request.first_token or request.cancelled:
                return [], []
            if callable(part.draw.params.bitmask):
                return [], []
            if request.generated + 1 < request.max_tokens:
                requests.append(request)
                parts.append(Part(request.sequence, None, 0, part.draw, part.mask))
        return requests, parts

    def _add(
        self, request: Request, taken: int, requests: list[Request], parts: list[Part]
    ) -> None:
        """Put the next tokens of a request into a step; after the last one, a token is drawn."""
        end = request.computed + taken
        tokens = request.tokens[request.computed : end]
        params, mask = request.params, None
        if params is None:
            part = Part(request.sequence, tokens, taken)
        elif end < len(request.tokens):
            part = Part(request.sequence, tokens)
        else:
            if params.bitmask is not None:
                generated = request.tokens[request.prompt_length :]
                try:
                    mask = params.mask_after(generated, self._vocab_size)
                except MaskError as error:
                    self._fail(request, error)
                    return
            part = Part(request.sequence, tokens, 0, request.draw, mask)
        requests.append(request)
        parts.append(part)

    def _deliver(self, request: Request, result: Result, now: float) -> None:
        token = result.token
        if token < 0:
            self._fail(
                request,
                NumericsError(
                    "The logits hold no number to choose by (all are NaN or forbidden); check "
                    "the bitmask, and the checkpoint with `mxforge diff`."
                ),
            )
            return
        if not request.first_token:
            request.first_token = now
            self._counters.prefill_s += now - request.admitted
            if request.first is None or request.first is request:
                # A later prompt may begin as this one did and go on otherwise.
                self._model.keep(request.sequence)
        params = request.params
        assert params is not None
        self._counters.generated_tokens += 1
        request.tokens.append(token)
        stops = token in request.stops
        text = "" if stops else request.text.push(request.token_bytes(token))
        logprobs: tuple[TokenLogprob, ...] = ()
        if params.logprobs is not None and (of := result.logprob) is not None:
            logprobs = (TokenLogprob(of.token_id, of.logprob, of.top[: params.logprobs]),)
        if stops or request.text.stopped:
            self._finish(request, "stop", text, (token,), logprobs)
        elif len(request.tokens) >= request.prompt_length + request.max_tokens:
            self._finish(request, "length", text, (token,), logprobs)
        else:
            self._tell(request, Piece(text, (token,), logprobs, index=request.index))

    def _finish(
        self,
        request: Request,
        reason: str,
        text: str = "",
        tokens: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
    ) -> None:
        """End a request, running or waiting, with its last piece."""
        now = time.perf_counter()
        admitted = request.admitted or now
        first = request.first_token or now
        decode = now - first
        last: Item | None
        if request.params is None:
            cancelled = CancelledError("The request was cancelled.")
            last = cancelled if reason == "cancelled" else None
        else:
            self._counters.decode_s += decode
            last = Piece(
                text + request.text.finish(),
                tokens,
                logprobs,
                reason,
                Usage(request.prompt_length, request.generated, request.cached),
                Timings(
                    queue_s=admitted - request.submitted,
                    prefill_s=first - admitted,
                    decode_s=decode,
                    decode_tok_s=(request.generated - 1) / decode if decode > 0 else 0.0,
                ),
                request.index,
            )
        self._end(request, reason, last, keep=request.params is not None)

    def _fail(self, request: Request, error: Exception) -> None:
        self._end(request, "error", error)

    def _end(self, request: Request, reason: str, last: Item | None, *, keep: bool = False) -> None:
        """Let go of a request, count its end, and tell it the last that there is."""
        self._running.pop(request, None)
        try:
            if any(request in requests for requests, _ in self._steps):
                self._leaving.append((request, keep))
            else:
                self._let_go(request, keep)
        finally:  # so that it hears of its end in any case
            self._counters.finished[reason] += 1
            self._submissions.ended += 1
            if last is not None:
                self._tell(request, last)

    def _let_go(self, request: Request, keep: bool) -> None:
        if keep and request.sequence:
            self._model.keep(request.sequence)
        self._free(request)

    def _free(self, request: Request) -> None:
        if request.sequence:  # some end before they ran
            self._model.free(request.sequence)
            request.sequence = 0

    @staticmethod
    def _tell(request: Request, item: Item) -> None:
        try:
            request.inbox.put(item)
        except RuntimeError:  # its event loop was closed
            request.abandoned = True


def shares(wanted: Sequence[int], budget: int) -> list[int]:
    """Of each as much as it wants of a budget, in equal parts: who wants less leaves the rest."""
    counts = [0] * len(wanted)
    left = len(wanted)
    for index in sorted(range(left), key=wanted.__getitem__):
        counts[index] = min(wanted[index], -(-budget // left))
        budget -= counts[index]
        left -= 1
    return counts


def _frees_after_loss(target: str) -> bool:
    """Whether a device that was lost can be used again by this process, once all is freed."""
    return not target.startswith("cuda")
