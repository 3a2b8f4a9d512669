from __future__ import annotations

import json

import pytest

from phirt.errors import ModelFormatError
from phirt.models.manifest import read_manifest, write_manifest


@pytest.fixture
def written(folder):
    return write_manifest(
        folder,
        weights_id="abc:int8",
        architecture="llama",
        precision="int8",
        source={"file": "x.gguf", "sha256": "abc"},
        versions={"phirt": "0.1"},
    )


def test_what_is_written_is_read_back(folder, written):
    assert read_manifest(folder) == written
    assert written.files["model.onnx.data"] == 96
    assert "phirt.json" not in written.files
    written.check_files(folder)


def test_a_folder_made_elsewhere_has_none(folder):
    assert read_manifest(folder) is None


def test_a_file_of_another_size_is_named(folder, written):
    (folder / "model.onnx.data").write_bytes(b"short")
    with pytest.raises(ModelFormatError, match=r"model\.onnx\.data has 5 bytes; .* says 96"):
        written.check_files(folder)


def test_a_missing_file_is_named(folder, written):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelFormatError, match=r"lacks the file tokenizer\.json"):
        written.check_files(folder)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format_version", 2, "Upgrade phirt"),
        ("format_version", None, "lacks the field 'format_version'"),
        ("weights_id", 7, "'weights_id' must be a string"),
        ("files", {"../x": 1}, "lists a file named '../x'"),
        ("files", {"x": -1}, "gives the file x no valid size"),
        ("files", {"x": 1 << 60}, "gives the file x no valid size"),
    ],
)
def test_a_damaged_manifest_is_a_typed_error(folder, written, key, value, message):
    path = folder / "phirt.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ModelFormatError, match=message):
        read_manifest(folder)
