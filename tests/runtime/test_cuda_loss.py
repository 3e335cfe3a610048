"""A CUDA device that fails in an answer, with NVIDIA's libraries replaced by ones that do nothing.

What they cannot show: kernels, times, and what a real driver does. TVM's own code is the real one,
and ends the process where it cannot free a tensor.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mxforge.compile import compile_model, cuda

SOURCE = Path(__file__).parents[1] / "support" / "fake_cuda.c"
COMPILER = shutil.which("cc") or shutil.which("gcc")
SCRIPT = """
import ctypes, gc, sys
from mxforge import Engine, SamplingParams
from mxforge.errors import DeviceLostError

fake = ctypes.CDLL("libcudart.so.13")
allocated = ctypes.c_long.in_dll(fake, "fake_cuda_allocated")
path, cpu = sys.argv[1:]
params = SamplingParams(max_tokens=40, temperature=0, ignore_eos=True)

def outcome(ask):
    try:
        ask()
        return "answered"
    except DeviceLostError as error:
        return str(error)

with Engine.load(path, context_length=256, max_batch=2) as engine:
    engine.generate([1, 2, 3], params)
print(allocated.value, "after closing")
engine, idle = (Engine.load(path, context_length=256, max_batch=2) for _ in range(2))
idle.generate([1, 2], params)
streams = [engine.stream([n, 2, 3], params) for n in (1, 2, 3)]
next(streams[0])
fake.fake_cuda_lose()
for stream in streams:
    print(outcome(lambda: list(stream)))
gc.collect()
print(outcome(lambda: engine.generate([1], params)))
print(outcome(lambda: idle.generate([1], params)))
print(outcome(lambda: Engine.load(path)))
engine.close()
idle.close()
with Engine.load(cpu, context_length=256) as other:
    print(outcome(lambda: other.generate([1, 2], params)))
del engine, idle, streams, stream
gc.collect()
print("alive")
"""


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if COMPILER is None or sys.platform != "linux":
        pytest.skip("needs Linux and a C compiler")
    folder = tmp_path_factory.mktemp("cuda")
    versions = folder / "versions"
    versions.write_text("libcudart.so.13 { global: *; };")
    command = [COMPILER, "-shared", "-fPIC", "-w", str(SOURCE)]
    for name, options in (
        ("libcudart.so.13", [f"-Wl,--version-script={versions}"]),
        ("libcuda.so.1", ["-DDRIVER", f"-L{folder}", "-l:libcudart.so.13"]),
    ):
        output = ["-o", str(folder / name), f"-Wl,-soname,{name}"]
        subprocess.run([*command, *output, *options], check=True)
    return folder


@pytest.fixture(scope="module")
def artifact(odd_checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For CUDA, its machine code replaced by a word: nvcc is not needed."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "compiled", lambda *_: b"machine code")
        return compile_model(
            odd_checkpoint("odd-1"), "cuda:sm_90a", tmp_path_factory.mktemp("a") / "cuda"
        )


def test_a_lost_device_fails_every_request_by_name_and_the_process_lives(
    libraries: Path, artifact: Path, odd_artifact: Path
) -> None:
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(artifact), str(odd_artifact)],
        env={**os.environ, "LD_LIBRARY_PATH": str(libraries)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    closed, *lost, other, alive = result.stdout.splitlines()
    assert closed == "0 after closing"
    assert len(lost) == 6
    for said in lost:
        assert "cudaErrorIllegalAddress" in said or "CUDA_ERROR_ILLEGAL_ADDRESS" in said
        assert said.endswith("CUDA lets this process use the device no more; start it again.")
    assert (other, alive) == ("answered", "alive")
    assert "Traceback" not in result.stderr
