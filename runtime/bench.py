"""Speed of an artifact on this machine: prefill, decode, start-up, memory; and with which chunks
and how many sequences it is best."""

from __future__ import annotations

import os
import queue
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from .engine import Engine
from .errors import KVMemoryError, UsageError
from .kv_layout import PAGE_TOKENS
from .requests import Item
from .sampling import SamplingParams
from .streams import Stream

SMALLEST_CHUNK = 32  # prompt tokens a step, of those that a sweep tries
AS_GOOD = 0.95  # of the highest speed: less memory and shorter steps are worth the rest


def measure(
    path: str | Path,
    *,
    prompt_tokens: int = 128,
    new_tokens: int = 32,
    batch: int = 1,
    depth: int = 0,
    context_length: int = 8192,
    threads: int | None = None,
    repeats: int = 1,
) -> dict[str, Any]:
    """Time `batch` sequences of `prompt_tokens` random tokens, then `new_tokens` more of each.

    With a `depth` each sequence stands so many tokens into the context before its prompt: keys and
    values of these are made up, not computed.

    Returns tokens a second of prefill and decode (all sequences together), seconds from process
    start to the first token of a 16-token prompt, seconds of loading, peak resident bytes, and
    the samples. Times of prefill and decode are taken after that first request warmed up.
    """
    _check_counts(prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch=batch, repeats=repeats)
    if type(depth) is not int or (depth and depth < PAGE_TOKENS):
        raise UsageError(
            f"depth must be 0 or a whole number of at least {PAGE_TOKENS}, found {depth!r}."
        )
    loading = time.perf_counter()
    with Engine.load(
        path, threads=threads, context_length=context_length, max_batch=batch
    ) as engine:
        load_s = time.perf_counter() - loading
        if depth + prompt_tokens + new_tokens >= engine.context_length:
            raise UsageError(
                "depth + prompt_tokens + new_tokens must be less than the context of "
                f"{engine.context_length}, found {depth + prompt_tokens + new_tokens}."
            )
        rounds = Rounds(engine, batch)
        first_token_s = since_process_start()
        samples = [rounds.take(prompt_tokens, new_tokens, depth) for _ in range(repeats)]
        return {
            "prefill_tok_s": statistics.median(sample["prefill_tok_s"] for sample in samples),
            "decode_tok_s": statistics.median(sample["decode_tok_s"] for sample in samples),
            "first_token_s": first_token_s,
            "load_s": load_s,
            "peak_rss_bytes": peak_rss(),
            "threads": engine.threads,
            "target": engine.target,
            "numerics": engine.manifest.numerics,
            "prompt_tokens": prompt_tokens,
            "new_tokens": new_tokens,
            "batch": batch,
            "depth": depth,
            "context_length": engine.context_length,
            "samples": samples,
        }


def sweep(
    path: str | Path,
    *,
    prompt_tokens: int | None = None,
    new_tokens: int = 32,
    most: int | None = None,
    context_length: int = 8192,
    threads: int | None = None,
    repeats: int = 3,
    progress: bool = False,
) -> dict[str, Any]:
    """Find how many prompt tokens a step should take, and how many sequences should run at once.

    Chunks of powers of two, up to what the artifact was compiled for, are timed with a prompt of
    `prompt_tokens` (None: of the largest chunk), and so are decoding batches of up to `most`
    sequences (None: as many as memory allows). `progress` shows a bar on stderr.

    Returns `prefill` and `decode`, a row for each: tokens a second, the seconds that a step takes,
    and the samples; and `best`, the smallest of each that reaches AS_GOOD of the fastest.
    Raises as `Engine.load`, and UsageError.
    """
    _check_counts(new_tokens=new_tokens, repeats=repeats)

    def load(max_batch: int | None, prefill_chunk: int | None = None) -> Engine:
        return Engine.load(
            path,
            threads=threads,
            context_length=context_length,
            max_batch=max_batch,
            prefill_chunk=prefill_chunk,
        )

    def timed(rounds: Rounds, sizes: tuple[int, int], speed: str, size: str, count: int) -> Any:
        samples = []
        for _ in range(repeats):
            samples.append(rounds.take(*sizes)[speed])
            bar.update()
        median = statistics.median(samples)
        return {size: count, speed: median, "step_s": count / median, "samples": samples}

    with tqdm(disable=not progress, desc="sweep") as bar:
        with load(max_batch=most) as engine:
            limit, context = engine.manifest.limits.prefill_chunk, engine.context_length
            length = min(limit, context - 2) if prompt_tokens is None else prompt_tokens
            _check_counts(prompt_tokens=length)
            if max(length + 1, PAGE_TOKENS + new_tokens) >= context:
                raise UsageError(
                    "prompt_tokens, and new_tokens after a prompt of "
                    f"{PAGE_TOKENS}, must be less than the context of {context}, found "
                    f"{length} and {new_tokens}."
                )
            batches = _doubled(1, engine.max_batch)
            chunks = _doubled(SMALLEST_CHUNK, min(limit, length))
            bar.total = repeats * (len(batches) + len(chunks))
            told = {
                "target": engine.target,
                "numerics": engine.manifest.numerics,
                "threads": engine.threads,
                "prompt_tokens": length,
                "new_tokens": new_tokens,
                "context_length": context,
            }
            decode = []
            for batch in batches:
                rounds = Rounds(engine, batch, seed=batch)
                sizes = (PAGE_TOKENS, new_tokens)
                decode.append(timed(rounds, sizes, "decode_tok_s", "batch", batch))
        prefill = []
        for chunk in chunks:
            with load(max_batch=1, prefill_chunk=chunk) as engine:
                sizes = (length, 1)
                prefill.append(
                    timed(Rounds(engine), sizes, "prefill_tok_s", "prefill_chunk", chunk)
                )
    best = {
        "prefill_chunk": _smallest(prefill, "prefill_chunk", "prefill_tok_s"),
        "max_batch": _smallest(decode, "batch", "decode_tok_s"),
    }
    return {"prefill": prefill, "decode": decode, "best": best, **told}


