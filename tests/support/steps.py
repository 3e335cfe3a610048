"""An artifact's steps without an engine: any tokens of any sequences in one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mxforge.artifact import open_artifact
from mxforge.engine import open_model
from mxforge.machine import usable_cores
from mxforge.steps import Part

CONTEXT = 512  # of a sequence, where a test does not say another


@dataclass
class Begun:
    """A sequence, and how many of its tokens are computed."""

    sequence: int
    length: int = 0


class Steps:
    """Steps of an artifact, for `batch` sequences of `context` tokens."""

    def __init__(self, artifact: Path, batch: int = 4, context: int = CONTEXT) -> None:
        opened = open_artifact(artifact)
        self.vocab_size = int(opened.manifest.config["vocab_size"])
        chunk = opened.manifest.limits.prefill_chunk
        self.model = open_model(
            opened,
            threads=usable_cores(),
            context=context,
            max_batch=batch,
            prefill_chunk=chunk,
        )

    def begin(self) -> Begun:
        """A sequence without tokens."""
        return Begun(self.model.create(())[0])

    def end(self, *sequences: Begun) -> None:
        for begun in sequences:
            self.model.free(begun.sequence)

    def run(self, parts: Sequence[tuple[Begun, np.ndarray]]) -> list[np.ndarray]:
        """Logits [n, V] of the next tokens of each sequence, all in one step: of `decode` where
        each has one, of `forward` else."""
        step = [Part(begun.sequence, new.tolist(), logits=len(new)) for begun, new in parts]
        self.model.submit(step)
        results = self.model.wait()
        for begun, new in parts:
            begun.length += len(new)
        return [np.asarray(result.logits) for result in results]

    def prefill(self, tokens: np.ndarray, chunk: int) -> np.ndarray:
        """Logits [n, V] of one sequence, `chunk` tokens a step."""
        begun = self.begin()
        starts = range(0, len(tokens), chunk)
        parts = [self.run([(begun, tokens[start : start + chunk])])[0] for start in starts]
        self.end(begun)
        return np.concatenate(parts)
