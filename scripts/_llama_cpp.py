"""Times llama.cpp on one GGUF in this process, and prints one JSON object.

Everything goes through llama.cpp's C interface: between two steps there is only the choice of the
likeliest token. Called by scripts/bench with a JSON object of options.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import llama_cpp as ll
import numpy as np

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
    result: dict[str, Any] = {}
    rng = np.random.default_rng(options["seed"])

    def prompt(length: int) -> list[int]:
        return rng.integers(0, options["vocab_size"], length).tolist()

    common = {"context": options["context_length"], "threads": options["threads"]}
    context = Context(model, sequences=1, **common)
    result["load_s"] = time.perf_counter() - started
    context.prefill(prompt(16))
    result["first_token_s"] = time.perf_counter() - started
    for length in options["prefill"]:
        result[f"prefill_{length}"] = context.prefill_tok_s(prompt(length))
    new_tokens = options["new_tokens"]
    result["decode_1"] = context.decode_tok_s([prompt(options["decode_prompt"])], new_tokens)
    context.close()
    for batch in options["batches"]:
        context = Context(model, sequences=batch, **common)
        prompts = [prompt(16) for _ in range(batch)]
        context.decode_tok_s(prompts, 1)
        result[f"decode_{batch}"] = context.decode_tok_s(prompts, max(1, new_tokens // 2))
        context.close()
    print(json.dumps(result))


if __name__ == "__main__":
    main()
