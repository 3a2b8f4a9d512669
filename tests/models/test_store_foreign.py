"""What is not the store's own stays, whatever lies beside it and whatever a manifest says."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest

from phirt.errors import StoreError
from phirt.models.hashing import remembered_sha256
from phirt.models.hub_partial import claimable
from phirt.models.store import Store
from tests.models.store_content import CONTENT, KEY, SHA256, fill, fill_source


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.mark.parametrize("claimed", ["../../documents", "{parent}/documents", "../models/other"])
def test_a_manifest_names_no_folder_outside_that_goes_with_the_model(store, tmp_path, claimed):
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "letter.txt").write_text("mine")
    store.install_source(SHA256, "x.gguf", fill_source, size=len(CONTENT))
    store.install("other", fill)
    source = {"name": "x", "id": "sha256:" + claimed.format(parent=tmp_path)}
    store.install(KEY, partial(fill, source=source))
    store.remove(KEY)
    assert (documents / "letter.txt").read_text() == "mine"
    assert store.find("other")


FOREIGN = (
    "copies/holiday/photo.jpg",
    "hashes/passwords.txt",
    "hashes/folder/x",
    "locks/door.txt",
    "locks/uv.lock",
    "openvino/notes.txt",
    "openvino/samples/code.cpp",
    "partial/draft/novel.txt",
    "sources/program/main.c",
    "sources/list.txt",
    "tmp/me@home/work.txt",
    "tmp/me@home.1/work.txt",
    "used/car",
    "used/bike.txt",
)


def test_collecting_leaves_what_others_keep_under_the_same_names(store):
    for name in FOREIGN:
        file = store.root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
        for path in (file, file.parent):
            os.utime(path, (1, 1))
    store.install(KEY, fill)  # which sweeps, too
    collected = store.collect(converter_version=9)
    assert dict(collected.freed) == {}
    gone = [name for name in FOREIGN if not (store.root / name).is_file()]
    assert gone == []


def test_collecting_takes_its_own_beside_them(store, tmp_path):
    store.install_copy("copy", fill)
    (tmp_path / "file").write_text("x")
    os.utime(tmp_path / "file", (1, 1))
    remembered_sha256(tmp_path / "file", store.root / "hashes")
    (tmp_path / "file").unlink()
    (store.root / "hashes" / "passwords.txt").write_text("mine")
    compiled = store.root / "openvino" / ("0123" * 8)
    compiled.mkdir(parents=True)
    (compiled / "lock").touch()
    (compiled / "1.blob").write_text("x")
    store.collect(converter_version=9)
    kept = {path.relative_to(store.root).as_posix() for path in store.root.rglob("*")}
    assert kept - {"copies", "openvino", "locks", "tmp"} == {"hashes", "hashes/passwords.txt"}


def test_a_link_to_a_folder_elsewhere_goes_and_the_folder_stays(store, tmp_path, link):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    fill(elsewhere)
    (store.root / "models").mkdir(parents=True)
    link(store.root / "models" / KEY, elsewhere)
    store.remove(KEY)
    assert (elsewhere / "model.onnx.data").exists()
    assert not os.path.lexists(store.root / "models" / KEY)


def test_a_folder_that_no_key_could_name_is_none_of_the_stores(store):
    folder = store.root / "models" / "My_Model"
    folder.mkdir(parents=True)
    fill(folder)
    (store.root / "sources" / "program" / "src").mkdir(parents=True)
    assert store.installed() == []
    assert store.verify() == []


def test_a_fetched_file_that_cannot_be_read_is_a_fault(store):
    folder: Path = store.root / "sources" / ("0" * 64)
    (folder / "x.gguf").mkdir(parents=True)
    (fault,) = store.verify()
    assert fault.path == folder / "x.gguf"


def test_a_folder_without_manifest_is_not_removed(store):
    folder: Path = store.root / "models" / "notes"
    folder.mkdir(parents=True)
    (folder / "diary.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"holds no phirt\.json.*Delete the folder yourself"):
        store.remove("notes")
    assert (folder / "diary.txt").exists()


def test_a_file_where_the_store_has_a_folder_is_a_typed_error(store):
    store.root.mkdir()
    (store.root / "models").write_text("mine")
    for use in (store.installed, store.verify, lambda: store.collect(converter_version=1)):
        with pytest.raises(StoreError, match="models"):
            use()
    (store.root / "partial").write_text("mine")
    assert list(claimable(store.root / "partial" / SHA256)) == []
