"""Statistics of GPUs that are not here: the gates, the parsers, the tracked files, the pins."""

from __future__ import annotations

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from support import folders, mesa

ROOT = Path(__file__).resolve().parents[2]

from absent_gpus import cuda, results, vulkan  # noqa: E402

COMPILERS = {"vulkan": vulkan, "cuda": cuda}


def made_up(**kernels: dict[str, Any]) -> results.Results:
    """Results of one GPU."""
    return results.results("a compiler 1.0", "20b", "fast", {"a GPU": kernels})


GOOD = {"registers": 32, "spills": 0, "scratch_bytes": 0, "instructions": 100, "cycles": 5000}


# ---------------------------------------------------------------------------------------- gates


@pytest.mark.parametrize("name", results.UNWANTED)
def test_gate_of_each_unwanted_thing(name: str):
    found = made_up(good=GOOD, bad={**GOOD, name: 8})
    assert results.broken_gates(found, {}) == [f"bad on a GPU should have no {name}: 8"]
    assert results.broken_gates(found, {("a GPU", "bad"): "why"}) == []


def test_gate_of_kernels_that_do_not_compile():
    found = made_up(bad={"failed": "the driver crashed"})
    for exceptions in ({}, {("a GPU", "bad"): "why"}):
        problems = results.broken_gates(found, exceptions)
        assert problems[0] == "bad does not compile for a GPU: the driver crashed"


def test_exception_that_nothing_needs_any_more():
    exceptions = {("a GPU", "good"): "why", ("another compiler's", "good"): "why"}
    problems = results.broken_gates(made_up(good=GOOD), exceptions)
    assert problems == ["good on a GPU needs no exception any more; remove it"]


def test_differences_part_counts_from_estimates():
    before = made_up(a=GOOD, b=GOOD, gone=GOOD)
    after = made_up(a={**GOOD, "registers": 40, "cycles": 4000}, b=GOOD, new=GOOD)
    counted, harmless = results.differences(before, after, {})
    assert counted == ["a GPU a: registers 32 -> 40", "a GPU gone: gone", "a GPU new: new"]
    assert harmless == ["a GPU a: cycles 5000 -> 4000"]
    assert results.differences(before, before, {}) == ([], [])


def test_differences_within_a_compilers_spread():
    before, spread = made_up(a=GOOD), {"instructions": 0.01, "spills": 0.01}
    for instructions, explained in ((101, False), (99, False), (102, True), (98, True)):
        after = made_up(a={**GOOD, "instructions": instructions})
        line = [f"a GPU a: instructions 100 -> {instructions}"]
        expected = (line, []) if explained else ([], line)
        assert results.differences(before, after, spread) == expected
    counted, _ = results.differences(before, made_up(a={**GOOD, "spills": 1}), spread)
    assert counted == ["a GPU a: spills 0 -> 1"]  # whatever part of nothing that is


def test_another_compiler_is_a_difference():
    after = {**made_up(a=GOOD), "compiler": "a compiler 2.0"}
    counted, _ = results.differences(made_up(a=GOOD), after, {})
    assert counted == ["compiler: a compiler 1.0 -> a compiler 2.0"]


def test_text_is_the_object_with_a_line_for_each_kernel():
    found = made_up(a=GOOD, b={"failed": 'a "reason"'})
    text = results.text(found)
    assert json.loads(text) == found
    assert sum('"registers"' in line or '"failed"' in line for line in text.splitlines()) == 2


# ------------------------------------------------------------------------------ tracked files


@pytest.mark.parametrize("name", COMPILERS)
def test_tracked_results(name: str):
    compiler = COMPILERS[name]
    path = ROOT / "docs" / "bench" / f"{name}-absent-gpus.json"
    tracked = json.loads(path.read_text())
    assert path.read_text() == results.text(tracked)
    page = compiler.page(tracked)
    assert path.with_suffix(".md").read_text() == page
    assert compiler.gates(tracked) == []
    for found in tracked["gpus"].values():
        assert {"sample_token", "mxfp4w_moe_down", "i8w_linear", "bf16w_linear"} <= set(found)


def test_tracked_results_are_of_the_pinned_compilers():
    vulkan_tracked, cuda_tracked = (
        json.loads((ROOT / "docs" / "bench" / f"{name}-absent-gpus.json").read_text())
        for name in COMPILERS
    )
    assert vulkan_tracked["compiler"] == f"Mesa {mesa.version()}"
    assert list(vulkan_tracked["gpus"]) == [gpu.name for gpu in vulkan.GPUS]
    release = cuda_tracked["compiler"].removeprefix("nvcc ")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert f"nvidia-cuda-nvcc=={release}" in project["project"]["optional-dependencies"]["cuda"]
    assert tuple(cuda_tracked["gpus"]) == cuda.ARCHS


# -------------------------------------------------------------------------------------- parsers

