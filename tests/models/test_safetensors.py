"""Safetensors files: what is read, and what is refused before anything is."""

from __future__ import annotations

import json
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phirt.errors import (
    ModelError,
    ModelFormatError,
    ModelNotFoundError,
    UnsafeModelError,
    UnsupportedModelError,
)
from phirt.models.safetensors import INDEX_NAME, SafetensorsFolder, weight_files

VALUES = np.array([[1, -2, 0.5], [3, 4, -0.25]], np.float32)
HEADER: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "single": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "half": {"dtype": "F16", "shape": [2, 3], "data_offsets": [24, 36]},
    "brain": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [36, 48]},
    "packed": {"dtype": "U32", "shape": [1], "data_offsets": [48, 52]},
    "none": {"dtype": "F32", "shape": [0, 7], "data_offsets": [52, 52]},
    "scalar": {"dtype": "F32", "shape": [], "data_offsets": [52, 56]},
}
DATA = (
    VALUES.tobytes()
    + VALUES.astype("<f2").tobytes()
    + (VALUES.view("<u4") >> 16).astype("<u2").tobytes()
    + b"\1\2\3\4"
    + np.float32(7).tobytes()
)


def encode(header: Any, data: bytes = DATA) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def write(folder: Path, content: bytes, name: str = "model.safetensors") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return folder


def changed(name: str, **fields: Any) -> dict[str, Any]:
    return {**HEADER, name: {**HEADER[name], **fields}}


def test_the_tensors_of_one_file(tmp_path):
    with SafetensorsFolder(write(tmp_path, encode(HEADER))) as tensors:
        assert tensors.names() == ["single", "half", "brain", "packed", "none", "scalar"]
        for name in ("single", "half", "brain"):
            assert tensors.shape(name) == (2, 3)
            values = tensors.float32(name)
            assert values.dtype == np.float32
            np.testing.assert_array_equal(values, VALUES)
        assert (tensors.dtype("single"), tensors.dtype("brain")) == ("F32", "BF16")
        assert tensors.float32("none").shape == (0, 7)
        assert tensors.float32("scalar") == 7
        np.testing.assert_array_equal(tensors.raw("packed"), [1, 2, 3, 4])


def test_nothing_can_be_written_into_a_file(tmp_path):
    with SafetensorsFolder(write(tmp_path, encode(HEADER))) as tensors:
        assert not tensors.raw("single").flags.writeable
        with pytest.raises(ValueError, match="read-only"):
            tensors.raw("single")[0] = 0


def test_values_are_aligned_wherever_they_lie(tmp_path):
    for spaces in range(4):
        content = encode(json.dumps(HEADER).encode() + b" " * spaces)
        with SafetensorsFolder(write(tmp_path, content)) as tensors:
            assert tensors.float32("single").flags.aligned
            np.testing.assert_array_equal(tensors.float32("single"), VALUES)


def test_an_array_outlives_its_folder(tmp_path):
    tensors = SafetensorsFolder(write(tmp_path, encode(HEADER)))
    values = tensors.float32("single")
    tensors.close()
    tensors.close()
    np.testing.assert_array_equal(values, VALUES)
    with pytest.raises(ValueError, match="closed"):
        tensors.float32("single")


def test_what_is_not_there_or_is_no_float_is_a_typed_error(tmp_path):
    with SafetensorsFolder(write(tmp_path, encode(HEADER))) as tensors:
        with pytest.raises(ModelFormatError, match="no tensor 'other'"):
            tensors.float32("other")
        with pytest.raises(UnsupportedModelError, match="'packed' is U32"):
            tensors.float32("packed")


class TestReading:
    """Copies of a tensor's bytes, from a file that is not mapped."""

    def test_any_part_of_a_tensor(self, tmp_path):
        with SafetensorsFolder(write(tmp_path, encode(HEADER))) as tensors:
            assert tensors.read("packed", 0, 4).tolist() == [1, 2, 3, 4]
            assert tensors.read("packed", 1, 2).tolist() == [2, 3]
            np.testing.assert_array_equal(
                tensors.read("single", 4, 20).view("<f4"), VALUES.flat[1:]
            )
            assert tensors.read("none", 0, 0).shape == (0,)

    def test_it_is_the_callers_own(self, tmp_path):
        with SafetensorsFolder(write(tmp_path, encode(HEADER))) as tensors:
            tensors.read("packed", 0, 4)[:] = 0
            assert tensors.read("packed", 0, 4).tolist() == [1, 2, 3, 4]

    def test_each_shard_from_its_own_file(self, sharded):
        with SafetensorsFolder(sharded) as tensors:
            np.testing.assert_array_equal(tensors.read("last", 0, 24).view("<f4"), VALUES.flat)
            np.testing.assert_array_equal(tensors.read("half", 0, 12).view("<f2"), VALUES.flat)

    def test_many_threads_at_once(self, tmp_path):
        with (
            SafetensorsFolder(write(tmp_path, encode(HEADER))) as tensors,
            ThreadPoolExecutor(8) as pool,
        ):
            places = [(start, 24 - start) for start in range(24)] * 50
            found = pool.map(lambda place: tensors.read("single", *place), places)
            whole = VALUES.tobytes()
            assert [each.tobytes() for each in found] == [whole[start:] for start, _ in places]

    def test_a_file_that_has_shrunk_since_is_a_typed_error(self, tmp_path):
        path = write(tmp_path, encode(HEADER)) / "model.safetensors"
        with SafetensorsFolder(tmp_path) as tensors:
            os.truncate(path, path.stat().st_size - 5)  # the scalar, and a byte of "packed"
            assert tensors.read("brain", 0, 12).size == 12
            for name in ("packed", "scalar"):
                with pytest.raises(ModelFormatError, match="become shorter while it was read"):
                    tensors.read(name, 0, 4)

    def test_a_closed_folder_reads_nothing(self, tmp_path):
        tensors = SafetensorsFolder(write(tmp_path, encode(HEADER)))
        tensors.read("packed", 0, 4)
        tensors.close()
        tensors.close()
        with pytest.raises(ValueError, match="are closed"):
            tensors.read("packed", 0, 4)

    def test_what_is_not_there_is_a_typed_error(self, tmp_path):
        with (
            SafetensorsFolder(write(tmp_path, encode(HEADER))) as tensors,
            pytest.raises(ModelFormatError, match="no tensor 'other'"),
        ):
            tensors.read("other", 0, 1)


