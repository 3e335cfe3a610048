"""Opening and verifying an artifact: what is refused and how it is said."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from support.small import SMALL_MANIFEST, edit_manifest, make_artifact

from mxforge import machine
from mxforge.artifact import CPU_VARIABLE, open_artifact, read_manifest, verify
from mxforge.compile.artifact_writer import ArtifactWriter
from mxforge.errors import ArtifactCorruptError, ArtifactError, ArtifactTargetError, UsageError
from mxforge.inspect import describe
from mxforge.machine import host_system
from mxforge.manifest import MANIFEST, LibraryInfo, WeightInfo


def test_what_is_written_is_read_back(made):
    opened = open_artifact(made)
    assert replace(opened.manifest, files={}) == SMALL_MANIFEST
    assert opened.library == made / "model.so"
    weights = opened.weight_files["weights-00001.safetensors"]
    assert weights.array("a.weight")[3, 15] == 63
    assert weights.data_start % (16 << 10) == 0
    assert opened.load_tokenizer().kind is None
    assert sorted(p.relative_to(made).as_posix() for p in made.rglob("*") if p.is_file()) == [
        "manifest.json",
        "model.plan",
        "model.so",
        "tokenizer/special_tokens.json",
        "weights-00001.safetensors",
    ]


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
    edit_manifest(made, change)
    with pytest.raises(ArtifactCorruptError, match=message):
        open_artifact(made)


def test_weights_from_a_seed_need_no_file(tmp_path):
    weight = WeightInfo("a", (4,), "bfloat16", None, "mapped", {"normal": 0.5})
    manifest = replace(SMALL_MANIFEST, weights=(weight,), random_seed=3)
    with ArtifactWriter(tmp_path / "m") as writer:
        writer.write("model.so", b"x")
        writer.write("model.plan", b"x")
        writer.finish(manifest)
    opened = open_artifact(tmp_path / "m")
    assert opened.weight_files == {}
    assert opened.manifest.weights[0].fill == {"normal": 0.5}


def test_a_cpu_without_a_needed_feature_is_named(made):
    edit_manifest(made, lambda c: c["libraries"][0].update(features=["avx9000", "amx-none"]))
    with pytest.raises(ArtifactTargetError, match="cpu:x86-64 needs amx-none, avx9000"):
        open_artifact(made)


def test_another_system_is_named(made):
    edit_manifest(made, lambda c: c["target"].update(host="plan9-vax"))
    with pytest.raises(ArtifactTargetError, match=f"plan9-vax.*{host_system()}"):
        open_artifact(made)


# -------------------------------------------------------------------------------- several libraries


LIBRARIES = (
    LibraryInfo("cpu:best", "model-best.so", "model-best.plan", ("quick", "wide")),
    LibraryInfo("cpu:good", "model-good.so", "model-good.plan", ("quick",)),
    LibraryInfo("cpu:plain", "model-plain.so", "model-plain.plan", ()),
)


@pytest.fixture
def portable(tmp_path):
    return make_artifact(
        tmp_path / "portable", manifest=replace(SMALL_MANIFEST, libraries=LIBRARIES)
    )


@pytest.fixture
def cpu(monkeypatch):
    """cpu(*features): this machine's CPU has these; none: the system tells none."""

    def has(*features):
        monkeypatch.setattr(machine, "_cpu_flags", lambda: frozenset(features))

    return has


@pytest.mark.parametrize(
    ("features", "chosen"),
    [
        (("fpu", "quick", "wide"), "best"),
        (("fpu", "quick"), "good"),
        (("fpu", "wide"), "plain"),
        (("fpu",), "plain"),
        ((), "plain"),
    ],
    ids=str,
)
def test_the_best_library_that_this_cpu_can_run(portable, cpu, features, chosen):
    cpu(*features)
    opened = open_artifact(portable)
    assert opened.variant.target == f"cpu:{chosen}"
    assert opened.library == portable / f"model-{chosen}.so"


def test_a_library_can_be_asked_for(portable, cpu, monkeypatch):
    cpu("fpu", "quick")
    for level in ("good", "plain"):
        monkeypatch.setenv(CPU_VARIABLE, level)
        assert open_artifact(portable).variant.target == f"cpu:{level}"
    monkeypatch.setenv(CPU_VARIABLE, "")
    assert open_artifact(portable).variant.target == "cpu:good"


def test_a_library_asked_for_that_this_cpu_cannot_run(portable, cpu, monkeypatch):
    cpu("fpu", "quick")
    monkeypatch.setenv(CPU_VARIABLE, "best")
    with pytest.raises(ArtifactTargetError, match=f"cpu:best needs wide. Unset {CPU_VARIABLE}"):
        open_artifact(portable)


@pytest.mark.parametrize("level", ["avx9000", "cpu:good", "\x1b[2J", " "])
def test_a_library_asked_for_that_is_not_there(portable, level, monkeypatch):
    monkeypatch.setenv(CPU_VARIABLE, level)
    with pytest.raises(UsageError, match=rf"{CPU_VARIABLE}.*\(best, good, plain\)") as caught:
        open_artifact(portable)
    assert str(caught.value).isprintable()


def test_asking_for_a_cpu_means_nothing_to_a_gpu(made, monkeypatch):
    edit_manifest(made, lambda c: c["target"].update(kind="vulkan", name="vulkan:desktop"))
    monkeypatch.setenv(CPU_VARIABLE, "avx2")
    assert open_artifact(made).library == made / "model.so"


def test_a_cpu_that_can_run_none_learns_what_each_needs(tmp_path, cpu):
    manifest = replace(SMALL_MANIFEST, libraries=LIBRARIES[:2])
    artifact = make_artifact(tmp_path / "model", manifest=manifest)
    cpu("fpu", "wide")
    with pytest.raises(
        ArtifactTargetError,
        match=r"cpu:best needs quick; cpu:good needs quick\. Compile .*portable",
    ):
        open_artifact(artifact)


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.target)
def test_every_library_is_checked_whichever_runs_here(portable, library):
    path = portable / library.file
    flip(path, 2)
    with pytest.raises(ArtifactCorruptError, match=f"{library.file} has another content"):
        open_artifact(portable)
    assert verify(portable, progress=False).changed == (library.file,)
    path.unlink()
    with pytest.raises(ArtifactCorruptError, match=f"{library.file} is missing"):
        open_artifact(portable)
    assert verify(portable, progress=False).missing == (library.file,)


def test_inspecting_shows_the_libraries_and_the_one_that_runs_here(portable, cpu, monkeypatch):
    cpu("fpu", "quick")
    about = describe(portable)
    assert [library["target"] for library in about["libraries"]] == [
        "cpu:best", "cpu:good", "cpu:plain",
    ]  # fmt: skip
    assert about["libraries"][0]["features"] == ("quick", "wide")
    assert (about["runs_here"], about["problem"]) == ("cpu:good", "")
    monkeypatch.setenv(CPU_VARIABLE, "best")
    about = describe(portable)
    assert about["runs_here"] is None
    assert "cpu:best needs wide" in about["problem"]


# --------------------------------------------------------------------------------------- verifying


def test_verify_finds_nothing_in_a_sound_artifact(made, capfd):
    result = verify(made)
    assert result.ok
    result.check()
    assert result.files == 4
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
