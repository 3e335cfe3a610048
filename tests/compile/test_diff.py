from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints.random_checkpoint import write_checkpoint
from checkpoints.shapes import ODD_SHAPES

from mxforge import compile_model
from mxforge.artifact import open_artifact
from mxforge.cli import main
from mxforge.compile import diff
from mxforge.compile.diff import BOUNDS, Report, compare, random_tokens
from mxforge.compile.models.gpt_oss.reference import LayerTrace, ReferenceModel
from mxforge.errors import ArtifactError, CheckpointError, NumericsError, UsageError

Compiled = Callable[..., Path]
Checkpoints = Callable[[str], Path]


@pytest.mark.parametrize("numerics", ["exact", "fast"])
@pytest.mark.parametrize("name", ODD_SHAPES)
def test_every_part_is_within_its_bound(
    name, numerics, compiled: Compiled, odd_checkpoint: Checkpoints
):
    report = compare(
        compiled(name, numerics), odd_checkpoint(name), tokens=320, seed=1, dtype=np.float64
    )
    report.check()
    layers = open_artifact(compiled(name, numerics)).manifest.config["num_hidden_layers"]
    stages = ["after_attention", "expert_ids", "expert_weights", "output"]
    assert [(c.layer, c.tensor) for c in report.comparisons] == [
        (None, "embedding"),
        *((layer, stage) for layer in range(layers) for stage in stages),
        (None, "logits"),
    ]
    relative = [c for c in report.comparisons if c.tensor != "expert_ids"]
    assert {c.bound for c in relative} == {BOUNDS[numerics]}
    assert report.routed == 320 * layers
    # Nearly everything counts; more is close where attention is rounded too.
    assert report.close_calls <= {"exact": 0.02, "fast": 0.12}[numerics] * report.routed


@pytest.mark.slow
@pytest.mark.parametrize("dense", ["bf16", "int8"])
@pytest.mark.parametrize("name", ["odd-1", "odd-4", "odd-5"])
def test_activations_in_bfloat16_are_within_the_bound_of_fast(
    name, dense, compiled: Compiled, odd_checkpoint: Checkpoints
):
    artifact = compiled(name, "fast", activations="bf16", dense=dense)
    info = open_artifact(artifact).manifest.precision
    assert (info.experts, info.dense) == ("bf16", {"bf16": "bf16xbf16", "int8": "i8"}[dense])
    report = compare(artifact, odd_checkpoint(name), tokens=100)
    report.check()
    # Rounded: with activations in float32 throughout, no layer errs as much.
    layers = [c.error for c in report.comparisons if c.tensor == "output"]
    assert max(error for error in layers if error is not None) > 5e-4


@pytest.mark.slow
def test_activations_in_mxfp8_are_less_accurate(compiled: Compiled, odd_checkpoint: Checkpoints):
    """As docs/numerics.md has it."""
    artifact = compiled("odd-1", "fast", activations="mxfp8")
    report = compare(artifact, odd_checkpoint("odd-1"), tokens=100, bound=4e-2)
    report.check()
    layers = [c.error for c in report.comparisons if c.tensor == "output"]
    assert max(error for error in layers if error is not None) > 1e-2


def test_another_bound_takes_the_place_of_the_numerics(
    compiled: Compiled, odd_checkpoint: Checkpoints
):
    artifact, checkpoint = compiled("odd-1", "fast"), odd_checkpoint("odd-1")
    report = compare(artifact, checkpoint, tokens=40, bound=1.0)
    assert report.failure is None
    assert {c.bound for c in report.comparisons if c.tensor != "expert_ids"} == {1.0}
    assert compare(artifact, checkpoint, tokens=40, bound=1e-9).failure is not None


# Weight whose bytes change -> the first tensor that shows it.
DAMAGE = {
    "model.embed_tokens.weight": "embedding",
    "model.layers.0.input_layernorm.weight": "layer 0 after_attention",
    "model.layers.1.self_attn.sinks": "layer 1 after_attention",
    "model.layers.1.self_attn.o_proj.weight": "layer 1 after_attention",
    "model.layers.2.mlp.router.weight": "layer 2 expert_ids",
    "model.layers.0.mlp.experts.gate_up_proj_blocks": "layer 0 output",
    "model.layers.1.mlp.experts.down_proj_scales": "layer 1 output",
    "model.layers.2.mlp.experts.down_proj_bias": "layer 2 output",
    "model.norm.weight": "logits",
    "lm_head.weight": "logits",
}


