from __future__ import annotations

import dataclasses
import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args

import ml_dtypes
import numpy as np
import pytest
from checkpoints.random_checkpoint import write_checkpoint
from checkpoints.shapes import ODD_SHAPES, hf_config
from support.targets import CUDA, PLAIN_CPU

from mxforge.compile import targets, weights
from mxforge.compile.checkpoint import HFCheckpoint
from mxforge.compile.formats import Precision
from mxforge.compile.models.gpt_oss import GPT_OSS
from mxforge.compile.models.gpt_oss.config import GptOssConfig
from mxforge.compile.models.gpt_oss.tensors import expected_tensors
from mxforge.compile.models.tensors import WeightRole
from mxforge.compile.weights import PackedWeight, packed_weights
from mxforge.errors import NaNScaleError
from mxforge.safetensors import SafetensorsWriter
from mxforge.schedules.kernel import Target
from mxforge.schedules.linear import bf16_cpu

Checkpoints = Callable[[str], Path]

F32, I8 = Precision("float32", "f32"), Precision("float16", "i8", "i8")
BF16 = Precision("float16", "bf16", "bf16xbf16")
LAYOUTS = {
    "cpu f32": (PLAIN_CPU, F32),
    "cpu bf16": (PLAIN_CPU, BF16),
    "cpu i8": (PLAIN_CPU, I8),
    "gpu": (CUDA, F32),
}


def content(weight: PackedWeight, checkpoint: HFCheckpoint) -> np.ndarray:
    return np.concatenate(list(weight.chunks(checkpoint)))


def all_packed(config: GptOssConfig, target: Target, precision: Precision) -> list[PackedWeight]:
    return packed_weights(GPT_OSS.weights(config), target, precision)


def named(config: GptOssConfig, target: Target, precision: Precision) -> dict[str, PackedWeight]:
    return {weight.name: weight for weight in all_packed(config, target, precision)}


def test_every_role_has_a_packer():
    assert weights._PACKERS.keys() == set(get_args(WeightRole))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ODD_SHAPES)
def test_every_weight_has_the_shape_and_size_that_it_declares(
    name, layout, odd_checkpoint: Checkpoints
):
    checkpoint = HFCheckpoint(odd_checkpoint(name))
    for weight in all_packed(checkpoint.config, *LAYOUTS[layout]):
        packed = content(weight, checkpoint)
        assert packed.shape == weight.shape, weight.name
        assert packed.dtype.name == weight.dtype, weight.name
        assert packed.nbytes == weight.nbytes, weight.name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["20b", "120b-2layers", *ODD_SHAPES])
def test_every_tensor_of_the_checkpoint_is_used_once(name, layout):
    config = GptOssConfig.from_hf(hf_config(name))
    listed = all_packed(config, *LAYOUTS[layout])
    sources = [source for weight in listed for source in weight.sources]
    assert sorted(sources) == sorted(expected_tensors(config))
    assert len({weight.name for weight in listed}) == len(listed)


def test_the_published_20b_takes_the_bytes_of_the_published_20b():
    """3.609 GB of BF16 and 10.152 GB of MXFP4; small vectors grow to f32, dense rows to tiles.

    With 8-bit dense weights, 34 bytes instead of 64 for 32 of attention's and lm_head's 1.216 G.
    """
    config = GptOssConfig.from_hf(hf_config("20b"))
    bf16, i8 = 13.761e9, 13.761e9 - 1.216e9 * 30 / 32
    for precision, published in ((F32, bf16), (BF16, bf16), (I8, i8)):
        total = sum(weight.nbytes for weight in all_packed(config, PLAIN_CPU, precision))
        assert published < total < published * 1.002


@pytest.mark.parametrize("layout", LAYOUTS)
def test_small_chunks_make_the_same_weights(layout, odd_checkpoint: Checkpoints, monkeypatch):
    checkpoint = HFCheckpoint(odd_checkpoint("odd-4"))
    whole = all_packed(checkpoint.config, *LAYOUTS[layout])
    expected = [content(weight, checkpoint) for weight in whole]
    monkeypatch.setattr(weights, "CHUNK_BYTES", 1)
    cut = 0
    for weight, truth in zip(
        all_packed(checkpoint.config, *LAYOUTS[layout]), expected, strict=True
    ):
        chunks = list(weight.chunks(checkpoint))
        cut += len(chunks) > 1
        assert np.concatenate(chunks).tobytes() == truth.tobytes(), weight.name
    assert cut > 10


