"""Listing what is installed, removing it, and collecting what nobody needs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from phirt.errors import ModelNotFoundError, StoreError
from phirt.models.hashing import remembered_sha256
from phirt.models.owners import owner_tag
from phirt.models.staging import lock_of
from phirt.models.store import Store
from tests.models.store_content import CONTENT, KEY, SHA256, fill, fill_source, leftovers

CONVERTED: dict[str, Any] = {
    "source": {"name": "x.gguf", "id": f"sha256:{SHA256}"},
    "versions": {"converter": "3"},
}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def install_converted(store: Store, key: str = KEY, **manifest: Any) -> Path:
    store.install_source(SHA256, "x.gguf", fill_source, size=len(CONTENT))
    return store.install(key, partial(fill, **(CONVERTED | manifest)), name="tiny")


def content_of(store: Store) -> list[str]:
    """Every file of the store but the phirt.json's, by its path in it."""
    files = (path for path in store.root.rglob("*") if path.is_file())
    return sorted(path.relative_to(store.root).as_posix() for path in files)


# Listing.


def test_an_empty_store_lists_nothing(store):
    assert store.installed() == []
    assert store.verify() == []
    assert not store.root.exists()


def test_a_fetched_model_is_listed_with_its_revision(store):
    source = {"repository": "org/tiny", "revision": "c0ffee"}
    before = datetime.now(UTC) - timedelta(seconds=2)
    path = store.install(KEY, partial(fill, source=source), name="tiny")
    (model,) = store.installed()
    assert (model.key, model.name, model.path) == (KEY, "tiny", path)
    assert (model.source, model.revision) == ("org/tiny", "c0ffee")
    assert (model.precision, model.bytes) == ("int8", len(CONTENT))
    assert model.format is None, "it holds no layout that phirt knows"
    assert model.last_used is not None
    assert before <= model.last_used <= datetime.now(UTC) + timedelta(seconds=2)


def test_looking_a_model_up_is_using_it(store):
    store.install(KEY, fill)
    os.utime(store.root / "used" / KEY, (1, 1))
    assert store.installed()[0].last_used == datetime.fromtimestamp(1, tz=UTC)
    store.find(KEY)
    last_used = store.installed()[0].last_used
    assert last_used is not None
    assert last_used.year > 2000


def test_a_converted_model_is_listed_with_its_file(store):
    install_converted(store)
    (model,) = store.installed()
    assert (model.source, model.revision) == ("x.gguf", None)


def test_what_is_damaged_is_not_listed_and_is_removable(store):
    path = store.install(KEY, fill)
    (path / "phirt.json").write_text("{")
    assert store.installed() == []
    store.remove(KEY)
    assert not path.exists()


def test_a_damaged_source_is_named(store):
    file = store.install_source(SHA256, "x.gguf", fill_source, size=len(CONTENT))
    file.write_bytes(CONTENT[::-1])
    (fault,) = store.verify()
    assert (fault.key, fault.path) == (SHA256, file)
    assert store.verify(install_converted(store).name) == [], "of this model alone"


def test_a_damaged_source_is_fetched_again_once_verify_has_found_it(store):
    file = store.install_source(SHA256, "x.gguf", fill_source, size=len(CONTENT))
    status = file.stat()
    file.write_bytes(CONTENT[::-1])
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert len(store.verify()) == 1
    assert store.find_source(SHA256, "x.gguf", size=len(CONTENT)) is None
    again = store.install_source(SHA256, "x.gguf", fill_source, size=len(CONTENT))
    assert again.read_bytes() == CONTENT
    assert store.verify() == []


# Removing.


def test_removing_frees_the_model_and_its_source(store):
    install_converted(store)
    assert store.remove(KEY) >= 2 * len(CONTENT)
    assert store.find(KEY) is None
    assert [name for name in content_of(store) if not name.startswith("locks/")] == []