def damaged(artifact: Path, folder: Path, weight: str) -> Path:
    """A copy of the artifact in which one weight's elements stand in reverse order."""
    copy = shutil.copytree(artifact, folder / "damaged")
    opened = open_artifact(copy)
    info = next(w for w in opened.manifest.weights if w.name == weight)
    assert info.file is not None
    where = opened.weight_files[info.file].tensors[weight]
    size = int(np.prod(info.shape))
    element = f"V{(where.end - where.begin) // size}"
    content = np.memmap(copy / info.file, element, "r+", where.begin, size)
    content[:] = content[::-1].copy()
    content.flush()
    return copy


@pytest.mark.parametrize("weight", DAMAGE)
def test_it_stops_at_the_first_tensor_that_is_wrong(
    weight, compiled: Compiled, odd_checkpoint: Checkpoints, tmp_path: Path
):
    lines: list[str] = []
    artifact = damaged(compiled("odd-1"), tmp_path, weight)
    report = compare(artifact, odd_checkpoint("odd-1"), announce=lines.append)
    assert report.failure is report.comparisons[-1]
    assert report.failure.where == DAMAGE[weight]
    assert all(c.ok for c in report.comparisons[:-1])
    assert len(lines) == len(report.comparisons)
    with pytest.raises(NumericsError, match=f"(?i){DAMAGE[weight].rpartition(' ')[0]}"):
        report.check()


def test_a_tensor_without_numbers_is_outside_every_bound(
    compiled: Compiled, odd_checkpoint: Checkpoints, tmp_path: Path
):
    artifact = shutil.copytree(compiled("odd-5"), tmp_path / "artifact")
    opened = open_artifact(artifact)
    where = opened.weight_files["weights-00001.safetensors"].tensors["model.norm.weight"]
    with (artifact / "weights-00001.safetensors").open("r+b") as file:
        file.seek(where.begin)
        file.write(np.float32(np.nan).tobytes())
    report = compare(artifact, odd_checkpoint("odd-5"), tokens=5)
    assert report.failure is not None
    assert (report.failure.where, report.failure.error) == ("logits", None)
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["ok"] is False
    with pytest.raises(NumericsError, match="infinity"):
        report.check()


# -- routing ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def routed(odd_checkpoint: Checkpoints) -> tuple[ReferenceModel, LayerTrace]:
    reference = ReferenceModel(odd_checkpoint("odd-1"))
    x = reference.embed(random_tokens(reference.config.vocab_size, 100))
    return reference, reference.layer(0, x)


def compare_layer(routed, noise: float, **changes: np.ndarray) -> list[diff.Comparison]:
    """The layer's comparisons where the library made `noise` after attention, and `changes`."""
    reference, truth = routed
    shift = np.zeros_like(truth.after_attention)
    shift[:, 0] = noise
    ours = {
        "after_attention": truth.after_attention + shift,
        "expert_ids": truth.expert_ids,
        "expert_weights": truth.expert_weights,
        "output": truth.output,
    }
    outputs = diff._LayerOutputs(**(ours | changes))
    return list(diff._layer(outputs, truth, 0, reference, 1e-2))


def rerouted(truth: LayerTrace) -> tuple[int, dict[str, np.ndarray]]:
    """The token with the smallest router gap, and outputs in which it took the next expert."""
    token = int(np.argmin(truth.router_gap))
    k = truth.expert_ids.shape[1]
    ids = truth.expert_ids.copy()
    ids[token, -1] = np.argsort(-truth.router_logits[token])[k]
    output = truth.output.copy()
    output[token] *= 2
    return token, {"expert_ids": ids, "output": output}


def test_an_error_that_explains_the_routing_makes_it_a_close_call(routed):
    _, truth = routed
    _, changes = rerouted(truth)
    # So much at one channel moves the token's neighbours in the logits past each other.
    _, ids, weights, output = compare_layer(routed, noise=0.05, **changes)
    assert 1 <= ids.close_calls < 50
    assert ids.rerouted == 1
    assert ids.ok
    assert (weights.compared, output.compared) == (99, 99)
    assert weights.ok
    assert output.ok
    assert output.error == 0  # the token whose output is another one does not count


def test_a_close_call_that_took_the_same_experts_counts(routed):
    _, truth = routed
    token = int(np.argmin(truth.router_gap))
    output = truth.output.copy()
    output[token] *= 2
    _, ids, _, compared = compare_layer(routed, noise=0.05, output=output)
    assert ids.close_calls >= 1
    assert ids.rerouted == 0
    assert not compared.ok
    assert compared.token == token


