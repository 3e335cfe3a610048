"""The artifact: what is refused and how it is said, atomic writing, verification."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace

import numpy as np
import pytest

from mxforge import artifact as module
from mxforge.artifact import (
    MANIFEST,
    ArtifactWriter,
    KernelInfo,
    Limits,
    Manifest,
    MemoryPlan,
    PrecisionInfo,
    SourceInfo,
    TargetInfo,
    TokenizerInfo,
    WeightInfo,
    check_cpu_features,
    host_system,
    is_inside,
    missing_cpu_features,
    open_artifact,
    parse_cpuinfo,
    parse_sysctl,
    read_manifest,
    verify,
)
from mxforge.errors import (
    ArtifactCorruptError,
    ArtifactError,
    ArtifactTargetError,
    ArtifactVersionError,
    OutputError,
)

MANIFEST_WITHOUT_FILES = Manifest(
    name="tiny",
    config={"hidden_size": 64, "layer_types": ["full_attention"], "rope_theta": 150000.0},
    target=TargetInfo("cpu", "cpu:x86-64"),
    numerics="exact",
    precision=PrecisionInfo("float32", "float32", "f32"),
    limits=Limits(4, 64, 1024),
    stop_token_ids=(2, 12),
    memory=MemoryPlan(320, 1024, 1024, 4096),
    kernels=(KernelInfo("f32_rms_norm", "cpu", "parallel items", "rows=1", ("norm",)),),
    weights=(
        WeightInfo("a.weight", (4, 16), "float32", "weights-00001.safetensors"),
        WeightInfo("b.scales", (64,), "uint8", "weights-00001.safetensors"),
    ),
    weights_order=("b.scales", "a.weight"),
    source=SourceInfo("huggingface", "0" * 64),
    tokenizer=TokenizerInfo(None),
)


def fill(writer):
    with writer.weights(
        "weights-00001.safetensors", [("a.weight", "F32", (4, 16)), ("b.scales", "U8", (64,))]
    ) as weights:
        weights.write("a.weight", np.arange(64, dtype=np.float32).reshape(4, 16))
        weights.write("b.scales", np.arange(64, dtype=np.uint8))
    writer.write("tokenizer/special_tokens.json", b"{}\n")
    writer.path("model.so").write_bytes(b"library")
    writer.add("model.so")


def make(path, force=False, manifest=MANIFEST_WITHOUT_FILES):
    with ArtifactWriter(path, force) as writer:
        fill(writer)
        writer.finish(manifest)
    return path


@pytest.fixture
def made(tmp_path):
    return make(tmp_path / "model")


def edit(folder, change):
    """Change the manifest's JSON in place."""
    content = json.loads((folder / MANIFEST).read_text())
    change(content)
    (folder / MANIFEST).write_text(json.dumps(content))


# ------------------------------------------------------------------------------- the manifest


def test_what_is_written_is_read_back(made):
    opened = open_artifact(made)
    assert replace(opened.manifest, files={}) == MANIFEST_WITHOUT_FILES
    assert opened.library == made / "model.so"
    weights = opened.weight_files["weights-00001.safetensors"]
    assert weights.array("a.weight")[3, 15] == 63
    assert weights.data_start % (16 << 10) == 0
    assert opened.load_tokenizer().kind is None
    assert sorted(p.relative_to(made).as_posix() for p in made.rglob("*") if p.is_file()) == [
        "manifest.json",
        "model.so",
        "tokenizer/special_tokens.json",
        "weights-00001.safetensors",
    ]


def test_equal_inputs_give_equal_bytes(tmp_path):
    a, b = make(tmp_path / "a"), make(tmp_path / "b")
    for path in (p for p in a.rglob("*") if p.is_file()):
        assert path.read_bytes() == (b / path.relative_to(a)).read_bytes()


