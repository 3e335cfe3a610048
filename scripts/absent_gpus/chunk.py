"""A chunk of a prompt of gpt-oss: its launches and their blocks, counted in the compiled code.

Decoded tokens of other sequences go with it, in the same call.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.results import table
from checkpoints.shapes import hf_config

from mxforge.compile.models.gpt_oss.config import GptOssConfig
from mxforge.compile.targets import resolve
from mxforge.kv_layout import PAGE_TOKENS, page_bytes

from . import results, shipped
from .token import CARDS, chunk_launches

TITLE = "A chunk of a prompt"
TOKENS, SEQUENCES = 2048, 3
MOST_LAUNCHES = 12  # of a layer
CONTEXTS = (0, 8192 - TOKENS)  # where the chunk begins
SPREAD: dict[str, float] = {}


def measure(_scratch: Path) -> results.Results:
    """Launches on each card, added up by function: how many, blocks and threads of one."""
    cards = {}
    for name, card in CARDS.items():
        functions: dict[str, dict[str, Any]] = {}
        for one in chunk_launches(card.target, shipped.MODEL, shipped.NUMERICS, TOKENS, SEQUENCES):
            sums = functions.setdefault(
                one.function, {"launches": 0, "blocks": one.blocks, "threads": one.threads}
            )
            sums["launches"] += 1
        cards[name] = functions
    return results.results("counted in the compiled code", shipped.MODEL, shipped.NUMERICS, cards)


def of_a_layer(functions: dict[str, Any]) -> float:
    """Launches of a layer on average: without those of the whole chunk."""
    layers = hf_config(shipped.MODEL)["num_hidden_layers"]
    return sum(one["launches"] for one in functions.values() if one["launches"] > 1) / layers


def cache_read(tokens: int, context: int, window: int, of_block: int) -> int:
    """Pages of a KV head that blocks of so many tokens read, for a chunk that begins behind
    `context` tokens; window 0 means all keys."""
    pages = 0
    for first in range(context, context + tokens, of_block):
        last = min(first + of_block, context + tokens) - 1
        low = max(first - window + 1, 0) if window else 0
        pages += last // PAGE_TOKENS - low // PAGE_TOKENS + 1
    return pages


def tokens_of_block(functions: dict[str, Any], kv_heads: int) -> int:
    """Tokens that share a read of the cache: by the blocks of the prompt's attention, which is
    launched before that of tokens that are alone."""
    blocks = next(
        one["blocks"] for name, one in functions.items() if name.startswith("f32_paged_attention")
    )
    return -(-(TOKENS + SEQUENCES) // -(-blocks // kv_heads))


def _cache(card: str, functions: dict[str, Any]) -> str:
    """The table of what attention reads."""
    config = GptOssConfig.from_hf(hf_config(shipped.MODEL))
    kv_heads = config.num_key_value_heads
    precision = resolve(CARDS[card].target).precision(shipped.NUMERICS, config)
    page = page_bytes(kv_heads, config.head_dim, precision.kv)
    shared = tokens_of_block(functions, kv_heads)
    rows = [
        [
            kind,
            f"{context:,}",
            *(f"{cache_read(TOKENS, context, window, n) * page / 1e6:,.0f}" for n in (1, shared)),
        ]
        for kind, window in (("full", 0), ("sliding", config.sliding_window))
        for context in CONTEXTS
    ]
    heading = f"in blocks of {shared}" if shared > 1 else "as it is"
    return table(["layer", "tokens before", "MB of cache, token by token", heading], rows)


def gates(found: results.Results) -> list[str]:
    """A sentence for each card with too many launches."""
    return [
        f"a layer of a chunk takes {of_a_layer(functions):.1f} launches on {card}, more than "
        f"{MOST_LAUNCHES}"
        for card, functions in found["gpus"].items()
        if of_a_layer(functions) > MOST_LAUNCHES
    ]


def page(found: results.Results) -> str:
    """The tables as Markdown."""
    parts = [
        f"# {TITLE}",
        "Written by `scripts/gpu_statistics`; do not edit. Counted in the compiled code of "
        f"gpt-oss-{found['model']}, {found['numerics']} numerics: {TOKENS:,} tokens of a prompt "
        f"and a decoded token of each of {SEQUENCES} sequences, in one call. Nothing ran on these "
        "cards.",
    ]
    for name, functions in found["gpus"].items():
        rows = [
            [function, str(one["launches"]), f"{one['blocks']:,}", str(one["threads"])]
            for function, one in functions.items()
        ]
        parts.append(
            f"## {name}, `{CARDS[name].target}`\n\n{of_a_layer(functions):.1f} launches a layer; "
            f"at most {MOST_LAUNCHES} were asked.\n\n"
            + table(["", "launches", "blocks", "threads"], rows)
            + "\n\nWhat attention reads of a layer's cache, through L2:\n\n"
            + _cache(name, functions)
        )
    return "\n\n".join(parts) + "\n"
