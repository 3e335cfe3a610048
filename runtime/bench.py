"""Speed of an artifact on this machine: prefill, decode, start-up, memory."""

from __future__ import annotations

import os
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from .engine import Engine, Stream
from .errors import KVMemoryError, UsageError
from .kv_layout import PAGE_TOKENS
from .sampling import SamplingParams


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
    for name, value in (
        ("prompt_tokens", prompt_tokens),
        ("new_tokens", new_tokens),
        ("batch", batch),
        ("repeats", repeats),
    ):
        if type(value) is not int or value < 1:
            raise UsageError(f"{name} must be a whole number of at least 1, found {value!r}.")
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


class Rounds:
    """Timed rounds of one engine, which a 16-token prompt has warmed up."""

    def __init__(self, engine: Engine, batch: int = 1) -> None:
        self._engine, self._batch = engine, batch
        self._rng = np.random.default_rng(0)
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
    request = engine._request([*tokens, 0], params)
    request.made_up = len(tokens)
    engine._submit(request)
    for _ in Stream(engine, request):
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
