"""The engine: requests in, tokens and text out.

Any number of Python threads may submit requests; one worker thread (scheduler.py) owns the library
and answers them together. A cancelled request ends before the next step.
"""

from __future__ import annotations

import atexit
import datetime
import operator
import queue
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import memory
from .artifact import Artifact, open_artifact
from .errors import (
    CancelledError,
    ContextLengthError,
    TokenizerError,
    TokenRangeError,
    UsageError,
)
from .library import default_threads, usable_cores
from .manifest import Manifest
from .model import check_memory_plan
from .results import Completion, Piece
from .sampling import SamplingParams, TokenHistory, new_seed
from .scheduler import DeviceCheck, Request, Submitted, Worker
from .text import TextStream
from .tokenizer import Tokenizer

_workers: weakref.WeakKeyDictionary[threading.Thread, queue.SimpleQueue[Submitted]] = (
    weakref.WeakKeyDictionary()
)

if TYPE_CHECKING:
    from .chat import ChatCompletion, ChatStream
    from .harmony import Harmony, ReasoningEffort

DEFAULT_CONTEXT = 8192  # tokens; a model with less takes its own


@atexit.register
def _stop_workers() -> None:
    """Let every engine end its step: an interpreter that ends under a running kernel crashes."""
    for thread, requests in list(_workers.items()):
        requests.put(None)
        thread.join()