# -- layouts ---------------------------------------------------------------------------------------


def unpack_dense(packed: np.ndarray, rows: int) -> np.ndarray:
    groups, k, tile = packed.shape
    return packed.transpose(0, 2, 1).reshape(groups * tile, k)[:rows]


def test_queries_keys_and_values_are_stacked_in_this_order(odd_checkpoint: Checkpoints):
    checkpoint = HFCheckpoint(odd_checkpoint("odd-1"))
    config, prefix = checkpoint.config, "model.layers.1.self_attn."
    parts = [checkpoint.tensor(f"{prefix}{name}_proj.weight") for name in "qkv"]
    stacked = np.concatenate(parts)
    packed = named(config, PLAIN_CPU, F32)[f"{prefix}qkv_proj.weight"]
    rows = unpack_dense(content(packed, checkpoint), config.qkv_rows)
    assert (rows == stacked).all()
    # GPUs read whole tiles of a head, in the order of their lanes.
    on_gpu = content(named(config, CUDA, F32)[packed.name], checkpoint)
    assert (
        np.sort(on_gpu.view(np.uint16).ravel()) == np.sort(stacked.view(np.uint16).ravel())
    ).all()
    bias = content(named(config, PLAIN_CPU, F32)[f"{prefix}qkv_proj.bias"], checkpoint)
    biases = [checkpoint.tensor(f"{prefix}{name}_proj.bias") for name in "qkv"]
    assert (bias == np.concatenate(biases).astype(np.float32)).all()


def test_rows_beyond_the_last_tile_are_zeros(odd_checkpoint: Checkpoints):
    checkpoint = HFCheckpoint(odd_checkpoint("odd-1"))
    packed = content(named(checkpoint.config, PLAIN_CPU, F32)["lm_head.weight"], checkpoint)
    rest = checkpoint.config.vocab_size % bf16_cpu.TILE.rows
    assert rest
    assert (packed[-1, :, rest:] == 0).all()
    assert (packed[-1, :, :rest] == checkpoint.tensor("lm_head.weight")[-rest:].T).all()


def test_gpus_keep_the_bits_of_experts_in_another_order(odd_checkpoint: Checkpoints):
    checkpoint = HFCheckpoint(odd_checkpoint("odd-3"))
    listed = named(checkpoint.config, CUDA, F32)
    prefix = "model.layers.2.mlp.experts.gate_up_proj_"
    for part in ("blocks", "scales"):
        packed, stored = (
            content(listed[prefix + part], checkpoint),
            checkpoint.tensor(prefix + part),
        )
        assert _set_bits(packed) == _set_bits(stored)
    bias = checkpoint.tensor(f"{prefix}bias")
    assert (content(listed[f"{prefix}bias"], checkpoint) == bias).all()


def _set_bits(array: np.ndarray) -> int:
    return int(np.unpackbits(np.ascontiguousarray(array).view(np.uint8)).sum())


def test_gate_and_up_change_order_together(odd_checkpoint: Checkpoints):
    """On CPUs the rows of blocks, scales and bias of gate_up_proj are permuted alike."""
    checkpoint = HFCheckpoint(odd_checkpoint("odd-1"))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    listed = named(checkpoint.config, PLAIN_CPU, F32)
    stored = checkpoint.tensor(f"{name}_bias").astype(np.float32)
    bias = content(listed[f"{name}_bias"], checkpoint)
    order = np.array([int(np.flatnonzero(stored[0] == value)[0]) for value in bias[0]])
    unique = [i for i, value in enumerate(bias[0]) if (stored[0] == value).sum() == 1]
    scales = content(listed[f"{name}_scales"], checkpoint)  # [experts, groups, k/32, 32 rows]
    rows = scales.transpose(0, 1, 3, 2).reshape(checkpoint.tensor(f"{name}_scales").shape)
    assert len(unique) > 100
    assert (rows[0, unique] == checkpoint.tensor(f"{name}_scales")[0, order[unique]]).all()


# -- other checkpoints than the published ----------------------------------------------------------


