"""Folders of links, for runtimes that follow none."""

from __future__ import annotations

import os
import shutil

import pytest

from phirt.errors import ModelNotFoundError, UnsafeModelError
from phirt.models.folder import FORMATS, read_folder
from phirt.models.real_files import real_folder
from phirt.models.store import Store
from tests.models.model_files import (
    WRITERS,
    write_onnx_folder,
    write_openvino_folder,
    write_snapshot,
)


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


def contents(folder):
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.name != "phirt-copy.json"
    }


@pytest.mark.parametrize("layout", FORMATS)
def test_a_snapshot_of_links_is_copied_and_reads_the_same(layout, tmp_path, link, store):
    model = WRITERS[layout](tmp_path / "model")
    snapshot = write_snapshot(model, tmp_path / "hub", link)
    copy = real_folder(snapshot, store=store)
    assert copy.is_relative_to(store.root)
    assert copy.name.startswith("org-tiny-1b-")
    assert contents(copy) == contents(model)
    assert not any(file.is_symlink() for file in copy.rglob("*"))
    original, copied = read_folder(snapshot), read_folder(copy)
    assert copied.facts == original.facts
    assert copied.artifact.weights_id == original.artifact.weights_id
    if original.model_path is not None:
        assert (copy / original.model_path.relative_to(snapshot)).is_file()


def test_a_folder_of_files_is_itself(tmp_path, store):
    model = write_onnx_folder(tmp_path / "model")
    assert real_folder(model, store=store) == model
    assert not store.root.exists()


def test_a_copy_is_made_once_and_anew_when_a_file_changes(tmp_path, link, store):
    snapshot = write_snapshot(write_openvino_folder(tmp_path / "model"), tmp_path / "hub", link)
    first = real_folder(snapshot, store=store)
    written = (first / "openvino_model.bin").stat().st_ctime_ns
    assert real_folder(snapshot, store=store) == first
    assert (first / "openvino_model.bin").stat().st_ctime_ns == written
    blob = (snapshot / "openvino_model.bin").resolve()
    blob.write_bytes(b"another")
    second = real_folder(snapshot, store=store)
    assert second != first
    assert (second / "openvino_model.bin").read_bytes() == b"another"


def test_a_damaged_copy_is_made_again(tmp_path, link, store):
    snapshot = write_snapshot(write_openvino_folder(tmp_path / "model"), tmp_path / "hub", link)
    copy = real_folder(snapshot, store=store)
    whole = contents(copy)
    (copy / "openvino_model.bin").write_bytes(b"")
    assert real_folder(snapshot, store=store) == copy
    assert contents(copy) == whole


def test_a_copy_can_be_written_to_and_removed(tmp_path, link, store):
    snapshot = write_snapshot(write_openvino_folder(tmp_path / "model"), tmp_path / "hub", link)
    (snapshot / "openvino_model.bin").resolve().chmod(0o444)
    copy = real_folder(snapshot, store=store)
    assert os.access(copy / "openvino_model.bin", os.W_OK)
    shutil.rmtree(copy)


def test_m3_pickles_and_hidden_files_are_left_out(tmp_path, link, store):
    model = write_openvino_folder(tmp_path / "model")
    for name in ("pytorch_model.bin", ".gitattributes", ".cache/x"):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_bytes(name.encode())
    snapshot = write_snapshot(model, tmp_path / "hub", link)
    names = set(contents(real_folder(snapshot, store=store)))
    assert names == {
        "chat_template.jinja",
        "config.json",
        "openvino_model.bin",
        "openvino_model.xml",
        "tokenizer.json",
        "tokenizer_config.json",
    }


@pytest.mark.parametrize("name", ["onnx/model.onnx_data", "onnx/more/x", "tokenizer.json"])
def test_m10_a_link_that_leaves_the_repository_is_refused_at_any_depth(tmp_path, link, store, name):
    snapshot = write_snapshot(write_onnx_folder(tmp_path / "model"), tmp_path / "hub", link)
    secret = tmp_path / "secret"
    secret.write_text("x")
    (snapshot / name).unlink(missing_ok=True)
    (snapshot / name).parent.mkdir(exist_ok=True)
    link(snapshot / name, secret)
    with pytest.raises(UnsafeModelError, match="leads out of the model folder"):
        real_folder(snapshot, store=store)
    assert not store.root.exists()


def test_a_link_to_nothing_is_a_typed_error(tmp_path, link, store):
    snapshot = write_snapshot(write_openvino_folder(tmp_path / "model"), tmp_path / "hub", link)
    (snapshot / "openvino_model.bin").resolve().unlink()
    with pytest.raises(ModelNotFoundError, match="which is not there"):
        real_folder(snapshot, store=store)


def test_where_the_system_cannot_copy_by_itself_it_is_copied_by_reading(
    tmp_path, link, store, monkeypatch
):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    model = write_openvino_folder(tmp_path / "model")
    snapshot = write_snapshot(model, tmp_path / "hub", link)
    assert contents(real_folder(snapshot, store=store)) == contents(model)
