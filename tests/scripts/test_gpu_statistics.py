"""Statistics of GPUs that are not here: the gates, the parsers, the tracked files, the pins."""

from __future__ import annotations

import hashlib
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tvm  # noqa: F401 (imports mxforge.compile.spirv itself)
from support import folders, mesa

from mxforge.compile.spirv import KernelCode

ROOT = Path(__file__).resolve().parents[2]

from absent_gpus import chunk, cuda, hopper, results, sass, vulkan  # noqa: E402

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


def test_tracked_instructions_a_weight():
    tracked = json.loads((ROOT / "docs" / "bench" / "cuda-absent-gpus.json").read_text())
    for arch in cuda.COUNTED:
        for kernel in (
            "bf16w_linear", "bf16w_linear1", "bf16w_norm_qkv_insert", "i8w_linear", "i8w_linear1",
            "i8w_norm_qkv_insert", "mxfp4w_moe_gate_up_swiglu", "mxfp4w_moe_down",
            "mxfp4w_bf16_moe_gate_up_swiglu", "mxfp4w_bf16_moe_down",
        ):  # fmt: skip
            assert tracked["gpus"][arch][kernel]["instructions_a_weight"] > 0.5


def test_tracked_chunk():
    path = ROOT / "docs" / "bench" / "chunk-absent-gpus.json"
    tracked = json.loads(path.read_text())
    assert path.read_text() == results.text(tracked)
    assert path.with_suffix(".md").read_text() == chunk.page(tracked)
    assert chunk.gates(tracked) == []


def test_cache_that_a_chunk_reads():
    assert chunk.cache_read(32, 0, 0, 1) == 16 * 1 + 16 * 2  # pages
    assert chunk.cache_read(32, 0, 0, 16) == 1 + 2
    assert chunk.cache_read(17, 100, 20, 16) == 3 + 2  # keys 81 … 115, and 97 … 116
    for blocks, of_those_alone, tokens in ((8 * 129, 32, 16), (8 * 257, 8 * 2051, 8)):
        functions = {
            "f32_rope_table": {"blocks": 10_000},
            "f32_paged_attention_1": {"blocks": blocks},
            "f32_paged_attention_2": {"blocks": of_those_alone},
        }
        assert chunk.tokens_of_block(functions, kv_heads=8) == tokens


def test_gate_of_a_chunks_launches():
    card = {"a": {"launches": 24 * 12}}
    made = results.results("a compiler", "20b", "fast", {"NVIDIA H200": card})
    assert chunk.gates(made) == []
    card |= {"b": {"launches": 24}, "once": {"launches": 1}}
    (problem,) = chunk.gates(made)
    assert problem == "a layer of a chunk takes 13.0 launches on NVIDIA H200, more than 12"


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


@pytest.mark.parametrize(("count", "problems"), [
    (16, []), (0, ["sample_token on a GPU should multiply matrices: 0 times"]),
])  # fmt: skip
def test_matrix_instructions_are_counted_where_there_have_to_be_some(count, problems):
    output = f"{AMD}\nstatistic\tsample_token_kernel\tcompute\tv_wmma\t{count}"
    found = vulkan.parse(output, ["sample_token_kernel"], vulkan.RADV)["sample_token"]
    assert found["matrix_instructions"] == count
    assert (
        vulkan.gates(made_up(sample_token={**found, "spills": 0, "scratch_bytes": 0})) == problems
    )


@pytest.mark.parametrize(("shape", "lanes", "listed"), [
    ((16, 16, 16), 32, True), ((16, 16, 16), 64, False), ((8, 8, 16), 32, False),
])  # fmt: skip
def test_a_gpu_sees_no_kernel_of_matrices_that_it_lacks(shape, lanes, listed):
    m, n, k = shape
    needs = {
        "features": ["computeFullSubgroups"], "subgroup_size": lanes,
        "matrices": [{"m": m, "n": n, "k": k}],
    }  # fmt: skip
    about = {"argument_buffer": False, "argument_bytes": 24, "requirements": needs}
    kernel = KernelCode("a_kernel", b"", about)
    found = vulkan._list(vulkan.GPUS[0], [(kernel, Path("a.spv"))])
    assert found == ("a_kernel 24 32 1 1 a.spv" if listed else "")


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
    assert cuda.parse(USED, SASS, {}) == {
        "kv_copy_pages": {
            "registers": 14, "scratch_bytes": 0, "shared_bytes": 512, "instructions": 5, "loads": 2,
            "wide_loads": 1, "early_loads": 0, "local_accesses": 0, "wide_loads_ahead": 1,
        },
        "moe_plan": {
            "registers": 40, "scratch_bytes": 176, "shared_bytes": 0, "instructions": 2, "loads": 0,
            "wide_loads": 0, "early_loads": 0, "local_accesses": 2,
        },
    }  # fmt: skip