@pytest.mark.parametrize("name", ["format_version", "abi_version"])
def test_another_version_is_named_before_anything_else(made, name):
    def change(content):
        content[name] = 7
        del content["limits"]

    edit(made, change)
    with pytest.raises(ArtifactVersionError, match=f"{name} 7.*reads 1"):
        open_artifact(made)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda c: c.pop("limits"), "limits is missing"),
        (lambda c: c["limits"].pop("context"), r"limits\.context is missing"),
        (lambda c: c.update(more=1), "more is unknown"),
        (lambda c: c["target"].update(more=1), r"target\.more is unknown"),
        (lambda c: c.update(name=3), "name should be a string"),
        (lambda c: c.update(name="\x1b[2J"), "name should be printable"),
        (lambda c: c.update(name=None), "name should be a string, but is None"),
        (lambda c: c["limits"].update(context="x"), r"limits\.context should be a whole number"),
        (lambda c: c["limits"].update(context=True), r"limits\.context"),
        (lambda c: c["limits"].update(context=1.0), r"limits\.context"),
        (lambda c: c["limits"].update(context=0), r"limits\.context is too small"),
        (lambda c: c["memory"].update(weights_bytes=-1), r"memory\.weights_bytes is too small"),
        (lambda c: c.update(format_version="1"), "format_version"),
        (lambda c: c.update(numerics="slow"), "numerics should be one of"),
        (lambda c: c["tokenizer"].update(kind="x"), r"tokenizer\.kind"),
        (lambda c: c.update(random_seed="x"), "random_seed"),
        (lambda c: c.update(stop_token_ids=[1, "2"]), r"stop_token_ids\[1\]"),
        (lambda c: c.update(stop_token_ids=[-1]), "stop_token_ids is too small"),
        (lambda c: c.update(kernels={}), "kernels should be a list"),
        (lambda c: c["kernels"][0].update(functions=[1]), r"kernels\[0\]\.functions\[0\]"),
        (lambda c: c["weights"][0].update(shape=[4, -16]), "a.weight.*shape is too small"),
        (lambda c: c["weights"][0].update(file="x"), "a.weight.*not among files"),
        (lambda c: c["weights"][0].update(file=None), "neither file nor seed"),
        (lambda c: c["weights_order"].pop(), "weights_order"),
        (lambda c: c["weights_order"].append("a.weight"), "weights_order"),
        (lambda c: c["files"]["model.so"].update(sha256="0"), r"model\.so.*64 hex digits"),
        (lambda c: c["files"].update({"../x": c["files"]["model.so"]}), "inside the folder"),
        (lambda c: c["files"].update({"/etc/x": c["files"]["model.so"]}), "inside the folder"),
        (lambda c: c["files"].update({MANIFEST: c["files"]["model.so"]}), "inside the folder"),
        (lambda c: c["files"].update({"\x1b[2J": c["files"]["model.so"]}), r"x1b\[2J"),
        (lambda c: c["files"].pop("model.so"), r"one library"),
        (
            lambda c: c["files"]["weights-00001.safetensors"].update(header_sha256=None),
            "header_sha256",
        ),
    ],
)
def test_a_damaged_manifest_names_the_field(made, change, field):
    edit(made, change)
    with pytest.raises(ArtifactCorruptError, match=field):
        open_artifact(made)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"\xff", b'{"a":1,"a":2}', b"[" * 100_000, b'{"a":NaN}', b"1" * 9999],
)
def test_an_unreadable_manifest(made, text):
    (made / MANIFEST).write_bytes(text)
    with pytest.raises(ArtifactCorruptError, match=MANIFEST):
        open_artifact(made)


def test_random_damage_is_always_a_named_error(made):
    values = [None, True, 0, -1, 1.5, "", "x", [], {}, [None], 2**70, "../x", "\ud800"]
    original = (made / MANIFEST).read_text()

    def damage(value, rng):
        if isinstance(value, (dict, list)) and value and rng.random() < 0.9:
            key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
            value[key] = damage(value[key], rng)
            return value
        return rng.choice(values)

    for seed in range(300):
        damaged = damage(json.loads(original), random.Random(seed))
        (made / MANIFEST).write_text(json.dumps(damaged))
        try:
            open_artifact(made)
        except ArtifactError as error:
            str(error).encode()  # printable anywhere


def test_every_truncation_of_a_manifest_is_refused(made):
    text = (made / MANIFEST).read_bytes()
    for length in range(0, len(text) - 2, 37):
        with pytest.raises(ArtifactError):
            Manifest.from_json(text[:length])


@pytest.mark.parametrize(
    ("path", "inside"),
    [
        ("a", True), ("a/b.c", True), ("ä", True), ("..a", True),
        ("", False), (".", False), ("..", False), ("/", False), ("/a", False), ("a/../b", False),
        ("./a", False), ("a//b", False), ("a/", False), ("a\\b", False), ("c:a", False),
        ("a\0", False), ("\ud800", False),
    ],
)  # fmt: skip
def test_paths_inside_a_folder(path, inside):
    assert is_inside(path) is inside


