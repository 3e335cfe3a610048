"""From the bytes of tokens to text, piece by piece: split characters and stop strings.

A token can end in the middle of a character, and a stop string can begin in one token and end in
a later one. So both hold back what they cannot decide yet; `finish` gives out the rest.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def printable(text: str) -> str:
    """`text` without the control characters that could garble a terminal."""
    return _CONTROL.sub("", text)


class IncrementalDecoder:
    """Bytes to text. Incomplete UTF-8 waits for its rest, invalid UTF-8 becomes U+FFFD."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, data: bytes) -> str:
        """The text that `data` completes."""
        return self._decoder.decode(data)

    def finish(self) -> str:
        """U+FFFD where a character was left incomplete, else nothing."""
        return self._decoder.decode(b"", final=True)


class StopMatcher:
    """Cuts text at the first stop string, wherever the text was split.

    First is what is complete first; of several complete at the same character, the longest.
    What could still become a stop string is held back.
    """

    def __init__(self, stops: Iterable[str] = ()) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""
        self.matched: str | None = None  # the stop string that was found

    def push(self, text: str) -> str:
        """What of `text`, and of what was held back, is certainly output; nothing after a match."""
        if not self._stops:
            return text
        if self.matched is not None:
            return ""
        text = self._held + text
        # (end, begin, stop) of the first occurrence of each stop string
        found = [
            (begin + len(stop), begin, stop)
            for stop in self._stops
            if (begin := text.find(stop)) >= 0
        ]
        if found:
            _, begin, self.matched = min(found)
            self._held = ""
            return text[:begin]
        keep = self._undecided(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back: no more text follows, so it is no stop string."""
        held, self._held = self._held, ""
        return held

    def _undecided(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = min(max(map(len, self._stops), default=1) - 1, len(text))
        for length in range(longest, 0, -1):
            end = text[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0


class TextStream:
    """The text of a sequence as its tokens arrive.

    stream = TextStream(params.stop_strings)
    piece = stream.push(tokenizer.token_bytes(token))   # "" while undecided
    if stream.stopped: ...                              # the sequence is over
    piece = stream.finish()                             # at the end, whatever ended it
    """

    def __init__(self, stops: Iterable[str] = ()) -> None:
        self._decoder = IncrementalDecoder()
        self._matcher = StopMatcher(stops)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found; what is pushed afterwards gives nothing."""
        return self._matcher.matched is not None

    @property
    def stop_string(self) -> str | None:
        """The stop string that was found."""
        return self._matcher.matched

    def push(self, data: bytes) -> str:
        """The text that the next token's bytes make certain."""
        return self._matcher.push(self._decoder.push(data))

    def finish(self) -> str:
        """What was held back, at most one stop string's length; nothing after a match."""
        return self._matcher.push(self._decoder.finish()) + self._matcher.finish()