def program(*lines: str) -> str:
    """A function of this name, at the usual addresses."""
    code = (f"        /*{16 * i:04x}*/  {line} ;" for i, line in enumerate(lines))
    return "\n".join(["\t\tFunction : bf16w_linear_kernel", *code, ""])


def followed(*lines: str, threads: int = 32) -> sass.Followed:
    ((_, code),) = sass.functions(program(*lines))
    return sass.follow(code, threads)


def test_loops_count_as_often_as_they_run():
    loop = ("IADD3 R1, R1, 0x1, RZ", "ISETP.LT.AND P0, PT, R1, 0x5, PT", "@P0 BRA 0x10")
    assert followed("MOV R1, RZ", *loop, "EXIT").instructions == 1 + 5 * 3 + 1
    assert followed("MOV R1, RZ", *loop, "EXIT", threads=96).instructions == 3 * 17


def test_code_for_a_second_token_does_not_count():
    skipped = ("FADD R2, R2, R2",) * 4
    found = followed(
        "ULDC.64 UR4, c[0x0][0x210]", "UISETP.GE.AND UP0, UPT, UR4, 0x2, UPT",
        "PLOP3.LUT P0, PT, PT, PT, UP0, 0x80, 0x0", "@!P0 BRA 0x80", *skipped, "EXIT",
    )  # fmt: skip
    assert found.instructions == 5


def test_lanes_that_part_meet_again():
    found = followed(
        "S2R R0, SR_TID.X", "LOP3.LUT P0, RZ, R0, 0x1, RZ, 0xc0, !PT", "@!P0 BRA 0x50",
        "FADD R2, R2, R2", "FADD R2, R2, R2", "FADD R2, R2, R2", "EXIT",
    )  # fmt: skip
    assert found.instructions == 7


def test_lanes_vote_and_the_arrays_hold_their_indices():
    found = followed(
        "S2R R0, SR_TID.X", "LDC.64 R2, c[0x0][0x210]", "IMAD.WIDE R4, R0, 0x4, R2",
        "LDG.E.CONSTANT R6, desc[UR4][R4.64]", "ISETP.GE.U32.AND P0, PT, R6, 0x1e, PT",
        "VOTE.ANY R7, PT, P0", "POPC R8, R7", "IADD3 R8, R8, -0x1, RZ",
        "ISETP.NE.AND P1, PT, R8, RZ, PT", "@P1 BRA 0x70", "EXIT",
    )  # fmt: skip
    assert found.instructions == 7 + 2 * 3 + 1  # lanes 30 and 31 voted


def test_words_carry_as_in_the_machine():
    """Each line's result has to be nothing, else the program does not end."""
    for lines in (
        ("MOV R2, 0xffffffff", "IADD3 R4, P0, R2, 0x1, RZ", "IADD3.X R5, RZ, -0x1, RZ, P0, !PT"),
        ("MOV R2, RZ", "IADD3 R4, P0, R2, -R2, RZ", "IADD3.X R5, RZ, -0x1, RZ, P0, !PT"),
        ("MOV R2, 0x5a", "IMAD.HI R3, R2, 0x2aaaaaab, RZ", "IADD3 R5, R3, -0xf, RZ"),
        ("MOV R2, 0xfffffff8", "SHF.R.S32.HI R3, RZ, 0x2, R2", "IADD3 R5, R3, 0x2, RZ"),
        ("MOV R2, 0x80000001", "LEA.HI R3, R2, -0x1, RZ, 0x1", "IADD3 R5, R3, RZ, RZ"),
        ("MOV R2, 0xfffffffe", "IMAD.WIDE R2, R2, 0x4, RZ", "IADD3 R5, R3, 0x1, RZ"),
        ("MOV R2, 0x3412", "PRMT R3, R2, 0x5401, RZ", "IADD3 R5, R3, -0x1234, RZ"),
        ("MOV R2, 0x6", "LOP3.LUT R3, R2, 0x3, 0x1, 0xca, !PT", "IADD3 R5, R3, -0x3, RZ"),
    ):  # fmt: skip
        found = followed(*lines, "ISETP.NE.AND P1, PT, R5, RZ, PT", "@P1 BRA 0x40", "EXIT")
        assert found.instructions == len(lines) + 3


def test_predicates_wait_in_a_register():
    found = followed(
        "MOV R2, 0x500", "R2P PR, R2.B1, 0x7", "P2R.B2 R3, PR, R2, 0x6",
        "ISETP.NE.AND P1, PT, R3, 0x40500, PT", "@P1 BRA 0x40", "@P0 EXIT", "BRA 0x60",
    )  # fmt: skip
    assert found.instructions == 6


def test_instructions_without_a_rule():
    with pytest.raises(sass.NoRuleError, match="QSPC.E at 0x0"):
        followed("QSPC.E P0, RZ, [R2]", "EXIT")
    with pytest.raises(sass.NoRuleError, match="more than"):
        followed("BRA 0x0", "EXIT")


