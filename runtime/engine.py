"""The engine: requests in, tokens and text out.

Any number of Python threads may submit requests; one worker thread (scheduler.py) owns the library
and answers them together. A cancelled request ends before the next step.
"""

from __future__ import annotations

import asyncio
import atexit
import datetime
import queue
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from . import memory
from .artifact import Artifact, open_artifact
from .core import CoreSequences
from .errors import (
    ContextLengthError,
    TokenizerError,
    TokenRangeError,
    UsageError,
)
from .limits import DEFAULT_CONTEXT, DEFAULT_MAX_WAITING, checked_limits, checked_whole
from .manifest import Manifest
from .requests import Inbox, Item, Request, Submissions, requests_of, token_ids
from .results import Completion, Metrics, Piece
from .sampling import SamplingParams
from .scheduler import Worker
from .steps import Sequences
from .streams import AsyncStream, LoopInbox, Stream, by_index, completed
from .tokenizer import Tokenizer

if TYPE_CHECKING:
    from .chat import ChatCompletion, ChatStream
    from .harmony import Harmony, ReasoningEffort

MAX_ANSWERS = 128  # to one prompt

_workers: weakref.WeakKeyDictionary[threading.Thread, Submissions] = weakref.WeakKeyDictionary()


@atexit.register
def _stop_workers() -> None:
    """Let every engine end its step: an interpreter that ends under a running kernel crashes."""
    for thread, submissions in list(_workers.items()):
        submissions.close()
        thread.join()


def _check_devices() -> None:
    """Let every engine look whether its device is still there; one has found its own lost.

    A device is opened anew when nobody has anything on it any more, and an engine without requests
    would not notice.
    """
    for submissions in list(_workers.values()):
        submissions.check_device()


def open_model(
    artifact: Artifact, *, threads: int, context: int, max_batch: int, prefill_chunk: int
) -> Sequences:
    """Open the model of an artifact, on the thread that will run it."""
    return CoreSequences(
        artifact, threads=threads, context=context, max_batch=max_batch, prefill_chunk=prefill_chunk
    )


