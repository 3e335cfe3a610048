"""Prompts and parameters for the engine on the artifact `odd_artifact`."""

from __future__ import annotations

import numpy as np

from mxforge import SamplingParams
from mxforge.sampling import token_bitmask

CONTEXT = 512
VOCAB = 1003

GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
ENDLESS = SamplingParams(temperature=0, ignore_eos=True)  # until the context is full


def prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([seed, length]).integers(1, VOCAB, length).tolist()


def forced(*tokens: int, **others) -> SamplingParams:
    """Parameters that allow no other tokens."""
    return SamplingParams(bitmask=token_bitmask(tokens, VOCAB), **others)
