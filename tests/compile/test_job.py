"""compile_model and compile-model from the outside: what goes wrong, and what is left of it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from checkpoints.random_checkpoint import write_checkpoint
from checkpoints.shapes import hf_config

from mxforge import Engine, SamplingParams
from mxforge.artifact import open_artifact, read_manifest, verify
from mxforge.compile import cli, compile_model
from mxforge.compile.checkpoint import HFCheckpoint
from mxforge.compile.checkpoint.fingerprint import fingerprint
from mxforge.compile.models.gpt_oss.tensors import EMBEDDING
from mxforge.errors import (
    CheckpointError,
    ConfigError,
    MxforgeError,
    NaNScaleError,
    OutputError,
    TensorDtypeError,
    TensorMissingError,
    TensorShapeError,
    TokenizerError,
    UnknownArchitectureError,
    UsageError,
)

Compiled = Callable[..., Path]
Checkpoints = Callable[[str], Path]


# -- what a good compilation writes ----------------------------------------------------------------


def test_the_manifest_describes_the_model(compiled: Compiled, odd_checkpoint: Checkpoints):
    checkpoint = HFCheckpoint(odd_checkpoint("odd-3"))
    manifest = read_manifest(compiled("odd-3", "fast"))
    assert manifest.name == "odd-3"
    assert dict(manifest.config) == json.loads(json.dumps(checkpoint.config.to_dict()))
    assert (manifest.numerics, manifest.precision.kv_dtype) == ("fast", "bfloat16")
    assert (manifest.limits.max_batch, manifest.limits.prefill_chunk) == (16, 512)
    assert manifest.limits.context == 1024
    assert manifest.stop_token_ids == checkpoint.generation_config.eos_token_ids
    assert (manifest.source.format, manifest.source.sha256) == (
        "huggingface",
        fingerprint(checkpoint),
    )
    assert manifest.random_seed is None
    page = 2 * 5 * 16 * 24 * 2  # K and V, heads, slots, head_dim, bytes
    sliding, full = manifest.kv_groups
    assert (sliding.name, full.name) == ("sliding", "full")
    assert (sliding.window, full.window) == (checkpoint.config.sliding_window, None)
    assert (sliding.page_bytes, full.page_bytes) == (3 * page, 2 * page)
    assert {w.name for w in manifest.weights if w.access == "sparse"} == {EMBEDDING}
    verify(compiled("odd-3", "fast"), progress=False).check()


def test_limits_are_taken_over_and_kept(odd_checkpoint: Checkpoints, tmp_path: Path):
    said: list[str] = []
    artifact = compile_model(
        odd_checkpoint("odd-5"),
        output=tmp_path / "artifact",
        numerics="exact",
        max_batch=1,
        prefill_chunk=7,
        announce=said.append,
    )
    limits = read_manifest(artifact).limits
    assert (limits.max_batch, limits.prefill_chunk) == (1, 7)
    assert any("warning" in line and "token ids only" in line for line in said)
    with Engine.load(artifact, context_length=64) as engine:
        assert engine.logits(list(range(17)) * 2).shape == (34, 17)  # in chunks of 7
        with pytest.raises(UsageError, match="max_batch"):
            Engine.load(artifact, max_batch=2)


def test_it_needs_no_output(odd_checkpoint: Checkpoints, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    artifact = compile_model(odd_checkpoint("odd-5"), target="cpu:x86-64", random_weights=True)
    assert artifact == Path("artifacts/odd-5-cpu-x86-64")
    assert read_manifest(artifact).name == "odd-5"


# -- random weights --------------------------------------------------------------------------------


def test_a_bare_config_runs_on_random_weights(tmp_path: Path, capsys):
    """Deterministic ones; with the real vocabulary it takes text, too."""
    source = tmp_path / "tiny" / "config.json"
    source.parent.mkdir()
    source.write_text(json.dumps(hf_config("tiny")))
    output = tmp_path / "artifact"
    arguments = [str(source), "--random-weights", "--output", str(output)]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out == f"{output}\n"

    manifest = read_manifest(output)
    assert manifest.name == "tiny"
    assert manifest.random_seed == 0
    assert manifest.source.format == "config"
    assert manifest.tokenizer.kind == "o200k_harmony"
    assert all(weight.file is None and weight.fill for weight in manifest.weights)
    assert not list(output.rglob("*.safetensors"))

    answers = set()
    for _ in range(2):
        with Engine.load(output, context_length=64, max_batch=1) as engine:
            logits = engine.logits([1, 200, 30000])
            assert np.isfinite(logits).all()
            assert 0.1 < logits.std() < 10
            params = SamplingParams(max_tokens=8, seed=3, ignore_eos=True)
            answer = engine.generate("The capital of France is", params)
            answers.add((answer.token_ids, answer.text, logits.tobytes()))
    assert len(answers) == 1


# -- the output ------------------------------------------------------------------------------------


def test_an_existing_output_is_kept_or_replaced(odd_checkpoint: Checkpoints, tmp_path: Path):
    source, output = odd_checkpoint("odd-5"), tmp_path / "artifact"
    compile_model(source, output=output, numerics="exact", random_weights=True)
    before = (output / "manifest.json").read_bytes()
    with pytest.raises(OutputError, match="exists already.*--force"):
        compile_model(source, output=output, numerics="fast", random_weights=True)
    assert (output / "manifest.json").read_bytes() == before
    compile_model(source, output=output, numerics="fast", random_weights=True, force=True)
    assert open_artifact(output).manifest.numerics == "fast"
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]


def test_only_an_artifact_is_replaced(odd_checkpoint: Checkpoints, tmp_path: Path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="not an artifact"):
        compile_model(odd_checkpoint("odd-5"), output=tmp_path / "precious", force=True)
    assert (tmp_path / "precious" / "thesis.txt").read_text() == "years of work"


def test_a_disk_that_is_too_full_is_found_at_once(
    odd_checkpoint: Checkpoints, tmp_path: Path, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage)
    with pytest.raises(OutputError, match=r"needs \d+ bytes .*but 1048576 bytes"):
        compile_model(odd_checkpoint("odd-5"), output=tmp_path / "artifact")
    assert list(tmp_path.iterdir()) == []


# -- checkpoints that cannot be compiled -----------------------------------------------------------


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


def edit_header(folder: Path, old: bytes, new: bytes) -> None:
    """Replace a text of the same length in the weights' header."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    assert data.find(old, 8, end) > 0
    assert len(old) == len(new)
    path.write_bytes(data[:end].replace(old, new, 1) + data[end:])


