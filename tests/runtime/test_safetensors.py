from __future__ import annotations

import hashlib
import json
import resource
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from mxforge.errors import OutputError, SafetensorsError
from mxforge.safetensors import (
    SafetensorsWriter,
    dtype_name,
    numpy_dtype,
    open_safetensors,
)

DTYPES = [
    bool, np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32, np.uint64, np.int64,
    np.float16, np.float32, np.float64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2, ml_dtypes.float8_e8m0fnu,
]  # fmt: skip


def some_arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "a.bytes": rng.integers(0, 256, (3, 5), np.uint8),
        "b.bf16": rng.standard_normal((7, 3)).astype(ml_dtypes.bfloat16),
        "c.scalar": np.array(3.5, np.float32),
        "d.empty": np.empty((0, 4), np.int64),
        "é.f16": rng.standard_normal(9).astype(np.float16),
        "f.wide": rng.integers(0, 9, (2, 1, 3)),
    }


def write(path: Path, arrays: dict[str, np.ndarray], **options: Any) -> SafetensorsWriter:
    infos = [(name, dtype_name(a.dtype), a.shape) for name, a in arrays.items()]
    with SafetensorsWriter(path, infos, **options) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    return writer


def craft(path: Path, header: bytes | dict[str, Any], data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


# -- what is written is read ---------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"data_start_alignment": 16384, "tensor_alignment": 64}])
def test_round_trip(tmp_path: Path, options: dict[str, int]):
    arrays, path = some_arrays(), tmp_path / "x.safetensors"
    write(path, arrays, metadata={"format": "pt"}, **options)
    file = open_safetensors(path)
    assert file.metadata == {"format": "pt"}
    assert list(file.tensors) == list(arrays)
    assert len(file) == len(arrays)
    assert "a.bytes" in file
    for name, array in arrays.items():
        ours = file.array(name)
        assert (ours.dtype, ours.shape) == (array.dtype, array.shape)
        assert ours.tobytes() == array.tobytes()
        assert not ours.flags.writeable
    if options:
        assert file.data_start % 16384 == 0
        assert all(info.begin % 64 == 0 for info in file.tensors.values())


def test_the_safetensors_library_reads_ours_and_we_read_its(tmp_path: Path):
    library = pytest.importorskip("safetensors.numpy")
    arrays, path = some_arrays(), tmp_path / "x.safetensors"
    write(path, arrays, data_start_alignment=16384, tensor_alignment=64)
    theirs = library.load_file(path)
    assert {name for name in theirs if not name.startswith("__padding_")} == set(arrays)
    for name, array in arrays.items():
        assert theirs[name].tobytes() == array.tobytes()
    library.save_file(arrays, path, metadata={"by": "them"})
    file = open_safetensors(path)
    assert file.metadata == {"by": "them"}
    for name, array in arrays.items():
        assert file.array(name).tobytes() == array.tobytes()
        assert file.array(name).dtype == array.dtype


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtype_names(dtype: Any):
    assert numpy_dtype(dtype_name(dtype)) == np.dtype(dtype)


def test_dtype_without_a_name():
    with pytest.raises(SafetensorsError, match="complex64"):
        dtype_name(np.complex64)


def test_arrays_are_views_that_outlive_the_file_object(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    write(path, {"a": np.arange(8, dtype=np.int32)})
    array = open_safetensors(path).array("a")
    path.unlink()
    assert array.base is not None
    assert array.tolist() == list(range(8))


def test_advice_changes_nothing_one_can_see(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    write(path, {"a": np.arange(9000, dtype=np.int32), "b": np.empty((0,), np.int8)})
    file = open_safetensors(path)
    for name in file.tensors:
        file.will_need(name)
        file.drop(name)
    assert file.array("a")[8999] == 8999


def test_reading_needs_no_ml_dtypes_before_bfloat16(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    write(path, {"a": np.zeros(4, np.float16), "b": np.zeros(4, ml_dtypes.bfloat16)})
    code = (
        "import sys; from mxforge.safetensors import open_safetensors;"
        f"f = open_safetensors({str(path)!r}); f.array('a'); assert 'ml_dtypes' not in sys.modules;"
        "assert f.array('b').dtype.name == 'bfloat16'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_tensor(tmp_path: Path):
    write(tmp_path / "x", {"a": np.zeros(1, np.int8)})
    with pytest.raises(SafetensorsError, match="no tensor 'b'"):
        open_safetensors(tmp_path / "x").array("b")


# -- writing in pieces ---------------------------------------------------------------------------


def test_pieces_stream_in_constant_memory(tmp_path: Path):
    path, piece = tmp_path / "x", np.arange(1 << 18, dtype=np.float32)
    tracemalloc.start()
    with SafetensorsWriter(path, [("w", "F32", (32, 1 << 18))], digest=True) as writer:
        for _ in range(32):
            writer.write("w", piece)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20
    assert (open_safetensors(path).array("w") == piece).all()
    assert writer.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_pieces_may_be_bytes_and_need_not_end_with_elements(tmp_path: Path):
    with SafetensorsWriter(tmp_path / "x", [("w", "I32", (2,))], sync=True) as writer:
        writer.write("w", b"\1\0\0")
        writer.write("w", b"")
        writer.write("w", memoryview(bytearray(b"\0\2\0\0\0")))
    assert open_safetensors(tmp_path / "x").array("w").tolist() == [1, 2]


def test_a_strided_array_is_written_in_its_own_order(tmp_path: Path):
    array = np.arange(12, dtype=np.int16).reshape(3, 4).T
    write(tmp_path / "x", {"w": array})
    assert (open_safetensors(tmp_path / "x").array("w") == array).all()


def test_same_input_same_bytes(tmp_path: Path):
    for name in "xy":
        write(tmp_path / name, some_arrays(), tensor_alignment=64)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()


def test_no_tensors_at_all(tmp_path: Path):
    write(tmp_path / "x", {})
    assert open_safetensors(tmp_path / "x").tensors == {}


TWO = [("a", "U8", (2,)), ("b", "U8", (2,))]


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([], "'a' still lacks 2 bytes"),
        ([("a", b"12"), ("b", b"1")], "'b' still lacks 1 bytes"),
        ([("a", b"123")], "'a' has 2 bytes left to write, found 3"),
        ([("b", b"12")], "expected bytes of tensor 'a', found bytes of 'b'"),
        ([("a", b"1"), ("b", b"12")], "expected bytes of tensor 'a', found bytes of 'b'"),
        ([("a", b"12"), ("b", b"12"), ("b", b"1")], "expected bytes of tensor None"),
        ([("c", b"")], "found bytes of 'c'"),
    ],
)
def test_pieces_that_do_not_add_up(tmp_path: Path, pieces, message: str):
    path = tmp_path / "x"

    def write_pieces() -> None:
        with SafetensorsWriter(path, TWO) as writer:
            for name, data in pieces:
                writer.write(name, data)

    with pytest.raises(SafetensorsError, match=message):
        write_pieces()
    assert not path.exists()


@pytest.mark.parametrize(
    ("infos", "message"),
    [
        ([("a", "U8", (1,)), ("a", "U8", (1,))], "announced twice"),
        ([("__metadata__", "U8", (1,))], "announced twice"),
        ([("__padding_0", "U8", (1,))], "reserved"),
        ([("a", "U9", (1,))], "unknown dtype"),
    ],
)
def test_impossible_plan(tmp_path: Path, infos, message: str):
    with pytest.raises(SafetensorsError, match=message):
        SafetensorsWriter(tmp_path / "x", infos)
    assert not (tmp_path / "x").exists()


def test_an_exception_on_the_way_removes_the_file(tmp_path: Path):
    def fail() -> None:
        with SafetensorsWriter(tmp_path / "x", TWO) as writer:
            writer.write("a", b"12")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not (tmp_path / "x").exists()


@pytest.fixture
def small_disk() -> Iterator[None]:
    """Files cannot grow beyond 64 KiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_disk")
@pytest.mark.parametrize("size", [(1 << 16) - 50, 1 << 20])
def test_full_disk(tmp_path: Path, size: int):
    with pytest.raises(OutputError, match="x cannot be written"):
        write(tmp_path / "x", {"a": np.zeros(size, np.uint8)})
    assert not (tmp_path / "x").exists()


def test_no_such_folder(tmp_path: Path):
    with pytest.raises(OutputError, match="cannot be written: No such file"):
        SafetensorsWriter(tmp_path / "no" / "x", TWO)


# -- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [0, 1, 7])
def test_too_short(tmp_path: Path, length: int):
    (tmp_path / "x").write_bytes(bytes(length))
    with pytest.raises(SafetensorsError, match="at least 8 bytes"):
        open_safetensors(tmp_path / "x")


def test_absent_or_a_folder(tmp_path: Path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(SafetensorsError, match="cannot be read"):
            open_safetensors(path)


@pytest.mark.parametrize("length", [3, 100_000_000, 100_000_001, 1 << 63, (1 << 64) - 1])
def test_header_length_beyond_the_file(tmp_path: Path, length: int):
    (tmp_path / "x").write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(SafetensorsError, match=r"truncated|are allowed"):
        open_safetensors(tmp_path / "x")


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b'"a"',
        b"\xff\xfe",
        b'{"a": NaN}',
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
        b'{"a": {}, "a": {}}',
        b'{"a": {"dtype": "U8", "dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}',
        b'{"__metadata__": []}',
        b'{"__metadata__": {"a": 1}}',
    ],
)
def test_header_is_not_the_expected_json(tmp_path: Path, header: bytes):
    with pytest.raises(SafetensorsError, match=r"header|__metadata__|must have"):
        open_safetensors(craft(tmp_path / "x", header))


@pytest.mark.parametrize(
    "bad",
    [
        None,
        7,
        {},
        {"dtype": "U8", "shape": [4]},
        {**entry(), "more": 1},
        entry(dtype="U7"),
        entry(dtype=8),
        entry(dtype=["U8"]),
        entry(shape=4),
        entry(shape=None),
        entry(shape=[-4]),
        entry(shape=[-2, -2]),
        entry(shape=[4.0]),
        entry(shape=[True, 4]),
        entry(shape=["4"]),
        entry(shape=[1] * 33 + [4]),
        entry(shape=[1 << 63, 0]),
        entry(shape=[1 << 32, 1 << 32]),
        entry(shape=[0, 1 << 62, 2], offsets=(0, 0)),
        entry(shape=[5]),
        entry(dtype="F32"),
        entry(offsets=4),
        entry(offsets=[0]),
        entry(offsets=[0, 4, 8]),
        entry(offsets=[4, 0]),
        entry(offsets=[-4, 0]),
        entry(offsets=[0.0, 4.0]),
        entry(offsets=[0, 1 << 64]),
    ],
)
def test_impossible_entry(tmp_path: Path, bad: Any):
    with pytest.raises(SafetensorsError, match="tensor 'a'"):
        open_safetensors(craft(tmp_path / "x", {"a": bad}, bytes(4)))


@pytest.mark.parametrize(
    ("offsets", "data", "message"),
    [
        ([(0, 4), (2, 6)], 6, "'b' overlaps"),
        ([(0, 4), (0, 4)], 4, "'b' overlaps"),
        ([(0, 4), (5, 9)], 9, "'b' leaves a hole"),
        ([(1, 5), (5, 9)], 9, "'a' leaves a hole"),
        ([(0, 4), (4, 8)], 7, "truncated"),
        ([(0, 4), (4, 8)], 9, "bytes follow"),
        ([(0, 4), (1 << 40, (1 << 40) + 4)], 8, "'b' leaves a hole"),
    ],
)
def test_tensors_do_not_cover_the_data(tmp_path: Path, offsets, data: int, message: str):
    header = {name: entry(offsets=list(o)) for name, o in zip("ab", offsets, strict=True)}
    with pytest.raises(SafetensorsError, match=message):
        open_safetensors(craft(tmp_path / "x", header, bytes(data)))


def test_header_order_need_not_be_the_data_order(tmp_path: Path):
    header = {"b": entry(offsets=[4, 8]), "a": entry(offsets=[0, 4])}
    file = open_safetensors(craft(tmp_path / "x", header, b"12345678"))
    assert list(file.tensors) == ["a", "b"]
    assert file.array("b").tobytes() == b"5678"


def test_hostile_names_stay_printable(tmp_path: Path):
    name = "\ud800\x1b[31m" + "x" * 10_000
    with pytest.raises(SafetensorsError) as caught:
        open_safetensors(craft(tmp_path / "x", {name: entry(shape=[5])}, bytes(4)))
    str(caught.value).encode()
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 500 + len(str(tmp_path))


def test_nesting_that_can_be_read_but_not_shown(tmp_path: Path):
    for depth in range(900, 1000):
        header = b'{"a": ' + b"[" * depth + b"]" * depth + b"}"
        with pytest.raises(SafetensorsError):
            open_safetensors(craft(tmp_path / "x", header))


def test_damaged_bytes_never_raise_anything_else(tmp_path: Path):
    write(tmp_path / "good", some_arrays(), metadata={"format": "pt"})
    good = (tmp_path / "good").read_bytes()
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(400):
        data = bytearray(good)
        for at in rng.integers(0, open_safetensors(tmp_path / "good").data_start, 2):
            data[at] = rng.integers(256)
        (tmp_path / "bad").write_bytes(data)
        try:
            file = open_safetensors(tmp_path / "bad")
            for name in file.tensors:
                file.array(name)
        except SafetensorsError:
            refused += 1
    assert refused > 200