def test_what_is_no_artifact(tmp_path):
    with pytest.raises(ArtifactError, match="nothing at that path"):
        open_artifact(tmp_path / "none")
    with pytest.raises(ArtifactError, match=MANIFEST):
        open_artifact(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ArtifactError, match="compile-model"):
        read_manifest(tmp_path)
    with pytest.raises(ArtifactError):
        read_manifest(tmp_path / "config.json")


# ------------------------------------------------------------------------------------ opening


def flip(path, offset):
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: flip(f / "model.so", 3), r"model\.so has another content"),
        (lambda f: flip(f / "tokenizer/special_tokens.json", 0), "special_tokens.json has another"),
        (lambda f: (f / "model.so").write_bytes(b"x"), "7 bytes, but has 1"),
        (lambda f: (f / "model.so").unlink(), "model.so is missing"),
        (lambda f: (f / "weights-00001.safetensors").unlink(), "weights.* is missing"),
        (lambda f: os.truncate(f / "weights-00001.safetensors", 20_000 - 1), "bytes, but has"),
        (lambda f: flip(f / "weights-00001.safetensors", 0), "another header"),
        (lambda f: flip(f / "weights-00001.safetensors", 7), "another header"),
        (lambda f: flip(f / "weights-00001.safetensors", 30), "another header"),
    ],
)
def test_a_damaged_file_is_named_when_opened(made, damage, message):
    damage(made)
    with pytest.raises(ArtifactCorruptError, match=message):
        open_artifact(made)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["weights"][0].update(shape=[4, 17]), r"\[4, 17\], but is float32 \[4, 16\]"),
        (lambda c: c["weights"][0].update(dtype="bfloat16"), "a.weight"),
        (lambda c: c["weights"][0].update(file="model.so"), "not there"),
    ],
)
def test_weights_that_are_not_as_the_manifest_says(made, change, message):
    edit(made, change)
    with pytest.raises(ArtifactCorruptError, match=message):
        open_artifact(made)


def test_weights_from_a_seed_need_no_file(tmp_path):
    weight = WeightInfo("a", (4,), "bfloat16", None, {"normal": 0.5})
    manifest = replace(
        MANIFEST_WITHOUT_FILES, weights=(weight,), weights_order=("a",), random_seed=3
    )
    with ArtifactWriter(tmp_path / "m") as writer:
        writer.write("model.so", b"x")
        writer.finish(manifest)
    opened = open_artifact(tmp_path / "m")
    assert opened.weight_files == {}
    assert opened.manifest.weights[0].fill == {"normal": 0.5}


# ---------------------------------------------------------------------------------- verifying


def test_verify_finds_nothing_in_a_sound_artifact(made, capfd):
    result = verify(made)
    assert result.ok
    result.check()
    assert result.files == 3
    assert result.bytes == sum(info.bytes for info in read_manifest(made).files.values())
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "verify" in captured.err


def test_verify_names_each_changed_missing_and_extra_file(made, capfd):
    weights = made / "weights-00001.safetensors"
    flip(weights, weights.stat().st_size - 1)  # in the data: opening does not see it
    open_artifact(made)
    (made / "tokenizer/special_tokens.json").unlink()
    (made / "tokenizer/more").write_text("x")
    result = verify(made, progress=False)
    assert result.changed == ("weights-00001.safetensors",)
    assert result.missing == ("tokenizer/special_tokens.json",)
    assert result.extra == ("tokenizer/more",)
    with pytest.raises(ArtifactCorruptError, match=r"weights.*special_tokens\.json.*more"):
        result.check()
    assert capfd.readouterr().err == ""


# --------------------------------------------------------------------------------- this machine


CPUINFO = """processor\t: 0
flags\t\t: fpu avx2 fma avx512f avx512_vnni
processor\t: 1
flags\t\t: fpu avx2 fma avx512f
"""


def test_cpuinfo_counts_what_all_processors_have():
    assert parse_cpuinfo(CPUINFO) == {"fpu", "avx2", "fma", "avx512f"}
    assert parse_cpuinfo("Features : fp asimd asimddp\n") == {"fp", "asimd", "asimddp"}
    assert parse_cpuinfo("") == frozenset()