@pytest.fixture
def sharded(tmp_path) -> Path:
    folder = write(tmp_path / "sharded", encode(HEADER), "model-00001-of-00002.safetensors")
    second = {"last": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}
    write(folder, encode(second, DATA[:24]), "model-00002-of-00002.safetensors")
    write_index(folder, {"single": 1, "half": 1, "last": 2})
    return folder


def write_index(folder: Path, shards: dict[str, int]) -> None:
    files = {name: f"model-0000{shard}-of-00002.safetensors" for name, shard in shards.items()}
    write(folder, json.dumps({"metadata": {}, "weight_map": files}).encode(), INDEX_NAME)


class TestSeveralFiles:
    def test_the_index_says_what_belongs_to_the_model(self, sharded):
        write(sharded, b"is not looked at", "model.safetensors")
        with SafetensorsFolder(sharded) as tensors:
            assert tensors.names() == ["single", "half", "last"]

    def test_without_an_index_one_file_of_the_usual_name_is_all(self, sharded):
        (sharded / INDEX_NAME).unlink()
        assert [file.name for file in weight_files(sharded)] == [
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
        ]
        write(sharded, encode(HEADER))
        write(sharded, encode(HEADER), "adapter_model.safetensors")
        assert weight_files(sharded) == (sharded / "model.safetensors",)

    def test_a_tensor_that_is_not_where_the_index_says_is_a_typed_error(self, sharded):
        for shards in ({"absent": 1}, {"last": 1}):
            write_index(sharded, {"half": 1, "last": 2, **shards})
            with pytest.raises(ModelFormatError, match="as it says"):
                SafetensorsFolder(sharded)

    def test_a_tensor_that_is_in_two_files_is_a_typed_error(self, sharded):
        write(sharded, encode(HEADER), "model-00002-of-00002.safetensors")
        with pytest.raises(ModelFormatError, match="'single' is in another file too"):
            SafetensorsFolder(sharded)

    def test_a_file_that_is_missing_is_named(self, sharded):
        (sharded / "model-00002-of-00002.safetensors").unlink()
        with pytest.raises(ModelNotFoundError, match=r"lacks model-00002-of-00002\.safetensors"):
            SafetensorsFolder(sharded)

    @pytest.mark.parametrize(
        "file", ["../x.safetensors", "/x.safetensors", "a/b.safetensors", "model.bin", 7, None]
    )
    def test_m3_m10_an_index_names_plain_safetensors_files_only(self, sharded, file):
        write(sharded, json.dumps({"weight_map": {"single": file}}).encode(), INDEX_NAME)
        with pytest.raises(ModelFormatError, match="it says that 'single' is in"):
            SafetensorsFolder(sharded)

    @pytest.mark.parametrize("index", [{}, {"weight_map": {}}, {"weight_map": []}], ids=str)
    def test_an_index_without_a_map_is_a_typed_error(self, sharded, index):
        write(sharded, json.dumps(index).encode(), INDEX_NAME)
        with pytest.raises(ModelFormatError, match="weight_map"):
            SafetensorsFolder(sharded)


def test_a_folder_without_weights(tmp_path):
    assert weight_files(tmp_path) == ()
    with pytest.raises(ModelNotFoundError, match=r"holds no model\.safetensors"):
        SafetensorsFolder(tmp_path)


def test_m10_a_link_out_of_the_folder_is_refused(tmp_path, link):
    folder = write(tmp_path / "model", b"", "unused")
    write(tmp_path, encode(HEADER), "outside")
    link(folder / "model.safetensors", tmp_path / "outside")
    with pytest.raises(UnsafeModelError, match="leads out of the model folder"):
        SafetensorsFolder(folder)


