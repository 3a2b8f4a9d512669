"""The store: whole models or none, whatever happens meanwhile."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from phirt.errors import ModelFormatError, ModelNotFoundError, StoreError, UnsafeModelError
from phirt.models import staging
from phirt.models.store import Store
from tests.models.store_content import CONTENT, KEY, SHA256, fill, fill_source, leftovers


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


# Where it lies.


def test_phirt_home_and_the_platforms_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("PHIRT_HOME", str(tmp_path / "home"))
    assert Store().root == tmp_path / "home"
    assert Store(tmp_path / "other").root == tmp_path / "other"
    monkeypatch.delenv("PHIRT_HOME")
    assert "phirt" in Store().root.parts


def test_looking_creates_nothing(store):
    assert store.find(KEY) is None
    assert store.find_source(SHA256, "x.gguf", size=1) is None
    assert not store.root.exists()


@pytest.mark.parametrize(
    "key",
    ["", ".", "..", "../x", "a/b", "a\\b", "/x", "C:", "c:x", "\\\\h\\s", "a\0", "nul", "con.x",
     "A", "ä", "a b", "a.", "x" * 101, "-x", "a@b"],
    ids=ascii,
)  # fmt: skip
def test_s1_keys_that_are_not_plain_names_are_refused(store, key):
    with pytest.raises(ValueError, match="cannot name a model in the store"):
        store.find(key)
    with pytest.raises(ValueError, match="cannot name a model in the store"):
        store.install(key, fill)
    assert not store.root.exists()


@pytest.mark.parametrize(
    ("sha256", "name"),
    [
        ("../x", "x"),
        (SHA256.upper(), "x"),
        (SHA256[:-1], "x"),
        (SHA256 + "\n", "x"),
        (SHA256, "../x"),
        (SHA256, "C:x"),
        (SHA256, "x\0"),
        (SHA256, "source.json"),
    ],
)
def test_s1_sources_that_are_not_plain_names_are_refused(store, sha256, name):
    with pytest.raises(ValueError, match=r"SHA-256|cannot name a file"):
        store.install_source(sha256, name, fill_source, size=1)
    assert not store.root.exists()


# Installing.


def test_an_installed_artifact_is_found_and_not_made_again(store):
    path = store.install(KEY, fill)
    assert path == store.root / "models" / KEY == store.find(KEY)
    assert (path / "model.onnx.data").read_bytes() == CONTENT
    assert store.install(KEY, lambda folder: pytest.fail("made again")) == path
    assert leftovers(store) == []


def test_what_fill_raises_propagates_and_leaves_nothing(store):
    def fail(folder: Path) -> None:
        fill(folder)
        raise ModelNotFoundError("no source")

    with pytest.raises(ModelNotFoundError, match="no source"):
        store.install(KEY, fail)
    assert store.find(KEY) is None
    assert not (store.root / "models" / KEY).exists()
    assert leftovers(store) == []
    store.install(KEY, fill)


def test_an_interrupt_leaves_nothing(store):
    def interrupted(folder: Path) -> None:
        fill(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.install(KEY, interrupted)
    assert not (store.root / "models" / KEY).exists()
    assert leftovers(store) == []


def test_a_converter_that_writes_no_manifest_is_a_bug(store):
    with pytest.raises(RuntimeError, match="not complete"):
        store.install(KEY, lambda folder: (folder / "model.onnx").write_bytes(b"x"))
    assert store.find(KEY) is None


@pytest.mark.parametrize("damage", ["truncate", "unlink", "manifest", "empty", "file"])
def test_a_damaged_artifact_is_not_used_and_is_replaced(store, damage):
    path = store.install(KEY, fill)
    if damage == "truncate":
        (path / "model.onnx.data").write_bytes(CONTENT[:-1])
    elif damage == "unlink":
        (path / "model.onnx.data").unlink()
    elif damage == "manifest":
        (path / "phirt.json").write_text("{")
    else:
        shutil.rmtree(path)
        path.mkdir() if damage == "empty" else path.write_text("x")
    if damage in {"empty", "file"}:
        assert store.find(KEY) is None
    else:
        with pytest.raises(ModelFormatError, match=KEY):
            store.find(KEY)
    assert (store.install(KEY, fill) / "model.onnx.data").read_bytes() == CONTENT
    assert leftovers(store) == []


# A full disk.


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_s9_a_disk_that_fills_up_is_a_typed_error_with_both_figures(store, number):
    def full(folder: Path) -> None:
        (folder / "model.onnx.data").write_bytes(CONTENT)
        raise OSError(number, os.strerror(number), str(folder / "model.onnx.data"))

    with pytest.raises(StoreError, match=r"needs more of disk space; .* MB free\..* PHIRT_HOME"):
        store.install(KEY, full)
    assert not (store.root / "models" / KEY).exists()
    assert leftovers(store) == []
    assert store.install(KEY, fill) == store.find(KEY)


def test_s9_a_full_disk_behind_another_error_counts(store):
    def full(folder: Path) -> None:
        raise RuntimeError("the writer failed") from OSError(errno.ENOSPC, "full")

    with pytest.raises(StoreError, match="disk space"):
        store.install(KEY, full)


def test_s9_too_little_space_is_said_before_the_work(store):
    with pytest.raises(StoreError, match=r"needs about 1,000,000,000,000 MB"):
        store.install(KEY, lambda folder: pytest.fail("started"), needed_bytes=10**18)
    assert leftovers(store) == []


def test_s9_the_old_model_stays_when_another_does_not_fit(store):
    path = store.install(KEY, fill)
    with pytest.raises(StoreError):
        store.install("other", fill, needed_bytes=10**18)
    assert store.find(KEY) == path


def test_a_full_disk_while_the_store_itself_writes(store, monkeypatch):
    def full(path: Path, **kwargs: bool) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(staging, "_sync", full)
    with pytest.raises(StoreError, match="disk space"):
        store.install(KEY, fill)
    assert leftovers(store) == []


def test_a_store_that_cannot_be_written_is_a_typed_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match=r"cannot be written.*PHIRT_HOME"):
        Store(tmp_path / "file" / "store").install(KEY, fill)


# Sources.


def test_a_source_is_hashed_when_it_is_installed(store):
    path = store.install_source(SHA256, "x.gguf", fill_source, size=len(CONTENT))
    assert path == store.root / "sources" / SHA256 / "x.gguf"
    assert store.find_source(SHA256, "x.gguf", size=len(CONTENT)) == path


def test_s7_a_source_of_another_hash_is_not_installed(store):
    wrong = "0" * 64
    with pytest.raises(UnsafeModelError, match=f"SHA-256 is {SHA256}, not {wrong}"):
        store.install_source(wrong, "x.gguf", fill_source, size=len(CONTENT))
    assert store.find_source(wrong, "x.gguf", size=len(CONTENT)) is None
    assert leftovers(store) == []


def test_a_source_whose_time_changed_is_hashed_again(store):
    path = store.install_source(SHA256, "x.gguf", fill_source, size=len(CONTENT))
    os.utime(path, ns=(1, 1))
    assert store.find_source(SHA256, "x.gguf", size=len(CONTENT)) == path
    path.write_bytes(CONTENT[:-1] + b"!")
    assert store.find_source(SHA256, "x.gguf", size=len(CONTENT)) is None
    store.install_source(SHA256, "x.gguf", fill_source, size=len(CONTENT))
    assert path.read_bytes() == CONTENT


def test_a_source_of_another_size_is_not_found(store):
    path = store.install_source(SHA256, "x.gguf", fill_source, size=len(CONTENT))
    path.write_bytes(CONTENT[:-1])
    assert store.find_source(SHA256, "x.gguf", size=len(CONTENT)) is None


# Leftovers.


def test_the_work_of_another_machine_is_swept_only_when_it_is_old(store):
    work = store.root / "tmp" / f"models-{KEY}@0123456789ab.1.abcdef01"
    (work / "content").mkdir(parents=True)
    store.install("first", fill)
    assert work.exists()
    for path in (work / "content", work):
        os.utime(path, (1, 1))
    store.install("second", fill)
    assert not work.exists()


def test_the_loser_of_a_race_without_locks_discards_its_copy(store, monkeypatch):
    def fill_second(folder: Path) -> None:
        fill(folder, content=b"second")
        rival(folder)

    def rival(folder: Path) -> None:
        target = store.root / "models" / KEY
        shutil.copytree(folder, target)
        (target / "model.onnx.data").write_bytes(b"rival!")

    path = store.install(KEY, fill_second)
    assert (path / "model.onnx.data").read_bytes() == b"rival!"
    assert leftovers(store) == []


def test_a_model_that_is_removed_as_soon_as_it_is_installed_is_said_to_be(store, monkeypatch):
    def published(name: str) -> None:
        if name == "published":
            shutil.rmtree(store.root / "models" / KEY)

    monkeypatch.setattr(staging, "kill_point", published)
    with pytest.raises(ModelNotFoundError, match="removed as soon as it was installed"):
        store.install(KEY, fill)
    assert leftovers(store) == []