def test_sysctl_of_both_kinds_of_mac():
    assert parse_sysctl(
        "machdep.cpu.features: FPU AVX1.0 SSE4.1\nmachdep.cpu.leaf7_features: AVX2 BMI2\n"
    ) == {"fpu", "avx1.0", "sse4.1", "avx2", "bmi2"}
    assert parse_sysctl(
        "hw.optional.arm.FEAT_DotProd: 1\nhw.optional.arm.FEAT_I8MM: 0\nhw.optional.AdvSIMD: 1\n"
    ) == {"FEAT_DotProd", "AdvSIMD"}


@pytest.mark.parametrize(
    ("system", "flags", "required", "missing"),
    [
        ("linux-x86_64", "avx2 avx512_vnni", ["avx2", "avx512vnni"], ()),
        (
            "linux-x86_64",
            "avx2",
            ["avx512vnni", "avx2", "avx512bf16"],
            ("avx512bf16", "avx512vnni"),
        ),
        ("linux-aarch64", "asimd asimddp i8mm", ["neon", "dotprod", "i8mm"], ()),
        ("linux-aarch64", "asimd", ["neon", "i8mm", "dotprod"], ("dotprod", "i8mm")),
        ("darwin-aarch64", "AdvSIMD FEAT_DotProd", ["neon", "dotprod", "i8mm"], ("i8mm",)),
        ("linux-x86_64", "", ["avx2"], ()),  # the system does not tell
    ],
)
def test_features_under_the_systems_names(monkeypatch, system, flags, required, missing):
    monkeypatch.setattr(module, "_cpu_flags", lambda: frozenset(flags.split()))
    monkeypatch.setattr(module, "host_system", lambda: system)
    assert missing_cpu_features(required) == missing


def test_a_cpu_without_a_needed_feature_is_named(made):
    edit(made, lambda c: c["target"].update(features=["avx9000", "amx-none"]))
    with pytest.raises(ArtifactTargetError, match="amx-none, avx9000"):
        open_artifact(made)
    check_cpu_features([])


def test_another_system_is_named(made):
    edit(made, lambda c: c["target"].update(host="plan9-vax"))
    with pytest.raises(ArtifactTargetError, match=f"plan9-vax.*{host_system()}"):
        open_artifact(made)


# ------------------------------------------------------------------------------------ writing


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def test_nothing_is_to_be_seen_before_the_end(tmp_path):
    with ArtifactWriter(tmp_path / "model") as writer:
        fill(writer)
        (hidden,) = listing(tmp_path)
        assert hidden.startswith(f".model.partial-{os.getpid()}-")
        writer.finish(MANIFEST_WITHOUT_FILES)
        assert listing(tmp_path) == ["model"]
    assert listing(tmp_path) == ["model"]


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_nothing(tmp_path, error):
    def interrupted():
        with ArtifactWriter(tmp_path / "model") as writer:
            fill(writer)
            raise error

    with pytest.raises(error):
        interrupted()
    assert listing(tmp_path) == []


def test_leaving_without_finish_leaves_nothing(tmp_path):
    with ArtifactWriter(tmp_path / "model") as writer:
        fill(writer)
    assert listing(tmp_path) == []


def test_an_existing_artifact_is_refused_unless_forced(made):
    with pytest.raises(OutputError, match="--force"):
        make(made)
    changed = replace(MANIFEST_WITHOUT_FILES, name="second")
    make(made, force=True, manifest=changed)
    assert read_manifest(made).name == "second"
    assert listing(made.parent) == ["model"]


def test_a_failed_replacement_keeps_the_old_one(made):
    def fail():
        with ArtifactWriter(made, force=True):
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert verify(made, progress=False).ok


def test_a_failed_rename_puts_the_old_one_back(made, monkeypatch):
    rename = module.Path.rename

    def fail(path, target):
        if ".partial-" in path.name:
            raise OSError(errno.EIO, "broken", str(path))
        return rename(path, target)

    monkeypatch.setattr(module.Path, "rename", fail)
    with pytest.raises(OutputError, match="broken"):
        make(made, force=True)
    monkeypatch.undo()
    assert verify(made, progress=False).ok
    assert listing(made.parent) == ["model"]


