from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from support.small import edit_json, rewrite

from mxforge.compile.checkpoint import HFCheckpoint, check_scales
from mxforge.compile.models.gpt_oss.reference import ReferenceModel
from mxforge.compile.models.gpt_oss.tensors import expected_tensors
from mxforge.errors import (
    CheckpointError,
    ConfigError,
    NaNScaleError,
    TensorDtypeError,
    TensorMissingError,
    TensorShapeError,
)
from mxforge.safetensors import dtype_name

BLOCKS = "model.layers.0.mlp.experts.gate_up_proj_blocks"
SCALES = "model.layers.1.mlp.experts.down_proj_scales"
QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(odd_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of odd-1 (one file) to damage."""
    return Path(shutil.copytree(odd_checkpoint("odd-1"), tmp_path / "odd-1"))


@pytest.fixture
def sharded(odd_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of odd-3 (several shards) to damage."""
    return Path(shutil.copytree(odd_checkpoint("odd-3"), tmp_path / "odd-3"))


@pytest.mark.parametrize("name", ["odd-1", "odd-3"])
def test_every_tensor_is_there(name, odd_checkpoint: Callable[[str], Path]):
    checkpoint = HFCheckpoint(odd_checkpoint(name))
    checkpoint.check()
    expected = expected_tensors(checkpoint.config)
    assert set(checkpoint.tensors) == set(expected)
    assert checkpoint.unexpected() == []
    assert checkpoint.dense_dtypes() == {"BF16"}
    assert len(checkpoint.files) == (1 if name == "odd-1" else 12)
    for tensor, spec in expected.items():
        array = checkpoint.tensor(tensor)
        assert array.shape == spec.shape
        assert array.dtype in (np.uint8, ml_dtypes.bfloat16)
        assert not array.flags.writeable


def test_tensors_of_the_published_20b():
    from checkpoints.shapes import hf_config

    from mxforge.compile.models.gpt_oss.config import GptOssConfig

    specs = expected_tensors(GptOssConfig.from_hf(hf_config("20b")))
    assert len(specs) == 3 + 24 * 19
    assert specs["model.layers.23.mlp.experts.gate_up_proj_blocks"].shape == (32, 5760, 90, 16)
    assert specs["model.layers.0.mlp.experts.down_proj_scales"].shape == (32, 2880, 90)
    assert specs["model.layers.0.self_attn.k_proj.weight"].shape == (512, 2880)
    assert specs["lm_head.weight"].shape == (201088, 2880)


def test_without_attention_biases(odd_checkpoint: Callable[[str], Path], folder: Path):
    biases = [
        name
        for name in HFCheckpoint(folder).tensors
        if "self_attn" in name and name.endswith(".bias")
    ]
    assert len(biases) == 3 * 4
    truth = {name: np.zeros_like(HFCheckpoint(folder).tensor(name)) for name in biases}
    rewrite(folder, truth)
    expected = ReferenceModel(folder).logits([1, 2, 3])
    edit_json(folder / "config.json", attention_bias=False)
    rewrite(folder, dict.fromkeys(biases))
    assert (ReferenceModel(folder).logits([1, 2, 3]) == expected).all()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_other_dense_dtypes_are_read(folder: Path, dtype: Any):
    before = ReferenceModel(folder).logits([5, 6, 7])
    source = HFCheckpoint(folder)
    dense = [n for n, spec in expected_tensors(source.config).items() if "BF16" in spec.dtypes]
    rewrite(folder, {name: source.tensor(name).astype(dtype) for name in dense})
    checkpoint = HFCheckpoint(folder)
    assert checkpoint.dense_dtypes() == {dtype_name(dtype)}
    after = ReferenceModel(checkpoint).logits([5, 6, 7])
    # bfloat16 fits into float32 exactly; float16 loses its smallest values.
    assert after == pytest.approx(before, abs=0 if dtype is np.float32 else 1e-2)


def test_a_tensor_that_the_model_does_not_use_is_ignored(folder: Path):
    rewrite(folder, {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)})
    checkpoint = HFCheckpoint(folder)
    checkpoint.check()
    assert checkpoint.unexpected() == ["model.layers.0.self_attn.rotary_emb.inv_freq"]


