"""Records of the machine: read whole or not at all, and never lost between two processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from phirt.dispatch.machine_dir import machine_dir, read_record, update_record, write_record
from phirt.errors import StoreError


@pytest.fixture
def record(tmp_path):
    return tmp_path / "machine" / "record.json"


def test_it_is_in_the_store_unless_another_folder_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PHIRT_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("PHIRT_MACHINE_DIR", raising=False)
    assert machine_dir() == tmp_path / "home" / "machine"
    monkeypatch.setenv("PHIRT_MACHINE_DIR", str(tmp_path / "named"))
    assert machine_dir() == tmp_path / "named"


def test_a_place_that_cannot_be_is_told(monkeypatch):
    def expanduser(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv("PHIRT_MACHINE_DIR", "~/machine")
    monkeypatch.setattr(Path, "expanduser", expanduser)
    with pytest.raises(StoreError, match="Set PHIRT_MACHINE_DIR to the absolute path of a folder"):
        machine_dir()


def test_what_is_written_is_read(record):
    write_record(record, {"a": [1, 2.5, None, "ü"]})
    assert read_record(record) == {"a": [1, 2.5, None, "ü"]}
    assert [path.name for path in record.parent.iterdir()] == ["record.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"a": NaN}', b"\xff", b'{"a":1,"a":2}'])
def test_a_damaged_record_is_none(record, content):
    write_record(record, {"a": 1})
    record.write_bytes(content)
    assert read_record(record) is None


def test_there_is_none_before_it_is_written(record):
    assert read_record(record) is None


def test_a_folder_that_cannot_be_written_is_no_fault(record, caplog):
    record.parent.write_text("a file where the folder should be")
    write_record(record, {"a": 1})
    update_record(record, lambda found: {"a": 2})
    assert caplog.text.count("cannot be written") == 2


ADD = """
import sys
from pathlib import Path
from phirt.dispatch.machine_dir import update_record
path, first = Path(sys.argv[1]), int(sys.argv[2])
for number in range(first, first + 20):
    update_record(path, lambda found: {**(found or {}), str(number): number})
"""


def test_two_processes_that_add_lose_nothing(record: Path):
    children = [
        subprocess.Popen([sys.executable, "-c", ADD, str(record), str(first)]) for first in (0, 20)
    ]
    assert [child.wait(timeout=60) for child in children] == [0, 0]
    found = read_record(record)
    assert found is not None
    assert sorted(found.values()) == list(range(40))
