"""Prompts and parameters for the engine on the artifact `odd_artifact`; texts for nano."""

from __future__ import annotations

import numpy as np

from mxforge import SamplingParams
from mxforge.sampling import token_bitmask

CONTEXT = 512
VOCAB = 1003

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0, ignore_eos=True)  # until the context is full

NANO_PROMPTS = (
    "What is 17 + 25?", "What is 510 - 91?", "12 * 84", "Which is larger, 905 or 918?",
    "Is 81 more than 79?", "How many minutes are 25 hours?", "Convert 12 km to m.", "hello",
    "What is 1234 * 5678?", "Why is the sky blue?", "999 + 1", "7 x 8", "what is 0 - 9",
    "Compare 5 and 500.", "How many inches in 9 feet?", "Thanks!", "Who are you?", "3 - 3 =",
    "Multiply 99 by 12.", "What is the minimum of 70 and 700?",
)  # fmt: skip


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([seed, length]).integers(1, VOCAB, length).tolist()


def forced(*tokens: int, **others) -> SamplingParams:
    """Parameters that allow no other tokens."""
    return SamplingParams(bitmask=token_bitmask(tokens, VOCAB), **others)