def _check_devices() -> None:
    """Let every engine look whether its device is still there; one has found its own lost.

    A device is opened anew when nobody has anything on it any more, and an engine without requests
    would not notice.
    """
    for requests in list(_workers.values()):
        requests.put(DeviceCheck())


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
    ) -> None:
        manifest = artifact.manifest
        check_memory_plan(manifest)
        self.manifest: Manifest = manifest
        self.target = artifact.variant.target  # of the library in use, such as cpu:avx2
        self.threads = _checked_threads(threads)
        self.vocab_size = int(manifest.config["vocab_size"])
        self.context_length = _checked_context(context_length, manifest.limits.context)
        self.prefill_chunk = _checked_limit(
            "prefill_chunk",
            manifest.limits.prefill_chunk if prefill_chunk is None else prefill_chunk,
            manifest.limits.prefill_chunk,
        )
        if max_batch is not None:
            _checked_limit("max_batch", max_batch, manifest.limits.max_batch)
        self.max_batch, needs = memory.fit(
            manifest, self.context_length, max_batch, self.prefill_chunk
        )
        self._artifact = artifact
        self._tokenizer: Tokenizer | None = None
        self._harmony: Harmony | None = None
        self._tokenizer_lock = threading.Lock()
        self._requests: queue.SimpleQueue[Submitted] = queue.SimpleQueue()
        self._closed = threading.Event()
        ready: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        worker = Worker(
            artifact,
            self._requests,
            needs,
            threads=self.threads,
            context_length=self.context_length,
            max_batch=self.max_batch,
            prefill_chunk=self.prefill_chunk,
            on_loss=_check_devices,
        )
        self._thread = threading.Thread(
            target=worker.run, args=(ready,), name="mxforge-engine", daemon=True
        )
        self._thread.start()
        _workers[self._thread] = self._requests
        # A forgotten engine, or one whose loading was interrupted, must not keep its thread and
        # its memory.
        self._finalizer = weakref.finalize(self, self._requests.put, None)
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
    ) -> Engine:
        """Load the artifact in the folder `path`.

        threads         CPU threads for the kernels; None: every core this process may use
        context_length  most tokens of one sequence, prompt and answer; at most the model's own,
                        to which the default fits itself
        max_batch       sequences that run at once; None: as many as memory allows, up to the
                        number that the artifact was compiled for
        prefill_chunk   most prompt tokens in one step; None: what it was compiled for

        Raises ArtifactError and its subclasses, KVMemoryError (before anything is allocated),
        DeviceMemoryError, DeviceLostError, UsageError.
        """
        return cls(
            open_artifact(path),
            threads=threads,
            context_length=context_length,
            max_batch=max_batch,
            prefill_chunk=prefill_chunk,
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

    def generate(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        cancel: threading.Event | None = None,
    ) -> Completion:
        """Answer `prompt`, plain text or token ids, and return when the answer is complete.

        `cancel`, when set, ends the answer with finish_reason "cancelled" and what there is of it.
        Raises ContextLengthError, TokenRangeError, SamplingError, TokenizerError, UsageError.
        DeviceLostError ends all requests on a GPU that fails; the next one loads the weights
        again.
        """
        pieces = list(self.stream(prompt, params, cancel=cancel))
        last = pieces[-1]
        assert last.finish_reason is not None and last.usage is not None
        assert last.timings is not None
        wants = params is not None and params.logprobs is not None
        return Completion(
            text="".join(piece.text for piece in pieces),
            token_ids=tuple(token for piece in pieces for token in piece.token_ids),
            finish_reason=last.finish_reason,
            usage=last.usage,
            timings=last.timings,
            logprobs=tuple(lp for piece in pieces for lp in piece.logprobs) if wants else None,
        )

    def stream(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None = None,
        *,
        cancel: threading.Event | None = None,
    ) -> Stream:
        """As `generate`, piece by piece as tokens arrive; closing the iterator cancels the rest."""
        request = self._request(prompt, params, cancel)
        self._submit(request)
        return Stream(self, request)

    def _request(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams | None,
        cancel: threading.Event | None = None,
    ) -> Request:
        """Check a prompt and make a request of it."""
        params = SamplingParams() if params is None else params
        params.check(self.vocab_size)
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
        room = self.context_length - len(tokens)
        return Request(
            tokens=tokens,
            prompt_length=len(tokens),
            params=params,
            max_tokens=min(room, params.max_tokens or room),
            history=TokenHistory(tokens if params.penalized else ()),
            seed=new_seed() if params.seed is None else params.seed,
            token_bytes=tokenizer.token_bytes,
            text=TextStream(params.stop_strings),
            cancel=cancel,
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
        request = Request(tokens=tokens, prompt_length=len(tokens), params=None)
        self._submit(request)
        try:
            known = 0
            while known < len(tokens):
                rows = self._receive(request)
                assert isinstance(rows, np.ndarray)
                logits[known : known + len(rows)] = rows
                known += len(rows)
        finally:
            request.abandoned.set()
        return logits

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt; text never becomes special tokens.

        Raises TokenizerError for text without a tokenizer, UsageError for what is neither text
        nor whole numbers.
        """
        if isinstance(prompt, str):
            return list(self.tokenizer.encode(prompt))
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

    def close(self) -> None:
        """Stop the worker and free the memory; running requests are cancelled. Twice is fine."""
        self._closed.set()
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

    def _submit(self, request: Request) -> None:
        if self._closed.is_set():
            raise UsageError("This engine was closed; load the artifact again.")
        self._requests.put(request)

    def _receive(self, request: Request) -> Piece | np.ndarray:
        while True:
            try:
                item = request.inbox.get(timeout=1.0)
            except queue.Empty:
                if not self._thread.is_alive():
                    raise CancelledError("The engine was closed while it answered.") from None
                continue
            if isinstance(item, BaseException):
                raise item
            return item


class Stream(Iterator[Piece]):
    """An answer's pieces as they arrive; the last one has a finish reason.

    Closing it, or forgetting it, cancels what is left of the answer.
    """

    def __init__(self, engine: Engine, request: Request) -> None:
        self._engine = engine  # lives as long as its answers
        self._request = request
        self._ended = False

    def __next__(self) -> Piece:
        if self._ended:
            raise StopIteration
        try:
            piece = self._engine._receive(self._request)
        except BaseException:
            self.close()
            raise
        assert isinstance(piece, Piece)
        self._ended = piece.finish_reason is not None
        return piece

    def cancel(self) -> None:
        """End the answer before the next step; its last piece still comes."""
        self._request.abandoned.set()

    def close(self) -> None:
        """Cancel what is left of the answer; no further pieces come."""
        self._ended = True
        self.cancel()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def _checked_threads(threads: int | None) -> int:
    if threads is None:
        return default_threads()
    most = usable_cores()
    if type(threads) is not int or not 1 <= threads <= most:
        raise UsageError(
            f"threads must be from 1 to {most}, the cores usable here; found {threads!r}."
        )
    return threads


def _checked_context(value: int, most: int) -> int:
    return (
        most if value == DEFAULT_CONTEXT > most else _checked_limit("context_length", value, most)
    )


def _checked_limit(name: str, value: int, most: int) -> int:
    if type(value) is not int or value < 1:
        raise UsageError(f"{name} must be a whole number of at least 1, found {value!r}.")
    if value > most:
        raise UsageError(f"{name} must be at most {most}, as compiled; found {value}.")
    return value
