"""Whose a partial file is, and who may go on with it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from phirt.models import hub_download, owners
from phirt.models.hub_partial import PartialFile, claimable
from tests.hub.conftest import FILES, WEIGHTS, content_of, files_of

DATA = "onnx/model.onnx.data"


@pytest.fixture
def place(tmp_path):
    return tmp_path / "partial" / "0000"


@pytest.fixture
def place_of(store, snapshot, monkeypatch):
    """Where the store keeps what is fetched of a file; progress is told of every piece."""
    monkeypatch.setattr(hub_download, "_REPORT_EVERY_S", 0.0)
    return lambda path: store.root / "partial" / files_of(snapshot, [path])[0].digest


@pytest.fixture
def dead():
    """The tag of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return f"{owners._host()}.{process.pid}"


def leave(place, name, data):
    place.mkdir(parents=True, exist_ok=True)
    (place / name).write_bytes(data)
    return place / name


def test_a_new_one_is_empty_and_says_whose_it_is(place):
    part = PartialFile(place)
    assert part.path.parent == place
    assert part.path.name.startswith(f"{owners.owner_tag()}.")
    assert part.path.read_bytes() == b""
    assert part.is_ours


def test_one_that_is_given_up_is_gone_on_with(place):
    with PartialFile(place) as first:
        first.path.write_bytes(b"some")
    with PartialFile(place) as second:
        assert second.path.read_bytes() == b"some"
        assert not first.is_ours
    assert len(list(place.iterdir())) == 1


def test_one_in_use_is_left_alone(place):
    with PartialFile(place) as first, PartialFile(place) as second:
        assert first.path != second.path
        assert first.is_ours
        assert list(claimable(place)) == []


def test_that_of_a_process_that_ended_is_gone_on_with(place, dead):
    leave(place, f"{dead}.x", b"some")
    assert PartialFile(place).path.read_bytes() == b"some"


def test_the_longest_is_taken_and_the_others_are_removed(place, dead):
    for count in (1, 3, 2):
        leave(place, f"{dead}.{count}", b"x" * count)
    part = PartialFile(place)
    assert list(place.iterdir()) == [part.path]
    assert part.path.read_bytes() == b"xxx"


@pytest.mark.parametrize(
    ("tag", "idle_s", "taken"),
    [
        ("elsewhere.1", 60, False),
        ("elsewhere.1", 3600, True),
        (None, 3600, False),
        (None, 2e5, True),
    ],
)
def test_where_nothing_is_known_of_the_owner_age_decides(place, tag, idle_s, taken):
    file = leave(place, f"{tag or owners.owner_tag()}.x", b"some")
    then = time.time() - idle_s
    os.utime(file, (then, then))
    assert list(claimable(place)) == ([file] if taken else [])
    assert (PartialFile(place).path.read_bytes() == b"some") is taken
    assert list(claimable(place)) == []


def test_moving_it_leaves_no_folder(place, tmp_path):
    with PartialFile(place) as part:
        part.path.write_bytes(b"all")
        part.move_to(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"all"
    assert not place.parent.exists()


def test_discarding_it_leaves_no_folder(place):
    with PartialFile(place) as part:
        part.discard()
        assert not part.is_ours
    assert not place.parent.exists()


def test_s8_of_many_at_once_one_gets_it(place, dead):
    leave(place, f"{dead}.x", b"some")
    barrier = threading.Barrier(8)
    parts = []

    def claim():
        barrier.wait()
        parts.append(PartialFile(place))

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(part.path.read_bytes() for part in parts) == [b""] * 7 + [b"some"]


def test_s8_downloads_of_one_file_at_once_do_not_meet(hub, pull):
    folders = []
    threads = [threading.Thread(target=lambda: folders.append(pull())) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [content_of(folder) for folder in folders] == [FILES] * 6


@pytest.mark.parametrize("kind", ["removed", "taken over"])
def test_a_partial_file_that_goes_away_is_begun_anew_and_not_written(pull, place_of, kind):
    place = place_of(DATA)
    taken = place / "elsewhere.1.x"
    sizes: list[int] = []

    def meanwhile(progress):
        if progress.completed > len(WEIGHTS) // 2 and not sizes:
            file = next(place.iterdir())
            file.rename(taken)
            sizes.append(taken.stat().st_size)
            if kind == "removed":
                taken.unlink()

    assert content_of(pull(progress=meanwhile)) == FILES
    assert sizes
    if kind == "taken over":
        assert taken.stat().st_size == sizes[0]


def test_one_that_goes_away_after_all_is_fetched_is_fetched_again(hub, pull, store):
    def meanwhile(progress):
        if progress.completed == progress.total:
            for file in (store.root / "partial").rglob("*"):
                if file.is_file():
                    file.unlink()

    assert content_of(pull(progress=meanwhile)) == FILES


@pytest.mark.parametrize("seen", [FileNotFoundError, FileExistsError])
def test_the_empty_folder_may_go_at_any_moment(tmp_path, monkeypatch, seen):
    """Another process that is done removes it, also in the middle of ``Path.mkdir``."""
    place = tmp_path / "partial" / "digest"
    make, failures = Path.mkdir, [seen("removed"), FileExistsError("removed again")]

    def mkdir(path, *args, **kwargs):
        if path == place and failures:
            raise failures.pop(0)
        make(path, *args, **kwargs)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    assert PartialFile(place).path.is_file()


def test_what_is_no_folder_is_told(tmp_path):
    place = tmp_path / "digest"
    place.touch()
    with pytest.raises(FileExistsError):
        PartialFile(place)
