"""Which KV pages belong to whom: the host's book-keeping, without the pages themselves.

A page holds 16 positions. There are two pools, one for the layers that attend to everything
("full") and one for those that see a window ("sliding"); page 7 of a pool is page 7 in the tensor
of each of its layers.

    full      a sequence keeps every page, from position 0 on
    sliding   a sequence drops a page once neither its last position nor a later one sees into it

Pages carry reference counts. Several sequences share what is full and finished; the page in which
a sequence writes next is copied first, if someone else holds it too. A step goes

    copies = kv.prepare(sequence, n)     # pages for the next n positions; run the copies at once
    tables = kv.tables([sequence, ...])  # what forward and decode are given
    ...                                  # the library's step
    kv.commit(sequence, n)               # n positions more; drops what the window has left
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .errors import KVMemoryError
from .kv_layout import PAGE_TOKENS


class PagePool:
    """`size` pages, the lowest free ones handed out first, counted by reference.

    So the pages of a prompt mostly follow each other, and are read as a stream.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._references = [0] * size
        self._free = list(range(size))  # a heap

    @property
    def free(self) -> int:
        """How many pages are free."""
        return len(self._free)

    def references(self, page: int) -> int:
        """How many hold the page."""
        return self._references[page]

    def allocate(self, count: int = 1) -> list[int]:
        """`count` pages with one reference each; KVMemoryError, and none taken, if there are fewer.

        What a page held before is still in it.
        """
        if count > len(self._free):
            raise self.exhausted(count)
        pages = [heapq.heappop(self._free) for _ in range(count)]
        for page in pages:
            self._references[page] = 1
        return pages

    def exhausted(self, count: int) -> KVMemoryError:
        """The error to raise where `count` pages are wanted and not there."""
        return KVMemoryError(
            f"{count} KV pages of {PAGE_TOKENS} tokens were needed, but only {self.free} of "
            f"{self.size} are free; load with a longer context or run fewer sequences at once."
        )

    def retain(self, pages: Sequence[int]) -> None:
        """One more reference to each page."""
        for page in pages:
            if self._references[page] == 0:
                raise ValueError(f"page {page} is free and cannot be retained")
            self._references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One reference less to each page; without any it is free again."""
        for page in pages:
            if self._references[page] == 0:
                raise ValueError(f"page {page} is free and cannot be released")
            self._references[page] -= 1
            if self._references[page] == 0:
                heapq.heappush(self._free, page)


@dataclass
class SequencePages:
    """The pages of one sequence.

    length         positions computed so far, 0 to length - 1
    full           full[k] holds positions 16 k to 16 k + 15
    sliding        sliding[k] holds the 16 positions from 16 (sliding_first + k)
    """

    length: int = 0
    full: list[int] = field(default_factory=list)
    sliding: list[int] = field(default_factory=list)
    sliding_first: int = 0


class PageCopies(NamedTuple):
    """(source, destination) pages to copy before the next step, in each kind's tensors."""

    full: list[tuple[int, int]]
    sliding: list[tuple[int, int]]


class PageTables(NamedTuple):
    """What forward and decode are told of b sequences; all int32.

    Rows are padded with page 0, which is never looked at.
    """

    full_table: np.ndarray  # [b, most full pages]
    full_first: np.ndarray  # [b], zeros
    sliding_table: np.ndarray  # [b, most sliding pages]
    sliding_first: np.ndarray  # [b], logical number of the page in column 0


@dataclass
class _Snapshot:
    """A finished prefix: its tokens (int32 [length]) and the pages that it still holds."""

    tokens: np.ndarray
    pages: SequencePages


