"""Metal in libmxforge, as far as a machine without it can tell: types, and the text of kernels."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import tvm_ffi
from tvm import IRModule

from mxforge.compile.kernels import of_gpu
from mxforge.compile.targets import resolve
from mxforge.native import build
from mxforge.schedules import KERNELS

NATIVE = Path(build.__file__).parent
STUBS = Path(__file__).resolve().parents[1] / "support" / "metal_stubs"
# Of two kernels, whose programs define the same names.
NAMES = ("f32_rms_norm", "kv_copy_pages")
READ = """
#include <cstdio>
#include <cstring>
#include "sources.h"
#include "../core/error.h"
#include "../core/os.h"
int main(int, char** words) {
  try {
    const mxforge::core::MappedFile file(words[1]);
    const std::string_view text(static_cast<const char*>(file.data()), file.size());
    for (const auto& [name, source] : mxforge::metal::ReadSources(text)) {
      std::printf("%s %zu\\n", name.c_str(), source.size());
    }
  } catch (const mxforge::core::Error& error) {
    std::puts(error.what());
  }
}
"""


@pytest.mark.parametrize("source", ["metal/device.mm", "metal/sources.cc", "core/device_kinds.cc"])
def test_it_compiles_against_declarations_of_metal(source, tmp_path):
    pytest.importorskip("ziglang")
    own = ["-fobjc-arc"] if source.endswith(".mm") else []
    target = build.SYSTEMS["darwin-aarch64"].zig
    command = [
        *build.find_zig(), "-target", target, *build._FLAGS, *own, "-Werror", "-Wconversion",
        "-DMXFORGE_METAL", "-isystem", str(STUBS), "-c", str(NATIVE / source),
        "-o", str(tmp_path / "made.o"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that prints the kernels of a file, or why there are none."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "read.cc").write_text(READ)
    own = [NATIVE / "metal" / "sources.cc", NATIVE / "core" / "os.cc"]
    command = [
        *build.find_compiler(), "-std=c++17", f"-I{NATIVE / 'metal'}", str(folder / "read.cc"),
        *map(str, own), "-o", str(folder / "read"), "-ldl",
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return folder / "read"


def text_of(*names: str) -> str:
    """What the compiler writes of these kernels."""
    target = resolve("metal")
    functions = {
        name: KERNELS[name]
        .build(target.kernels, **KERNELS[name].cases[0].static)
        .with_attr("mxforge.kernel", name)
        for name in names
    }
    kernels = of_gpu(IRModule(functions), target)
    built = tvm_ffi.get_global_func("target.build.metal")(kernels.functions, kernels.target)
    return str(built.inspect_source())


def test_each_kernels_text_is_found(reader, tmp_path):
    file = tmp_path / "model.metal"
    file.write_text(text_of(*NAMES))
    said = subprocess.run([reader, file], capture_output=True, text=True, check=True).stdout
    alone = {f"{name}_kernel": text_of(name) for name in NAMES}
    sizes = {name: len(text.partition("\n")[2]) for name, text in alone.items()}
    assert said.splitlines() == [f"{name} {size}" for name, size in sorted(sizes.items())]
    for name, text in alone.items():
        assert text.startswith(f"// Function: {name}\n")
        assert f"kernel void {name}(" in text


@pytest.mark.parametrize("text", ["", "kernel void f() {}\n", "// Function: f"])
def test_other_text_is_refused(text, reader, tmp_path):
    file = tmp_path / "model.metal"
    file.write_text(text)
    said = subprocess.run([reader, file], capture_output=True, text=True, check=True).stdout
    assert "holds no kernels for Metal" in said
