"""Hashes of files, computed and remembered."""

import hashlib
import os
import sys
import threading

import pytest

from phirt.models import hashing
from phirt.models.hashing import BackgroundDigest, remembered_sha256, sha256_of
from phirt.types import Progress

LONG_AGO = 1_000_000_000  # seconds


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"content")
    os.utime(path, (LONG_AGO, LONG_AGO))
    return path


@pytest.fixture
def read(monkeypatch):
    """The files that are read to the end."""
    paths = []
    original = sha256_of

    def spy(path, *, progress=None):
        paths.append(path.name)
        return original(path, progress=progress)

    monkeypatch.setattr(hashing, "sha256_of", spy)
    return paths


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def test_progress_reaches_the_size(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * (3 << 20))
    seen: list[Progress] = []
    assert sha256_of(path, progress=seen.append) == sha256(b"x" * (3 << 20))
    assert [(p.stage, p.completed, p.total) for p in seen][-1] == ("hash", 3 << 20, 3 << 20)


def test_a_file_is_read_once(file, read, tmp_path):
    for _ in range(3):
        assert remembered_sha256(file, tmp_path / "records") == sha256(b"content")
    assert read == ["model.gguf"]


@pytest.mark.parametrize(
    ("data", "seconds"), [(b"contenT", LONG_AGO + 1), (b"longer content", LONG_AGO)]
)
def test_a_changed_file_is_read_again(file, read, tmp_path, data, seconds):
    remembered_sha256(file, tmp_path / "records")
    file.write_bytes(data)
    os.utime(file, (seconds, seconds))
    assert remembered_sha256(file, tmp_path / "records") == sha256(data)
    assert len(read) == 2


@pytest.mark.skipif(sys.platform == "win32", reason="Windows keeps no time of the last change")
def test_another_file_of_the_same_size_and_time_is_read(file, read, tmp_path):
    remembered_sha256(file, tmp_path / "records")
    file.write_bytes(b"contenT")
    os.utime(file, (LONG_AGO, LONG_AGO))
    assert remembered_sha256(file, tmp_path / "records") == sha256(b"contenT")


def test_a_file_just_written_is_not_remembered(file, read, tmp_path):
    os.utime(file)
    remembered_sha256(file, tmp_path / "records")
    remembered_sha256(file, tmp_path / "records")
    assert len(read) == 2


@pytest.mark.parametrize("damage", [b"", b"{", b'{"sha256": 5}', b"[]"])
def test_a_damaged_record_is_made_anew(file, read, tmp_path, damage):
    records = tmp_path / "records"
    remembered_sha256(file, records)
    (record,) = records.iterdir()
    record.write_bytes(damage)
    assert remembered_sha256(file, records) == sha256(b"content")
    assert remembered_sha256(file, records) == sha256(b"content")
    assert len(read) == 2


def test_records_that_cannot_be_written_do_no_harm(file, tmp_path):
    (tmp_path / "records").write_bytes(b"a file where the folder should be")
    assert remembered_sha256(file, tmp_path / "records") == sha256(b"content")


class TestBackgroundDigest:
    def test_is_the_hash_of_all_chunks_so_far(self):
        digest = BackgroundDigest(hashlib.sha256())
        data = bytes(range(256)) * 300
        for start in range(0, len(data), 777):
            digest.update(data[start : start + 777])
        assert digest.hexdigest() == hashlib.sha256(data).hexdigest()
        digest.update(b"more")
        assert digest.hexdigest() == hashlib.sha256(data + b"more").hexdigest()

    def test_its_thread_ends_with_it(self):
        before = set(threading.enumerate())
        digest = BackgroundDigest(hashlib.sha256())
        (thread,) = set(threading.enumerate()) - before
        del digest
        thread.join(10)
        assert not thread.is_alive()
