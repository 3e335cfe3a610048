"""OpenAI's original layout, held against the same models in the Hugging Face layout."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints.random_checkpoint import write_checkpoint
from checkpoints.shapes import ODD_SHAPES, hf_config
from support.small import SMALL_SHAPE, edit_json, rewrite
from support.targets import CUDA, PLAIN_CPU

from mxforge.artifact import open_artifact
from mxforge.compile import compile_model
from mxforge.compile.checkpoint import (
    HFCheckpoint,
    OpenAICheckpoint,
    open_checkpoint,
    stored_tensors,
)
from mxforge.compile.checkpoint.fingerprint import fingerprint
from mxforge.compile.diff import compare
from mxforge.compile.formats import Precision
from mxforge.compile.models.gpt_oss import GPT_OSS
from mxforge.compile.models.gpt_oss.config import GptOssConfig
from mxforge.compile.models.gpt_oss.reference import ReferenceModel
from mxforge.compile.models.gpt_oss.tensors import expected_tensors, weights
from mxforge.compile.weights import packed_weights
from mxforge.errors import (
    CheckpointError,
    ConfigError,
    NaNScaleError,
    TensorDtypeError,
    TensorMissingError,
    TensorShapeError,
    UnknownArchitectureError,
)
from mxforge.inspect import describe
from mxforge.safetensors import dtype_name

Both = Callable[[str], tuple[Path, Path]]

# What the odd shapes have that this layout has no key for.
EXPRESSIBLE: dict[str, dict[str, Any]] = {
    "odd-1": {},
    "odd-2": {"layer_types": None},
    "odd-3": {
        "layer_types": None,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 8.0,
            "beta_slow": 1.0,
            "truncate": False,
        },
    },
    "odd-4": {"rms_norm_eps": 1e-5},
    "odd-5": {},
    "harmony": {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 32},
}
SHARD = "model--{:05}-of-{:05}.safetensors"
BLOCKS = "block.0.mlp.mlp1_weight.blocks"
SCALES = "block.1.mlp.mlp2_weight.scales"
QKV = "block.1.attn.qkv.weight"


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    """both(shape) -> one model in the Hugging Face layout, and in the original one."""
    root = tmp_path_factory.mktemp("layouts")

    @cache
    def make(name: str) -> tuple[Path, Path]:
        shape = "tiny" if name == "harmony" else name
        overrides = EXPRESSIBLE[name]
        return (
            write_checkpoint(root / "hf" / name, shape, overrides=overrides),
            write_checkpoint(
                root / "openai" / name / "original", shape, layout="openai", overrides=overrides
            ),
        )

    return make


@pytest.fixture
def folder(both: Both, tmp_path: Path) -> Path:
    """A copy of odd-1 (one file) to damage."""
    return Path(shutil.copytree(both("odd-1")[1], tmp_path / "odd-1"))


@pytest.fixture
def sharded(both: Both, tmp_path: Path) -> Path:
    """A copy of odd-3 (several shards, no index) to damage."""
    return Path(shutil.copytree(both("odd-3")[1], tmp_path / "odd-3"))


# -- the same model ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPRESSIBLE)
def test_every_tensor_is_that_of_the_other_layout(name: str, both: Both):
    hf, original = map(open_checkpoint, both(name))
    assert isinstance(hf, HFCheckpoint)
    assert isinstance(original, OpenAICheckpoint)
    original.check()
    assert original.config == hf.config
    assert original.unexpected() == []
    assert original.dense_dtypes() == {"BF16"}
    assert set(original.tensors) == set(original.stored_tensors())
    for tensor in expected_tensors(hf.config):
        ours, theirs = original.tensor(tensor), hf.tensor(tensor)
        assert ours.dtype == theirs.dtype, tensor
        assert ours.shape == theirs.shape, tensor
        assert (ours.view(np.uint8) == theirs.view(np.uint8)).all(), tensor
        assert not ours.flags.writeable
        assert not ours.flags.owndata  # a view of the mapping
        original.drop(tensor)
        assert (ours.view(np.uint8) == theirs.view(np.uint8)).all(), tensor


def test_the_files_hold_what_the_published_ones_do(both: Both):
    """Name by name, apart from the table that reader and writer share."""
    hf, original = map(open_checkpoint, both("odd-1"))
    pairs = {
        "embedding.weight": ["model.embed_tokens.weight"],
        "norm.scale": ["model.norm.weight"],
        "unembedding.weight": ["lm_head.weight"],
    }
    for n in range(3):
        block, layer = f"block.{n}", f"model.layers.{n}"
        q, k, v = (f"{layer}.self_attn.{x}_proj" for x in ("q", "k", "v"))
        pairs |= {
            f"{block}.attn.norm.scale": [f"{layer}.input_layernorm.weight"],
            f"{block}.attn.qkv.weight": [f"{q}.weight", f"{k}.weight", f"{v}.weight"],
            f"{block}.attn.qkv.bias": [f"{q}.bias", f"{k}.bias", f"{v}.bias"],
            f"{block}.attn.sinks": [f"{layer}.self_attn.sinks"],
            f"{block}.attn.out.weight": [f"{layer}.self_attn.o_proj.weight"],
            f"{block}.attn.out.bias": [f"{layer}.self_attn.o_proj.bias"],
            f"{block}.mlp.norm.scale": [f"{layer}.post_attention_layernorm.weight"],
            f"{block}.mlp.gate.weight": [f"{layer}.mlp.router.weight"],
            f"{block}.mlp.gate.bias": [f"{layer}.mlp.router.bias"],
        }
        for theirs, ours in (("mlp1", "gate_up_proj"), ("mlp2", "down_proj")):
            mlp, experts = f"{block}.mlp.{theirs}", f"{layer}.mlp.experts.{ours}"
            pairs |= {
                f"{mlp}_weight.blocks": [f"{experts}_blocks"],
                f"{mlp}_weight.scales": [f"{experts}_scales"],
                f"{mlp}_bias": [f"{experts}_bias"],
            }
    assert pairs.keys() == original.tensors.keys()
    for name, parts in pairs.items():
        stored = original._shard(name).array(name)
        assert (stored == np.concatenate([hf.tensor(part) for part in parts])).all(), name


def test_rows_of_q_k_and_v_follow_each_other_in_the_file(both: Both):
    checkpoint = OpenAICheckpoint(both("odd-1")[1])
    fused = checkpoint._shard(QKV).array(QKV)
    assert fused.shape == (6 * 32 + 2 * 2 * 32, 96)
    names = [f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkv"]
    parts = [checkpoint.tensor(name) for name in names]
    assert [len(part) for part in parts] == [192, 64, 64]
    assert (np.concatenate(parts) == fused).all()
    begin = fused.__array_interface__["data"][0]
    starts = [part.__array_interface__["data"][0] - begin for part in parts]
    assert starts == [0, 192 * 96 * 2, 256 * 96 * 2]


@pytest.mark.parametrize("name", ODD_SHAPES)
def test_the_packed_weights_are_those_of_the_other_layout(name: str, both: Both):
    hf, original = map(open_checkpoint, both(name))
    for target, precision in (
        (PLAIN_CPU, Precision("float32", "f32")),
        (PLAIN_CPU, Precision("float16", "i8")),
        (CUDA, Precision("float32", "f32")),
    ):
        ours = packed_weights(weights(original.config), target, precision)
        theirs = packed_weights(weights(hf.config), target, precision)
        for one, other in zip(ours, theirs, strict=True):
            assert (one.name, one.shape, one.dtype) == (other.name, other.shape, other.dtype)
            for piece, same in zip(one.chunks(original), other.chunks(hf), strict=True):
                assert piece.tobytes() == same.tobytes(), one.name


@pytest.mark.parametrize("name", ["odd-3", "harmony"])
def test_the_artifact_is_that_of_the_other_layout(name: str, both: Both, tmp_path: Path):
    artifacts = [
        compile_model(path, output=tmp_path / str(i), numerics="exact")
        for i, path in enumerate(both(name))
    ]
    hf, original = (open_artifact(path).manifest for path in artifacts)
    assert (hf.source.format, original.source.format) == ("huggingface", "openai")
    assert (hf.name, original.name) == (name, name)  # that of the folder around `original`
    assert original.config == hf.config
    assert original.weights == hf.weights
    assert [w.name for w in original.weights] == [w.name for w in hf.weights]
    files = [file for file in hf.files if file.endswith(".safetensors")]
    assert files
    for file in files:
        assert (artifacts[0] / file).read_bytes() == (artifacts[1] / file).read_bytes()
    if name == "harmony":  # the others' stop ids are in generation_config.json alone
        assert original.stop_token_ids == hf.stop_token_ids == (200002, 199999, 200012)
        assert original.tokenizer.kind == hf.tokenizer.kind == "o200k_harmony"
        assert original.source.sha256 == hf.source.sha256
        compare(artifacts[0], both(name)[1], tokens=8).check()
    else:
        assert original.stop_token_ids == ()
    compare(artifacts[1], both(name)[1], tokens=8).check()


def test_the_fingerprint_is_that_of_the_other_layout(both: Both, folder: Path):
    hf = both("odd-1")[0]
    shutil.copy(hf / "generation_config.json", folder)  # stop ids are a part of it
    assert fingerprint(open_checkpoint(folder)) == fingerprint(HFCheckpoint(hf))


def test_tensors_of_the_published_20b():
    stored = stored_tensors(GPT_OSS, GptOssConfig.from_hf(hf_config("20b")), "openai")
    assert len(stored) == 3 + 24 * 15
    assert stored["block.23.attn.qkv.weight"].shape == (5120, 2880)
    assert stored["block.23.attn.qkv.bias"].shape == (5120,)
    assert stored["block.0.mlp.mlp1_weight.blocks"].shape == (32, 5760, 90, 16)
    assert stored["block.0.mlp.mlp2_weight.scales"].shape == (32, 2880, 90)
    assert stored["unembedding.weight"].shape == (201088, 2880)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_other_dense_dtypes_are_read(folder: Path, dtype: Any):
    before = ReferenceModel(folder).logits([5, 6, 7])
    source = OpenAICheckpoint(folder)
    dense = [n for n, spec in source.stored_tensors().items() if "BF16" in spec.dtypes]
    rewrite(folder, {n: source._shard(n).array(n).astype(dtype) for n in dense})
    assert OpenAICheckpoint(folder).dense_dtypes() == {dtype_name(dtype)}
    after = ReferenceModel(folder).logits([5, 6, 7])
    assert after == pytest.approx(before, abs=0 if dtype is np.float32 else 1e-2)


def test_a_tensor_that_the_model_does_not_use_is_ignored(folder: Path):
    rewrite(folder, {"block.0.attn.rope.inv_freq": np.ones(4, np.float32)})
    checkpoint = OpenAICheckpoint(folder)
    checkpoint.check()
    assert checkpoint.unexpected() == ["block.0.attn.rope.inv_freq"]


# -- finding it ----------------------------------------------------------------------------------


def test_inspect_names_the_layout(both: Both):
    description = describe(both("odd-3")[1])
    assert (description["kind"], description["format"]) == ("checkpoint", "openai")
    assert description["tokenizer"] is False
    assert description["files"][0]["file"] == SHARD.format(1, len(description["files"]))
    assert description["config"]["num_hidden_layers"] == 5


def test_the_folder_original_is_found_from_the_one_around_it(both: Both, tmp_path: Path):
    hf, original = both("odd-1")
    assert open_checkpoint(original.parent).path == original
    assert describe(original.parent)["format"] == "openai"
    # The whole repository: what it holds itself comes first, unless its weights were not fetched.
    whole = Path(shutil.copytree(hf, tmp_path / "whole"))
    shutil.copytree(original, whole / "original")
    assert open_checkpoint(whole).layout == "huggingface"
    assert open_checkpoint(whole / "original").layout == "openai"
    (whole / "model.safetensors").unlink()
    assert open_checkpoint(whole).layout == "openai"
    shutil.rmtree(whole / "original")
    with pytest.raises(CheckpointError, match="found neither"):
        open_checkpoint(whole)


def test_no_folder(tmp_path: Path):
    with pytest.raises(CheckpointError, match="found nothing"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        open_checkpoint(tmp_path)


def test_a_config_of_neither_layout(folder: Path):
    (folder / "config.json").write_text('{"n_layer": 12, "n_head": 12}')
    with pytest.raises(
        UnknownArchitectureError, match="found neither, but n_layer, n_head; .*OpenAI's original"
    ):
        open_checkpoint(folder)


def test_a_config_of_both_layouts(folder: Path):
    edit_json(folder / "config.json", num_local_experts=5)
    with pytest.raises(ConfigError, match="mixes two layouts: num_local_experts is a key of"):
        open_checkpoint(folder)


def test_config_and_weights_of_different_layouts(both: Both, folder: Path, tmp_path: Path):
    other = Path(shutil.copytree(both("odd-1")[0], tmp_path / "hf"))
    shutil.move(folder / "model.safetensors", folder / "kept")
    shutil.copy(other / "model.safetensors", folder)
    shutil.copy(folder / "kept", other / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"OpenAI's original layout, tensor (lm_head|model)\."
    ):
        open_checkpoint(folder)
    with pytest.raises(CheckpointError, match="the Hugging Face layout, tensor .* is not"):
        open_checkpoint(other)


def test_tensors_of_both_layouts(folder: Path):
    rewrite(folder, {"lm_head.weight": np.zeros(3, np.float32)})
    with pytest.raises(CheckpointError, match=r"tensor lm_head\.weight in model\.safetensors is"):
        open_checkpoint(folder)


# -- shards --------------------------------------------------------------------------------------


def test_shards_are_read_without_an_index(sharded: Path):
    checkpoint = OpenAICheckpoint(sharded)
    checkpoint.check()
    assert len(checkpoint.files) > 5
    assert checkpoint.files[0].name == SHARD.format(1, len(checkpoint.files))
    (sharded / "._model.safetensors").write_bytes(b"what macOS leaves behind")
    assert OpenAICheckpoint(sharded).files == checkpoint.files


def test_shards_of_any_name_are_read(sharded: Path):
    before = fingerprint(OpenAICheckpoint(sharded))
    for i, path in enumerate(OpenAICheckpoint(sharded).files):
        path.rename(sharded / f"part{i}.safetensors")
    assert fingerprint(OpenAICheckpoint(sharded)) == before


def test_an_index_is_followed_where_there_is_one(sharded: Path):
    checkpoint = OpenAICheckpoint(sharded)
    shutil.copy(checkpoint.files[0], sharded / "copy.safetensors")
    weight_map = {name: shard.path.name for name, shard in checkpoint._shard_of.items()}
    index = sharded / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    OpenAICheckpoint(sharded).check()
    index.unlink()
    with pytest.raises(CheckpointError, match=r"is in copy\.safetensors and in model--00001"):
        OpenAICheckpoint(sharded)


@pytest.mark.parametrize("number", [1, 2, "last"])
def test_a_missing_shard(number: int | str, sharded: Path):
    files = OpenAICheckpoint(sharded).files
    lost = files[-1 if number == "last" else int(number) - 1]
    lost.unlink()
    with pytest.raises(CheckpointError, match=f"{lost.name} is missing"):
        OpenAICheckpoint(sharded)


@pytest.mark.parametrize("count", ["99999", "999999999"])
def test_absurdly_many_shards(count: str, folder: Path):
    name = f"model--00001-of-{count}.safetensors"
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(CheckpointError, match=f"00002-of-{count}.* is missing"):
        OpenAICheckpoint(folder)


def test_a_truncated_shard(sharded: Path):
    path = OpenAICheckpoint(sharded).files[-1]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{path.name}.*truncated"):
        OpenAICheckpoint(sharded)


# -- bad input -----------------------------------------------------------------------------------


def test_no_weights(folder: Path):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"Expected \.safetensors files in .*found none"):
        OpenAICheckpoint(folder)


@pytest.mark.parametrize("keep", [0, 7, 8, 1000, -1])
def test_a_truncated_file(folder: Path, keep: int):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors.*truncated"):
        OpenAICheckpoint(folder)


def test_a_missing_tensor(folder: Path):
    rewrite(folder, {QKV: None, "unembedding.weight": None})
    checkpoint = OpenAICheckpoint(folder)
    with pytest.raises(TensorMissingError, match=f"{QKV} and 1 more is missing"):
        checkpoint.check()
    with pytest.raises(TensorMissingError, match=f"{QKV} is missing"):
        checkpoint.tensor("model.layers.1.self_attn.k_proj.weight")
    with pytest.raises(TensorMissingError, match="none of this architecture"):
        checkpoint.tensor(QKV)


def test_unquantized_experts_are_named_as_such(folder: Path):
    plain = BLOCKS.removesuffix(".blocks")
    rewrite(folder, {BLOCKS: None, plain: np.zeros((5, 320, 96), ml_dtypes.bfloat16)})
    with pytest.raises(TensorMissingError, match="found unquantized ones"):
        OpenAICheckpoint(folder).check()


def test_layers_that_the_weights_lack(folder: Path):
    edit_json(folder / "config.json", num_hidden_layers=4)
    with pytest.raises(TensorMissingError, match=r"block\.3\..*and 14 more"):
        OpenAICheckpoint(folder).check()


@pytest.mark.parametrize("name", [QKV, BLOCKS])
@pytest.mark.parametrize("shape", [(-1,), None])
def test_a_misshapen_tensor(folder: Path, name: str, shape: tuple[int, ...] | None):
    array = OpenAICheckpoint(folder)._shard(name).array(name)
    # Without rows, too: q, k and v could not be sliced from it.
    rewrite(folder, {name: array.reshape(shape) if shape else np.zeros((), array.dtype)})
    with pytest.raises(TensorShapeError, match=f"{name} must have the shape"):
        OpenAICheckpoint(folder).check()


def test_heads_of_another_number(folder: Path):
    edit_json(folder / "config.json", num_key_value_heads=3)
    with pytest.raises(TensorShapeError, match=r"qkv\.weight.*\[384, 96\].*found \[320, 96\]"):
        OpenAICheckpoint(folder).check()


@pytest.mark.parametrize(
    ("name", "dtype"), [(BLOCKS, np.int8), (SCALES, np.float32), (QKV, np.uint8)]
)
def test_a_wrong_dtype(folder: Path, name: str, dtype: Any):
    array = OpenAICheckpoint(folder)._shard(name).array(name)
    rewrite(folder, {name: np.zeros(array.shape, dtype)})
    with pytest.raises(TensorDtypeError, match=f"{name} must be .*found {dtype_name(dtype)}"):
        OpenAICheckpoint(folder).check()


def test_a_nan_scale_is_found_while_packing(folder: Path):
    scales = np.array(OpenAICheckpoint(folder)._shard(SCALES).array(SCALES))
    scales[3, 7, 1] = 255
    rewrite(folder, {SCALES: scales})
    checkpoint = OpenAICheckpoint(folder)
    checkpoint.check()
    listed = packed_weights(weights(checkpoint.config), PLAIN_CPU, Precision("float32", "f32"))
    pieces = (piece for weight in listed for piece in weight.chunks(checkpoint))
    with pytest.raises(NaNScaleError, match=r"layers\.1.*down_proj_scales.*at \[3, 7, 1\]"):
        list(pieces)


def test_other_stop_ids_and_a_tokenizer_beside_the_weights(folder: Path):
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 200002]}')
    (folder / "tokenizer.json").write_text("{}")
    checkpoint = OpenAICheckpoint(folder)
    assert checkpoint.generation_config.eos_token_ids == (7,)
    assert checkpoint.tokenizer_path == folder / "tokenizer.json"


# -- a config.json alone -------------------------------------------------------------------------


def test_a_bare_config_compiles_with_random_weights(tmp_path: Path):
    path = write_checkpoint(
        tmp_path / "gpt" / "original", "tiny", layout="openai", overrides=SMALL_SHAPE
    )
    artifact = compile_model(
        path / "config.json", output=tmp_path / "artifact", random_weights=True
    )
    manifest = open_artifact(artifact).manifest
    assert (manifest.name, manifest.source.format) == ("gpt", "config")
    assert dict(manifest.config) == json.loads(json.dumps(OpenAICheckpoint(path).config.to_dict()))
