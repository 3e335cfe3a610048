"""manifest.json: what is refused, and that the message names the field."""

from __future__ import annotations

import json
import random

import pytest
from support.small import edit_manifest

from mxforge.artifact import open_artifact, read_manifest
from mxforge.errors import ArtifactCorruptError, ArtifactError, ArtifactVersionError
from mxforge.manifest import ABI_VERSION, FORMAT_VERSION, MANIFEST, Manifest, is_inside


@pytest.mark.parametrize(
    ("name", "known"), [("format_version", FORMAT_VERSION), ("abi_version", ABI_VERSION)]
)
def test_another_version_is_named_before_anything_else(made, name, known):
    def change(content):
        content[name] = 7
        del content["limits"]

    edit_manifest(made, change)
    with pytest.raises(ArtifactVersionError, match=f"{name} 7.*reads {known}"):
        open_artifact(made)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda c: c.pop("limits"), "limits is missing"),
        (lambda c: c["limits"].pop("context"), r"limits\.context is missing"),
        (lambda c: c.update(name=3), "name should be a string"),
        (lambda c: c.update(name="\x1b[2J"), "name should be printable"),
        (lambda c: c.update(name=None), "name should be a string, but is None"),
        (lambda c: c["limits"].update(context="x"), r"limits\.context should be a whole number"),
        (lambda c: c["limits"].update(context=True), r"limits\.context"),
        (lambda c: c["limits"].update(context=1.0), r"limits\.context"),
        (lambda c: c["limits"].update(context=0), r"limits\.context is too small"),
        (lambda c: c["limits"].update(max_batch=1025), r"limits\.max_batch is beyond 1024"),
        (lambda c: c["memory"].update(workspace_bytes=1 << 63), "fit into 64 bits"),
        (lambda c: c["kv_groups"][0].update(dtype="int4"), r"kv_groups\[0\]\.dtype should be one"),
        (lambda c: c["kv_groups"][0].update(window=0), r"kv_groups\[0\]\.window"),
        (lambda c: c["kv_groups"][1].update(page_shape=[2, 0]), r"kv_groups\[1\]\.page_shape"),
        (lambda c: c["kv_groups"][1].update(name="sliding"), "kv_groups.*another name"),
        (lambda c: c["kv_groups"][1].update(layers=[1]), "kv_groups should have each layer once"),
        (lambda c: c["weights"][0].update(access="x"), r"weights\[0\]\.access should be one of"),
        (lambda c: c["weights"].append(c["weights"][0]), "weights should each have another name"),
        (lambda c: c["files"].pop("model.plan"), r"libraries\[0\]\.plan is not among files"),
        (lambda c: c["config"].pop("vocab_size"), r"config\.vocab_size should be.*is None"),
        (lambda c: c["config"].update(head_dim=1025), r"config\.head_dim.*from 1 to 1024"),
        (lambda c: c["config"].update(more={"a": 1}), r"config\['more'\] should be plain"),
        (lambda c: c["config"].update({"\x1b": 1}), "a name in config should be printable"),
        (lambda c: c["memory"].update(weights_bytes=-1), r"memory\.weights_bytes should be at"),
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
        (lambda c: c["files"]["model.so"].update(sha256="0"), r"model\.so.*64 hex digits"),
        (lambda c: c["files"].update({"../x": c["files"]["model.so"]}), "inside the folder"),
        (lambda c: c["files"].update({"/etc/x": c["files"]["model.so"]}), "inside the folder"),
        (lambda c: c["files"].update({MANIFEST: c["files"]["model.so"]}), "inside the folder"),
        (lambda c: c["files"].update({"\x1b[2J": c["files"]["model.so"]}), r"x1b\[2J"),
        (lambda c: c["files"].pop("model.so"), r"libraries\[0\]\.file is not among files"),
        (lambda c: c["libraries"].clear(), "at least, but lists none"),
        (lambda c: c["libraries"].append(c["libraries"][0]), "each have another target"),
        (
            lambda c: c["libraries"].append({**c["libraries"][0], "target": "cpu:avx2"}),
            "each have another file",
        ),
        (lambda c: c["libraries"][0].pop("features"), r"libraries\[0\]\.features is missing"),
        (lambda c: c["libraries"][0].update(features="avx2"), "features should be a list"),
        (
            lambda c: (
                c["target"].update(kind="cuda"),
                c["libraries"].append({**c["libraries"][0], "target": "cuda:sm_90"}),
            ),
            "one library for 'cuda', but lists 2",
        ),
        (
            lambda c: c["files"]["weights-00001.safetensors"].update(header_sha256=None),
            "header_sha256",
        ),
    ],
)
def test_a_damaged_manifest_names_the_field(made, change, field):
    edit_manifest(made, change)
    with pytest.raises(ArtifactCorruptError, match=field):
        open_artifact(made)