@pytest.mark.parametrize("force", [False, True])
def test_what_is_no_artifact_is_never_replaced(tmp_path, force):
    (tmp_path / "home").mkdir()
    (tmp_path / "home/letter").write_text("dear")
    (tmp_path / "file").write_text("x")
    for name in ("home", "file"):
        with pytest.raises(OutputError):
            make(tmp_path / name, force)
    assert (tmp_path / "home/letter").read_text() == "dear"
    assert listing(tmp_path) == ["file", "home"]


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "model").mkdir()
    make(tmp_path / "model")
    assert verify(tmp_path / "model", progress=False).ok


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path):
    def race():
        with ArtifactWriter(tmp_path / "model") as writer:
            fill(writer)
            (tmp_path / "model").mkdir()
            (tmp_path / "model/x").touch()
            writer.finish(MANIFEST_WITHOUT_FILES)

    with pytest.raises(OutputError, match="exists already"):
        race()
    assert listing(tmp_path) == ["model"]


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        make(tmp_path / "file" / "model")


def test_a_name_that_is_too_long(tmp_path):
    with pytest.raises(OutputError, match="cannot be written"):
        make(tmp_path / ("x" * 250))


def test_files_that_were_not_added_are_an_error(tmp_path):
    with ArtifactWriter(tmp_path / "model") as writer:
        fill(writer)
        writer.path("model.debug").touch()
        with pytest.raises(ValueError, match=r"model\.debug"):
            writer.finish(MANIFEST_WITHOUT_FILES)


@pytest.mark.parametrize("name", ["../x", "/x", MANIFEST])
def test_the_writer_stays_in_its_folder(tmp_path, name):
    with ArtifactWriter(tmp_path / "model") as writer, pytest.raises(ValueError, match="no path"):
        writer.path(name)


def test_a_link_stays_and_its_target_is_written(tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "big/model")
    make(tmp_path / "model")
    assert (tmp_path / "model").is_symlink()
    assert listing(tmp_path / "big") == ["model"]


# ------------------------------------------------------------------------------ the disk is full


def test_too_little_space_is_said_beforehand(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(9, 9, 1000))

    def reserve(size):
        with ArtifactWriter(tmp_path / "model") as writer:
            writer.reserve(size)

    reserve(1000)
    with pytest.raises(OutputError, match=r"needs 1001 bytes.*1000 bytes.*are free"):
        reserve(1001)
    assert listing(tmp_path) == []


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_disk_that_fills_up_is_said_with_numbers(tmp_path, wrapped):
    def write():
        full = OSError(errno.ENOSPC, "No space left on device")
        with ArtifactWriter(tmp_path / "model") as writer:
            writer.reserve(4321)
            if wrapped:
                raise OutputError("cannot be written") from full
            raise full

    with pytest.raises(OutputError, match=r"disk is full.*needs 4321 bytes.*are free"):
        write()
    assert listing(tmp_path) == []


def test_other_errors_of_the_system_are_not_the_outputs(tmp_path):
    def read():
        with ArtifactWriter(tmp_path / "model"):
            (tmp_path / "checkpoint").read_bytes()

    with pytest.raises(FileNotFoundError):
        read()


# --------------------------------------------------------------------------- killed compilations

KILLED = """
import os, sys, time
from mxforge.artifact import ArtifactWriter
with ArtifactWriter(sys.argv[1]) as writer:
    writer.write("model.so", b"half")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_a_killed_compilation_leaves_nothing_to_see_and_a_rerun_cleans_up(tmp_path):
    output = tmp_path / "model"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(output)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    (alive,) = listing(tmp_path)

    make(output)  # while the other lives, its folder is left alone
    assert listing(tmp_path) == [alive, "model"]

    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    (tmp_path / ".model-other.partial-1-00000000").mkdir()
    make(output, force=True)
    assert listing(tmp_path) == [".model-other.partial-1-00000000", "model"]


def test_a_process_that_died_between_the_two_renames(made):
    made.rename(made.with_name(".model.old-1-00000000"))
    with pytest.raises(OutputError, match="exists already"):
        make(made)
    assert verify(made, progress=False).ok
    assert listing(made.parent) == ["model"]


def test_an_old_one_left_after_a_complete_replacement_is_removed(made):
    shutil.copytree(made, made.with_name(".model.old-1-00000000"))
    make(made, force=True)
    assert listing(made.parent) == ["model"]


def test_two_writers_at_once_do_not_disturb_each_other(tmp_path):
    with ArtifactWriter(tmp_path / "model") as first:
        fill(first)
        with ArtifactWriter(tmp_path / "model"):
            pass
        first.finish(MANIFEST_WITHOUT_FILES)
    assert verify(tmp_path / "model", progress=False).ok