def test_other_experts_without_such_an_error_are_wrong(routed):
    _, truth = routed
    token, changes = rerouted(truth)
    _, ids, _, _ = compare_layer(routed, noise=0, **changes)
    assert not ids.ok
    assert ids.token == token
    assert ids.error == pytest.approx(truth.router_gap[token])
    assert ids.bound < 1e-4
    report = Report("a", "cpu", "fast", 100, 0, [ids])
    with pytest.raises(NumericsError, match=f"Layer 0 routes token {token} to other experts"):
        report.check()


def test_the_order_of_a_tokens_experts_is_no_matter(routed):
    _, truth = routed
    swapped = {
        "expert_ids": truth.expert_ids[:, ::-1],
        "expert_weights": truth.expert_weights[:, ::-1],
    }
    assert all(c.ok and c.error == 0 for c in compare_layer(routed, noise=0, **swapped))


def test_the_own_error_bounds_how_far_logits_move(routed):
    reference, truth = routed
    rng = np.random.default_rng(0)
    moved = truth.after_attention * (1 + 1e-3 * rng.standard_normal(truth.output.shape, np.float32))
    own = diff._own_error(moved, truth, 0, reference)
    normed = reference.mlp_norm(0, moved)
    logits = reference._linear("model.layers.0.mlp.router", normed)
    change = logits - truth.router_logits
    apart = change.max(axis=1) - change.min(axis=1)
    assert (apart <= own).all()
    assert own.max() <= 4 * apart.max()


# -- what cannot be compared -----------------------------------------------------------------------


def test_an_artifact_of_another_shape(compiled: Compiled, odd_checkpoint: Checkpoints):
    with pytest.raises(ArtifactError, match=r"not compiled from .*: the artifact has \w+ "):
        compare(compiled("odd-1"), odd_checkpoint("odd-5"))


def test_an_artifact_of_another_checkpoint_of_this_shape(compiled: Compiled, tmp_path: Path):
    other = write_checkpoint(tmp_path / "other", "odd-5", seed=9)
    with pytest.raises(ArtifactError, match="not compiled from .*weights are others"):
        compare(compiled("odd-5"), other)


def test_random_weights(odd_checkpoint: Checkpoints, tmp_path: Path):
    artifact = compile_model(
        odd_checkpoint("odd-5"), output=tmp_path / "artifact", random_weights=True
    )
    with pytest.raises(ArtifactError, match="--random-weights"):
        compare(artifact, odd_checkpoint("odd-5"))


@pytest.mark.parametrize("options", [{"tokens": 0}, {"tokens": 513}, {"seed": -1}])
def test_absurd_options(options, compiled: Compiled, odd_checkpoint: Checkpoints):
    with pytest.raises(UsageError, match=f"{next(iter(options))} must be"):
        compare(compiled("odd-5"), odd_checkpoint("odd-5"), **options)


def test_things_that_are_not_there(compiled: Compiled, odd_checkpoint: Checkpoints, tmp_path: Path):
    with pytest.raises(ArtifactError):
        compare(tmp_path, odd_checkpoint("odd-5"))
    with pytest.raises(CheckpointError):
        compare(compiled("odd-5"), tmp_path / "nothing")


# -- the command -----------------------------------------------------------------------------------


def test_the_command_tells_every_tensor(compiled: Compiled, odd_checkpoint: Checkpoints, capsys):
    assert main(["diff", str(compiled("odd-5")), str(odd_checkpoint("odd-5"))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" error")[0].rstrip() for line in lines[:-1]] == [
        "embedding",
        "layer 0 after_attention",
        "layer 0 expert_ids",
        "layer 0 expert_weights",
        "layer 0 output",
        "logits",
    ]
    assert lines[-1].startswith("all within bounds on cpu:")
    assert "; 0 of 64 routings were close calls" in lines[-1]


def test_the_command_prints_one_json_object(
    compiled: Compiled, odd_checkpoint: Checkpoints, tmp_path: Path, capsys
):
    paths = [str(compiled("odd-5")), str(odd_checkpoint("odd-5"))]
    assert main(["diff", *paths, "--tokens", "70", "--seed", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert (report["tokens"], report["seed"], report["numerics"]) == (70, 3, "exact")
    assert len(report["comparisons"]) == 6
    assert report["comparisons"][-1]["compared"] == 70  # more than are computed at a time
    assert set(report["comparisons"][0]) == {
        *(field.name for field in dataclasses.fields(diff.Comparison)),
        "ok",
    }

    wrong = damaged(compiled("odd-5"), tmp_path, "lm_head.weight")
    assert main(["diff", str(wrong), paths[1], "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["ok"] is False
    assert "logits differs by" in err