AMD = "\n".join(
    ["device\tAMD Radeon Graphics (RADV NAVI31)\tMesa 26.1.6-1~bpo13+1"]
    + ["begin\tsample_token_kernel"]
    + [
        f"statistic\tsample_token_kernel\tcompute\t{name}\t{value}"
        for name, value in (
            ("Driver pipeline hash", 8730867607251551566), ("SGPRs", 108), ("VGPRs", 256),
            ("Spilled SGPRs", 177), ("Spilled VGPRs", 3), ("Code size", 31320), ("LDS size", 5120),
            ("Scratch size", 768), ("Subgroups per SIMD", 4), ("Instructions", 6305),
            ("Latency", 44789), ("Inverse Throughput", 22394),
        )
    ]
)  # fmt: skip


def test_statistics_of_a_driver():
    found = vulkan.parse(AMD, ["sample_token_kernel"], vulkan.RADV)
    assert found == {
        "sample_token": {
            "registers": 256, "spills": 180, "scratch_bytes": 768, "shared_bytes": 5120, "waves": 4,
            "instructions": 6305, "code_bytes": 31320, "cycles": 44789,
        }
    }  # fmt: skip


def test_statistics_of_several_executables_add_up():
    lines = [f"statistic\ta_kernel\tCS\t{name}\t3" for n in "ab" for name in sorted(_turnip())]
    found = vulkan.parse("\n".join(["begin\ta_kernel", *lines]), ["a_kernel"], vulkan.TURNIP)
    assert found["a"]["instructions"] == 6
    assert found["a"]["spills"] == 12  # stores and loads


def _turnip() -> set[str]:
    return {name for names in vulkan.TURNIP.names.values() for name in names}


def test_kernels_that_a_driver_refuses_or_dies_of():
    output = (
        "device\ta\tb\nbegin\ta_kernel\nfailed\ta_kernel\tvkCreateComputePipelines returned -3\n"
        "begin\tb_kernel\n"
    )
    found = vulkan.parse(output, ["a_kernel", "b_kernel", "c_kernel"], vulkan.RADV)
    assert found == {
        "a": {"failed": "vkCreateComputePipelines returned -3"},
        "b": {"failed": "the driver crashed"},
        "c": {"failed": "the driver crashed before"},
    }


def test_statistic_with_another_name_is_an_error():
    with pytest.raises(KeyError, match="Scratch size"):
        vulkan.parse(AMD.replace("Scratch size", "Scratch"), ["sample_token_kernel"], vulkan.RADV)


USED = """
Fatbin elf code:
================
arch = sm_90a

Resource usage:
 Common:
  GLOBAL:0
 Function moe_plan_kernel:
  REG:40 STACK:176 SHARED:0 LOCAL:0 CONSTANT[0]:556 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function kv_copy_pages_kernel:
  REG:14 STACK:0 SHARED:512 LOCAL:0 CONSTANT[0]:576 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
SASS = """
\t.target\tsm_90a

\t\tFunction : kv_copy_pages_kernel
\t.headerflags\t@"EF_CUDA_SM90"
        /*0000*/                   LDC R1, c[0x0][0x28] ;      /* 0x00000a00ff017b82 */
                                                               /* 0x000fe20000000800 */
        /*0010*/                   LDG.E.CONSTANT R6, desc[UR6][R6.64] ;  /* 0x0 */
        /*0020*/              @!P0 LDG.E.128.CONSTANT R8, desc[UR6][R4.64] ;  /* 0x0 */
        /*0030*/             @!UP1 EXIT ;                      /* 0x000000000000794d */
        /*0040*/                   BRA 0x40;                   /* 0x000fc0000383ffff */
        /*0050*/                   NOP;                        /* 0x000fc00000000000 */
\t\t..........

\t\tFunction : moe_plan_kernel
        /*10000*/                  STL.64 [R1+0x8], R2 ;       /* 0x0000080201007387 */
        /*10010*/             @P2  LDL R3, [R1] ;              /* 0x0 */
