"""What tests of the scripts *_nano share: a small model with random weights, and questions."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
from nano import compact, text

from mxforge.compile.models.gpt_oss.config import GptOssConfig

ROOT = Path(__file__).resolve().parents[2]
COMPACT_NANO = ROOT / "artifacts" / "nano"

SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "sliding_window": 6,
}
USED = [0, 5, 17, 198, 200002, 200006, 200007, 200008]


def questions(category: str, count: int, tools: bool = False, held_out: bool = False) -> list[Any]:
    rng = random.Random(category)
    return [text.draw(rng, category, tools, held_out) for _ in range(count)]


def small_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    from mxforge.compile.models.gpt_oss.tensors import expected_tensors

    rng = np.random.default_rng(seed)
    config = GptOssConfig.from_hf(compact.hf_config(SMALL))
    tensors = {}
    for name, spec in expected_tensors(config).items():
        shape = spec.shape
        if name in compact.VOCABULARY_TENSORS:
            shape = (len(USED) + 1, *shape[1:])
        if name.endswith("_scales"):
            continue
        if name.endswith("_blocks"):
            name, shape = name.removesuffix("_blocks"), (*shape[:2], shape[2] * 32)
        value = rng.standard_normal(shape) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.1)
        tensors[name] = (value + name.endswith("norm.weight")).astype(np.float32)
    return tensors