def test_m8_truncated_at_every_byte(tmp_path):
    content = encode(HEADER)
    for length in range(len(content)):
        with pytest.raises(ModelFormatError, match=r"model\.safetensors"):
            SafetensorsFolder(write(tmp_path, content[:length]))


def test_bytes_after_the_last_tensor_are_a_typed_error(tmp_path):
    with pytest.raises(ModelFormatError, match="its tensors have 56 bytes, its data 57"):
        SafetensorsFolder(write(tmp_path, encode(HEADER, DATA + b"\0")))


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b" {}",
        b"[]",
        b"{",
        b"\xff",
        b'{"a":' + b"[" * 100_000,
        b'{"a": {}, "a": {}}',
        {"__metadata__": {"format": 1}},
        {"__metadata__": []},
        {**HEADER, "more": 1},
        {**HEADER, "more": {}},
        changed("single", dtype="F128"),
        changed("single", dtype=None),
        changed("single", dtype=["F32"]),
        changed("single", shape=None),
        changed("single", shape=[2, -3]),
        changed("single", shape=[2.0, 3]),
        changed("single", shape=[2, True]),
        changed("single", shape=[3, 3]),
        changed("single", shape=[1] * 10_000),
        changed("single", data_offsets=[0]),
        changed("single", data_offsets=[24, 0]),
        changed("single", data_offsets=[0, 24, 24]),
        changed("half", data_offsets=[12, 24]),  # overlaps
        changed("half", data_offsets=[25, 37]),  # leaves a hole
    ],
    ids=lambda header: str(header)[:60],
)
def test_a_header_that_cannot_be_right_is_a_typed_error(tmp_path, header):
    with pytest.raises(ModelFormatError, match=r"model\.safetensors"):
        SafetensorsFolder(write(tmp_path, encode(header)))


@pytest.mark.parametrize("offsets", [[-24, 0], [0, -1], [0, 10**15], [10**15, 10**15 + 24]])
def test_m11_offsets_that_are_negative_or_far_away(tmp_path, offsets):
    with pytest.raises(ModelFormatError, match="single"):
        SafetensorsFolder(write(tmp_path, encode(changed("single", data_offsets=offsets))))


@pytest.mark.parametrize(
    "shape", [[10**12, 1], [10**12, 0], [2**63, 2], [10**30, 0], [2**32, 2**32]], ids=str
)
def test_m12_a_dimension_beyond_the_file(tmp_path, shape):
    with pytest.raises(ModelFormatError, match="single"):
        SafetensorsFolder(write(tmp_path, encode(changed("single", shape=shape))))


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100_000_001, 2**32])
def test_m12_a_header_longer_than_the_file_or_the_budget(tmp_path, length):
    content = length.to_bytes(8, "little") + b"{}"
    with pytest.raises(ModelFormatError, match="header"):
        SafetensorsFolder(write(tmp_path, content))
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate(200 << 20)  # sparse
    with pytest.raises(ModelFormatError, match="header"):
        SafetensorsFolder(tmp_path)


def test_m9_flipped_bits_are_read_or_are_a_typed_error(tmp_path):
    content = encode(HEADER)
    generator = random.Random(0)  # noqa: S311 - chooses bits, guards nothing
    for _ in range(2_000):
        damaged = bytearray(content)
        for _ in range(generator.choice((1, 1, 2, 8))):
            damaged[generator.randrange(len(damaged) - len(DATA))] ^= 1 << generator.randrange(8)
        write(tmp_path, bytes(damaged))
        try:
            with SafetensorsFolder(tmp_path) as tensors:
                for name in tensors.names():
                    tensors.raw(name).sum()
        except ModelError:
            continue


@pytest.mark.oracle
class TestAgainstTheOfficialLibrary:
    def test_it_reads_the_same(self, tmp_path):
        from safetensors.numpy import load_file

        file = write(tmp_path, encode(HEADER)) / "model.safetensors"
        reference = load_file(file)
        with SafetensorsFolder(tmp_path) as tensors:
            assert tensors.names() == sorted(reference, key=tensors.names().index)
            for name in ("single", "half", "packed", "none", "scalar"):
                assert tensors.shape(name) == reference[name].shape
                assert tensors.raw(name).tobytes() == reference[name].tobytes()

    def test_what_it_refuses_is_refused(self, tmp_path):
        from safetensors import SafetensorError, safe_open

        content = encode(HEADER)
        generator = random.Random(1)  # noqa: S311 - chooses bits, guards nothing
        refused = 0
        for _ in range(2_000):
            damaged = bytearray(content)
            damaged[generator.randrange(len(damaged) - len(DATA))] ^= 1 << generator.randrange(8)
            file = write(tmp_path, bytes(damaged)) / "model.safetensors"
            try:
                with safe_open(file, "np"):
                    continue
            except SafetensorError:
                refused += 1
            with pytest.raises(ModelFormatError):
                SafetensorsFolder(tmp_path)
        assert refused > 500
