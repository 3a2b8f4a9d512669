"""What the header walk reads, and which files it leaves to others."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from phirt.build.gguf.file import GgufFile
from phirt.build.gguf.header import TensorInfo
from phirt.errors import ModelFormatError, ModelNotFoundError, UnsupportedModelError
from tests.build.gguf.raw import (
    ARRAY,
    BOOL,
    FLOAT32,
    Q4_0,
    STRING,
    UINT32,
    UINT64,
    Raw,
    array,
    pair,
    string,
    tensor,
)

PAIRS = [
    pair(b"integer", UINT64, struct.pack("<Q", 2**64 - 1)),
    pair(b"real", FLOAT32, struct.pack("<f", 0.5)),
    pair(b"flag", BOOL, b"\x01"),
    pair(b"text", STRING, string("né".encode())),
    pair(b"latin", STRING, string(b"n\xe9")),
    pair(b"numbers", ARRAY, array(FLOAT32, 2, struct.pack("<2f", 1.0, -2.0))),
    pair(b"texts", ARRAY, array(STRING, 3, string(b"a") + string(b"") + string("ü".encode()))),
    pair(b"latins", ARRAY, array(STRING, 2, string(b"a") + string(b"\xe9"))),
    pair(b"none", ARRAY, array(STRING, 0)),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def write(path: Path, raw: Raw) -> Path:
    path.write_bytes(raw.encode())
    return path


@pytest.mark.parametrize("version", [2, 3])
def test_tensors_have_their_place_in_the_file(path: Path, version: int) -> None:
    raw = Raw(
        version=struct.pack("<I", version),
        tensors=[tensor(b"a", [2, 3]), tensor(b"b", [64, 5], encoding=Q4_0, offset=64)],
        data=bytes(64) + bytes(range(180)),
    )
    with GgufFile(write(path, raw)) as file:
        start = len(raw.encode()) - 64 - 180
        assert file.header.version == version
        assert list(file.header.tensors.values()) == [
            TensorInfo("a", (3, 2), "F32", start, 24),
            TensorInfo("b", (5, 64), "Q4_0", start + 64, 180),
        ]
        assert file.read(start + 64, 180).tolist() == list(range(180))


def test_alignment_is_the_file_s_own(path: Path) -> None:
    pairs = [pair(b"general.alignment", UINT32, struct.pack("<I", 128))]
    raw = Raw(pairs=pairs, tensors=[tensor(b"a", [1])], data=bytes(4), alignment=128)
    with GgufFile(write(path, raw)) as file:
        assert file.header.tensors["a"].offset % 128 == 0


def test_metadata_is_read_by_type(path: Path) -> None:
    with GgufFile(write(path, Raw(pairs=PAIRS))) as file:
        assert file.integer("integer") == 2**64 - 1
        assert file.real("real") == 0.5
        assert file.real("integer") == float(2**64 - 1)
        assert file.flag("flag") is True
        assert file.string("text") == "né"
        numbers = file.numbers("numbers")
        assert numbers is not None
        np.testing.assert_array_equal(numbers, np.array([1, -2], dtype=np.float32))
        assert file.strings("texts") == ["a", "", "ü"]
        assert file.strings("none") == []
        for read in (file.integer, file.real, file.flag, file.string, file.numbers, file.strings):
            assert read("absent") is None


@pytest.mark.parametrize(
    ("reader", "key", "message"),
    [
        ("integer", "flag", "must be an integer, and is bool True"),
        ("integer", "real", "must be an integer, and is float 0.5"),
        ("real", "flag", "must be a number"),
        ("flag", "integer", "must be a boolean"),
        ("string", "texts", "must be a string, and is an array of STRING"),
        ("numbers", "integer", "must be an array, and is int"),
        ("numbers", "texts", "must be an array of numbers"),
        ("strings", "numbers", "must be an array of strings"),
        ("string", "latin", "'latin' is not UTF-8"),
        ("strings", "latins", "element 1 of 'latins' is not UTF-8"),
    ],
)
def test_a_value_of_another_type_is_an_error(
    path: Path, reader: str, key: str, message: str
) -> None:
    with (
        GgufFile(write(path, Raw(pairs=PAIRS))) as file,
        pytest.raises(ModelFormatError, match=message),
    ):
        getattr(file, reader)(key)


@pytest.mark.parametrize(
    ("version", "found"),
    [
        (struct.pack("<I", 1), "version 1"),
        (struct.pack("<I", 4), "version 4"),
        (struct.pack(">I", 3), "big-endian, version 3"),
    ],
)
def test_other_versions_are_named(path: Path, version: bytes, found: str) -> None:
    with pytest.raises(UnsupportedModelError, match=found):
        GgufFile(write(path, Raw(version=version)))


def test_an_encoding_newer_than_the_gguf_package_is_named(path: Path) -> None:
    raw = Raw(tensors=[tensor(b"t", [32], encoding=9999)], data=bytes(64))
    with pytest.raises(UnsupportedModelError, match="'t' is stored in encoding number 9999"):
        GgufFile(write(path, raw))


def test_another_kind_of_file_is_not_gguf(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(ModelFormatError, match="it is not GGUF"):
        GgufFile(path)


def test_an_empty_file_is_damaged(path: Path) -> None:
    path.touch()
    with pytest.raises(ModelFormatError, match="needs 4 bytes, but the file has 0 left"):
        GgufFile(path)


def test_a_missing_file_is_not_found(path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="cannot be opened"):
        GgufFile(path)


def test_a_file_that_shrinks_while_it_is_open_is_an_error(path: Path) -> None:
    raw = Raw(tensors=[tensor(b"a", [8])], data=bytes(32))
    with GgufFile(write(path, raw)) as file:
        info = file.header.tensors["a"]
        with path.open("r+b") as other:
            other.truncate(info.offset + 8)
        with pytest.raises(ModelFormatError, match=r"32 bytes at .* and 8 are now"):
            file.read(info.offset, info.nbytes)


@pytest.mark.parametrize("damaged", [False, True])
def test_the_file_is_closed(path: Path, damaged: bool) -> None:
    raw = Raw(magic=b"FUGG" if damaged else b"GGUF")
    if damaged:
        with pytest.raises(ModelFormatError):
            GgufFile(write(path, raw))
    else:
        with GgufFile(write(path, raw)) as file:
            pass
        file.close()  # again, which does nothing
    path.unlink()  # Windows refuses to delete what is open; elsewhere, ResourceWarning is an error
