"""A format that joins its table is an option, is packed, is computed with and is answered by."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.targets import PLAIN_CPU
from support.toy_format import KERNEL, TOY

from mxforge import Engine, SamplingParams, compile_model
from mxforge.artifact import read_manifest, verify
from mxforge.compile.cli import parser
from mxforge.compile.diff import compare
from mxforge.compile.formats import Formats, Precision
from mxforge.errors import FormatError
from mxforge.schedules.formats import DENSE

Checkpoints = Callable[[str], Path]


@pytest.fixture
def toy() -> Iterator[None]:
    DENSE.add(TOY)
    yield
    DENSE.remove(TOY)


@pytest.mark.usefixtures("toy")
def test_a_model_is_compiled_with_it_and_answers(odd_checkpoint: Checkpoints, tmp_path: Path):
    checkpoint = odd_checkpoint("odd-2")
    artifact = compile_model(checkpoint, output=tmp_path / "a", dense="toy8", activations="f32")
    verify(artifact)
    manifest = read_manifest(artifact)
    assert manifest.precision.dense == "toy8"
    assert KERNEL.name in {kernel.name for kernel in manifest.kernels}
    compare(artifact, checkpoint, tokens=40).check()
    with Engine.load(artifact, context_length=64) as engine:
        greedy = SamplingParams(temperature=0, max_tokens=4, stop_token_ids=())
        assert len(engine.generate([1, 2, 3], greedy).token_ids) == 4


@pytest.mark.usefixtures("toy")
def test_the_command_line_offers_it():
    assert parser().parse_args(["checkpoint", "--dense", "toy8"]).dense == "toy8"
    assert "bf16, int8, toy8" in " ".join(parser().format_help().split())


@pytest.mark.usefixtures("toy")
def test_what_it_does_not_fit_stays_bf16():
    precision = Precision().with_asked(Formats.of("fast", dense="toy8"), PLAIN_CPU)
    assert (precision.dense_of(48).name, precision.dense_of(50).name) == ("toy8", "bf16")


@pytest.mark.usefixtures("toy")
def test_its_name_is_taken():
    with pytest.raises(FormatError, match="dense weight format called 'toy8' already"):
        DENSE.add(TOY)


def test_activations_that_no_experts_kernel_reads_are_refused():
    precision = Precision(activations="i16")  # of dense layers
    assert precision.unscheduled(PLAIN_CPU) == ["activations i16"]


def test_the_plainest_format_of_an_option_comes_first():
    assert [format_.name for format_ in DENSE.asked("bf16")] == ["bf16", "bf16xbf16"]


def test_a_name_that_no_format_has():
    with pytest.raises(FormatError, match="Unknown dense weight format 'toy8'; .* bf16, bf16xbf16"):
        Precision(dense="toy8").dense_of(64)
