"""A chunk of a prompt of gpt-oss: its launches and their blocks, counted in the compiled code.

Decoded tokens of other sequences go with it, in the same call.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.results import table
from checkpoints.shapes import hf_config

from . import results, shipped
from .token import CARDS, chunk_launches

TITLE = "A chunk of a prompt"
TOKENS, SEQUENCES = 2048, 3
MOST_LAUNCHES = 12  # of a layer
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
        )
    return "\n\n".join(parts) + "\n"