def truncate(path: Path, missing: int) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - missing)


def set_scale(folder: Path, value: int) -> None:
    checkpoint = HFCheckpoint(folder)
    info = checkpoint.tensors["model.layers.0.mlp.experts.down_proj_scales"]
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(info.end - 1)
        file.write(bytes([value]))


class Damage(NamedTuple):
    shape: str
    do: Callable[[Path], object]
    error: type[MxforgeError]
    says: str


DAMAGES = {
    "truncated weights": Damage(
        "odd-5",
        lambda f: truncate(f / "model.safetensors", 1),
        CheckpointError,
        "model.safetensors",
    ),
    "a header of noise": Damage(
        "odd-5",
        lambda f: (f / "model.safetensors").write_bytes(b"\x20" + bytes(7) + b"noise" * 20),
        CheckpointError,
        "model.safetensors",
    ),
    "a truncated shard": Damage(
        "odd-3",
        lambda f: truncate(sorted(f.glob("model-*.safetensors"))[1], 100),
        CheckpointError,
        "model-00002",
    ),
    "a missing shard": Damage(
        "odd-3",
        lambda f: sorted(f.glob("model-*.safetensors"))[2].unlink(),
        CheckpointError,
        "model-00003",
    ),
    "no weights": Damage(
        "odd-5", lambda f: (f / "model.safetensors").unlink(), CheckpointError, "neither"
    ),
    "a missing tensor": Damage(
        "odd-5",
        lambda f: edit_header(f, b"model.norm.weight", b"model.norm.wright"),
        TensorMissingError,
        "model.norm.weight",
    ),
    "another dtype": Damage(
        "odd-5",
        lambda f: edit_header(f, b'"U8"', b'"I8"'),
        TensorDtypeError,
        "must be U8, found I8",
    ),
    "another shape": Damage(
        "odd-5", lambda f: edit_config(f, vocab_size=18), TensorShapeError, r"\[18, 32\]"
    ),
    "fewer tensors than layers": Damage(
        "odd-5",
        lambda f: edit_config(f, num_hidden_layers=2, layer_types=None),
        TensorMissingError,
        "model.layers.1",
    ),
    "another architecture": Damage(
        "odd-5",
        lambda f: edit_config(f, architectures=["LlamaForCausalLM"], model_type="llama"),
        UnknownArchitectureError,
        "(?i)llama",
    ),
    "a config without a number": Damage(
        "odd-5", lambda f: edit_config(f, hidden_size=None), ConfigError, "hidden_size"
    ),
    "a hidden size of no whole block": Damage(
        "odd-5", lambda f: edit_config(f, hidden_size=40), ConfigError, "hidden_size"
    ),
    "a config that is no JSON": Damage(
        "odd-5", lambda f: (f / "config.json").write_text("{"), ConfigError, "config.json"
    ),
    "no config": Damage(
        "odd-5", lambda f: (f / "config.json").unlink(), MxforgeError, "config.json"
    ),
    "an unreadable tokenizer": Damage(
        "odd-5", lambda f: (f / "tokenizer.json").write_text("{}"), TokenizerError, "tokenizer"
    ),
    "a scale that is no number": Damage(
        "odd-5", lambda f: set_scale(f, 255), NaNScaleError, "down_proj_scales"
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_leaves_nothing(
    case, odd_checkpoint: Checkpoints, tmp_path: Path, capsys
):
    damage = DAMAGES[case]
    folder = shutil.copytree(odd_checkpoint(damage.shape), tmp_path / "checkpoint")
    damage.do(folder)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(damage.error, match=damage.says) as caught:
        compile_model(folder, output=out / "artifact")
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 600
    assert list(out.iterdir()) == []


# -- absurd arguments ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"numerics": "quick"},
        {"max_batch": 0},
        {"max_batch": 1025},
        {"max_batch": True},
        {"prefill_chunk": 0},
        {"prefill_chunk": 8193},
        {"prefill_chunk": 5.0},
    ],
    ids=str,
)
def test_absurd_options(options, odd_checkpoint: Checkpoints, tmp_path: Path):
    with pytest.raises(UsageError, match=next(iter(options))):
        compile_model(odd_checkpoint("odd-5"), output=tmp_path / "artifact", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_bare_config_has_no_weights(odd_checkpoint: Checkpoints, tmp_path: Path):
    with pytest.raises(UsageError, match="--random-weights"):
        compile_model(odd_checkpoint("odd-5") / "config.json", output=tmp_path / "artifact")


def test_nothing_to_compile(tmp_path: Path):
    with pytest.raises(CheckpointError, match="nothing"):
        compile_model(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MxforgeError, match=r"config\.json"):
        compile_model(tmp_path / "empty", output=tmp_path / "artifact")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["{checkpoint}", "--max-batch", "0"], 2),
        (["{checkpoint}/config.json"], 2),
        (["{checkpoint}", "--target", "abacus"], 1),
        (["{checkpoint}", "--output", "{checkpoint}/config.json"], 1),
        (["{checkpoint}/nothing"], 1),
    ],
)
def test_the_command_exits_with_one_line(arguments, code, odd_checkpoint: Checkpoints, capsys):
    folder = str(odd_checkpoint("odd-5"))
    assert cli.main([argument.format(checkpoint=folder) for argument in arguments]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith("compile-model: ")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments", [[], ["a", "b"], ["a", "--numerics", "quick"], ["--max", "x"]]
)
def test_wrong_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: compile-model" in capsys.readouterr().err


