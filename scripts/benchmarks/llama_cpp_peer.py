"""Times llama.cpp on one GGUF in this process; prints a line of JSON for each sample as it comes.

Everything goes through llama.cpp's C interface: between two steps there is only the choice of the
likeliest token. Called by scripts/bench_peers with a JSON object of options.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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

    def prefill(self, prompt: Sequence[int], sequence: int = 0, past: int = 0) -> int:
        """Feed a prompt in chunks from position `past` on; the first token of the answer."""
        chosen = -1
        for start in range(0, len(prompt), CHUNK):
            piece = prompt[start : start + CHUNK]
            chunk = [(t, past + start + i, sequence) for i, t in enumerate(piece)]
            chosen = self.step(chunk, last_only=True)[0]
        return chosen

    def prefill_tok_s(self, prompt: Sequence[int]) -> float:
        started = time.perf_counter()
        self.prefill(prompt)
        return len(prompt) / (time.perf_counter() - started)

    def decode_tok_s(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, past: int = 0
    ) -> float:
        """Tokens a second of all sequences together, after their prompts are in."""
        tokens = [self.prefill(prompt, sequence, past) for sequence, prompt in enumerate(prompts)]
        started = time.perf_counter()
        for step in range(new_tokens):
            fed = [(t, past + len(prompts[s]) + step, s) for s, t in enumerate(tokens)]
            tokens = self.step(fed, last_only=False)
        return new_tokens * len(prompts) / (time.perf_counter() - started)

    def state(self) -> bytes:
        """Keys and values of sequence 0, in llama.cpp's format."""
        size = ll.llama_state_seq_get_size(self._context, 0)
        buffer = (ctypes.c_uint8 * size)()
        return bytes(buffer[: ll.llama_state_seq_get_data(self._context, buffer, size, 0)])

    def restore(self, state: np.ndarray, length: int) -> None:
        """Let sequence 0 have this state, of `length` positions."""
        pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        read = ll.llama_state_seq_set_data(self._context, pointer, state.size, 0)
        last = ll.llama_memory_seq_pos_max(ll.llama_get_memory(self._context), 0)
        if (read, last) != (state.size, length - 1):
            raise SystemExit(
                f"llama.cpp should take a state of {length} positions, and took {last + 1}"
            )


# -- far into a context without computing it ------------------------------------------------------


def stretched(state: bytes, length: int) -> np.ndarray:
    """The state of a sequence of n computed positions, as if it had `length`: u8.

    Full layers get the n rows over and over, sliding ones keep theirs and move to the end. The
    format, as llama.cpp's llama_kv_cache::state_write has it, all little-endian:

        8 bytes                           of which kind it is
        for full, then for sliding layers:
          u32 streams, u32 cells          one stream
          cells × (i32 position, u32 1, i32 sequence)
          u32 transposed, u32 layers      not transposed
          layers × K, then layers × V:    u32 type, u64 bytes of a row, the rows of all cells
    """
    raw = np.frombuffer(state, np.uint8)
    at, parts, computed = 8, [raw[:8]], 0

    def take(kind: str, count: int = 1) -> np.ndarray:
        nonlocal at
        found = np.frombuffer(state, kind, count, at)
        at += found.nbytes
        return found

    def put(*values: np.ndarray) -> None:
        parts.extend(np.ascontiguousarray(value).view(np.uint8).ravel() for value in values)

    for full in (True, False):
        (streams, cells) = take("<u4", 2)
        positions = take("<i4", 3 * cells).reshape(-1, 3).copy()
        (transposed, layers) = take("<u4", 2)
        if streams != 1 or transposed or (np.diff(positions[:, 0]) != 1).any():
            raise SystemExit("llama.cpp's state is not of the layout that this script knows")
        if full:
            computed = cells
            positions = np.resize(positions, (length, 3))
            positions[:, 0] = np.arange(length)
        else:
            positions[:, 0] += length - computed
        put(np.array([streams, len(positions)], "<u4"), positions)
        put(np.array([transposed, layers], "<u4"))
        for _ in range(2 * layers):
            kind, row = take("<u4"), take("<u8")
            rows = take("u1", int(cells * row[0])).reshape(cells, -1)
            put(kind, row, np.resize(rows, (len(positions), rows.shape[1])))
    if at != len(state):
        raise SystemExit("llama.cpp's state has more in it than this script knows")
    return np.concatenate(parts)


