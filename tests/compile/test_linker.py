"""Libraries of kernels are linked here for every system, and none needs anything of its system."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tvm
from support.binaries import read_binary
from tvm import tirx

from mxforge.compile import compile_model, linker
from mxforge.compile.linker import HOSTS, link
from mxforge.compile.targets import resolve
from mxforge.errors import TargetError
from mxforge.manifest import Manifest
from mxforge.schedules import KERNELS

KERNEL = "moe_plan"  # calls memset
SLOT = "__mxforge_raised"
LEVELS = {"x86_64": "x86-64", "aarch64": "neon"}


@pytest.fixture(scope="module")
def compiled_kernel(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """compiled_kernel(host) -> an object file with a kernel."""
    pytest.importorskip("ziglang")

    def make(host: str) -> Path:
        target = resolve(f"cpu:{LEVELS[host.partition('-')[2]]}", host)
        kernel = KERNELS[KERNEL]
        function = kernel.build(target.kernels, **kernel.cases[0].static)
        module = tvm.IRModule({KERNEL: function.with_attr("global_symbol", KERNEL)})
        built = tirx.build(module, target=tvm.target.Target(target.tvm), pipeline="default")
        path = tmp_path_factory.mktemp("objects") / f"{host}.o"
        built.write_to_file(str(path), "o")
        return path

    return make


@pytest.mark.parametrize("host", HOSTS)
def test_a_library_exports_its_kernels_and_imports_nothing(host, compiled_kernel, tmp_path):
    compiled = compiled_kernel(host)
    made = []
    for folder in (tmp_path / "first", tmp_path / "second folder"):
        folder.mkdir()
        made.append(folder / f"model{HOSTS[host].suffix}")
        link([compiled], host, made[-1])
        assert list(folder.iterdir()) == [made[-1]]
    assert made[0].read_bytes() == made[1].read_bytes()
    binary = read_binary(made[0])
    assert {f"__tvm_ffi_{KERNEL}", SLOT} <= binary.exports
    if host.startswith("darwin"):  # where no library can be without it
        assert binary.libraries == {"/usr/lib/libSystem.B.dylib"}
        assert binary.imports <= {"dyld_stub_binder"}
        assert binary.versions == {(11, 0)}
        assert binary.signed or host == "darwin-x86_64"
    else:
        assert binary.libraries | binary.imports == set()
    if host == "android-aarch64":
        assert binary.alignment == 16 << 10


def test_what_a_kernel_misses_is_said_when_it_is_linked(tmp_path):
    pytest.importorskip("ziglang")
    source = tmp_path / "needs.c"
    source.write_text("int missing(void); int found(void) { return missing(); }\n")
    for host in ("linux-x86_64", "linux-aarch64", "windows-x86_64"):
        compiled = tmp_path / f"{host}.o"
        linker.run(
            [*linker.compiler(host), "-fPIC", "-c", source.name, "-o", str(compiled)], tmp_path
        )
        with pytest.raises(TargetError, match="missing"):
            link([compiled], host, tmp_path / "library")


def test_an_unknown_system_names_the_known_ones():
    with pytest.raises(TargetError, match=r"'plan9-vax'.*linux-x86_64.*windows-x86_64"):
        resolve("cpu:avx2", "plan9-vax")


def test_a_level_has_to_be_of_the_systems_architecture():
    with pytest.raises(TargetError, match=r"cpu:avx2 is of x86_64.*cpu:neon-i8mm"):
        resolve("cpu:avx2", "linux-aarch64")


def test_cpu_is_this_machines_level_and_on_no_other_system():
    with pytest.raises(TargetError, match=r"windows-x86_64.*cpu:avx2.*cpu:portable"):
        resolve("cpu", "windows-x86_64")


@pytest.mark.full
@pytest.mark.parametrize("host", HOSTS)
def test_nano_compiles_for_every_system(host, nano, tmp_path):
    level = LEVELS[host.partition("-")[2]]
    artifact = compile_model(nano, f"cpu:{level}", tmp_path / "artifact", host=host)
    manifest = Manifest.from_json((artifact / "manifest.json").read_text())
    assert manifest.target.host == host
    binary = read_binary(artifact / f"model{HOSTS[host].suffix}")
    assert len(binary.exports) > 20
    assert not binary.imports - {"dyld_stub_binder"}
