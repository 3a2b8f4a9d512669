"""Rows S4, S8 and S9 over a pull: from the first byte of a download to the installed model."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from phirt.errors import StoreError
from phirt.models import hub_download, manifest, staging
from phirt.models.folder import read_folder
from phirt.models.hub_models import fetch, plan_build
from phirt.models.hub_names import HubName
from phirt.models.store import Store
from tests.hub.fake_hub import FakeHub
from tests.models.model_files import write_model_folder
from tests.models.processes import finish, kill, points, start
from tests.models.store_content import leftovers

REPO = "org/tiny"
DATA = "model.onnx.data"
DATA_BYTES = 3_000_000


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as running:
        yield running


@pytest.fixture
def environment(hub: FakeHub, tmp_path: Path) -> Mapping[str, str]:
    """Where the hub is, and none of the user's own settings."""
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_TOKEN": "",
        "HF_HUB_OFFLINE": "0",
    }


def publish(hub: FakeHub, folder: Path, *, seed: int) -> str:
    """Put a model into the repository; its commit."""
    files = {file.name: file.read_bytes() for file in write_model_folder(folder).iterdir()}
    files[DATA] += np.random.default_rng(seed).bytes(DATA_BYTES)
    return hub.add_repo(REPO, files)


def is_clean(store: Store) -> bool:
    """Whether nothing is left after gc but what is installed."""
    store.collect(converter_version=1)
    files = [path.relative_to(store.root) for path in store.root.rglob("*") if path.is_file()]
    places = {path.parts[0] for path in files}
    return places <= {"models", "used"} and not leftovers(store)


@pytest.mark.slow  # some twenty-five processes, each of which asks the hub
def test_s4_killed_at_20_seeded_points_of_a_pull(store, hub, environment, tmp_path):
    old = publish(hub, tmp_path / "old", seed=0)
    (path, _) = finish(start(store, "pull", REPO, environment=environment))
    new = publish(hub, tmp_path / "new", seed=1)
    passed = points(tmp_path, "pull", REPO, environment=environment)
    assert {"chunk", "check", "take", "hash", "publish", "published"} <= set(passed)
    random = np.random.default_rng(4)
    killed = 0
    while killed < 20:
        number = int(random.integers(len(passed))) + 1
        process = start(store, "pull", REPO, kill_at=number, environment=environment)
        process.communicate(timeout=120)
        killed += process.returncode != 0
        assert store.verify() == [], "what is there is whole"
        assert store.find(Path(path).name) == Path(path), "the old model stays"
        revisions = {model.revision: model for model in store.installed()}
        if new in revisions:  # killed at the end, or done early with the parts of those before
            store.remove(revisions.pop(new).key)
        assert revisions.keys() == {old}
    finish(start(store, "pull", REPO, environment=environment))
    assert {model.revision for model in store.installed()} == {old, new}
    assert store.verify() == []
    assert is_clean(store)


def test_what_a_kill_left_is_gone_on_with_or_collected(store, hub, environment, tmp_path):
    publish(hub, tmp_path / "model", seed=0)
    kill(store, "pull", REPO, at="take", environment=environment)
    before = hub.bytes_sent
    finish(start(store, "pull", REPO, environment=environment))
    assert hub.bytes_sent == before, "all of it was there"
    (model,) = store.installed()
    store.remove(model.key)
    kill(store, "pull", REPO, at="take", environment=environment)
    assert is_clean(store)
    assert store.installed() == []


@pytest.mark.parametrize("flags", [(), ("--no-locks",)], ids=["locks", "no locks"])
def test_s8_eight_processes_pull_the_same_model(store, hub, environment, tmp_path, flags):
    publish(hub, tmp_path / "model", seed=0)
    processes = [start(store, "pull", REPO, *flags, environment=environment) for _ in range(8)]
    (path,) = {finish(process)[0] for process in processes}
    assert [model.path for model in store.installed()] == [Path(path)]
    assert store.verify() == []
    assert read_folder(Path(path)).artifact.path == Path(path)
    assert leftovers(store) == []
    assert is_clean(store)


# Row S9: a full disk.


@pytest.fixture
def pull(hub, environment, monkeypatch, store):
    """Pulls in this process."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def pull() -> Path:
        name = HubName.parse(REPO)
        build = plan_build(name, label="tiny", formats=("onnx-genai",), device="cpu", offline=False)
        return fetch(build, store, progress=None).path

    return pull


@pytest.mark.parametrize("point", ["fill", "chunk", "take", "manifest", "hash", "sync", "publish"])
def test_s9_a_disk_that_fills_up_at_any_point_of_a_pull(
    store, hub, pull, *, tmp_path, monkeypatch, point
):
    publish(hub, tmp_path / "old", seed=0)
    old = pull()
    publish(hub, tmp_path / "new", seed=1)

    def full(name: str) -> None:
        if name == point:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        for module in (staging, manifest, hub_download):
            patch.setattr(module, "kill_point", full)
        with pytest.raises(StoreError, match=r"disk space; .* MB free"):
            pull()
    assert [model.path for model in store.installed()] == [old], "the old model is intact"
    assert store.verify() == []
    assert leftovers(store) == []
    new = pull()
    assert {model.path for model in store.installed()} == {old, new}
    assert is_clean(store)


def test_s9_too_little_space_is_said_before_a_byte_is_fetched(
    store, hub, pull, environment, *, tmp_path, monkeypatch
):
    publish(hub, tmp_path / "model", seed=0)
    usage = shutil.disk_usage(tmp_path)._replace(free=DATA_BYTES - 1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        with pytest.raises(StoreError, match="needs about 3 MB of disk space"):
            pull()
    assert hub.bytes_sent == 0
    kill(store, "pull", REPO, at="take", environment=environment)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage)
        assert pull().is_dir(), "what a download left takes no more room"