\t\t..........
"""


def test_statistics_of_cuda_code():
    assert cuda.parse(USED, SASS) == {
        "kv_copy_pages": {
            "registers": 14, "scratch_bytes": 0, "shared_bytes": 512, "instructions": 5, "loads": 2,
            "wide_loads": 1, "early_loads": 0, "local_accesses": 0, "wide_loads_ahead": 1,
        },
        "moe_plan": {
            "registers": 40, "scratch_bytes": 176, "shared_bytes": 0, "instructions": 2, "loads": 0,
            "wide_loads": 0, "early_loads": 0, "local_accesses": 2,
        },
    }  # fmt: skip


LOOPS = """
\t\tFunction : bf16w_linear_kernel
        /*0000*/                   LDG.E.128.CONSTANT R4, desc[UR6][R6.64] ;
        /*0010*/                   ACQBULK ;
        /*0020*/                   LDG.E R8, desc[UR6][R4.64] ;
        /*0030*/                   LDG.E.128 R12, desc[UR6][R6.64] ;
        /*0040*/                   HMMA.16816.F32.BF16 R16, R4, R2, R16 ;
        /*0050*/               @P0 BRA 0x30 ;
        /*0060*/                   LDG.E.128 R12, desc[UR6][R6.64] ;
        /*0070*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0080*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0090*/                   HMMA.16816.F32.BF16 R16, R4, R2, R16 ;
        /*00a0*/                   BRA `(.L_x_1) 0x60 ;
        /*00b0*/               @P1 BRA 0x20 ;
"""


def test_main_loop_is_the_dearest_inner_one_that_multiplies():
    used = USED.replace("moe_plan_kernel", "bf16w_linear_kernel")
    found = cuda.parse(used, SASS.replace("moe_plan_kernel", "other_kernel").partition(
        "\t\tFunction : other")[0] + LOOPS)["bf16w_linear"]  # fmt: skip
    assert found["instructions_a_weight"] == round(5 / 8, 2)
    assert found["wide_loads_ahead"] == 2
    assert found["early_loads"] == 1


# ------------------------------------------------------------------------------- the pinned Mesa


def test_pinned_packages():
    names = [package.name for package in mesa.packages()]
    assert len(set(names)) == len(names)
    assert {*mesa.WANTED, "libc6", "libstdc++6"} <= set(names)
    assert "://" not in mesa.PACKAGES.read_text()  # the mirror is this machine's


@pytest.mark.parametrize(
    "line",
    [
        "0" * 63 + "  pool/main/m/mesa/a_1_amd64.deb",
        "0" * 64 + "  somewhere/a_1_amd64.deb",
        "0" * 64 + "  pool/main/m/mesa/a_1_arm64.deb",
        "",
    ],
)
def test_damaged_table_of_packages(line: str):
    with pytest.raises(ValueError, match="SHA-256"):
        mesa.packages(f"{line}\n")


@pytest.fixture
def one_package(monkeypatch, tmp_path: Path) -> mesa.Package:
    """A table of one package, and a folder to unpack it to."""
    package = mesa.Package(hashlib.sha256(b"content").hexdigest(), "pool/main/m/m/a_1_all.deb")
    table = tmp_path / "packages.txt"
    table.write_text(
        f"{package.sha256}  {package.path}\n{'0' * 64}  pool/mesa-vulkan-drivers_1_amd64.deb\n"
    )
    monkeypatch.setattr(mesa, "PACKAGES", table)
    monkeypatch.setattr(mesa, "FOLDER", tmp_path / "mesa")
    monkeypatch.setattr(mesa, "ARCHITECTURE", mesa.platform.machine())
    monkeypatch.setattr(mesa, "_mirror", lambda: "http://mirror")
    monkeypatch.setattr(mesa, "APT_HELPER", tmp_path)  # there
    return package


def test_package_that_the_mirror_no_longer_has(monkeypatch, one_package):
    def fetch(*_command: Any) -> str:
        raise folders.SetupError("apt-helper said E: Failed to fetch …  404  Not Found")

    monkeypatch.setattr(mesa, "run", fetch)
    with pytest.raises(mesa.Gone, match=r"gpu_statistics --pin"):
        mesa.open_mesa()
    assert not mesa.FOLDER.exists()


@pytest.mark.parametrize(("required", "gone", "code"), [(1, True, 0), (1, False, 1), (0, False, 0)])
def test_running_without_the_pinned_mesa(monkeypatch, capsys, required, gone, code):
    """What a mirror drops fails nothing; what else is missing does where it is required."""

    def fail() -> mesa.Mesa:
        raise mesa.Gone("gone") if gone else folders.SetupError("no apt")

    monkeypatch.setattr(mesa, "open_mesa", fail)
    monkeypatch.setenv("MXFORGE_REQUIRE_MESA", str(required))
    assert mesa.main(["run", "-c", "1"]) == code
    assert "nothing is run on a newer Mesa: " in capsys.readouterr().out


def test_package_with_another_content(monkeypatch, one_package):
    def fetch(command: Path, *words: Any) -> str:
        assert command == mesa.APT_HELPER
        files = [word for word in words if isinstance(word, Path)]
        for file in files:
            file.write_bytes(b"other content")
        return ""

    monkeypatch.setattr(mesa, "run", fetch)
    with pytest.raises(folders.SetupError, match=one_package.sha256):
        mesa.open_mesa()
    assert not mesa.FOLDER.exists()


def test_folder_is_made_once_for_each_stamp(tmp_path: Path):
    made: list[str] = []

    def make(new: Path) -> None:
        made.append(new.name)
        (new / "file").write_text(str(len(made)))

    for stamp, count in (("a", 1), ("a", 1), ("b", 2)):
        folder = folders.made(tmp_path / "folder", stamp, make)
        assert (folder / "file").read_text() == str(count)
    with pytest.raises(folders.SetupError):
        folders.made(tmp_path / "folder", "c", _raise)
    assert (tmp_path / "folder" / "file").read_text() == "2"
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["folder"]


def _raise(_new: Path) -> None:
    raise folders.SetupError("no")