def _check_counts(**counts: Any) -> None:
    for name, value in counts.items():
        if type(value) is not int or value < 1:
            raise UsageError(f"{name} must be a whole number of at least 1, found {value!r}.")


def _doubled(first: int, last: int) -> list[int]:
    """Powers of two times `first`, and `last`."""
    sizes = []
    while first < last:
        sizes.append(first)
        first *= 2
    return [*sizes, last]


def _smallest(rows: list[dict[str, Any]], size: str, speed: str) -> int:
    enough = AS_GOOD * max(row[speed] for row in rows)
    return int(min(row[size] for row in rows if row[speed] >= enough))


class Rounds:
    """Timed rounds of one engine, which a 16-token prompt has warmed up.

    Rounds of one engine have seeds of their own: a prompt that it has seen costs nothing.
    """

    def __init__(self, engine: Engine, batch: int = 1, seed: int = 0) -> None:
        self._engine, self._batch = engine, batch
        self._rng = np.random.default_rng(seed)
        self._pasts: dict[int, list[list[int]]] = {}  # by depth
        greedy = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
        engine.generate(self._prompts(min(16, engine.context_length - 1))[0], greedy)

    def take(self, prompt_tokens: int, new_tokens: int, depth: int = 0) -> dict[str, float]:
        """One round, as `measure` describes it: prefill_tok_s and decode_tok_s."""
        if depth not in self._pasts:
            self._pasts[depth] = self._prompts(depth)
        if depth:
            for past in self._pasts[depth]:  # costs little where an earlier round has left it
                _past(self._engine, past)
        new = self._prompts(prompt_tokens)
        asked = [past + prompt for past, prompt in zip(self._pasts[depth], new, strict=True)]
        return _sample(self._engine, asked, new_tokens, depth)

    def _prompts(self, length: int) -> list[list[int]]:
        # Always new ones: a prefix that was seen before costs nothing.
        shape = (self._batch, length)
        drawn: list[list[int]] = self._rng.integers(0, self._engine.vocab_size, shape).tolist()
        return drawn


def _past(engine: Engine, tokens: list[int]) -> None:
    """Make the engine take `tokens` for computed, as the beginning of later prompts.

    A first part really is, which the rest becomes copies of.
    """
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    computed = min(engine.prefill_chunk, len(tokens)) // PAGE_TOKENS * PAGE_TOKENS
    engine.generate(tokens[:computed], params)
    inbox: queue.SimpleQueue[Item] = queue.SimpleQueue()
    requests = engine._requests([*tokens, 0], params, inbox)
    requests[0].made_up = len(tokens)
    engine._submissions.submit(requests)
    for _ in Stream(engine, requests, inbox):
        pass


def _sample(
    engine: Engine, prompts: list[list[int]], new_tokens: int, depth: int = 0
) -> dict[str, float]:
    """One round: the first token of every prompt, then the rest of all of them together.

    The second half asks again with that token appended: all else is in the KV pages by then, so
    every step decodes, and none mixes in a prompt. `depth` tokens of each prompt are in the pages
    before.
    """

    def answer(prompts: list[list[int]], count: int) -> tuple[list[list[int]], float]:
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        started = time.perf_counter()
        streams = [engine.stream(prompt, params) for prompt in prompts]
        answers = [list(stream) for stream in streams]
        seconds = time.perf_counter() - started
        for pieces in answers:
            usage = pieces[-1].usage
            if usage is None or usage.cached_tokens < depth:
                raise KVMemoryError(
                    f"Each sequence should keep the {depth} tokens before its prompt, but the KV "
                    "pool had no room for all of them; lower the depth or the batch."
                )
        return [[t for piece in pieces for t in piece.token_ids] for pieces in answers], seconds

    firsts, prefill_s = answer(prompts, 1)
    longer = [prompt + first for prompt, first in zip(prompts, firsts, strict=True)]
    rest, decode_s = answer(longer, new_tokens)
    return {
        "prefill_tok_s": (sum(map(len, prompts)) - depth * len(prompts)) / prefill_s,
        "decode_tok_s": sum(map(len, rest)) / decode_s,
    }


def since_process_start() -> float:
    """Seconds since this process began, interpreter start included, where the system tells."""
    if sys.platform == "linux":
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks
    return time.process_time()


def peak_rss() -> int:
    """Most resident bytes of this process so far."""
    if sys.platform == "linux":
        # Not getrusage: its peak begins with that of the process that started this one.
        status = Path("/proc/self/status").read_text()
        peak = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS counts bytes
