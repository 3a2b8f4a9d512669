"""What is said of the store and of phirt's own records, and that the commands mend it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import phirt
from phirt.cli import main
from phirt.doctor.storage import examine_records, examine_store
from phirt.models.owners import owner_tag
from phirt.models.store import Store


def look(*, deep=False):
    return list(examine_store(deep=deep, progress=None))


def faults(*, deep=False):
    return [each for each in look(deep=deep) if each.severity != "ok"]


def mend(command):
    """Run a command of phirt's, in this process: it has no network, nor needs any here."""
    name, *arguments = shlex.split(command)
    assert name == "phirt"
    assert main(arguments) == 0


@pytest.fixture
def model(tiny_gguf) -> Path:
    """A model in the store, converted from a file of the user's."""
    with phirt.load(tiny_gguf, backend="onnxruntime", precision="fp32"):
        pass
    (installed,) = Store().installed()
    path: Path = installed.path
    return path


class TestFolder:
    def test_there_is_none_yet(self):
        (found,) = look()
        assert found.severity == "ok"
        assert "0 models" in found.found
        assert not Store().root.exists()

    def test_it_cannot_be_written(self, monkeypatch):
        def refuse(**_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
        (found,) = faults()
        assert found.severity == "broken"
        assert "cannot be written: Permission denied" in found.found
        assert "PHIRT_HOME" in str(found.command)

    def test_it_is_no_folder(self, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("PHIRT_HOME", str(tmp_path / "file"))
        (found,) = faults()
        assert found.severity == "broken"

    def test_the_home_of_nobody(self, monkeypatch):
        monkeypatch.setenv("PHIRT_HOME", "~nobody-of-that-name/models")
        (found,) = faults()
        assert (found.severity, "cannot be at" in found.found) == ("broken", True)
        assert "PHIRT_HOME" in str(found.command)

    def test_a_full_disk(self, monkeypatch):
        usage = shutil.disk_usage(Path.cwd())
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=300_000_000))
        (found,) = faults()
        assert (found.severity, found.found[:15]) == ("warning", "0.3 GB are free")


class TestLeftovers:
    def test_what_a_dead_process_left_is_collected(self):
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        tag = f"{owner_tag().partition('.')[0]}.{ended.pid}.0123abcd"
        left = Store().root / "tmp" / f"models-tiny@{tag}"
        left.mkdir(parents=True)
        (left / "weights").write_bytes(bytes(1000))
        (found,) = faults()
        assert (found.severity, found.command) == ("note", "phirt gc")
        mend(found.command)
        assert faults() == []
        assert not left.exists()

    def test_an_unfinished_download(self):
        partial = Store().root / "partial" / ("ab" * 20)
        partial.mkdir(parents=True)
        (partial / "file").write_bytes(bytes(2_000_000))
        (found,) = faults()
        assert "2.0 MB" in found.found
        mend(found.command)
        assert faults() == []

    def test_what_is_being_written_is_nobodys_leftover(self):
        (Store().root / "tmp" / f"models-tiny@{owner_tag()}.0123abcd").mkdir(parents=True)
        assert faults() == []


class TestModels:
    def test_a_sound_one(self, model):
        (found,) = look()
        assert "1 model," in found.found
        (found,) = look(deep=True)
        assert "every file hashed" in found.found

    def test_a_missing_file(self, model):
        (model / "model.onnx").unlink()
        (found,) = faults()
        assert found.severity == "broken"
        assert "model.onnx is missing" in found.found
        # It came from a file of the user's: there is nowhere to fetch it from.
        assert found.command == f"phirt rm {model.name}"
        mend(found.command)
        assert faults() == []

    def test_another_size(self, model):
        with (model / "tokenizer.json").open("ab") as file:
            file.write(b" ")
        (found,) = faults()
        assert "tokenizer.json" in found.found

    def test_another_byte_and_the_same_time_shows_to_a_deep_look_only(self, model):
        file = max(model.iterdir(), key=lambda path: path.stat().st_size)
        status = file.stat()
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert faults() == []
        (found,) = faults(deep=True)
        assert "SHA-256" in found.found

    def test_a_manifest_that_cannot_be_read(self, model):
        (model / "phirt.json").write_text("{")
        (found,) = faults()
        assert found.command == f"phirt rm {model.name}"
        mend(found.command)
        assert faults() == []

    def test_a_changed_template_is_for_people_to_judge(self, model):
        (model / "chat_template.jinja").write_text("{{ messages }}")
        (found,) = faults()
        assert "template" in found.found
        assert "--accept-template" in found.found

    def test_somebody_elses_folder(self):
        (Store().root / "models" / "theirs").mkdir(parents=True)
        (found,) = faults()
        assert (found.severity, found.command) == ("warning", None)

    @pytest.mark.parametrize(
        ("source", "versions", "command"),
        [
            ({"repository": "org/tiny"}, {}, "phirt pull org/tiny"),
            (
                {"repository": "org/tiny", "name": "tiny.gguf"},
                {"converter": "4"},
                "phirt pull org/tiny --precision fp32 --backend onnxruntime",
            ),
        ],
        ids=["built-elsewhere", "converted-here"],
    )
    def test_one_that_can_be_fetched_again(self, model, source, versions, command):
        manifest = json.loads((model / "phirt.json").read_text())
        manifest |= {"name": "org/tiny", "source": source, "versions": versions}
        (model / "phirt.json").write_text(json.dumps(manifest))
        (model / "model.onnx").unlink()
        (found,) = faults()
        assert found.command == command


class TestRecords:
    @pytest.fixture
    def folder(self, tmp_path, monkeypatch):
        folder = tmp_path / "machine"
        folder.mkdir()
        monkeypatch.setenv("PHIRT_MACHINE_DIR", str(folder))
        return folder

    def test_none(self, folder):
        assert list(examine_records()) == []

    def test_sound(self, folder):
        (folder / "survey-1.json").write_text("{}")
        (found,) = examine_records()
        assert found.severity == "ok"

    def test_damaged(self, folder):
        (folder / "survey-1.json").write_text("{}")
        (folder / "quarantine.json").write_text('{"entries": [')
        (found,) = examine_records()
        assert found.severity == "warning"
        assert found.found.startswith("quarantine.json in ")
        subprocess.run(str(found.command), shell=True, check=True)  # noqa: S602 - as a user does
        (found,) = examine_records()
        assert found.severity == "ok"