# -- the measurements -----------------------------------------------------------------------------


@dataclass
class Run:
    """The model, the options, and a state to stretch."""

    model: Any
    options: dict[str, Any]
    computed: bytes = b""

    def context(self, length: int, sequences: int = 1) -> Context:
        context = Context(
            self.model, context=length, sequences=sequences, threads=self.options["threads"]
        )
        context.prefill([1] * 16)  # wakes what sleeps until the first step
        context.clear()
        return context

    def past(self, length: int) -> np.ndarray:
        """A state of so many positions."""
        if not self.computed:
            context = self.context(CHUNK)
            rng = np.random.default_rng(0)
            context.prefill(rng.integers(0, self.options["vocab_size"], CHUNK).tolist())
            self.computed = context.state()
            context.close()
        return stretched(self.computed, length)


def tok_s(run: Run, figure: dict[str, Any], seed: int, beside: Callable[[], Any]) -> dict[str, Any]:
    """One sample of prefill or decode, and what stood beside it."""
    rng = np.random.default_rng(seed)
    sizes = (figure["batch"], figure["prompt"])
    prompts = rng.integers(0, run.options["vocab_size"], sizes).tolist()
    context = run.context(figure["context"], figure["batch"])
    past = figure["depth"]
    if past:
        context.restore(run.past(past), past)
    with beside() as around:
        if figure["kind"] == "prefill":
            value = context.prefill_tok_s(prompts[0])
        else:
            value = context.decode_tok_s(prompts, figure["new"], past)
    context.close()
    return {"value": value, **around}


def peak_memory(run: Run, figure: dict[str, Any]) -> int:
    """The most that was resident since the process began, a whole context in it.

    llama.cpp writes all of the KV cache when it makes it, so that none need be filled.
    """
    from mxforge.bench import peak_rss

    context = run.context(figure["context"])
    context.decode_tok_s([[1] * figure["prompt"]], figure["new"])
    context.close()
    return peak_rss()


def load(gguf: str, mapped: bool) -> Any:
    """Read the weights into memory in llama.cpp's fastest layout, or only map the file."""
    ll.llama_log_set(_quiet, ctypes.c_void_p(0))
    ll.llama_backend_init()
    params = ll.llama_model_default_params()
    # It copies the experts into a layout of its own: with a mapping there would be two of them.
    params.load_mode = ll.LLAMA_LOAD_MODE_MMAP if mapped else ll.LLAMA_LOAD_MODE_NONE
    params.use_extra_bufts = not mapped
    model = ll.llama_model_load_from_file(gguf.encode(), params)
    if not model:
        raise SystemExit("llama.cpp could not load the file")
    return model


@ll.llama_log_callback
def _quiet(level: int, text: bytes, _data: ctypes.c_void_p) -> None:
    if level >= 3:  # warnings and errors
        sys.stderr.write(text.decode(errors="replace"))


def main() -> None:
    options = json.loads(sys.argv[1])
    figures: dict[str, dict[str, Any]] = options["figures"]
    mapped = "first_token" in figures  # the quickest start, and nothing else of this process
    run = Run(load(options["gguf"], mapped), options)
    if mapped:
        figure = figures["first_token"]
        Context(
            run.model, context=figure["context"], sequences=1, threads=options["threads"]
        ).prefill([1] * figure["prompt"])
        at = time.perf_counter()
        from mxforge.bench import since_process_start

        print(json.dumps({"value": since_process_start() - (time.perf_counter() - at)}))
        return
    peak = peak_memory(run, figures["memory"]) if "memory" in figures else None
    from benchmarks.machine import Probe, beside

    probe = Probe()  # has memory of its own
    for pair in options["pairs"]:
        for name, figure in figures.items():
            if name == "memory":
                found = {"value": peak, "bandwidth_gb_s": [round(probe.read_gb_s(), 2)]}
            else:
                found = tok_s(run, figure, pair, lambda: beside(probe, options["patience_s"]))
            print(json.dumps({"pair": pair, "figure": name, **found}), flush=True)


if __name__ == "__main__":
    main()
