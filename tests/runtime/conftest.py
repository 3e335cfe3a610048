"""Compiled artifacts that the runtime's tests share, and a look into the engine's worker."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.prompts import CONTEXT
from support.sequences import Watched
from support.small import MAX_BATCH, PREFILL_CHUNK, small_checkpoint

import mxforge.engine
from mxforge import Engine
from mxforge.scheduler import Worker
from mxforge.tokenizer import HARMONY_VOCAB


@pytest.fixture(scope="session")
def odd_artifact(compiled: Callable[..., Path]) -> Path:
    """Shape odd-1 (window 5, odd sizes, vocabulary of 1003, no tokenizer), exact numerics."""
    return compiled("odd-1", max_batch=MAX_BATCH, prefill_chunk=PREFILL_CHUNK)


@pytest.fixture(scope="session")
def chat_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights with gpt-oss's vocabulary and tokenizer: what it says is noise."""
    from mxforge import compile_model

    checkpoint = small_checkpoint(tmp_path_factory.mktemp("chat"), vocab_size=HARMONY_VOCAB)
    return compile_model(checkpoint, output=checkpoint.parent / "artifact", max_batch=2)


@pytest.fixture(scope="module")
def engine(odd_artifact: Path) -> Iterator[Engine]:
    with Engine.load(odd_artifact, context_length=CONTEXT) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def text_engine(text_artifact: Path) -> Iterator[Engine]:
    with Engine.load(text_artifact, context_length=CONTEXT) as loaded:
        yield loaded


def wait_until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait for a condition that another thread brings about."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


@pytest.fixture
def until() -> Callable[..., None]:
    return wait_until


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> list[Worker]:
    """Every worker that an engine makes during the test, oldest first."""
    made: list[Worker] = []

    class Recorded(Worker):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(mxforge.engine, "Worker", Recorded)
    return made


@pytest.fixture
def watched_models(monkeypatch: pytest.MonkeyPatch) -> list[Watched]:
    """The sequences of every model that an engine opens during the test, oldest first."""
    opened: list[Watched] = []
    open_model = mxforge.engine.open_model

    def watched(*args, **options) -> Watched:
        opened.append(Watched(open_model(*args, **options)))
        return opened[-1]

    monkeypatch.setattr(mxforge.engine, "open_model", watched)
    return opened


@pytest.fixture
def load(
    odd_artifact: Path, workers: list[Worker], watched_models: list[Watched]
) -> Iterator[Callable[..., Engine]]:
    """load(options) -> an engine of `odd_artifact`, or of `artifact`.

    After the test its requests have to end, and no sequence may be left but of those that ran when
    it was closed.
    """
    engines: list[Engine] = []

    def load_engine(artifact: Path = odd_artifact, **options) -> Engine:
        engines.append(Engine.load(artifact, **{"context_length": CONTEXT, **options}))
        return engines[-1]

    yield load_engine
    for worker in workers:
        wait_until(lambda worker=worker: worker._closing or not worker._running)
    for engine in engines:
        engine.close()
    ran = [request.sequence for worker in workers for request in worker._running]
    left = [sequence for model in watched_models for sequence in model.open]
    assert sorted(left) == sorted(sequence for sequence in ran if sequence)
    assert all(model.closed for model in watched_models)