def test_sha256_follows_every_file(folder: Path):
    before = HFCheckpoint(folder).sha256()
    assert HFCheckpoint(folder).sha256() == before
    scales = np.array(HFCheckpoint(folder).tensor(SCALES))
    scales[0, 0, 0] ^= 1
    rewrite(folder, {SCALES: scales})
    changed = HFCheckpoint(folder).sha256()
    (folder / "generation_config.json").unlink()
    assert len({before, changed, HFCheckpoint(folder).sha256()}) == 3


def test_tokenizer_path(folder: Path):
    assert HFCheckpoint(folder).tokenizer_path is None
    (folder / "tokenizer.json").write_text("{}")
    assert HFCheckpoint(folder).tokenizer_path == folder / "tokenizer.json"


# -- stop ids ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generation", "config_eos", "expected"),
    [
        ({"eos_token_id": [7, 3, 7]}, 1, (7, 3)),
        ({"eos_token_id": 7}, 1, (7,)),
        ({"eos_token_id": [5, 200002]}, 1, (5,)),  # outside this vocabulary: cannot occur
        ({}, 1, ()),
        (None, 1, (1,)),
        (None, None, ()),
    ],
)
def test_stop_ids(folder: Path, generation, config_eos, expected):
    edit_json(folder / "config.json", eos_token_id=config_eos)
    file = folder / "generation_config.json"
    if generation is None:
        file.unlink()
    else:
        file.write_text(json.dumps(generation))
    assert HFCheckpoint(folder).generation_config.eos_token_ids == expected


def test_stop_ids_of_harmony_where_the_vocabulary_is_harmonys(tmp_path: Path):
    from checkpoints.random_checkpoint import write_checkpoint

    small = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32}
    path = write_checkpoint(tmp_path / "tiny", "tiny", overrides=small)
    assert set(HFCheckpoint(path).generation_config.eos_token_ids) == {200002, 199999, 200012}
    (path / "generation_config.json").unlink()
    edit_json(path / "config.json", eos_token_id=None)
    assert set(HFCheckpoint(path).generation_config.eos_token_ids) == {200002, 199999, 200012}


@pytest.mark.parametrize("eos", ["2", -1, [1.5], {"a": 1}, [True]])
def test_bad_stop_ids(folder: Path, eos: Any):
    edit_json(folder / "generation_config.json", eos_token_id=eos)
    with pytest.raises(ConfigError, match="eos_token_id must be"):
        HFCheckpoint(folder)


# -- bad input -----------------------------------------------------------------------------------


def test_no_folder(tmp_path: Path):
    with pytest.raises(CheckpointError, match="found nothing"):
        HFCheckpoint(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="found a file"):
        HFCheckpoint(tmp_path / "file")


def test_no_config(folder: Path):
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        HFCheckpoint(folder)


def test_no_weights(folder: Path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="found neither"):
        HFCheckpoint(folder)


@pytest.mark.parametrize("keep", [0, 7, 8, 1000, -1])
def test_truncated_file(folder: Path, keep: int):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*truncated"):
        HFCheckpoint(folder)


def test_corrupt_header(folder: Path):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[40] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="not a valid safetensors file"):
        HFCheckpoint(folder)


def test_missing_shard(sharded: Path):
    (sharded / "model-00005-of-00012.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00005-of-00012\.safetensors is missing"):
        HFCheckpoint(sharded)


def test_truncated_shard(sharded: Path):
    path = sharded / "model-00012-of-00012.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"model-00012-of-00012.*truncated"):
        HFCheckpoint(sharded)


