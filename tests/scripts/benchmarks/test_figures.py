"""Bytes and operations that a model needs at least, counted by scripts/benchmarks/figures.py."""

from __future__ import annotations

import dataclasses

import pytest
from benchmarks.figures import FIGURES, Traffic, flops_per_token
from benchmarks.figures import work as bytes_and_flops
from benchmarks.models import RandomModel
from checkpoints.shapes import hf_config

from mxforge.compile.models.gpt_oss.config import GptOssConfig


def test_active_experts_and_the_window_are_counted():
    """By hand, for the 20b shapes: 24 layers of 32 experts, 4 a token, half of them sliding."""
    config = GptOssConfig.from_hf(hf_config("20b"))
    traffic = Traffic(dense=1000, experts=3200, kv_full=10, kv_sliding=7)
    decode = bytes_and_flops(FIGURES["decode_8k"], config, traffic)
    length = 8192 + 16 + 8
    assert decode["bytes"] == pytest.approx(1000 + 400 + length * 10 + 128 * 7)
    eight = bytes_and_flops(FIGURES["batch_8"], config, traffic)
    assert eight["bytes"] == pytest.approx(1000 + 3200 * (1 - (7 / 8) ** 8) + 8 * 24 * 17)
    prefill = bytes_and_flops(FIGURES["prefill_2048"], config, traffic)
    assert prefill["bytes"] == pytest.approx(4 * (1000 + 3200))  # all experts, in each chunk
    assert prefill["flops"] == 2048 * flops_per_token(config)


def test_bytes_are_counted_from_the_manifest():
    shapes = {
        "model.embed_tokens.weight": ([100, 8], "bfloat16"),
        "model.layers.0.self_attn.o_proj.weight": ([8, 8], "uint8"),
        "model.layers.0.self_attn.o_proj.weight_scale": ([8], "float16"),
        "model.layers.0.mlp.router.weight": ([4, 8], "bfloat16"),
        "model.layers.0.mlp.experts.down_proj_blocks": ([4, 8, 8], "uint8"),
        "model.layers.0.mlp.experts.down_proj_bias": ([4, 8], "float32"),
    }
    weights = [{"name": n, "shape": s, "dtype": d} for n, (s, d) in shapes.items()]
    groups = [
        {"window": 20, "layers": [0], "dtype": "int8", "page_shape": [2, 1, 80]},
        {"window": None, "layers": [1, 2], "dtype": "float16", "page_shape": [2, 1, 200]},
    ]
    traffic = Traffic.of_manifest({"weights": weights, "kv_groups": groups})
    assert (traffic.dense, traffic.experts) == (64 + 16 + 64, 256 + 128)
    assert (traffic.kv_full, traffic.kv_sliding) == (100, 10)


def test_bytes_of_the_gguf_are_those_of_its_file(tmp_path):
    gguf = pytest.importorskip("gguf")
    from benchmarks import random_gguf

    config = GptOssConfig.from_hf(hf_config("tiny", {"vocab_size": 500}))
    random_gguf.write_gguf(tmp_path / "tiny.gguf", config)
    tensors = gguf.GGUFReader(tmp_path / "tiny.gguf").tensors
    nbytes = {tensor.name: int(tensor.n_bytes) for tensor in tensors}
    traffic = Traffic.of_gguf(config)
    assert traffic.experts == sum(n for name, n in nbytes.items() if "_exps." in name)
    unread = nbytes["token_embd.weight"]
    assert traffic.dense + traffic.experts == sum(nbytes.values()) - unread


def test_what_a_choice_reads_is_counted_as_an_artifact_says(work):
    """Of the tiny shape, without compiling it and as compiled."""
    from mxforge.artifact import read_manifest
    from mxforge.compile.targets import resolve

    model = RandomModel.of("tiny", work)
    if not model.artifact.exists():
        model.compile()
    target = resolve("cpu")
    counted = Traffic.of_model(model.config, target, target.precision("fast", model.config))
    manifest = dataclasses.asdict(read_manifest(model.artifact))
    assert counted == Traffic.of_manifest(manifest)