def rewritten(folder: Path, out: Path, change: Callable[[str, np.ndarray], np.ndarray]) -> Path:
    """A copy of a checkpoint with every tensor changed."""
    checkpoint = HFCheckpoint(folder)
    out.mkdir()
    dtypes = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "uint8": "U8"}
    arrays = {name: change(name, checkpoint.tensor(name)) for name in checkpoint.tensors}
    infos = [(name, dtypes[array.dtype.name], array.shape) for name, array in arrays.items()]
    with SafetensorsWriter(out / "model.safetensors", infos) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    (out / "config.json").write_bytes((folder / "config.json").read_bytes())
    return out


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_other_dense_dtypes_are_rounded_to_bfloat16(
    dtype, odd_checkpoint: Checkpoints, tmp_path: Path
):
    def change(_name: str, array: np.ndarray) -> np.ndarray:
        return array if array.dtype == np.uint8 else array.astype(dtype) * dtype(1.001)

    other = HFCheckpoint(rewritten(odd_checkpoint("odd-5"), tmp_path / "other", change))
    other.check()
    for weight in all_packed(other.config, PLAIN_CPU, F32):
        packed = content(weight, other)
        assert packed.shape == weight.shape
        assert packed.dtype.name == weight.dtype
    embedding = content(named(other.config, PLAIN_CPU, F32)["model.embed_tokens.weight"], other)
    nearest = other.tensor("model.embed_tokens.weight").astype(ml_dtypes.bfloat16)
    assert (embedding == nearest).all()


def test_without_attention_bias_the_library_gets_zeros(odd_checkpoint: Checkpoints):
    checkpoint = HFCheckpoint(odd_checkpoint("odd-5"))
    config = dataclasses.replace(checkpoint.config, attention_bias=False)
    listed = named(config, PLAIN_CPU, F32)
    for part in ("qkv_proj", "o_proj"):
        bias = listed[f"model.layers.0.self_attn.{part}.bias"]
        assert bias.sources == ()
        assert not content(bias, checkpoint).any()
    sources = [source for weight in listed.values() for source in weight.sources]
    assert sorted(sources) == sorted(expected_tensors(config))


@pytest.mark.parametrize("part", ["gate_up_proj", "down_proj"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_scale_that_is_no_number_is_found_while_packing(
    part, layout, odd_checkpoint: Checkpoints, tmp_path: Path
):
    name = f"model.layers.0.mlp.experts.{part}_scales"

    def change(tensor: str, array: np.ndarray) -> np.ndarray:
        array = array.copy()
        if tensor == name:
            array[0, 3, 0] = 255
        return array

    other = HFCheckpoint(rewritten(odd_checkpoint("odd-5"), tmp_path / "other", change))
    other.check()
    with pytest.raises(NaNScaleError, match=rf"{part}_scales .*\[0, 3, 0\]"):
        content(named(other.config, *LAYOUTS[layout])[name], other)


# -- memory ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> HFCheckpoint:
    """40 MB: a vocabulary of 20,000, and 64 experts of 130 KB each."""
    changes = {"hidden_size": 256, "intermediate_size": 320, "vocab_size": 20000}
    changes |= {"num_local_experts": 64, "num_hidden_layers": 1}
    folder = tmp_path_factory.mktemp("wide") / "checkpoint"
    return HFCheckpoint(write_checkpoint(folder, "odd-1", overrides=changes))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packing_holds_a_chunk_at_a_time(layout, wide: HFCheckpoint, monkeypatch):
    monkeypatch.setattr(weights, "CHUNK_BYTES", 1 << 20)
    listed = all_packed(wide.config, *LAYOUTS[layout])
    assert sum(weight.nbytes for weight in listed) > 23 << 20
    tracemalloc.start()
    try:
        for weight in listed:
            for chunk in weight.chunks(wide):
                del chunk
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


def test_fills_keep_random_weights_in_range():
    """What the runtime makes where there is no checkpoint: no NaN scales, no idle kinds."""
    config = GptOssConfig.from_hf(hf_config("20b"))
    for weight in all_packed(config, PLAIN_CPU, I8):
        json.dumps(weight.fill)
        ((kind, value),) = weight.fill.items()
        assert kind in ("values", "constant", "normal", "bytes")
        if weight.name.endswith("_scales"):
            low, high = value
            assert kind == "bytes"
            assert 0 < low <= high < 255


def test_targets_with_the_same_kernels_share_a_layout():
    config = GptOssConfig.from_hf(hf_config("odd-1"))

    def shapes(name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        for weight in all_packed(config, targets.resolve(name).kernels, F32):
            yield weight.name, weight.shape

    assert list(shapes("cpu:avx2")) == list(shapes("cpu:x86-64"))