def test_shards_in_each_others_place(sharded: Path):
    shutil.copy(
        sharded / "model-00001-of-00012.safetensors", sharded / "model-00002-of-00012.safetensors"
    )
    with pytest.raises(TensorMissingError, match="promises tensor"):
        HFCheckpoint(sharded)


@pytest.mark.parametrize(
    "file",
    [
        "../odd-3/model-00001-of-00012.safetensors",
        "/etc/passwd",
        "/x.safetensors",
        "..\\x.safetensors",
        "sub/x.safetensors",
        "c:x.safetensors",
        "config.json",
        "x\0.safetensors",
        "\x1b[2J.safetensors",
        "\ud800.safetensors",
        "",
        7,
        None,
    ],
)
def test_index_points_out_of_its_folder(sharded: Path, file: Any):
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**weight_map, "lm_head.weight": file})
    with pytest.raises(CheckpointError, match="files of its own folder"):
        HFCheckpoint(sharded)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_bad_index(sharded: Path, text: str):
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        HFCheckpoint(sharded)


def test_missing_tensor(folder: Path):
    rewrite(folder, {QUERY: None, "lm_head.weight": None})
    checkpoint = HFCheckpoint(folder)
    with pytest.raises(TensorMissingError, match=f"{QUERY} and 1 more is missing"):
        checkpoint.check()
    with pytest.raises(TensorMissingError, match=f"{QUERY} is missing"):
        checkpoint.tensor(QUERY)


def test_unquantized_experts_are_named_as_such(folder: Path):
    plain = BLOCKS.removesuffix("_blocks")
    rewrite(folder, {BLOCKS: None, plain: np.zeros((5, 96, 320), ml_dtypes.bfloat16)})
    with pytest.raises(TensorMissingError, match="found unquantized ones"):
        HFCheckpoint(folder).check()


def test_layers_that_the_weights_lack(folder: Path):
    edit_json(folder / "config.json", num_hidden_layers=4, layer_types=None)
    with pytest.raises(TensorMissingError, match=r"model\.layers\.3\..*and 18 more"):
        HFCheckpoint(folder).check()


@pytest.mark.parametrize("name", [QUERY, BLOCKS])
def test_misshapen_tensor(folder: Path, name: str):
    array = np.asarray(HFCheckpoint(folder).tensor(name))
    rewrite(folder, {name: array.reshape(-1)})
    with pytest.raises(TensorShapeError, match=f"{name} must have the shape"):
        HFCheckpoint(folder).check()


def test_config_of_another_shape(folder: Path):
    edit_json(folder / "config.json", vocab_size=1004)
    with pytest.raises(TensorShapeError, match=r"\[1004, 96\].*found \[1003, 96\]"):
        HFCheckpoint(folder).check()


@pytest.mark.parametrize(
    ("name", "dtype"), [(BLOCKS, np.int8), (SCALES, np.float32), (QUERY, np.uint8)]
)
def test_wrong_dtype(folder: Path, name: str, dtype: Any):
    array = HFCheckpoint(folder).tensor(name)
    rewrite(folder, {name: np.zeros(array.shape, dtype)})
    with pytest.raises(TensorDtypeError, match=f"{name} must be .*found {dtype_name(dtype)}"):
        HFCheckpoint(folder).check()


def test_nan_scale(folder: Path):
    scales = np.array(HFCheckpoint(folder).tensor(SCALES))
    check_scales(SCALES, scales)
    check_scales(SCALES, scales[:0])
    scales[3, 7, 1] = 255
    with pytest.raises(NaNScaleError, match=r"down_proj_scales.*at \[3, 7, 1\]"):
        check_scales(SCALES, scales)
    rewrite(folder, {SCALES: scales})
    with pytest.raises(NaNScaleError, match=r"down_proj_scales\[3\]"):
        ReferenceModel(folder).expert(1, "down_proj", 3)