class PrefixCache:
    """Pages of prefixes, for prompts that begin with them; the least recently used are evicted.

    An entry holds references to all its full pages and to the sliding pages of its last window.
    So a prompt can start from any prefix of an entry whose window is still covered: from the
    entry's end or a few positions before it, and from anywhere where the window had dropped
    nothing yet.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._entries: OrderedDict[int, _Snapshot] = OrderedDict()  # oldest use first
        self._next_key = 0

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, tokens: np.ndarray, pages: SequencePages) -> None:
        """Take over the references of `pages`."""
        self._entries[self._next_key] = _Snapshot(tokens, pages)
        self._next_key += 1

    def pop_oldest(self) -> SequencePages:
        """Forget the least recently used entry and give its references back."""
        return self._entries.popitem(last=False)[1].pages

    def pop_same(self, tokens: np.ndarray) -> SequencePages | None:
        """Forget the entry of exactly these tokens, if there is one, and give its pages back."""
        for key, entry in self._entries.items():
            if np.array_equal(entry.tokens, tokens):
                return self._entries.pop(key).pages
        return None

    def longest(self, tokens: np.ndarray, window: int) -> tuple[int, SequencePages | None]:
        """The longest usable prefix of `tokens` and the entry it is in; (0, None) without one."""
        best, best_key = 0, -1
        for key, entry in self._entries.items():
            common = _common_prefix(entry.tokens, tokens)
            covered = first_visible_page(common, window) >= entry.pages.sliding_first
            if common > best and covered:
                best, best_key = common, key
        if best == 0:
            return 0, None
        self._entries.move_to_end(best_key)
        return best, self._entries[best_key].pages


class KVPages:
    """The pools of both kinds, the sequences' part in them, and the prefix cache.

    full_pages, sliding_pages   sizes of the pools (`page_needs` says what is enough)
    window                      how many keys a sliding layer sees, the query's own included
    prefixes                    how many prefixes to cache at most; they only use pages that no
                                sequence needs

    Not for several threads at once: one engine loop owns it.
    """

    def __init__(
        self, full_pages: int, sliding_pages: int, window: int, prefixes: int = 32
    ) -> None:
        self.full = PagePool(full_pages)
        self.sliding = PagePool(sliding_pages)
        self.window = window
        self.cache = PrefixCache(prefixes)

    def start(self, tokens: Sequence[int]) -> SequencePages:
        """A new sequence for the prompt `tokens`, beginning with what is known of it already.

        `length` of the result says how many positions need not be computed again; the last token
        always is, because its logits are wanted.
        """
        prompt = np.asarray(tokens, np.int32)[:-1]
        length, source = self.cache.longest(prompt, self.window)
        return SequencePages() if source is None else self._share(source, length)

    def fork(self, sequence: SequencePages) -> SequencePages:
        """A second sequence with the same past; what either writes is its own."""
        return self._share(sequence, sequence.length)

    def insert_prefix(self, sequence: SequencePages, tokens: Sequence[int]) -> None:
        """Insert the sequence's positions into the prefix cache; the sequence itself continues.

        `tokens` are its tokens, of which the first `length` are computed. Worth doing where a
        later prompt may branch off: at the end of a prompt, and at the end of a sequence.
        """
        if sequence.length == 0 or self.cache.limit == 0:
            return
        known = np.array(tokens[: sequence.length], np.int32)
        if len(known) != sequence.length:
            raise ValueError(f"{sequence.length} tokens were computed, {len(known)} are given")
        same = self.cache.pop_same(known)
        if same is not None:
            self.release(same)
        elif len(self.cache) == self.cache.limit:
            self.release(self.cache.pop_oldest())
        self.cache.add(known, self.fork(sequence))

    def prepare(self, sequence: SequencePages, new_tokens: int) -> PageCopies:
        """Pages for the next `new_tokens` positions, each held by this sequence alone.

        Returns the copies to make before the step. KVMemoryError, with nothing changed, where the
        pages are not there even after all cached prefixes are given up.
        """
        end = _pages(sequence.length + new_tokens)
        while True:
            needs = [
                max(0, end - first - len(pages))
                + _shared_partial(pool, pages, first, sequence.length)
                for pool, pages, first in self._kinds(sequence)
            ]
            short = [
                pool.exhausted(need)
                for pool, need in zip((self.full, self.sliding), needs, strict=True)
                if need > pool.free
            ]
            if not short:
                break
            if not len(self.cache):
                raise short[0]
            self.release(self.cache.pop_oldest())
        return PageCopies(
            *(
                _extend(pool, pages, first, sequence.length, need)
                for (pool, pages, first), need in zip(self._kinds(sequence), needs, strict=True)
            )
        )

    def commit(self, sequence: SequencePages, new_tokens: int) -> None:
        """Count `new_tokens` prepared positions as computed; drop the pages left by the window."""
        length = sequence.length + new_tokens
        if length > PAGE_TOKENS * len(sequence.full):
            raise ValueError(f"{length} positions were not prepared")
        sequence.length = length
        # Seen from the last position, not the next, so that it can be computed once more: the same
        # prompt asked again needs just that position's logits.
        first = first_visible_page(length - 1, self.window)
        gone = first - sequence.sliding_first
        if gone > 0:
            self.sliding.release(sequence.sliding[:gone])
            del sequence.sliding[:gone]
            sequence.sliding_first = first

    def release(self, sequence: SequencePages) -> None:
        """Give up all pages of the sequence; it is empty afterwards."""
        self.full.release(sequence.full)
        self.sliding.release(sequence.sliding)
        sequence.full, sequence.sliding = [], []
        sequence.length = sequence.sliding_first = 0

    def clear(self) -> None:
        """Empty the prefix cache."""
        while len(self.cache):
            self.release(self.cache.pop_oldest())

    def tables(self, sequences: Sequence[SequencePages]) -> PageTables:
        """The page tables of the sequences, in their order."""
        return PageTables(
            _table([sequence.full for sequence in sequences]),
            np.zeros(len(sequences), np.int32),
            _table([sequence.sliding for sequence in sequences]),
            np.array([sequence.sliding_first for sequence in sequences], np.int32),
        )

    def _share(self, source: SequencePages, length: int) -> SequencePages:
        """A sequence of the first `length` positions of `source`, on the same pages."""
        end = _pages(length)
        # As after `commit`; a prefix inside `source` has at least what its next position sees.
        first = max(source.sliding_first, first_visible_page(length - 1, self.window))
        shared = SequencePages(
            length,
            source.full[:end],
            source.sliding[first - source.sliding_first : end - source.sliding_first],
            first,
        )
        self.full.retain(shared.full)
        self.sliding.retain(shared.sliding)
        return shared

    def _kinds(self, sequence: SequencePages) -> list[tuple[PagePool, list[int], int]]:
        """(pool, the sequence's pages, logical number of the first of them) of either kind."""
        return [
            (self.full, sequence.full, 0),
            (self.sliding, sequence.sliding, sequence.sliding_first),
        ]


def _extend(
    pool: PagePool, pages: list[int], first: int, length: int, need: int
) -> list[tuple[int, int]]:
    """Append `need` pages, one of them in place of the begun page where others hold it too."""
    fresh = pool.allocate(need)
    copies = []
    if _shared_partial(pool, pages, first, length):
        index = length // PAGE_TOKENS - first
        copies.append((pages[index], fresh[0]))
        pool.release([pages[index]])
        pages[index] = fresh.pop(0)
    pages += fresh
    return copies


def _shared_partial(pool: PagePool, pages: list[int], first: int, length: int) -> bool:
    """Whether the page that position `length` falls into is begun and held by others too.

    Only such a page can be shared and written: sharing covers computed positions only.
    """
    return length % PAGE_TOKENS != 0 and pool.references(pages[length // PAGE_TOKENS - first]) > 1


def _pages(positions: int) -> int:
    return -(-positions // PAGE_TOKENS)


def first_visible_page(position: int, window: int) -> int:
    """Logical number of the first page that a sliding layer sees from `position`."""
    return max(0, position - window + 1) // PAGE_TOKENS


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if different.size else length


def _table(rows: Sequence[list[int]]) -> np.ndarray:
    table = np.zeros((len(rows), max(1, *map(len, rows))) if rows else (0, 1), np.int32)
    for index, row in enumerate(rows):
        table[index, : len(row)] = row
    return table


@dataclass(frozen=True)
class PageNeeds:
    """Sizes of the two pools that never run out, and their bytes."""

    full_pages: int
    sliding_pages: int
    full_bytes: int
    sliding_bytes: int

    @property
    def bytes(self) -> int:
        """Bytes of both pools."""
        return self.full_bytes + self.sliding_bytes


def page_needs(
    context_length: int,
    max_batch: int,
    prefill_chunk: int,
    window: int,
    bytes_per_page_full: int,
    bytes_per_page_sliding: int,
) -> PageNeeds:
    """What `max_batch` sequences of `context_length` tokens need at worst.

    `prefill_chunk` bounds the tokens of one step, all sequences together. The bytes of a page are
    those of all layers of its kind.
    """
    full_each = _pages(context_length)
    # So many pages can the windows of the last and the next position touch. A chunk adds its own
    # length, and a page more for each sequence, because it need not begin where a page does.
    sliding_each = (window + PAGE_TOKENS - 1) // PAGE_TOKENS + 1
    full = max_batch * full_each
    sliding = min(full, max_batch * (sliding_each + 1) + _pages(prefill_chunk))
    return PageNeeds(full, sliding, full * bytes_per_page_full, sliding * bytes_per_page_sliding)