def test_a_source_that_another_model_was_made_from_stays(store):
    install_converted(store)
    install_converted(store, "tiny-int4")
    store.remove(KEY)
    assert store.find_source(SHA256, "x.gguf", size=len(CONTENT))
    store.remove("tiny-int4")
    assert store.find_source(SHA256, "x.gguf", size=len(CONTENT)) is None


def test_a_source_stays_while_something_is_installed(store):
    install_converted(store)

    def remove_and_fill(folder: Path) -> None:
        store.remove(KEY)
        assert store.find_source(SHA256, "x.gguf", size=len(CONTENT)), "it may be read right now"
        fill(folder)

    store.install("other", remove_and_fill)


def test_removing_what_is_not_there(store):
    with pytest.raises(ModelNotFoundError, match="no model 'absent'"):
        store.remove("absent")
    with pytest.raises(ModelNotFoundError, match="no model 'absent'"):
        store.verify("absent")
    with pytest.raises(ModelNotFoundError, match="no model 'absent'"):
        store.accept_template("absent")
    with pytest.raises(ValueError, match="cannot name"):
        store.remove("../x")
    assert not store.root.exists()


def test_a_model_that_windows_holds_open_stays_whole(store, monkeypatch):
    path = store.install(KEY, fill)

    def refuse(self: Path, target: Path) -> None:
        raise PermissionError(13, "The process cannot access the file", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        with pytest.raises(StoreError, match="loaded; close it and try again"):
            store.remove(KEY)
    assert store.find(KEY) == path
    assert leftovers(store) == []


# Collecting.


def test_collecting_in_an_empty_store(store):
    assert store.collect(converter_version=1).bytes == 0
    assert not store.root.exists()


def test_collecting_leaves_the_models_and_takes_the_rest(store, tmp_path):
    path = install_converted(store)
    store.install("older", partial(fill, versions={"converter": "2"}))
    store.install("fetched", partial(fill, source={"repository": "org/tiny"}))
    store.install_copy("copy", fill)
    name = "0" * 32
    made = (f"openvino/{name}/1.blob", f"kv-ranges/{name}", f"partial/{SHA256}/data")
    for name in made:
        (store.root / name).parent.mkdir(parents=True)
        (store.root / name).write_bytes(CONTENT)
    collected = store.collect(converter_version=3)
    kinds = ["compiled", "copies", "kv-ranges", "models", "partial", "sources"]
    assert sorted(collected.freed) == kinds
    assert all(size >= len(CONTENT) for size in collected.freed.values())
    assert collected.bytes == sum(collected.freed.values())
    assert collected.kept == ()
    assert [model.key for model in store.installed()] == ["fetched", KEY]
    assert store.find(KEY) == path
    names = [file.name for file in path.iterdir()]
    kept = {f"models/{key}/{name}" for key in ("fetched", KEY) for name in names}
    assert set(content_of(store)) == kept | {"used/fetched", f"used/{KEY}"}
    assert store.collect(converter_version=3).freed == {}


def test_a_file_that_was_fetched_today_and_not_converted_yet_stays(store):
    file = store.install_source(SHA256, "x.gguf", fill_source, size=len(CONTENT))
    store.collect(converter_version=1)
    assert file.exists()
    os.utime(file.parent, (1, 1))
    store.collect(converter_version=1)
    assert not file.exists()


def test_what_is_being_made_is_not_collected(store):
    install_converted(store)
    (store.root / "partial" / SHA256).mkdir(parents=True)

    def collect_and_fill(folder: Path) -> None:
        collected = store.collect(converter_version=4)
        assert sorted(collected.freed) == ["models"]
        assert folder.exists()
        assert (store.root / "partial" / SHA256).exists()
        fill(folder)

    store.install("other", collect_and_fill)
    assert [model.key for model in store.installed()] == ["other"]


def test_what_a_dead_process_left_is_collected_and_what_a_live_one_makes_is_not(store):
    ended = subprocess.run(
        [sys.executable, "-c", "from phirt.models.owners import owner_tag; print(owner_tag())"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    for tag in (ended, owner_tag()):
        folder = store.root / "tmp" / f"models-x@{tag}.01234567"
        folder.mkdir(parents=True)
        (folder / "file").write_bytes(CONTENT)
    assert store.collect(converter_version=1).freed["leftovers"] >= len(CONTENT)
    assert leftovers(store) == [f"models-x@{owner_tag()}.01234567"]


def test_what_another_process_holds_is_kept_and_said(store):
    path = install_converted(store, versions={"converter": "1"})
    with FileLock(lock_of(path, store.root)):
        assert store.collect(converter_version=3).kept == (path,)
        assert path.exists()
        assert lock_of(path, store.root).exists()
    assert store.collect(converter_version=3).freed["models"] >= len(CONTENT)


def test_a_compiled_model_in_use_is_kept(store):
    folder = store.root / "openvino" / ("0" * 32)
    folder.mkdir(parents=True)
    with FileLock(folder / "lock"):
        assert store.collect(converter_version=3).kept == (folder,)
    store.collect(converter_version=3)
    assert not folder.exists()


def test_what_finder_leaves_is_no_fault_and_stops_nothing(store):
    path = install_converted(store)
    for name in ("", "models", "sources", f"sources/{SHA256}", "tmp", path.relative_to(store.root)):
        (store.root / name / ".DS_Store").write_bytes(b"finder")
    assert store.verify() == []
    assert [model.key for model in store.installed()] == [KEY]
    assert store.collect(converter_version=3).freed["sources"] >= len(CONTENT)
    assert store.collect(converter_version=3).freed == {}
    assert store.remove(KEY) >= len(CONTENT)


def test_records_of_files_that_are_gone_are_forgotten(store, tmp_path):
    records = store.root / "hashes"
    for name in ("kept", "gone"):
        (tmp_path / name).write_text(name)
        os.utime(tmp_path / name, (1, 1))
        remembered_sha256(tmp_path / name, records)
    (tmp_path / "gone").unlink()
    (records / f"{SHA256}.{'0' * 16}").write_text("{")
    store.collect(converter_version=1)
    (record,) = records.iterdir()
    assert json.loads(record.read_text())["path"] == str(tmp_path / "kept")


def test_a_store_that_cannot_be_written_is_a_typed_error(store, monkeypatch):
    store.install(KEY, partial(fill, versions={"converter": "1"}))

    def refuse(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(30, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StoreError, match=r"cannot be written: .*Read-only"):
        store.collect(converter_version=2)


# Row S12: somebody reads meanwhile.


def test_s12_a_file_that_is_open_stays_readable_or_its_model_stays(store):
    path = store.install(KEY, fill)
    with (path / "model.onnx.data").open("rb") as file:
        try:
            store.remove(KEY)
        except StoreError:  # Windows
            assert store.find(KEY) == path
        assert file.read() == CONTENT


def test_s12_a_model_that_goes_while_it_is_looked_up_is_not_there(store, monkeypatch):
    path = store.install(KEY, fill)
    original = Path.stat

    def vanish(self: Path, **kwargs: bool) -> os.stat_result:
        if self.name == "model.onnx.data" and path.exists():
            shutil.rmtree(path)
        return original(self, **kwargs)

    monkeypatch.setattr(Path, "stat", vanish)
    assert store.find(KEY) is None


def test_s12_finding_and_removing_from_many_threads(store):
    import threading

    ends = time.monotonic() + 1
    wrong: list[BaseException] = []

    def look() -> None:
        while time.monotonic() < ends:
            try:
                found = store.find(KEY)
                assert found in {None, store.root / "models" / KEY}
            except BaseException as error:
                wrong.append(error)

    def change() -> None:
        while time.monotonic() < ends:
            try:
                store.install(KEY, fill)
                store.remove(KEY)
                store.collect(converter_version=1)
            except ModelNotFoundError:
                pass
            except BaseException as error:
                wrong.append(error)

    threads = [threading.Thread(target=work) for work in (look, look, change, change)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert leftovers(store) == []
