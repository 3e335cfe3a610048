"""Times llama.cpp on one GGUF in this process, and prints its samples as JSON.

Everything goes through llama.cpp's C interface: between two steps there is only the choice of the
likeliest token. Called by scripts/bench with a JSON object of options.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import llama_cpp as ll
import numpy as np
from _bench import Probe, beside

CHUNK = 512


class Context:
    """One llama.cpp context: KV cache, threads, and what is fed to it."""

    def __init__(self, model: Any, *, context: int, sequences: int, threads: int) -> None:
        params = ll.llama_context_default_params()
        params.n_ctx = context
        params.n_batch = params.n_ubatch = CHUNK
        params.n_seq_max = sequences
        params.swa_full = False  # sliding layers keep their window only, as llama-server does
        params.kv_unified = True  # every sequence may fill the whole context
        params.n_threads = params.n_threads_batch = threads
        self._context = ll.llama_init_from_model(model, params)
        if not self._context:
            raise SystemExit("llama.cpp could not make a context; is there enough memory?")
        self._vocab = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(model))
        self._batch = ll.llama_batch_init(CHUNK, 0, 1)

    def close(self) -> None:
        ll.llama_batch_free(self._batch)
        ll.llama_free(self._context)

    def clear(self) -> None:
        ll.llama_memory_clear(ll.llama_get_memory(self._context), True)

    def step(self, tokens: Sequence[tuple[int, int, int]], last_only: bool) -> list[int]:
        """Feed (token, position, sequence); the likeliest tokens after the last, or after each."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, (token, position, sequence) in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = not last_only or i == len(tokens) - 1
        if code := ll.llama_decode(self._context, batch):
            raise SystemExit(f"llama_decode failed with code {code}")
        rows = [len(tokens) - 1] if last_only else range(len(tokens))
        return [self._likeliest(row) for row in rows]

    def _likeliest(self, row: int) -> int:
        logits = ll.llama_get_logits_ith(self._context, row)  # waits for the result
        return int(np.argmax(np.ctypeslib.as_array(logits, (self._vocab,))))

    def prefill(self, prompt: Sequence[int], sequence: int = 0) -> int:
        """Feed a prompt in chunks; the first token of the answer."""
        chosen = -1
        for start in range(0, len(prompt), CHUNK):
            chunk = [(t, start + i, sequence) for i, t in enumerate(prompt[start : start + CHUNK])]
            chosen = self.step(chunk, last_only=True)[0]
        return chosen

    def decode_tok_s(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> float:
        """Tokens a second of all sequences together, after their prompts are in."""
        self.clear()
        tokens = [self.prefill(prompt, sequence) for sequence, prompt in enumerate(prompts)]
        started = time.perf_counter()
        for step in range(new_tokens):
            fed = [(t, len(prompts[s]) + step, s) for s, t in enumerate(tokens)]
            tokens = self.step(fed, last_only=False)
        return new_tokens * len(prompts) / (time.perf_counter() - started)

    def prefill_tok_s(self, prompt: Sequence[int]) -> float:
        self.clear()
        started = time.perf_counter()
        self.prefill(prompt)
        return len(prompt) / (time.perf_counter() - started)


@ll.llama_log_callback
def _quiet(level: int, text: bytes, _data: ctypes.c_void_p) -> None:
    if level >= 3:  # warnings and errors
        sys.stderr.write(text.decode(errors="replace"))


def main() -> None:
    options = json.loads(sys.argv[1])
    started = time.perf_counter()
    ll.llama_log_set(_quiet, ctypes.c_void_p(0))
    ll.llama_backend_init()
    params = ll.llama_model_default_params()
    # It copies the experts into a layout of its own: with a mapping there would be two of them.
    params.load_mode = ll.LLAMA_LOAD_MODE_NONE
    model = ll.llama_model_load_from_file(options["gguf"].encode(), params)
    if not model:
        raise SystemExit("llama.cpp could not load the file")
    common = {"context": options["context_length"], "threads": options["threads"]}
    context = Context(model, sequences=1, **common)
    load_s = time.perf_counter() - started
    context.prefill([1] * 16)
    once = {
        "first_token_s": [time.perf_counter() - started],
        "load_s": [load_s],
        "peak_rss_bytes": [_peak_rss()],  # before the probe's own memory
    }
    context.close()
    probe = Probe()
    samples = []
    for seed in options["seeds"]:
        samples.append(once | sample(model, probe, seed, options, common))
        once = {}
    print(json.dumps(samples))


def sample(
    model: Any, probe: Probe, seed: int, options: dict[str, Any], common: dict[str, Any]
) -> dict[str, Any]:
    """Every figure once, each with what stood beside it."""
    rng = np.random.default_rng(seed)
    found: dict[str, Any] = {}
    new_tokens = options["new_tokens"]

    def prompts(count: int, length: int) -> list[list[int]]:
        return rng.integers(0, options["vocab_size"], (count, length)).tolist()

    def measure(name: str, figure: Callable[[], float]) -> None:
        with beside(probe, options["patience_s"]) as around:
            tok_s = figure()
        found[name] = {"tok_s": tok_s, **around}

    context = Context(model, sequences=1, **common)
    context.prefill(prompts(1, 16)[0])  # wakes what sleeps until the first step
    for length in options["prefill"]:
        (prompt,) = prompts(1, length)
        measure(f"prefill_{length}", partial(context.prefill_tok_s, prompt))
    alone = prompts(1, options["decode_prompt"])
    measure("decode_1", partial(context.decode_tok_s, alone, new_tokens))
    context.close()
    for batch in options["batches"]:
        together = Context(model, sequences=batch, **common)
        several = prompts(batch, 16)
        together.decode_tok_s(several, 1)
        measure(f"decode_{batch}", partial(together.decode_tok_s, several, max(1, new_tokens // 2)))
        together.close()
    return found


def _peak_rss() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)[0]) * 1024


if __name__ == "__main__":
    main()
