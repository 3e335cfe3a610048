from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints.shapes import hf_config

from mxforge import compile_model
from mxforge.artifact import read_manifest
from mxforge.compile import cuda
from mxforge.compile.diff import compare
from mxforge.compile.formats import TABLES, Formats, Precision
from mxforge.compile.models.gpt_oss.config import GptOssConfig
from mxforge.compile.targets import resolve
from mxforge.errors import TargetError, UsageError
from mxforge.schedules.moe import DOWN, GATE_UP

Compiled = Callable[..., Path]
Checkpoints = Callable[[str], Path]
TINY = GptOssConfig.from_hf(hf_config("tiny"))


@pytest.fixture
def nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    """It need not be here to choose formats."""
    monkeypatch.setattr(cuda, "find_nvcc", lambda: "nvcc")


def test_what_is_asked_for_takes_the_place_of_the_targets_best():
    cpu = resolve("cpu")
    best = cpu.precision("fast", TINY)
    assert cpu.precision("fast", TINY, Formats.of("fast", kv=None)) == best
    asked = cpu.precision("fast", TINY, Formats.of("fast", kv="f16", activations="f32"))
    assert asked == Precision("float16", "f32", best.dense)
    asked = cpu.precision("fast", TINY, Formats.of("fast", dense="bf16"))
    assert asked == Precision(best.kv, best.activations, "bf16")
    asked = cpu.precision("fast", TINY, Formats.of("fast", activations="bf16", dense="bf16"))
    assert (asked.activations, asked.dense) == ("bf16", "bf16xbf16")


@pytest.mark.parametrize("option", TABLES)
def test_an_unknown_format_is_told_the_known_ones(option, odd_checkpoint: Checkpoints, tmp_path):
    with pytest.raises(UsageError, match=f"{option} must be one of .*, found 'f8'"):
        compile_model(odd_checkpoint("odd-1"), output=tmp_path / "a", **{option: "f8"})
    assert not any(tmp_path.iterdir())


def test_exact_numerics_have_no_formats_to_choose(odd_checkpoint: Checkpoints, tmp_path):
    with pytest.raises(UsageError, match="exact numerics, which are float32"):
        compile_model(odd_checkpoint("odd-1"), output=tmp_path / "a", numerics="exact", kv="f32")


def test_gpus_take_their_own_weights_and_activations():
    with pytest.raises(TargetError, match="metal has no kernel for activations int8; leave it out"):
        resolve("metal").precision("fast", TINY, Formats.of("fast", activations="int8"))
    eight = Formats.of("fast", activations="f32", dense="int8")
    for target, name in (("metal", "i8xf32"), ("cpu", "i8")):
        assert resolve(target).precision("fast", TINY, eight).dense == name
    plain = Formats.of("fast", kv="int8", activations="f32", dense="bf16")
    assert resolve("metal").precision("fast", TINY, plain).kv == "int8"


@pytest.mark.usefixtures("nvcc")
def test_experts_take_bfloat16_where_tensor_cores_do():
    for name, activations in (
        ("cuda:sm_75", "f32"), ("cuda:sm_80", "bf16"), ("cuda", "bf16"), ("cuda:sm_90a", "bf16")
    ):  # fmt: skip
        target = resolve(name)
        assert target.precision("fast", TINY) == Precision("float16", activations, "i8xf32")
        assert target.precision("exact", TINY) == Precision()
    asked = Formats.of("fast", activations="bf16")
    with pytest.raises(TargetError, match="sm_75 has no kernel for activations bf16; leave it out"):
        resolve("cuda:sm_75").precision("fast", TINY, asked)
    # More inputs than a block has room for.
    large = GptOssConfig.from_hf(hf_config("tiny", {"intermediate_size": 4096}))
    target = resolve("cuda:sm_80")
    assert target.precision("fast", large).activations == "f32"
    with pytest.raises(TargetError, match="bf16 where experts=8, .*, intermediate=4096; leave it"):
        target.precision("fast", large, asked)


@pytest.mark.usefixtures("nvcc")
def test_mxfp8_is_asked_for_and_native_on_one_architecture():
    asked = Formats.of("fast", activations="mxfp8")
    for name, scaled in (("cpu", False), ("cuda:sm_80", False), ("cuda:sm_120a", True)):
        target = resolve(name)
        assert target.precision("fast", TINY).activations != "mxfp8"
        assert target.precision("fast", TINY, asked).activations == "mxfp8"
        for halves in (GATE_UP, DOWN):
            chosen = halves["mxfp8"].choose(target.kernels, **TINY.expert_sizes)
            assert chosen.name.endswith("scaled") == scaled
    for name in ("metal", "cuda:sm_75"):
        with pytest.raises(TargetError, match="no kernel for activations mxfp8; leave it out"):
            resolve(name).precision("fast", TINY, asked)


@pytest.mark.parametrize("kv", TABLES["kv"].options())
def test_every_cache_is_within_the_bound(kv, compiled: Compiled, odd_checkpoint: Checkpoints):
    artifact = compiled("odd-2", "fast", kv=kv)
    assert read_manifest(artifact).precision.kv_dtype == TABLES["kv"].asked(kv)[0].name
    compare(artifact, odd_checkpoint("odd-2"), tokens=100).check()


@pytest.mark.parametrize("kv", TABLES["kv"].options())
def test_the_memory_plan_counts_the_cache_as_it_is_kept(kv, compiled: Compiled):
    manifest = read_manifest(compiled("odd-2", "fast", kv=kv))
    c = manifest.config
    kinds = [kind == "full_attention" for kind in c["layer_types"]]
    values = 2 * c["num_key_value_heads"] * 16 * c["head_dim"]
    least = values * {"f32": 4, "f16": 2, "bf16": 2, "int8": 1}[kv] * sum(kinds)
    planned = next(group.page_bytes for group in manifest.kv_groups if group.window is None)
    assert least <= planned <= (least if kv != "int8" else least * 5 // 4)
