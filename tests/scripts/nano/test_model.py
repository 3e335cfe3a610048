"""The module that is trained, beside the reference and transformers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from nano import compact
from support.nano import ROOT, SMALL, USED

from mxforge.compile.checkpoint import HFCheckpoint
from mxforge.compile.models.gpt_oss.reference import (
    ReferenceModel,
    dequantize_mxfp4,
    transformers_logits,
    transformers_model,
)


@pytest.mark.live
def test_training_rounds_as_the_packer_does():
    torch = pytest.importorskip("torch")
    from nano import model as trained

    w = np.random.default_rng(1).standard_normal((4, 6, 96)).astype(np.float32)
    w[0, 0] = 0
    w[1] = np.round(w[1] * 4) / 4  # ties
    rounded = trained.fake_quantize(torch.from_numpy(w)).numpy()
    np.testing.assert_allclose(
        rounded, dequantize_mxfp4(*compact.quantize_mxfp4(w)), rtol=1e-6, atol=1e-7
    )


@pytest.mark.live
def test_the_trained_module_is_the_reference_model(small: Path, small_expanded: Path):
    """Packed dialogues give what each gives alone, in the reference and in transformers."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from nano import model as trained

    stored = compact.Compact(small)
    model, rows = trained.load(stored.config, stored.floats()), stored.rows()
    rng = np.random.default_rng(3)
    prefix = rng.choice(USED, 11).tolist()
    dialogues = [rng.choice([*USED, 99, 100_000], n).tolist() for n in (3, 19, 8, 30, 17)]
    batch = trained.make_batch(
        prefix, [(d, [True] * len(d)) for d in dialogues], rows, group_size=2
    )
    with torch.no_grad():
        hidden, _ = model.hidden(batch, quantized=False)
        packed = model.logits(hidden).numpy()
    reference = ReferenceModel(HFCheckpoint(small_expanded))
    theirs = transformers_model(HFCheckpoint(small_expanded))
    order = sorted(range(len(dialogues)), key=lambda i: len(dialogues[i]))
    at = 0
    for group in batch.groups[1:]:
        for m in range(group.count):
            dialogue = dialogues[order[at]]
            at += 1
            alone = reference.logits([*prefix, *dialogue])[len(prefix) :]
            first = group.first + m * group.length
            ours = packed[first : first + len(dialogue)][:, rows]
            assert np.linalg.norm(ours - alone) / np.linalg.norm(alone) < 1e-5
            if len(dialogue) == 30:
                truth, _ = transformers_logits(theirs, [*prefix, *dialogue])
                assert np.linalg.norm(ours - truth[-30:]) / np.linalg.norm(ours) < 1e-5


@pytest.mark.live
def test_loss_is_that_of_the_whole_vocabulary(small: Path, small_expanded: Path):
    torch = pytest.importorskip("torch")
    from nano import model as trained

    stored = compact.Compact(small)
    model = trained.load(stored.config, stored.floats())
    ids = [5, 17, 99, 198, 0, 200002]
    batch = trained.make_batch([5], [(ids, [i != 2 for i in range(6)])], stored.rows())
    with torch.no_grad():
        loss, balance = model.loss(batch, quantized=False)
    logits = ReferenceModel(HFCheckpoint(small_expanded), np.float64).logits([5, *ids])
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = -np.mean([log_p[i, token] for i, token in enumerate(ids) if i != 2])
    assert abs(float(loss) - expected) < 1e-5
    assert 0.5 < float(balance) < 3


@pytest.mark.live
def test_export_is_the_inverse_of_load(small: Path):
    pytest.importorskip("torch")
    from nano import model as trained

    stored = compact.Compact(small)
    floats = stored.floats()
    again = trained.export(trained.load(stored.config, floats))
    assert again.keys() == floats.keys()
    for name, value in floats.items():
        np.testing.assert_array_equal(again[name], value, err_msg=name)


@pytest.mark.live
@pytest.mark.full
def test_training_is_reproducible_and_resumes(tmp_path: Path):
    """Two processes, one process, and one that was interrupted: the same file."""
    pytest.importorskip("torch")
    common = ["--steps", "4", "--dialogues", "3", "--evaluate", "1", "--checkpoint-every", "2"]
    for key, value in SMALL.items():
        common += ["--set", f"{key}={value}"]
    files = []
    for name, options in {
        "two": [["--workers", "2"]],
        "one": [["--workers", "1"]],
        "resumed": [["--workers", "1", "--stop-after", "2"], ["--workers", "1"]],
    }.items():
        for more in options:
            words = [sys.executable, ROOT / "scripts" / "train_nano", *common, *more]
            words += ["--out", tmp_path / name, "--work", tmp_path / f"{name}-work"]
            subprocess.run(list(map(str, words)), check=True, env=os.environ | {"CI": "1"})
        files.append((tmp_path / name / "compact.safetensors").read_bytes())
    assert files[0] == files[1] == files[2]
