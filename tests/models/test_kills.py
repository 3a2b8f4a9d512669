"""Rows S4 and S8: processes that are killed at every step, and processes side by side."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from phirt.errors import ModelNotFoundError
from phirt.models.folder import read_folder
from phirt.models.store import Store
from tests.models.install_child import RUNS
from tests.models.processes import NEVER, finish, kill, points, start
from tests.models.store_content import KEY, fill, leftovers


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


# Row S4: kill -9.


def test_a_run_passes_every_kind_of_point(tmp_path):
    passed = points(tmp_path, "plain")
    assert set(passed) == {"fill", "part", "manifest", "hash", "sync", "publish", "published"}
    assert passed.index("hash") < passed.index("sync") < passed.index("publish")


@pytest.mark.parametrize(
    "point", ["fill", "part", "manifest", "hash", "sync", "publish", "published"]
)
def test_s4_killed_at_a_point_of_an_install(store, point):
    kill(store, "plain", at=point)
    assert (store.find(KEY) is not None) == (point == "published")
    assert len(leftovers(store)) == 1
    finish(start(store, "plain"))
    assert store.verify() == []
    store.collect(converter_version=1)
    assert leftovers(store) == []
    assert list((store.root / "locks").iterdir()) == []


def test_s4_killed_while_a_damaged_model_is_replaced(store):
    path = store.install(KEY, fill)
    for point in ("publish", "replace"):
        (path / "model.onnx.data").write_bytes(b"damaged")
        kill(store, "plain", at=point)
        assert (path / "model.onnx.data").read_bytes() == b"damaged", "whole, or not there"
    finish(start(store, "plain"))
    assert store.verify() == []


def test_s4_killed_between_a_damaged_model_and_its_replacement(store):
    path = store.install(KEY, fill)
    (path / "model.onnx.data").write_bytes(b"damaged")
    passed = finish(start(store, "plain", kill_at=NEVER))[-1].split()
    # The second attempt to publish comes after the damaged model is out of the way.
    (path / "model.onnx.data").write_bytes(b"damaged")
    (last,) = [number for number, name in enumerate(passed, 1) if name == "publish"][1:]
    kill(store, "plain", at=last)
    assert store.find(KEY) is None
    assert not path.exists()
    finish(start(store, "plain"))
    assert store.verify() == []


@pytest.mark.parametrize("point", ["discard", "discarded"])
def test_s4_killed_while_a_model_is_removed(store, point):
    store.install(KEY, fill)
    kill(store, "remove", at=point)
    assert (store.find(KEY) is not None) == (point == "discard")
    assert store.verify() == []
    try:
        store.remove(KEY)
    except ModelNotFoundError:
        assert point == "discarded"
    store.collect(converter_version=1)
    assert leftovers(store) == []


def test_s4_killed_at_seeded_points_of_a_conversion(store, tmp_path, tiny_gguf):
    passed = points(tmp_path, "convert", tiny_gguf)
    chosen = np.random.default_rng(4).choice(len(passed), size=10, replace=False)
    for number in map(int, chosen + 1):
        kill(store, "convert", tiny_gguf, at=number)
        found = store.find(KEY)
        if found is not None:
            assert passed[number - 1] == "published"
            assert store.verify() == []
            store.remove(KEY)
    (folder, _) = finish(start(store, "convert", tiny_gguf, kill_at=NEVER))
    assert read_folder(Path(folder)).artifact.precision == "int8"
    assert store.verify() == []
    store.collect(converter_version=1)
    assert leftovers(store) == []


def test_the_work_of_a_live_process_is_not_swept(store):
    def sweep_and_fill(folder: Path) -> None:
        finish(start(Store(store.root), "plain", "--no-locks"))
        assert len(leftovers(store)) == 1
        fill(folder)

    store.install("another", sweep_and_fill)
    assert {model.key for model in store.installed()} == {KEY, "another"}


# Row S8: eight processes.


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no locks"])
def test_s8_eight_processes_install_the_same_model(store, tmp_path, locks):
    arguments = ["plain"] if locks else ["plain", "--no-locks"]
    processes = [start(store, *arguments) for _ in range(8)]
    assert {finish(process)[0] for process in processes} == {str(store.root / "models" / KEY)}
    assert store.find(KEY)
    assert store.verify() == []
    runs = (tmp_path / RUNS).read_text().count("run")
    assert runs == 1 if locks else 1 <= runs <= 8
    assert leftovers(store) == []
    store.collect(converter_version=1)
    names = sorted(path.name for path in (store.root / "models").iterdir())
    assert names == [KEY]
    assert list((store.root / "locks").iterdir()) == []


def test_s8_eight_processes_of_which_half_are_killed(store):
    doomed = [start(store, "plain", "--no-locks", kill_at=number) for number in (1, 3, 9, 12)]
    others = [start(store, "plain", "--no-locks") for _ in range(4)]
    for process in doomed:
        process.communicate(timeout=120)
    for process in others:
        finish(process)
    assert store.verify() == []
    assert store.find(KEY)
    store.collect(converter_version=1)
    assert leftovers(store) == []
