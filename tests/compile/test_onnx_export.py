"""The ONNX graph against transformers (as recorded) and our reference; and what goes wrong."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from checkpoints.random_checkpoint import write_checkpoint
from checkpoints.shapes import ODD_SHAPES
from support.small import SMALL_SHAPE, small_checkpoint

from mxforge.artifact import read_manifest
from mxforge.cli import main
from mxforge.compile import onnx_export
from mxforge.compile.checkpoint import HFCheckpoint
from mxforge.compile.checkpoint.fingerprint import fingerprint
from mxforge.compile.diff import random_tokens
from mxforge.compile.models.gpt_oss import onnx_graph
from mxforge.compile.models.gpt_oss.reference import ReferenceModel
from mxforge.compile.onnx_export import FLOAT4_OPSET, NEWEST_OPSET, OLDEST_OPSET, export_onnx
from mxforge.errors import (
    CheckpointError,
    NaNScaleError,
    OutputError,
    TensorMissingError,
    UsageError,
)
from mxforge.safetensors import SafetensorsWriter, open_safetensors

Checkpoints = Callable[[str], Path]
CPU = ["CPUExecutionProvider"]


def run(graph: Path, tokens: np.ndarray) -> np.ndarray:
    """Logits f32 [n, V] by onnxruntime."""
    session = onnxruntime.InferenceSession(graph, providers=CPU)
    (logits,) = session.run(["logits"], {"token_ids": tokens.astype(np.int64)})
    return logits


def relative_error(ours: np.ndarray, truth: np.ndarray) -> float:
    return float(np.linalg.norm(ours - truth) / np.linalg.norm(truth))


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def rewritten(checkpoint: Path, folder: Path, change: Callable[[str, np.ndarray], object]) -> Path:
    """A copy of a one-file checkpoint with some tensors replaced (or, for None, left out)."""
    shutil.copytree(checkpoint, folder)
    file = open_safetensors(checkpoint / "model.safetensors")
    tensors = {name: change(name, file.array(name)) for name in file.tensors}
    kept = {name: np.asarray(value) for name, value in tensors.items() if value is not None}
    names = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "uint8": "U8"}
    infos = [(name, names[value.dtype.name], value.shape) for name, value in kept.items()]
    with SafetensorsWriter(folder / "model.safetensors", infos) as writer:
        for name, value in kept.items():
            writer.write(name, value)
    return folder


# -- what it computes ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ODD_SHAPES)
def test_logits_equal_the_golden_and_the_references(
    name, odd_checkpoint: Checkpoints, golden, tmp_path: Path
):
    truth = golden(name)
    logits = run(export_onnx(odd_checkpoint(name), tmp_path / "m.onnx"), truth.tokens)
    assert logits.dtype == np.float32
    assert relative_error(logits[truth.rows], truth.logits) <= 1e-5
    assert relative_error(logits, ReferenceModel(odd_checkpoint(name)).logits(truth.tokens)) <= 1e-5
    assert (logits.argmax(axis=1) == truth.argmax).all()


@pytest.mark.parametrize("name", ODD_SHAPES)
def test_float4_operators_say_the_same(name, odd_checkpoint: Checkpoints, tmp_path: Path):
    """By onnx's own evaluator, for onnxruntime's CPU does not read FLOAT4E2M1."""
    from onnx.reference import ReferenceEvaluator

    graph = export_onnx(odd_checkpoint(name), tmp_path / "m.onnx", opset=FLOAT4_OPSET)
    reference = ReferenceModel(odd_checkpoint(name))
    tokens = random_tokens(reference.config.vocab_size, 24)
    (logits,) = ReferenceEvaluator(str(graph)).run(None, {"token_ids": tokens.astype(np.int64)})
    assert relative_error(logits, reference.logits(tokens)) <= 1e-5


@pytest.mark.parametrize("tokens", [1, 2, 129])
def test_any_length_runs(tokens, odd_checkpoint: Checkpoints, tmp_path: Path):
    """A single token has no key but its own; 129 are one more than the window."""
    reference = ReferenceModel(odd_checkpoint("odd-4"))
    ids = random_tokens(reference.config.vocab_size, tokens, seed=5)
    logits = run(export_onnx(odd_checkpoint("odd-4"), tmp_path / "m.onnx"), ids)
    assert relative_error(logits, reference.logits(ids)) <= 1e-5


def test_the_vocabularys_last_rows_are_fewer(
    odd_checkpoint: Checkpoints, tmp_path: Path, monkeypatch
):
    monkeypatch.setattr(onnx_graph, "_VOCABULARY_ROWS", 100)  # 1003 of them
    reference = ReferenceModel(odd_checkpoint("odd-1"))
    logits = run(export_onnx(odd_checkpoint("odd-1"), tmp_path / "m.onnx"), np.arange(9))
    assert relative_error(logits, reference.logits(np.arange(9))) <= 1e-5


def test_every_mxfp4_byte_and_scale_is_expanded_exactly(tmp_path: Path):
    """All bytes, and the smallest scales, whose values float32 holds as subnormal numbers."""

    def change(name: str, tensor: np.ndarray) -> np.ndarray:
        if name.endswith("down_proj_blocks"):
            return np.resize(np.arange(256, dtype=np.uint8), tensor.shape)
        if name.endswith("down_proj_scales"):
            return np.resize(np.array([0, 1, 125, 130, 140], np.uint8), tensor.shape)
        return tensor

    checkpoint = rewritten(small_checkpoint(tmp_path), tmp_path / "changed", change)
    logits = run(export_onnx(checkpoint, tmp_path / "m.onnx"), np.arange(40))
    assert relative_error(logits, ReferenceModel(checkpoint).logits(np.arange(40))) <= 1e-5


def test_other_dense_dtypes_and_absent_biases(tmp_path: Path):
    def change(name: str, tensor: np.ndarray) -> np.ndarray | None:
        if "self_attn" in name and name.endswith("bias"):
            return None
        if tensor.dtype != ml_dtypes.bfloat16:
            return tensor
        return tensor.astype(np.float16 if "layers.0" in name else np.float32)

    source = small_checkpoint(tmp_path, attention_bias=False)
    checkpoint = rewritten(source, tmp_path / "changed", change)
    logits = run(export_onnx(checkpoint, tmp_path / "m.onnx"), np.arange(40))
    assert relative_error(logits, ReferenceModel(checkpoint).logits(np.arange(40))) <= 1e-5


# -- the files -------------------------------------------------------------------------------------


def test_both_layouts_give_the_same_model(tmp_path: Path):
    exported = []
    for layout in ("huggingface", "openai"):
        folder = write_checkpoint(
            tmp_path / layout / "gpt", "tiny", layout=layout, overrides=SMALL_SHAPE
        )
        graph = export_onnx(folder, tmp_path / layout / "m.onnx")
        model = onnx.load(graph, load_external_data=False)
        exported.append((model.graph, graph.with_name("m.onnx.data").read_bytes()))
    assert exported[0] == exported[1]


def test_the_data_file_is_the_checkpoints_tensors(odd_checkpoint: Checkpoints, tmp_path: Path):
    checkpoint = HFCheckpoint(odd_checkpoint("odd-3"))
    graph = export_onnx(checkpoint.path, tmp_path / "m.onnx")
    assert listing(tmp_path) == ["m.onnx", "m.onnx.data"]
    model = onnx.load(graph, load_external_data=False)
    data = (tmp_path / "m.onnx.data").read_bytes()
    external = [tensor for tensor in model.graph.initializer if tensor.external_data]
    seen = set()
    for tensor in external:
        place = {entry.key: entry.value for entry in tensor.external_data}
        assert place["location"] == "m.onnx.data"
        begin, length = int(place["offset"]), int(place["length"])
        name = tensor.name.removesuffix(".0")  # lm_head's only part
        assert data[begin : begin + length] == checkpoint.tensor(name).tobytes()
        assert begin % 4096 == 0
        seen.add(name)
    assert seen == set(checkpoint.tensors)
    # Aligned, and otherwise as large as what it was made from.
    assert len(data) < sum(info.nbytes for info in checkpoint.tensors.values()) + 4096 * len(seen)


def test_both_kinds_of_graph_share_their_data(odd_checkpoint: Checkpoints, tmp_path: Path):
    for folder, opset in (("a", OLDEST_OPSET), ("b", FLOAT4_OPSET), ("c", OLDEST_OPSET)):
        export_onnx(odd_checkpoint("odd-1"), tmp_path / folder / "m.onnx", opset=opset)
    data = [(tmp_path / folder / "m.onnx.data").read_bytes() for folder in "abc"]
    graphs = [(tmp_path / folder / "m.onnx").read_bytes() for folder in "abc"]
    assert data[0] == data[1] == data[2]
    assert graphs[0] == graphs[2] != graphs[1]
    types = {
        tensor.data_type
        for tensor in onnx.load(tmp_path / "b/m.onnx", load_external_data=False).graph.initializer
    }
    assert {onnx.TensorProto.FLOAT4E2M1, onnx.TensorProto.FLOAT8E8M0} <= types
    assert onnx.TensorProto.UINT8 not in types


@pytest.mark.parametrize("opset", range(OLDEST_OPSET, NEWEST_OPSET + 1))
def test_the_checker_passes_every_opset(opset, odd_checkpoint: Checkpoints, tmp_path: Path):
    graph = export_onnx(odd_checkpoint("odd-5"), tmp_path / "m.onnx", opset=opset)
    onnx.checker.check_model(graph, full_check=True)
    assert onnx.load(graph, load_external_data=False).opset_import[0].version == opset
    if opset < FLOAT4_OPSET:
        assert run(graph, np.arange(5)).shape == (5, 17)


def test_metadata_names_the_source(
    odd_checkpoint: Checkpoints, compiled: Callable[..., Path], tmp_path: Path
):
    checkpoint = HFCheckpoint(odd_checkpoint("odd-5"))
    model = onnx.load(export_onnx(checkpoint.path, tmp_path / "m.onnx"), load_external_data=False)
    notes = {entry.key: entry.value for entry in model.metadata_props}
    assert model.producer_name == "mxforge"
    assert json.loads(notes["config"]) == json.loads(json.dumps(checkpoint.config.to_dict()))
    assert json.loads(notes["stop_token_ids"]) == list(checkpoint.generation_config.eos_token_ids)
    assert notes["source_sha256"] == fingerprint(checkpoint)
    assert notes["source_sha256"] == read_manifest(compiled("odd-5")).source.sha256


def test_a_link_stays_and_its_target_is_written(odd_checkpoint: Checkpoints, tmp_path: Path):
    (tmp_path / "big").mkdir()
    (tmp_path / "m.onnx").symlink_to(tmp_path / "big/real.onnx")
    graph = export_onnx(odd_checkpoint("odd-5"), tmp_path / "m.onnx")
    assert graph.is_symlink()
    assert listing(tmp_path / "big") == ["real.onnx", "real.onnx.data"]
    assert run(tmp_path / "big/real.onnx", np.arange(3)).shape == (3, 17)


# -- what goes wrong -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["m.onnx", "m.onnx.data"])
def test_what_is_there_stays_without_force(name, odd_checkpoint: Checkpoints, tmp_path: Path):
    (tmp_path / name).write_text("precious")
    with pytest.raises(OutputError, match=rf"{name} exists already.*--force"):
        export_onnx(odd_checkpoint("odd-5"), tmp_path / "m.onnx")
    assert listing(tmp_path) == [name]
    assert (tmp_path / name).read_text() == "precious"
    graph = export_onnx(odd_checkpoint("odd-5"), tmp_path / "m.onnx", force=True)
    assert run(graph, np.arange(3)).shape == (3, 17)
    assert listing(tmp_path) == ["m.onnx", "m.onnx.data"]


def test_a_folder_is_never_replaced(odd_checkpoint: Checkpoints, tmp_path: Path):
    with pytest.raises(OutputError, match="is a folder"):
        export_onnx(odd_checkpoint("odd-5"), tmp_path, force=True)


def test_a_place_that_cannot_be_written(odd_checkpoint: Checkpoints, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        export_onnx(odd_checkpoint("odd-5"), tmp_path / "file" / "m.onnx")


def test_too_little_space_is_said_beforehand(
    odd_checkpoint: Checkpoints, tmp_path: Path, monkeypatch
):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(9, 9, 1000))
    with pytest.raises(OutputError, match=r"needs \d+ bytes, but 1000 are free"):
        export_onnx(odd_checkpoint("odd-5"), tmp_path / "m.onnx")
    assert listing(tmp_path) == []


def test_a_disk_that_fills_up(odd_checkpoint: Checkpoints, tmp_path: Path, monkeypatch):
    """/dev/full takes the data: every write to it fails as on a full disk."""
    write = onnx_export._write_data
    monkeypatch.setattr(
        onnx_export, "_write_data", lambda a, b, _, c: write(a, b, Path("/dev/full"), c)
    )
    with pytest.raises(OutputError, match=r"disk is full.*needs \d+ bytes"):
        export_onnx(odd_checkpoint("odd-5"), tmp_path / "m.onnx")
    assert listing(tmp_path) == []


def test_bad_checkpoints(tmp_path: Path):
    with pytest.raises(CheckpointError, match="found nothing"):
        export_onnx(tmp_path / "absent", tmp_path / "m.onnx")

    def without(name: str, tensor: np.ndarray) -> np.ndarray | None:
        return None if name == "lm_head.weight" else tensor

    def damaged(name: str, tensor: np.ndarray) -> np.ndarray:
        return np.full_like(tensor, 255) if name.endswith("down_proj_scales") else tensor

    source = small_checkpoint(tmp_path)
    with pytest.raises(TensorMissingError, match=r"lm_head\.weight"):
        export_onnx(rewritten(source, tmp_path / "without", without), tmp_path / "m.onnx")
    with pytest.raises(NaNScaleError, match="255"):
        export_onnx(rewritten(source, tmp_path / "damaged", damaged), tmp_path / "m.onnx")
    assert listing(tmp_path) == ["damaged", "small", "without"]


@pytest.mark.parametrize("opset", [OLDEST_OPSET - 1, NEWEST_OPSET + 1, True, 18.0])
def test_opsets_that_it_has_not(opset, odd_checkpoint: Checkpoints, tmp_path: Path):
    with pytest.raises(UsageError, match="from 18 to 24"):
        export_onnx(odd_checkpoint("odd-5"), tmp_path / "m.onnx", opset=opset)


STOPPED = """
import sys, time
from mxforge.compile import onnx_export
def stop(text):
    if text == sys.argv[3]:
        print("there", flush=True)
        time.sleep(60)