# -- killed ----------------------------------------------------------------------------------------


def kill_at(moment: str, command: list[str]) -> None:
    """Run until `moment` is announced, then SIGKILL."""
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if moment in line:
                process.send_signal(signal.SIGKILL)
                break
        else:
            pytest.fail(f"it never announced {moment!r}")
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_a_killed_compilation_leaves_nothing_to_be_seen(
    odd_checkpoint: Checkpoints, tmp_path: Path
):
    output = tmp_path / "artifact"
    command = [sys.executable, "-m", "mxforge.compile.cli", str(odd_checkpoint("odd-5"))]
    command += ["--output", str(output)]
    for moment in ("building the model", "linking", "packing the weights"):
        kill_at(moment, command)
        assert all(path.name.startswith(".artifact.partial-") for path in tmp_path.iterdir())
    compile_model(odd_checkpoint("odd-5"), output=output)
    assert [path.name for path in tmp_path.iterdir()] == ["artifact"]
    verify(output, progress=False).check()

    # Replacing: the old one is there until the new one is complete.
    kill_at("packing the weights", [*command, "--force", "--numerics", "exact"])
    verify(output, progress=False).check()
    assert read_manifest(output).numerics == "fast"


# -- memory ----------------------------------------------------------------------------------------


MEASURE = """
import sys, mxforge
from pathlib import Path

def held():  # without what is mapped from files
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024

most = before = 0
def announce(text):
    global before
    if text.startswith("packing"):
        before = held()

import threading, time
def watch():
    global most
    while True:
        most = max(most, held())
        time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()
mxforge.compile_model(sys.argv[1], output=sys.argv[2], announce=announce)
print(most - before)
"""


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="measures through /proc")
def test_packing_needs_little_memory_beside_the_page_cache(tmp_path: Path):
    """2 GB of weights, the largest of 400 MB: what is held does not follow their size."""
    changes = {
        "hidden_size": 1024,
        "intermediate_size": 1024,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "vocab_size": 201_088,
        "num_hidden_layers": 3,
    }
    folder = write_checkpoint(tmp_path / "checkpoint", "odd-4", overrides=changes)
    try:
        assert sum(file.stat().st_size for file in folder.iterdir()) > 1.2e9
        result = subprocess.run(
            [sys.executable, "-c", MEASURE, str(folder), str(tmp_path / "artifact")],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    finally:
        shutil.rmtree(folder)  # pytest would keep it
        shutil.rmtree(tmp_path / "artifact", ignore_errors=True)
    assert int(result.stdout) < 300 << 20
