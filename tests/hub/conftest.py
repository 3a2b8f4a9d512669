"""A hub for one test, and the network as it should be: loopback, without the user's settings."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from phirt.models import hub_session
from phirt.models.hub import HubFile, HubSnapshot, open_snapshot
from phirt.models.hub_download import download
from phirt.models.hub_names import HubName
from phirt.models.store import Store
from phirt.types import ProgressCallback
from tests.hub.fake_hub import FakeHub

REPO = "org/tiny"
WEIGHTS = random.Random(7).randbytes(300_000)  # noqa: S311 - not a secret
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "empty.txt": b"",
    "onnx/model.onnx": b"graph" * 100,
    "onnx/model.onnx.data": WEIGHTS,
}
_SETTINGS = ("HF_", "HUGGINGFACE_", "HUGGING_FACE_", "TRANSFORMERS_OFFLINE")

Pull = Callable[..., Path]


@pytest.fixture
def network(monkeypatch, tmp_path) -> Iterator[None]:
    """No settings, caches or tokens of whoever runs the tests; no waiting between tries."""
    for name in list(os.environ):
        if name.startswith(_SETTINGS) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf-home"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "no-tokens"))
    monkeypatch.setattr(hub_session, "_FIRST_WAIT_S", 0.01)
    huggingface_hub.close_session()
    yield
    huggingface_hub.close_session()


@pytest.fixture
def hub(network, monkeypatch) -> Iterator[FakeHub]:
    """A hub with one small model, which HF_ENDPOINT names."""
    with FakeHub() as fake:
        fake.add_repo(REPO, FILES)
        monkeypatch.setenv("HF_ENDPOINT", fake.endpoint)
        yield fake


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def snapshot(hub) -> HubSnapshot:
    """The small model's commit."""
    return snapshot_of()


@pytest.fixture
def pull(hub, store, tmp_path) -> Pull:
    """`pull(paths)` fetches the small model, or these files of it, into a new folder."""
    count = 0

    def pull(
        paths: list[str] | None = None,
        *,
        snapshot: HubSnapshot | None = None,
        progress: ProgressCallback | None = None,
    ) -> Path:
        nonlocal count
        count += 1
        folder: Path = tmp_path / f"fetched-{count}"
        folder.mkdir()
        listed = snapshot or snapshot_of()
        download(listed, files_of(listed, paths), folder, store=store, progress=progress)
        return folder

    return pull


def snapshot_of(name: str = REPO) -> HubSnapshot:
    return open_snapshot(HubName.parse(name), offline=False)


def files_of(snapshot: HubSnapshot, paths: list[str] | None = None) -> list[HubFile]:
    return [file for file in snapshot.files if paths is None or file.path in paths]


def content_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
