"""An artifact's functions called directly: any tokens of any sequences in a call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mxforge.artifact import open_artifact
from mxforge.kv import KVPages, SequencePages, page_needs
from mxforge.library import Library, usable_cores
from mxforge.model import Model

CONTEXT = 512  # of a sequence, where a test does not say another


class Steps:
    """Forward and decode of an artifact, for `batch` sequences of `context` tokens."""

    def __init__(self, artifact: Path, batch: int = 4, context: int = CONTEXT) -> None:
        opened = open_artifact(artifact)
        manifest = opened.manifest
        window = int(manifest.config["sliding_window"])
        chunk = manifest.limits.prefill_chunk
        self.needs = page_needs(context, batch, chunk + batch, window, 1, 1)
        self.window = window
        Library.use_threads(usable_cores())
        self.model = Model(opened, self.needs)
        self.forget()

    def forget(self) -> None:
        """Begin with empty pools; what was in the pages stays in them."""
        self.kv = KVPages(self.needs.full_pages, self.needs.sliding_pages, self.window)

    def forward(self, parts: Sequence[tuple[SequencePages, np.ndarray]]) -> list[np.ndarray]:
        """Logits [n, V] of the next tokens of each sequence, all in one call."""
        tokens, positions, token_seq = self._prepare(parts)
        logits = self.model.forward(
            tokens, positions, token_seq, range(len(tokens)), self.kv.tables([s for s, _ in parts])
        )
        return self._finish(parts, self.model.read_logits(logits, 0, len(tokens)))

    def decode(self, parts: Sequence[tuple[SequencePages, np.ndarray]]) -> list[np.ndarray]:
        """As `forward`, one token a sequence."""
        tokens, positions, token_seq = self._prepare(parts)
        tables = self.kv.tables([s for s, _ in parts])
        logits = self.model.decode(tokens, positions, token_seq, tables)
        return self._finish(parts, self.model.read_logits(logits, 0, len(tokens)))

    def prefill(self, tokens: np.ndarray, chunk: int) -> np.ndarray:
        """Logits [n, V] of one sequence, `chunk` tokens a call."""
        sequence = SequencePages()
        parts = [
            self.forward([(sequence, tokens[start : start + chunk])])[0]
            for start in range(0, len(tokens), chunk)
        ]
        self.kv.release(sequence)
        return np.concatenate(parts)

    def _prepare(self, parts: Sequence[tuple[SequencePages, np.ndarray]]) -> tuple[list[int], ...]:
        tokens: list[int] = []
        positions: list[int] = []
        token_seq: list[int] = []
        for index, (sequence, new) in enumerate(parts):
            copies = self.kv.prepare(sequence, len(new))
            self.model.copy_pages("full", copies.full)
            self.model.copy_pages("sliding", copies.sliding)
            tokens += new.tolist()
            positions += range(sequence.length, sequence.length + len(new))
            token_seq += [index] * len(new)
        return tokens, positions, token_seq

    def _finish(
        self, parts: Sequence[tuple[SequencePages, np.ndarray]], logits: np.ndarray
    ) -> list[np.ndarray]:
        for sequence, new in parts:
            self.kv.commit(sequence, len(new))
        ends = np.cumsum([len(new) for _, new in parts])
        return np.split(logits, ends[:-1])
