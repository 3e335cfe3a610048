"""What a decoded token takes: counted in compiled code, and what is predicted from it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

from absent_gpus import results, token  # noqa: E402
from absent_gpus.token import Launch  # noqa: E402
from checkpoints.shapes import hf_config  # noqa: E402


@pytest.fixture(scope="module")
def found(vulkan: Any) -> list[Launch]:
    return token.launches("vulkan", "odd-1", "exact", sequences=2, context=40)


def test_launches_are_those_of_the_model_and_of_sampling(found: list[Launch]):
    layers = hf_config("odd-1")["num_hidden_layers"]
    count = Counter(launch.function for launch in found)
    assert count["bf16w_embed"] == count["sample_token"] == 1
    assert sum(n for name, n in count.items() if name.startswith("mxfp4w_moe_down")) == layers
    assert all(launch.blocks > 0 and launch.threads > 0 for launch in found)


def test_bytes_are_those_of_the_weights_that_a_token_reads(found: list[Launch]):
    config = hf_config("odd-1")
    (embed,) = (launch for launch in found if launch.function == "bf16w_embed")
    assert embed.weight_bytes == 2 * 2 * config["hidden_size"]
    downs = [launch for launch in found if launch.function.startswith("mxfp4w_moe_down")]
    one = config["hidden_size"] * (config["intermediate_size"] * 17 // 32 + 4)
    taken = 1 - (1 - config["num_experts_per_tok"] / config["num_local_experts"]) ** 2
    experts = config["num_local_experts"]
    # An odd number of blocks is packed with one of zeros.
    assert one * experts * taken <= downs[0].weight_bytes <= 1.25 * one * experts * taken


CARD = token.Card("cuda:sm_80", 1000, 10, 100, 1.0, 2.0, 500, "code")


def test_a_prediction_is_by_what_takes_longest():
    def us(blocks: int, bytes_: int, ahead: int = 0, instructions: float = 0.0) -> float:
        statistics = {"wide_loads_ahead": ahead, "instructions_a_weight": instructions}
        return token.predicted_us(Launch("i8w_a", blocks, 100, bytes_), CARD, statistics)

    assert us(1, 0) == 2.0  # the launch
    assert us(1000, 10**6, ahead=8) == pytest.approx(2 + 1)  # bandwidth
    assert us(1, 10**6, ahead=8) == pytest.approx(2 + 10**6 / (100 * 16 * 8 / 500) / 1e3)  # latency
    weights = 10**6 * 32 / 34
    assert us(1000, 10**6, 8, 100.0) == pytest.approx(2 + weights * 100 / (10 * 100 * 1e3))


def test_gates():
    functions = {"a": {"launches": 100, "blocks": 7, "threads": 64, "bytes": 0}}
    card = {"NVIDIA H200": functions}
    made = results.results("a compiler", "20b", "fast", card)
    assert token.gates(made) == []
    functions["a"]["bytes"] = 200_000_000
    assert token.gates(made) == ["a on NVIDIA H200 has 7 blocks for 132 units"]
    functions["a"] |= {"blocks": 132, "launches": 176}
    assert token.gates(made) == ["a token takes 176 launches on NVIDIA H200, more than 175"]


def test_tracked_token():
    path = ROOT / "docs" / "bench" / "token-absent-gpus.json"
    tracked = json.loads(path.read_text())
    assert path.read_text() == results.text(tracked)
    assert path.with_suffix(".md").read_text() == token.page(tracked)
    assert token.gates(tracked) == []
    assert list(tracked["gpus"]) == list(token.CARDS)
