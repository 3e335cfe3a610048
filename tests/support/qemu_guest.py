"""What runs on the CPUs of `qemu.py`, on the runtime alone.

qemu_guest.py kernels FOLDER LIBRARY OUTPUTS    the calls that FOLDER describes
qemu_guest.py answer ARTIFACT PROMPT TOKENS     a greedy answer's tokens, or why there are none
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import ml_dtypes  # noqa: F401 (NumPy's names of bfloat16)
import numpy as np

from mxforge import Engine, SamplingParams, machine
from mxforge.core import CoreLibrary
from mxforge.errors import MxforgeError

THREADS = 2
# Bits of what the kernel tells a process about an aarch64 CPU: AT_HWCAP and AT_HWCAP2.
HWCAP, HWCAP2 = 16, 26
FEATURES = {"asimd": (HWCAP, 1), "asimddp": (HWCAP, 20), "i8mm": (HWCAP2, 13)}


def aarch64_flags() -> frozenset[str]:
    """As in /proc/cpuinfo, which older versions of qemu do not emulate."""
    value = ctypes.CDLL(None).getauxval
    value.restype, value.argtypes = ctypes.c_ulong, [ctypes.c_ulong]
    return frozenset(name for name, (word, bit) in FEATURES.items() if value(word) >> bit & 1)


def kernels(folder: str, library: str, outputs: str) -> None:
    """Call kernels of LIBRARY, as calls.plan has it. calls.json says with which arrays of
    inputs.npz, each as bytes with a shape and a dtype, and which of them go to OUTPUTS afterwards.
    """
    results = {}
    core = CoreLibrary("cpu", Path(folder, "calls.plan"), Path(library), THREADS)
    with np.load(Path(folder, "inputs.npz")) as inputs:
        for number, call in enumerate(json.loads(Path(folder, "calls.json").read_text())):
            print(call["what"], file=sys.stderr, flush=True)  # the last one, in case of a crash
            arrays = {
                key: inputs[key].view(dtype).reshape(shape)
                for key, shape, dtype in call["arguments"]
            }
            core.call(f"call{number}", list(arrays.values()))
            for key in call["results"]:
                results[key] = np.ascontiguousarray(arrays[key]).reshape(-1).view(np.uint8)
    np.savez(outputs, **results)


def answer(artifact: str, prompt: str, tokens: str) -> None:
    greedy = SamplingParams(max_tokens=int(tokens), temperature=0)
    try:
        with Engine.load(artifact, threads=THREADS, context_length=256) as engine:
            print(json.dumps(engine.generate(json.loads(prompt), greedy).token_ids))
    except MxforgeError as error:
        print(error)


if __name__ == "__main__":
    if machine.architecture() == "aarch64":
        machine._cpu_flags = aarch64_flags
    what, *arguments = sys.argv[1:]
    {"kernels": kernels, "answer": answer}[what](*arguments)
