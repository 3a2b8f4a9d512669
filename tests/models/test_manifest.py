from __future__ import annotations

import hashlib
import json

import pytest

from phirt.errors import ModelFormatError
from phirt.models import manifest as manifest_module
from phirt.models.hashing import sha256_of
from phirt.models.manifest import FileRecord, read_manifest, seal_manifest, write_manifest


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
    assert written.files["model.onnx.data"] == FileRecord(96)
    assert "phirt.json" not in written.files


def test_what_a_caller_does_to_one_is_not_read_back(folder, written):
    for name in ("files", "versions", "source", "build"):
        getattr(read_manifest(folder), name).clear()
    assert read_manifest(folder) == written


def test_sealing_adds_hash_time_name_and_template(folder, written):
    seal_manifest(folder, name="tiny")
    sealed = read_manifest(folder)
    assert sealed is not None
    assert sealed.name == "tiny"
    assert sealed.chat_template == hashlib.sha256(b"{{ messages }}").hexdigest()
    assert sealed.files.keys() == written.files.keys()
    for name, record in sealed.files.items():
        status = (folder / name).stat()
        assert record == FileRecord(status.st_size, sha256_of(folder / name), status.st_mtime_ns), (
            name
        )


def test_sealing_believes_hashes_that_were_checked_while_fetching(folder, monkeypatch):
    write_manifest(
        folder,
        weights_id="w",
        architecture="llama",
        precision="int4",
        source={},
        versions={},
        sha256={"model.onnx.data": "a" * 64},
    )
    hashed = []

    def spy(path):
        hashed.append(path.name)
        return "b" * 64

    monkeypatch.setattr(manifest_module, "sha256_of", spy)
    seal_manifest(folder)
    assert "model.onnx.data" not in hashed
    sealed = read_manifest(folder)
    assert sealed is not None
    assert sealed.files["model.onnx.data"].sha256 == "a" * 64
    assert "model.onnx" in hashed


def test_sealing_a_folder_without_a_manifest_does_nothing(folder):
    seal_manifest(folder)
    assert read_manifest(folder) is None


def test_files_in_folders_are_listed_by_their_path(folder):
    (folder / "onnx" / "parts").mkdir(parents=True)
    (folder / "onnx" / "parts" / "0.bin").write_bytes(b"abc")
    write_manifest(folder, weights_id="w", architecture="", precision="", source={}, versions={})
    read = read_manifest(folder)
    assert read is not None
    assert read.files["onnx/parts/0.bin"] == FileRecord(3)


def test_format_1_is_still_read(folder, written):
    path = folder / "phirt.json"
    document = json.loads(path.read_text())
    sizes = {name: record["size"] for name, record in document["files"].items()}
    old = document | {"format_version": 1, "files": sizes}
    del old["name"], old["chat_template"]
    path.write_text(json.dumps(old))
    assert read_manifest(folder) == written


def test_a_folder_made_elsewhere_has_none(folder):
    assert read_manifest(folder) is None


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format_version", 3, "Upgrade phirt"),
        ("format_version", None, "lacks the field 'format_version'"),
        ("weights_id", 7, "'weights_id' must be a string"),
        ("files", {"../x": 1}, "lists a file named '../x'"),
        ("files", {"a/../../x": {"size": 1}}, "lists a file named"),
        ("files", {"/".join("abcdefghi"): {"size": 1}}, "it is too deep"),
        ("files", {"x": {}}, "gives the file x no valid size"),
        ("files", {"x": {"size": -1}}, "gives the file x no valid size"),
        ("files", {"x": {"size": True}}, "gives the file x no valid size"),
        ("files", {"x": {"size": 1 << 60}}, "gives the file x no valid size"),
        ("files", {"x": {"size": 1, "sha256": "a"}}, "gives the file x no valid SHA-256"),
        ("files", {"x": {"size": 1, "mtime_ns": "1"}}, "gives the file x no valid time"),
    ],
)
def test_a_damaged_manifest_is_a_typed_error(folder, written, key, value, message):
    path = folder / "phirt.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ModelFormatError, match=message):
        read_manifest(folder)
