"""What Hugging Face's own library has fetched before is taken from its cache, once checked."""

from __future__ import annotations

import os

import huggingface_hub
import pytest

from phirt.types import Progress
from tests.hub.conftest import FILES, REPO, WEIGHTS, content_of, files_of, snapshot_of

DATA = "onnx/model.onnx.data"


@pytest.fixture
def cache(hub, tmp_path):
    """The user's cache after snapshot_download of the small model."""
    folder = tmp_path / "hf-home" / "hub"
    huggingface_hub.snapshot_download(REPO, endpoint=hub.endpoint, cache_dir=folder)
    hub.bytes_sent = 0
    return folder / "models--org--tiny"


def test_no_byte_of_what_is_there_is_fetched(hub, cache, pull, store):
    seen: list[Progress] = []
    assert content_of(pull(progress=seen.append)) == FILES
    assert hub.bytes_sent == 0
    assert seen[-1].completed == seen[-1].total
    assert list(store.root.rglob("*")) == []


def test_what_arrives_is_a_copy_and_no_link(cache, pull):
    weights = pull() / DATA
    assert not weights.is_symlink()
    assert weights.stat().st_nlink == 1
    weights.write_bytes(b"changed")
    assert (cache / "snapshots").is_dir()
    assert next(cache.rglob("model.onnx.data")).read_bytes() == WEIGHTS


def test_a_file_of_another_commit_is_taken_by_its_hash(hub, cache, pull):
    hub.add_repo(REPO, {**FILES, "config.json": b"newer"})
    assert content_of(pull())["config.json"] == b"newer"
    assert hub.bytes_sent == len(b"newer")


def test_only_what_is_missing_is_fetched(hub, cache, pull, snapshot):
    (cache / "blobs" / files_of(snapshot, [DATA])[0].digest).unlink()
    assert content_of(pull()) == FILES
    assert hub.bytes_sent == len(WEIGHTS)


@pytest.mark.parametrize("damage", ["flip", "cut", "folder"])
def test_a_damaged_file_is_fetched(hub, cache, pull, snapshot, damage):
    blob = cache / "blobs" / files_of(snapshot, [DATA])[0].digest
    blob.chmod(0o644)
    if damage == "flip":
        blob.write_bytes(b"x" + WEIGHTS[1:])
    elif damage == "cut":
        os.truncate(blob, 1000)
    else:
        blob.unlink()
        blob.mkdir()
    assert content_of(pull()) == FILES
    assert hub.bytes_sent == len(WEIGHTS)


def test_a_cache_without_links_is_read_too(hub, cache, pull):
    """As on Windows, where the snapshot's folder holds the files themselves."""
    for path in FILES:
        link = next((cache / "snapshots").iterdir()) / path
        blob = link.resolve()
        link.unlink()
        blob.rename(link)
    assert content_of(pull()) == FILES
    assert hub.bytes_sent == 0


def test_a_link_that_leads_nowhere_is_passed_over(hub, cache, pull):
    for blob in (cache / "blobs").iterdir():
        blob.unlink()
    assert content_of(pull()) == FILES


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"])
def test_the_cache_is_where_the_variables_say(hub, cache, pull, monkeypatch, variable):
    monkeypatch.delenv("HF_HOME")
    folder = cache.parent.parent if variable == "HF_HOME" else cache.parent
    monkeypatch.setenv(variable, str(folder))
    pull()
    assert hub.bytes_sent == 0


def test_another_repositorys_files_are_not_looked_for(hub, cache, pull):
    hub.add_repo("org/other", FILES)
    assert content_of(pull(snapshot=snapshot_of("org/other"))) == FILES
    assert hub.bytes_sent == sum(map(len, FILES.values()))
