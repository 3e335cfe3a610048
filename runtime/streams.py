"""Answers as they arrive: for a thread that waits, and for a task of an event loop."""

from __future__ import annotations

import asyncio
import queue
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING

from .requests import Item, Request
from .results import Completion, Piece

if TYPE_CHECKING:
    from .engine import Engine


class _Answers:
    """What both streams share: the requests, and which of them have ended."""

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        self._engine = engine  # lives as long as its answers
        self._requests = requests
        self._left = len(requests)

    def cancel(self) -> None:
        """End the answers before the next step; their last pieces still come."""
        for request in self._requests:
            request.abandoned = True

    def _end(self) -> None:
        self._left = 0
        self.cancel()

    def _taken(self, item: Item) -> Piece:
        if isinstance(item, BaseException):
            raise item
        assert isinstance(item, Piece)
        if item.finish_reason is not None:
            self._left -= 1
        return item

    def __del__(self) -> None:
        self._end()


class Stream(_Answers, Iterator[Piece]):
    """Pieces of an answer, or of several, as they arrive; the last one of each has a finish reason.

    Closing it, or forgetting it, cancels what is left.
    """

    def __init__(
        self, engine: Engine, requests: Sequence[Request], inbox: queue.SimpleQueue[Item]
    ) -> None:
        super().__init__(engine, requests)
        self._inbox = inbox

    def __next__(self) -> Piece:
        if not self._left:
            raise StopIteration
        try:
            return self._taken(self._inbox.get())
        except BaseException:
            self._end()
            raise

    def close(self) -> None:
        """Cancel what is left; no further pieces come."""
        self._end()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncStream(_Answers, AsyncIterator[Piece]):
    """As `Stream`, for the event loop in which it was made."""

    def __init__(self, engine: Engine, requests: Sequence[Request], inbox: LoopInbox) -> None:
        super().__init__(engine, requests)
        self._inbox = inbox

    async def __anext__(self) -> Piece:
        if not self._left:
            raise StopAsyncIteration
        try:
            return self._taken(await self._inbox.queue.get())
        except BaseException:  # the task's cancellation among them
            self._end()
            raise

    async def aclose(self) -> None:
        """Cancel what is left; no further pieces come."""
        self._end()

    async def __aenter__(self) -> AsyncStream:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


class _Mail:
    """Items on their way to one event loop, from any thread: one call wakes it for many."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._items: deque[tuple[asyncio.Queue[Item], Item]] = deque()
        self._called = False

    def put(self, to: asyncio.Queue[Item], item: Item) -> None:
        loop = self._loop()
        if loop is None or loop.is_closed():
            self._items.clear()
            raise RuntimeError("The event loop was closed.")
        self._items.append((to, item))
        if not self._called:
            self._called = True
            loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._called = False  # first: what comes from now on calls again
        while self._items:
            to, item = self._items.popleft()
            to.put_nowait(item)


_mails: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Mail] = weakref.WeakKeyDictionary()
_mails_lock = threading.Lock()


class LoopInbox:
    """An inbox whose reader is a task of the running event loop."""

    def __init__(self) -> None:
        loop = asyncio.get_running_loop()
        with _mails_lock:
            self._mail = _mails.setdefault(loop, _Mail(loop))
        self.queue: asyncio.Queue[Item] = asyncio.Queue()

    def put(self, item: Item, /) -> None:
        self._mail.put(self.queue, item)


def completed(pieces: Sequence[Piece], logprobs: bool) -> Completion:
    """The whole answer of all of its pieces."""
    last = pieces[-1]
    assert last.finish_reason is not None and last.usage is not None
    assert last.timings is not None
    return Completion(
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(token for piece in pieces for token in piece.token_ids),
        finish_reason=last.finish_reason,
        usage=last.usage,
        timings=last.timings,
        logprobs=tuple(lp for piece in pieces for lp in piece.logprobs) if logprobs else None,
    )


def by_index(pieces: Sequence[Piece], count: int) -> list[list[Piece]]:
    """The pieces of each of `count` answers."""
    parts: list[list[Piece]] = [[] for _ in range(count)]
    for piece in pieces:
        parts[piece.index].append(piece)
    return parts