onnx_export.export_onnx(sys.argv[1], sys.argv[2], force=True, announce=stop)
"""


@pytest.mark.parametrize("moment", ["writing the weights", "writing the graph"])
def test_a_killed_export_leaves_the_old_one_and_the_next_cleans_up(
    moment, odd_checkpoint: Checkpoints, tmp_path: Path
):
    graph = tmp_path / "m.onnx"
    for before in ([], ["m.onnx", "m.onnx.data"]):
        command = [sys.executable, "-c", STOPPED, odd_checkpoint("odd-5"), graph, moment]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "there\n"
            with pytest.raises(OutputError, match="another process"):
                export_onnx(odd_checkpoint("odd-5"), graph, force=True)
            process.send_signal(signal.SIGKILL)
        assert listing(tmp_path) == [".m.onnx.partial", *before]
        if before:
            assert run(graph, np.arange(3)).shape == (3, 17)
        export_onnx(odd_checkpoint("odd-5"), graph, force=True)
        assert listing(tmp_path) == ["m.onnx", "m.onnx.data"]


def test_an_interrupted_export_leaves_nothing(odd_checkpoint: Checkpoints, tmp_path: Path):
    def interrupt(text: str) -> None:
        if text == "writing the graph":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_onnx(odd_checkpoint("odd-5"), tmp_path / "m.onnx", announce=interrupt)
    assert listing(tmp_path) == []


# -- the command -----------------------------------------------------------------------------------


def test_the_command_prints_the_path(odd_checkpoint: Checkpoints, tmp_path: Path, capsys):
    graph = tmp_path / "new" / "m.onnx"
    assert main(["export-onnx", str(odd_checkpoint("odd-5")), str(graph), "--opset", "21"]) == 0
    out, err = capsys.readouterr()
    assert out == f"{graph}\n"
    assert "mxforge export-onnx: writing the weights" in err
    assert main(["export-onnx", str(odd_checkpoint("odd-5")), str(graph)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert main(["export-onnx", str(odd_checkpoint("odd-5")), str(graph), "--force"]) == 0
    assert main(["export-onnx", str(tmp_path), str(graph), "--opset", "9"]) == 2


def test_help_names_the_options(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["export-onnx", "--help"])
    assert caught.value.code == 0
    help_text = capsys.readouterr().out
    assert all(word in help_text for word in ("CHECKPOINT", "OUT.data", "--opset", "--force"))
