"""What tests of several folders share: random checkpoints, and artifacts compiled from them."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

GOLDEN = Path(__file__).parent / "compile" / "golden"
NANO = Path(__file__).resolve().parents[1] / "artifacts" / "nano"


@pytest.fixture(scope="session", autouse=True)
def _ctrl_c_works() -> None:
    """A shell lets what it runs in the background ignore Ctrl-C, and children inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _layers_have_nothing_to_say() -> Iterator[None]:
    """Under Vulkan's validation layers (see `watched`) a test fails that they say something of."""
    from support.vulkan_device import new_validation_messages

    yield
    said = new_validation_messages()
    assert not said, "\n".join(["the validation layers say:", *said])


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """An artifact with every kind of file and no model; see `support.small.SMALL_MANIFEST`."""
    from support.small import make_artifact

    return make_artifact(tmp_path / "model")


@pytest.fixture(scope="session")
def once(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """once(name, make) -> folder made by `make(folder)`, by one of pytest's processes for all."""
    root = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):  # of pytest-xdist: each has a folder in that of all
        root = root.parent

    def folder(name: str, make: Callable[[Path], object]) -> Path:
        made, begun = root / "made" / name, root / "begun" / name
        with FileLock(root / f"{name}.lock"):
            if not made.exists():
                made.parent.mkdir(exist_ok=True)
                begun.parent.mkdir(exist_ok=True)
                make(begun)
                begun.rename(made)
        return made

    return folder


@pytest.fixture(scope="session")
def odd_checkpoint(once: Callable[..., Path]) -> Callable[[str], Path]:
    """odd_checkpoint(shape) -> folder of the checkpoint that its golden file is about."""
    from checkpoints.random_checkpoint import write_checkpoint

    @cache
    def make(name: str) -> Path:
        with np.load(GOLDEN / f"{name}.npz") as stored:
            seed = int(json.loads(str(stored["about"]))["seed"])
        return once(name, lambda folder: write_checkpoint(folder, name, seed=seed))

    return make


@pytest.fixture(scope="session")
def compiled(
    once: Callable[..., Path], odd_checkpoint: Callable[[str], Path]
) -> Callable[..., Path]:
    """compiled(shape, numerics="exact", **options of compile_model) -> artifact.

    Each combination is compiled once a run, which takes some seconds.
    """
    from mxforge.compile import compile_model

    def make(name: str, numerics: str = "exact", **options: Any) -> Path:
        words = [name, numerics, *(f"{key}-{value}" for key, value in options.items())]
        return once(
            "-".join(words).replace(":", "-"),
            lambda output: compile_model(
                odd_checkpoint(name), output=output, numerics=numerics, **options
            ),
        )

    return make


@pytest.fixture(scope="session")
def text_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A very small checkpoint with a byte-level tokenizer.json; token 0 stops."""
    from support.small import TEXT_VOCAB, small_checkpoint, write_tokenizer

    checkpoint = small_checkpoint(tmp_path_factory.mktemp("text"), vocab_size=TEXT_VOCAB)
    write_tokenizer(checkpoint / "tokenizer.json")
    return checkpoint


@pytest.fixture(scope="session")
def text_artifact(text_checkpoint: Path) -> Path:
    """`text_checkpoint`, compiled with fast numerics."""
    from support.small import MAX_BATCH, PREFILL_CHUNK

    from mxforge import compile_model

    return compile_model(
        text_checkpoint,
        output=text_checkpoint.parent / "artifact",
        max_batch=MAX_BATCH,
        prefill_chunk=PREFILL_CHUNK,
    )


@pytest.fixture(scope="session")
def nano(once: Callable[..., Path]) -> Path:
    """The demo model in the published layout."""
    from nano.compact import expand

    return once("nano", lambda folder: expand(NANO, folder))


@pytest.fixture(scope="session")
def vulkan(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """vulkan:0 as `support.vulkan_device.VulkanDevice`; skips, saying why, where there is none."""
    from support.vulkan_device import open_device

    return open_device(tmp_path_factory.mktemp("vulkan"))


@pytest.fixture(scope="session")
def watched(vulkan: Any) -> dict[str, str]:
    """The environment of a process under Vulkan's validation layers; skips where they are not."""
    from support.vulkan_device import WATCHED, run_apart, unavailable

    report = 'vk = VulkanDevice()\nvk.statistics()\nprint(vk.hook("validation_messages")())'
    if '"watching":true' not in run_apart(report, **WATCHED).stdout.replace(" ", ""):
        unavailable("the validation layers are missing; Debian: vulkan-validationlayers")
    return WATCHED