def test_fields_of_later_versions_are_left_alone(made):
    before = read_manifest(made)

    def more(content):
        content.update(more={"a": [1]})
        for entry in (content["target"], content["kv_groups"][0], content["weights"][0]):
            entry.update(more=1)

    edit_manifest(made, more)
    assert read_manifest(made) == before


def from_a_seed(fill, dtype="float32"):
    def change(content):
        content["random_seed"] = 0
        content["weights"][0].update(file=None, fill=fill, dtype=dtype)

    return change


@pytest.mark.parametrize(
    "fill",
    [
        None, {}, {"more": 1}, {"normal": "x"}, {"normal": [1.0]}, {"constant": None},
        {"values": []}, {"values": ["x"]}, {"bytes": [0, 256]}, {"bytes": [2, 1]},
        {"bytes": [0.0, 1]}, {"normal": 1.0, "constant": 1.0}, {"of": "float32"},
        {"normal": 1.0, "of": "float8"}, {"normal": 1.0, "of": ["float32"]},
    ],
)  # fmt: skip
def test_a_fill_that_nothing_can_be_made_of(made, fill):
    edit_manifest(made, from_a_seed(fill))
    with pytest.raises(ArtifactCorruptError, match=r"a\.weight.*fill"):
        open_artifact(made)


def test_a_made_weight_of_unknown_dtype(made):
    edit_manifest(made, from_a_seed({"normal": 1.0}, "float8"))
    with pytest.raises(ArtifactCorruptError, match=r"a\.weight.*dtype should be one of bfloat16"):
        open_artifact(made)


@pytest.mark.parametrize("number", ["1e999", "-1e999"])
def test_a_number_beyond_floats(made, number):
    text = (made / MANIFEST).read_text().replace("150000.0", number)
    (made / MANIFEST).write_text(text)
    with pytest.raises(ArtifactCorruptError, match=r"config\['rope_theta'\].*finite"):
        open_artifact(made)


def test_a_version_of_many_digits_is_cut(made):
    edit_manifest(made, lambda content: content.update(format_version=10**4000))
    with pytest.raises(ArtifactVersionError) as caught:
        open_artifact(made)
    assert len(str(caught.value)) < 500 + len(str(made))


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"\xff", b'{"a":1,"a":2}', b"[" * 100_000, b'{"a":NaN}', b"1" * 9999],
)
def test_an_unreadable_manifest(made, text):
    (made / MANIFEST).write_bytes(text)
    with pytest.raises(ArtifactCorruptError, match=MANIFEST):
        open_artifact(made)


def test_nesting_that_can_be_read_but_not_shown(made):
    content = json.loads((made / MANIFEST).read_text())
    content["target"]["kind"] = "@"
    text = json.dumps(content)
    for depth in range(900, 1000):
        with pytest.raises(ArtifactCorruptError):
            Manifest.from_json(text.replace('"@"', "[" * depth + "]" * depth))


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
