"""Rows S4 and S8 over a pull: from the first byte of a download to the installed model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from phirt.models.folder import read_folder
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
