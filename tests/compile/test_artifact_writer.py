"""Writing an artifact: all or nothing, whatever else happens to the process or the disk."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
from support.small import SMALL_MANIFEST, fill_artifact, make_artifact

from mxforge.artifact import read_manifest, verify
from mxforge.compile.artifact_writer import ArtifactWriter
from mxforge.errors import OutputError
from mxforge.manifest import MANIFEST


def test_equal_inputs_give_equal_bytes(tmp_path):
    a, b = make_artifact(tmp_path / "a"), make_artifact(tmp_path / "b")
    for path in (p for p in a.rglob("*") if p.is_file()):
        assert path.read_bytes() == (b / path.relative_to(a)).read_bytes()


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def test_nothing_is_to_be_seen_before_the_end(tmp_path):
    with ArtifactWriter(tmp_path / "model") as writer:
        fill_artifact(writer)
        (hidden,) = listing(tmp_path)
        assert hidden.startswith(f".model.partial-{os.getpid()}-")
        writer.finish(SMALL_MANIFEST)
        assert listing(tmp_path) == ["model"]
    assert listing(tmp_path) == ["model"]


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, SystemExit])
def test_an_error_leaves_nothing(tmp_path, error):
    def interrupted():
        with ArtifactWriter(tmp_path / "model") as writer:
            fill_artifact(writer)
            raise error

    with pytest.raises(error):
        interrupted()
    assert listing(tmp_path) == []


def test_leaving_without_finish_leaves_nothing(tmp_path):
    with ArtifactWriter(tmp_path / "model") as writer:
        fill_artifact(writer)
    assert listing(tmp_path) == []


def test_an_existing_artifact_is_refused_unless_forced(made):
    with pytest.raises(OutputError, match="--force"):
        make_artifact(made)
    changed = replace(SMALL_MANIFEST, name="second")
    make_artifact(made, force=True, manifest=changed)
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
    rename = Path.rename

    def fail(path, target):
        if ".partial-" in path.name:
            raise OSError(errno.EIO, "broken", str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OutputError, match="broken"):
        make_artifact(made, force=True)
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
            make_artifact(tmp_path / name, force)
    assert (tmp_path / "home/letter").read_text() == "dear"
    assert listing(tmp_path) == ["file", "home"]


def test_an_empty_folder_is_taken(tmp_path):
    (tmp_path / "model").mkdir()
    make_artifact(tmp_path / "model")
    assert verify(tmp_path / "model", progress=False).ok


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path):
    def race():
        with ArtifactWriter(tmp_path / "model") as writer:
            fill_artifact(writer)
            (tmp_path / "model").mkdir()
            (tmp_path / "model/x").touch()
            writer.finish(SMALL_MANIFEST)

    with pytest.raises(OutputError, match="exists already"):
        race()
    assert listing(tmp_path) == ["model"]


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        make_artifact(tmp_path / "file" / "model")


def test_a_name_that_is_too_long(tmp_path):
    with pytest.raises(OutputError, match="cannot be written"):
        make_artifact(tmp_path / ("x" * 250))


def test_files_that_were_not_added_are_an_error(tmp_path):
    with ArtifactWriter(tmp_path / "model") as writer:
        fill_artifact(writer)
        writer.path("model.debug").touch()
        with pytest.raises(ValueError, match=r"model\.debug"):
            writer.finish(SMALL_MANIFEST)


@pytest.mark.parametrize("name", ["../x", "/x", MANIFEST])
def test_the_writer_stays_in_its_folder(tmp_path, name):
    with ArtifactWriter(tmp_path / "model") as writer, pytest.raises(ValueError, match="no path"):
        writer.path(name)


def test_a_link_stays_and_its_target_is_written(tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "model").symlink_to(tmp_path / "big/model")
    make_artifact(tmp_path / "model")
    assert (tmp_path / "model").is_symlink()
    assert listing(tmp_path / "big") == ["model"]


# --------------------------------------------------------------------------------- the disk is full


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


# ------------------------------------------------------------------------------ killed compilations

KILLED = """
import os, sys, time
from mxforge.compile.artifact_writer import ArtifactWriter
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

    make_artifact(output)  # while the other lives, its folder is left alone
    assert listing(tmp_path) == [alive, "model"]

    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    (tmp_path / ".model-other.partial-1-00000000").mkdir()
    make_artifact(output, force=True)
    assert listing(tmp_path) == [".model-other.partial-1-00000000", "model"]


def test_a_process_that_died_between_the_two_renames(made):
    made.rename(made.with_name(".model.old-1-00000000"))
    with pytest.raises(OutputError, match="exists already"):
        make_artifact(made)
    assert verify(made, progress=False).ok
    assert listing(made.parent) == ["model"]


def test_an_old_one_left_after_a_complete_replacement_is_removed(made):
    shutil.copytree(made, made.with_name(".model.old-1-00000000"))
    make_artifact(made, force=True)
    assert listing(made.parent) == ["model"]


def test_two_writers_at_once_do_not_disturb_each_other(tmp_path):
    with ArtifactWriter(tmp_path / "model") as first:
        fill_artifact(first)
        with ArtifactWriter(tmp_path / "model"):
            pass
        first.finish(SMALL_MANIFEST)
    assert verify(tmp_path / "model", progress=False).ok