def test_instructions_a_weight_are_those_of_one_token():
    used = USED.replace("moe_plan_kernel", "bf16w_linear_kernel")
    text = SASS.partition("\t\tFunction : moe_plan")[0] + program(
        "LDG.E.NA.128 R4, desc[UR6][R6.64]", "ACQBULK", "LDG.E.128 R12, desc[UR6][R6.64]",
        "HMMA.16816.F32.BF16 R16, R4, R2, R16", "EXIT",
    )  # fmt: skip
    found = cuda.parse(used, text, {"bf16w_linear_kernel": 64})["bf16w_linear"]
    assert found["instructions_a_weight"] == round(5 / 8, 2)  # a lane loads 8 weights
    assert found["wide_loads_ahead"] == 2
    assert found["early_loads"] == 1
    assert "instructions_a_weight" not in cuda.parse(used, text, {})["bf16w_linear"]


def share(*lines: str) -> float | None:
    ((_, code),) = sass.functions(program(*lines))
    return sass.matrix_share(code)


def test_share_of_tensor_cores_is_of_the_loop_with_most_of_them():
    mma, add = "HMMA.16816.F32.BF16 R16, R4, R2, R16", "FADD R2, R2, R2"
    assert share(add, add, "@P0 BRA 0x10", mma, "EXIT") is None  # in no loop
    assert share(mma, mma, add, "@P0 BRA 0x0", mma, add, "@P0 BRA 0x40", "EXIT") == 0.5
    assert share("IMMA.16832.S8.S8 R4, R4, R8, R4", add, add, "@P0 BRA 0x0", "EXIT") == 0.25


def test_what_a_jump_leads_over_is_left_out_of_the_share_if_it_only_computes():
    mma, add = "HMMA.16816.F32.BF16 R16, R4, R2, R16", "FADD R2, R2, R2"
    load, shared = "LDG.E R4, desc[UR6][R6.64]", "LDS R4, [R6]"

    def over(*lines: str) -> float | None:
        return share("@P1 BRA 0x30", *lines, mma, "@P0 BRA 0x0", "EXIT")

    assert over(add, add) == round(1 / 3, 3)
    assert over(add, load) == over(shared, add) == over(add, "BRA 0x30") == 0.2
    assert over(add, mma) == 0.4
    # Two ways: one of them is taken.
    ways = ("@P1 BRA 0x30", add, "BRA 0x50", add, add, mma, "@P0 BRA 0x0", "EXIT")
    assert share(*ways) == round(1 / 7, 3)


def test_what_is_of_hopper_alone():
    product = "HGMMA.64x128x16.F32.BF16 R24, R184, gdesc[UR20], R24"
    small = "HGMMA.64x32x16.F32.BF16 R24, R184, gdesc[UR20], R24, gsb0"
    empty = "HGMMA.64x8x16.F16 RZ, gdesc[URZ], RZ, !UPT, gsb0"
    wait, copy = "WARPGROUP.DEPBAR.LE gsb0, 0x1", "UBLKCP.S.G [UR10], [UR4], UR9"
    lines = (copy, product, small, wait, copy, *["FADD R2, R2, R2"] * 28, "@P0 BRA 0x10", empty)
    ((_, code),) = sass.functions(program(*lines))
    assert hopper.statistics(code) == {
        "wgmma": 3, "bulk_copies": 2, "empty_groups": 1,
        "waits_a_wgmma": 1, "slots_a_cycle": 0.5,  # 32 in 64
    }  # fmt: skip
    assert hopper.statistics(code[3:-1]) == {}


def test_what_only_large_scales_take_is_left_out_of_the_share():
    mma, add = "HMMA.16816.F32.BF16 R16, R4, R2, R16", "FADD R2, R2, R2"
    twice = "HMUL2.BF16_V2 R4, R5, 8.50705917302346158658e+37, 8.50705917302346158658e+37"
    lines = (add, "@!P1 BRA 0x60", add, twice, add, "BRA 0x70", add, mma, "@P0 BRA 0x0", "EXIT")
    assert share(*lines) == 0.2  # of five
    assert share(*(add if line == twice else line for line in lines)) == round(1 / 9, 3)


def test_threads_of_a_block():
    elf = (
        "  1 .nv.info.a_kernel\n.nv.info.a_kernel\n\tAttribute:\tEIATTR_REGCOUNT\n"
        "\tAttribute:\tEIATTR_MAX_THREADS\n\tFormat:\tEIFMT_SVAL\n\tValue:\t0xa0 0x1 0x1 \n"
        ".nv.info.b_kernel\n\tAttribute:\tEIATTR_REGCOUNT\n"
    )
    assert cuda.threads_of_blocks(elf) == {"a_kernel": 160}


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
