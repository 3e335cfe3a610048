"""TVM's runtime in this process: what is mapped, what fits where, and what cannot be loaded."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mxforge import library
from mxforge.errors import ArtifactTargetError
from mxforge.library import ALIGNMENT, Library, aligned_empty, default_threads, usable_cores


def in_fresh_process(code: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("shape", [(0,), (0, 7), (1,), (3, 5), (64, 64), ()])
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32])
def test_arrays_begin_where_vectors_may(shape: tuple[int, ...], dtype: type) -> None:
    for _ in range(5):
        array = aligned_empty(shape, dtype)
        assert array.shape == shape
        assert array.dtype == dtype
        assert array.ctypes.data % ALIGNMENT == 0
        assert array.flags.c_contiguous
        assert array.flags.writeable


@pytest.fixture(scope="module")
def loaded(odd_artifact: Path) -> Library:
    (path,) = odd_artifact.glob("model.*")
    return Library(path, "cpu")


@pytest.mark.parametrize("size", [0, 1, 5, 1000])
def test_tensors_are_copies(loaded: Library, size: int) -> None:
    array = np.arange(size, dtype=np.int32)
    tensor = loaded.tensor(array)
    array += 1
    back = loaded.numpy(tensor)
    assert back.tolist() == list(range(size))
    back += 1
    assert loaded.numpy(tensor).tolist() == list(range(size))


def test_weights_are_not_copied_and_live_as_long_as_their_tensor(loaded: Library) -> None:
    content = aligned_empty((4096,), np.uint8)
    content[:] = np.arange(4096) % 251
    tensor = loaded.weight(content, (1024,), "float32")
    content[0] += 1
    expected = content.view(np.float32).copy()
    del content
    filler = [np.empty(4096, np.uint8) for _ in range(100)]  # would take freed memory
    for array in filler:
        array[:] = 0
    np.testing.assert_array_equal(loaded.numpy(tensor), expected)


def test_a_view_is_the_beginning_of_its_base(loaded: Library) -> None:
    base = loaded.tensor(np.arange(12, dtype=np.float32).reshape(4, 3))
    assert loaded.numpy(loaded.view(base, (2, 3), "float32")).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.so"
    path.write_bytes(b"not machine code")
    with pytest.raises(ArtifactTargetError, match=r"model\.so should load on cpu but does not: "):
        Library(path, "cpu")
    with pytest.raises(ArtifactTargetError, match="should load on cpu"):
        Library(tmp_path / "absent.so", "cpu")


def test_a_device_that_is_not_here_is_named(odd_artifact: Path) -> None:
    (path,) = odd_artifact.glob("model.*")
    with pytest.raises(
        ArtifactTargetError, match="devices cpu, cuda, vulkan, metal, but the artifact is"
    ):
        Library(path, "abacus")
    if sys.platform != "darwin":
        with pytest.raises(ArtifactTargetError, match="for metal, but this platform's apache-tvm"):
            Library(path, "metal")


def test_threads_are_the_usable_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "usable_cores", lambda: 64)
    for content, expected in (
        ("max 100000\n", 64),
        ("200000 100000\n", 2),
        ("150000 100000\n", 2),
        ("50000 100000\n", 1),
        ("9900000 100000\n", 64),
        ("nonsense", 64),
    ):
        monkeypatch.setattr(Path, "read_text", lambda _self, content=content: content)
        assert default_threads() == expected
    monkeypatch.undo()
    if hasattr(os, "sched_getaffinity"):
        assert usable_cores() == len(os.sched_getaffinity(0))
    assert 1 <= default_threads() <= usable_cores()


def test_an_affinity_limits_the_threads(odd_artifact: Path) -> None:
    if not hasattr(os, "sched_setaffinity") or usable_cores() < 2:
        pytest.skip("needs two cores and Linux")
    code = (
        "import os, sys\n"
        "os.sched_setaffinity(0, [sorted(os.sched_getaffinity(0))[1]])\n"
        "import mxforge\n"
        "with mxforge.Engine.load(sys.argv[1], context_length=64) as engine:\n"
        "    print(engine.threads, engine.logits([1, 2]).shape[0])\n"
    )
    assert in_fresh_process(code, odd_artifact) == "1 2\n"


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_the_compiler_is_never_mapped_and_tvm_never_imported(text_artifact: Path) -> None:
    code = (
        "import sys, mxforge\n"
        "with mxforge.Engine.load(sys.argv[1], context_length=64) as engine:\n"
        "    engine.generate('hello', mxforge.SamplingParams(max_tokens=3, logprobs=2))\n"
        "maps = open('/proc/self/maps').read()\n"
        "print('libtvm_runtime.so' in maps, 'libtvm_compiler' in maps, 'libLLVM' in maps)\n"
        "print([name for name in ('tvm', 'torch', 'transformers') if name in sys.modules])\n"
    )
    assert in_fresh_process(code, text_artifact) == "True False False\n[]\n"


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
def test_torch_may_still_be_imported() -> None:
    code = "import mxforge.library, torch\nprint(float(torch.ones(3).sum()), torch.__name__)"
    assert in_fresh_process(code) == "3.0 torch\n"