class Engine:
    """A loaded artifact, for any number of threads; close it, or use it in a `with` block."""

    def __init__(
        self,
        artifact: Artifact,
        *,
        threads: int | None = None,
        context_length: int = DEFAULT_CONTEXT,
        max_batch: int | None = None,
        prefill_chunk: int | None = None,
        mixed_chunk: int | None = None,
        max_waiting: int = DEFAULT_MAX_WAITING,
    ) -> None:
        manifest = artifact.manifest
        limits = checked_limits(
            manifest,
            threads=threads,
            context_length=context_length,
            max_batch=max_batch,
            prefill_chunk=prefill_chunk,
            mixed_chunk=mixed_chunk,
            max_waiting=max_waiting,
        )
        self.manifest: Manifest = manifest
        self.target = artifact.variant.target  # of the library in use, such as cpu:avx2
        self.vocab_size = int(manifest.config["vocab_size"])
        self.threads = limits.threads
        self.context_length = limits.context_length
        self.prefill_chunk = limits.prefill_chunk
        self.max_batch = memory.fit(
            manifest, limits.context_length, limits.max_batch, limits.prefill_chunk
        )
        self._artifact = artifact
        self._stop_ids = frozenset(manifest.stop_token_ids)
        self._tokenizer: Tokenizer | None = None
        self._harmony: Harmony | None = None
        self._tokenizer_lock = threading.Lock()
        self._submissions = Submissions(self.max_batch, limits.max_waiting)
        ready: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        options = {
            "threads": self.threads,
            "context": self.context_length,
            "max_batch": self.max_batch,
            "prefill_chunk": self.prefill_chunk,
        }
        self._worker = Worker(
            lambda: open_model(artifact, **options),
            self._submissions,
            target=self.target,
            vocab_size=self.vocab_size,
            max_batch=self.max_batch,
            prefill_chunk=self.prefill_chunk,
            mixed_chunk=limits.mixed_chunk,
            on_loss=_check_devices,
        )
        self._thread = threading.Thread(
            target=self._worker.run, args=(ready,), name="mxforge-engine", daemon=True
        )
        self._thread.start()
        _workers[self._thread] = self._submissions
        # A forgotten engine, or one whose loading was interrupted, must not keep its thread and
        # its memory.
        self._finalizer = weakref.finalize(self, self._submissions.close)
        error = ready.get()
        if error is not None:
            self._thread.join()
            raise error

    @classmethod
    def load(
        cls,
        path: str | Path,
        threads: int | None = None,
        context_length: int = DEFAULT_CONTEXT,
        max_batch: int | None = None,
        prefill_chunk: int | None = None,
        mixed_chunk: int | None = None,
        max_waiting: int = DEFAULT_MAX_WAITING,
    ) -> Engine:
        """Load the artifact in the folder `path`.

        threads         CPU threads for the kernels; None: every core this process may use
        context_length  most tokens of one sequence, prompt and answer; at most the model's own,
                        to which the default fits itself
        max_batch       sequences that run at once; None: as many as memory allows, up to the
                        number that the artifact was compiled for
        prefill_chunk   most prompt tokens in one step; None: what it was compiled for
        mixed_chunk     most prompt tokens in a step in which other sequences generate: so long does
                        a prompt hold up their next tokens; at most prefill_chunk, None: 128
        max_waiting     how many requests may wait beside the max_batch that run; a further one is
                        refused with QueueFullError

        Raises ArtifactError and its subclasses, KVMemoryError (before anything is allocated),
        DeviceMemoryError, DeviceLostError, UsageError.
        """
        return cls(
            open_artifact(path),
            threads=threads,
            context_length=context_length,
            max_batch=max_batch,
            prefill_chunk=prefill_chunk,
            mixed_chunk=mixed_chunk,
            max_waiting=max_waiting,
        )

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, loaded when it is first needed."""
        with self._tokenizer_lock:
            if self._tokenizer is None:
                self._tokenizer = self._artifact.load_tokenizer()
            return self._tokenizer

    @property
    def harmony(self) -> Harmony:
        """The chat format in the model's tokenizer, loaded when it is first needed."""
        tokenizer = self.tokenizer
        with self._tokenizer_lock:
            if self._harmony is None:
                from .harmony import Harmony

                self._harmony = Harmony(tokenizer)
            return self._harmony

    @overload
    def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        n: None = None,
        priority: int = 0,
        cancel: threading.Event | None = None,
    ) -> Completion: ...
    @overload
    def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        n: int,
        priority: int = 0,
        cancel: threading.Event | None = None,
    ) -> tuple[Completion, ...]: ...
    def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        n: int | None = None,
        priority: int = 0,
        cancel: threading.Event | None = None,
    ) -> Completion | tuple[Completion, ...]:
        """Answer `prompt`, plain text or token ids, and return when the answer is complete.

        n         how many answers are wanted, at most 128; a tuple of them is returned. The prompt
                  is computed once. The answer of index i is drawn with the seed + i. Each takes a
                  place among those that run, or waits for one, as a request of its own would
        priority  a smaller one runs first; requests of the same priority run in the order of their
                  arrival. One that runs is never put back for another
        cancel    when set, ends the answers with finish_reason "cancelled" and what there is of
                  them

        Raises ContextLengthError, TokenRangeError, SamplingError, TokenizerError, QueueFullError,
        UsageError; MaskError where the function of bitmasks fails. DeviceLostError ends all
        requests on a GPU that fails; the next one loads the weights again.
        """
        count = 1 if n is None else n
        pieces = list(self.stream(prompt, params, n=count, priority=priority, cancel=cancel))
        return _answers(pieces, params, n)

    def stream(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        n: int = 1,
        priority: int = 0,
        cancel: threading.Event | None = None,
    ) -> Stream:
        """As `generate`, piece by piece as tokens arrive; closing the iterator cancels the rest.

        Pieces of several answers come as they are made, each with its answer's index.
        """
        inbox: queue.SimpleQueue[Item] = queue.SimpleQueue()
        requests = self._requests(prompt, params, inbox, n=n, priority=priority, cancel=cancel)
        self._submissions.submit(requests)
        return Stream(self, requests, inbox)

    @overload
    async def agenerate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        n: None = None,
        priority: int = 0,
    ) -> Completion: ...
    @overload
    async def agenerate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        n: int,
        priority: int = 0,
    ) -> tuple[Completion, ...]: ...
    async def agenerate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        n: int | None = None,
        priority: int = 0,
    ) -> Completion | tuple[Completion, ...]:
        """As `generate`, for a task of an event loop: its cancellation cancels the request."""
        if isinstance(prompt, str):  # a long text takes longer than a loop should wait
            prompt = await asyncio.to_thread(self.encode, prompt)
        count = 1 if n is None else n
        async with self.astream(prompt, params, n=count, priority=priority) as stream:
            return _answers([piece async for piece in stream], params, n)

    def astream(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        n: int = 1,
        priority: int = 0,
    ) -> AsyncStream:
        """As `stream`, for `async for` in a task of the running event loop.

        The task's cancellation cancels what is left; so does leaving `async with` around the
        stream. Any number of loops may use one engine. A text is encoded at once, in the calling
        thread; the first one loads the tokenizer.
        """
        inbox = LoopInbox()
        requests = self._requests(prompt, params, inbox, n=n, priority=priority)
        self._submissions.submit(requests)
        return AsyncStream(self, requests, inbox)

    def metrics(self) -> Metrics:
        """Counts of what this engine did since it was loaded; cheap, and from any thread."""
        return self._worker.metrics()

    def _requests(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None,
        inbox: Inbox,
        *,
        n: int = 1,
        priority: int = 0,
        cancel: threading.Event | None = None,
    ) -> list[Request]:
        """Check a prompt and make requests of it, one for each answer."""
        params = SamplingParams() if params is None else params
        params.check(self.vocab_size)
        checked_whole("n", n, 1, MAX_ANSWERS)
        checked_whole("priority", priority, -(2**31), 2**31 - 1)
        tokens = self.encode(prompt)
        self._check_prompt(tokens)
        tokenizer = self.tokenizer  # loaded here, so that the worker never waits for it
        if params.stop_strings and tokenizer.kind is None:
            raise TokenizerError(
                "Stop strings end a text, but this model was compiled without a tokenizer and "
                "gives none; use stop_token_ids."
            )
        if len(tokens) >= self.context_length:
            raise ContextLengthError(
                f"A prompt must leave room for an answer: expected fewer than {self.context_length}"
                f" tokens, found {len(tokens)}; load with a larger context_length or shorten it."
            )
        return requests_of(
            tokens,
            params,
            n,
            room=self.context_length - len(tokens),
            stop_ids=self._stop_ids,
            token_bytes=tokenizer.token_bytes,
            priority=priority,
            cancel=cancel,
            inbox=inbox,
        )

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        reasoning_effort: ReasoningEffort = "medium",
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        date: str | datetime.date | None = None,
        cancel: threading.Event | None = None,
    ) -> ChatCompletion:
        """Answer a conversation in the harmony format.

        messages          OpenAI's: {"role": "user", "content": "…"} and so on; see messages.py
        params            stop strings end the content, everything else holds for all tokens;
                          an answer ends where the format ends it, whatever ignore_eos says
        reasoning_effort  "low", "medium" or "high"
        tools             functions that the model may call, in OpenAI's form
        tool_choice       "auto", "none", "required", or {"type": "function",
                          "function": {"name": "…"}}; a call that must be made has no thinking
        date              the conversation's day for the system message; None: none, so that runs
                          repeat

        The answer holds thinking, content and tool calls apart; whatever the model writes ends
        as these, see harmony.py. Raises ChatError, TokenizerError (no harmony tokenizer),
        ContextLengthError, SamplingError, UsageError.
        """
        from .chat import chat

        stream = self.chat_stream(
            messages,
            params,
            reasoning_effort=reasoning_effort,
            tools=tools,
            tool_choice=tool_choice,
            date=date,
            cancel=cancel,
        )
        return chat(stream, params is not None and params.logprobs is not None)

    def chat_stream(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        reasoning_effort: ReasoningEffort = "medium",
        tools: Sequence[Mapping[str, Any]] | None = None,
        tool_choice: str | Mapping[str, Any] = "auto",
        date: str | datetime.date | None = None,
        cancel: threading.Event | None = None,
    ) -> ChatStream:
        """As `chat`, piece by piece as tokens arrive; closing the iterator cancels the rest."""
        from .chat import chat_stream

        return chat_stream(
            self,
            self.harmony,
            messages,
            params,
            reasoning_effort=reasoning_effort,
            tools=tools,
            tool_choice=tool_choice,
            date=date,
            cancel=cancel,
        )

    def logits(self, token_ids: Sequence[int]) -> np.ndarray:
        """Logits after every token: float32 [n, vocabulary]. Raises as `generate` does."""
        tokens = self.encode(token_ids)
        self._check_prompt(tokens)
        if len(tokens) > self.context_length:
            raise ContextLengthError(
                f"Expected at most {self.context_length} tokens, found {len(tokens)}; "
                "load with a larger context_length."
            )
        logits = np.empty((len(tokens), self.vocab_size), np.float32)
        inbox: queue.SimpleQueue[Item] = queue.SimpleQueue()
        request = Request(tokens=tokens, params=None, inbox=inbox)
        self._submissions.submit([request])
        try:
            known = 0
            while known < len(tokens):
                rows = inbox.get()
                if isinstance(rows, BaseException):
                    raise rows
                assert isinstance(rows, np.ndarray)
                logits[known : known + len(rows)] = rows
                known += len(rows)
        finally:
            request.abandoned = True
        return logits

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt; text never becomes special tokens.

        Raises TokenizerError for text without a tokenizer, UsageError for what is neither text
        nor whole numbers.
        """
        if isinstance(prompt, str):
            return list(self.tokenizer.encode(prompt))
        return token_ids(prompt)

    def close(self) -> None:
        """Stop the worker and free the memory; running requests are cancelled. Twice is fine."""
        self._finalizer()
        self._thread.join()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_prompt(self, tokens: list[int]) -> None:
        if not tokens:
            raise UsageError("A prompt needs at least one token, found none.")
        low, high = min(tokens), max(tokens)
        if low < 0 or high >= self.vocab_size:
            wrong = low if low < 0 else high
            raise TokenRangeError(
                f"Token ids must lie in 0 to {self.vocab_size - 1}, found {wrong}; "
                "the prompt was made for another model or tokenizer."
            )


def _answers(
    pieces: Sequence[Piece], params: SamplingParams | None, n: int | None
) -> Completion | tuple[Completion, ...]:
    """A completion of the pieces, or of those of each of `n` answers."""
    logprobs = params is not None and params.logprobs is not None
    answers = tuple(completed(part, logprobs) for part in by_index(pieces, n or 1))
    return answers[0] if n is None else answers
