"""Row S4 for `phirt.build_model`: killed at every step, and two at once into one place."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from phirt.building import build_model
from phirt.models.hashing import sha256_of
from phirt.models.kill_points import VARIABLE
from phirt.models.manifest import read_manifest
from phirt.testing import write_tiny_checkpoint
from tests.installed import require
from tests.models.processes import NEVER, finish

require("onnx")

_REPOSITORY = Path(__file__).parents[2]
_PATIENCE_S = 120

POINTS = ("fill", "tensor", "manifest", "hash", "sync", "publish", "published")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_checkpoint(tmp_path_factory.mktemp("source") / "tiny", "llama")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """An empty folder, for what is built and what is left of it."""
    folder = tmp_path / "place"
    folder.mkdir()
    return folder


def start(
    source: Path, out: Path, *flags: str, kill_at: int | str = NEVER
) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.models.build_child", str(source), str(out), *flags]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=_REPOSITORY,
        env=os.environ | {VARIABLE: str(kill_at)},
    )


def kill(source: Path, out: Path, *flags: str, at: int | str) -> None:
    """Build until the process has killed itself."""
    process = start(source, out, *flags, kill_at=at)
    _, errors = process.communicate(timeout=_PATIENCE_S)
    # An exception ends with 1. What kills itself ends with a signal, or 15 on Windows.
    assert process.returncode not in {0, 1}, f"not killed at {at}: {errors}"


def precision_of(out: Path) -> str | None:
    """How the model at a place is stored, which is whole; None where nothing is there."""
    if not out.exists():
        return None
    manifest = read_manifest(out)
    assert manifest is not None, "half a model"
    assert {path.name for path in out.iterdir()} == {*manifest.files, "phirt.json"}
    for name, record in manifest.files.items():
        assert record.sha256 == sha256_of(out / name), f"{name} is not what it was"
    return manifest.precision


def others(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir() if path.name != "out")


@pytest.fixture(scope="module")
def passed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The points of a build that nobody disturbs, in order."""
    return finish(start(source, tmp_path_factory.mktemp("undisturbed") / "out"))[-1].split()


def test_a_build_passes_every_kind_of_point(passed):
    assert set(passed) == set(POINTS)
    firsts = [passed.index(point) for point in POINTS]
    assert firsts == sorted(firsts)
    assert passed.count("tensor") > 20


@pytest.mark.slow  # a process for each point, and one to build after it
@pytest.mark.parametrize("point", POINTS)
def test_s4_killed_at_a_point_of_a_build(source, place, point):
    out = place / "out"
    kill(source, out, at=point)
    assert precision_of(out) == ("int8" if point == "published" else None)
    assert len(others(place)) == 1
    finish(start(source, out, "--overwrite"))
    assert precision_of(out) == "int8"
    assert others(place) == []


@pytest.mark.slow
@pytest.mark.parametrize("point", [*POINTS, "replace"])
def test_s4_killed_while_another_model_is_replaced(source, place, point):
    out = place / "out"
    build_model(source, out, precision="int8")
    kill(source, out, "--overwrite", "--int4", at=point)
    assert precision_of(out) == ("int4" if point == "published" else "int8")
    assert len(others(place)) == 1
    finish(start(source, out, "--overwrite", "--int4"))
    assert precision_of(out) == "int4"
    assert others(place) == []


@pytest.mark.slow
def test_s4_killed_between_the_old_model_and_the_new(source, place):
    out = place / "out"
    build_model(source, out, precision="int8")
    passed = finish(start(source, out, "--overwrite", "--int4"))[-1].split()
    # The second attempt to publish comes after the old model is out of the way.
    (last,) = [number for number, name in enumerate(passed, 1) if name == "publish"][1:]
    kill(source, out, "--overwrite", "--int4", at=last)
    assert precision_of(out) is None
    finish(start(source, out, "--int4"))
    assert precision_of(out) == "int4"
    assert others(place) == []


@pytest.mark.slow
def test_s4_killed_at_points_all_over_a_build(source, place, passed):
    out = place / "out"
    for number in range(1, len(passed), len(passed) // 8):
        kill(source, out, at=number)
        assert precision_of(out) is None
        assert len(others(place)) == 1, "what those before have left is gone"
    finish(start(source, out))
    assert precision_of(out) == "int8"
    assert others(place) == []


def test_parents_that_a_kill_left_are_used(source, place):
    out = place / "a" / "b" / "out"
    kill(source, out, at="sync")
    finish(start(source, out))
    assert precision_of(out) == "int8"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_only_what_a_build_has_left_is_swept(source, place):
    kept = [".out.phirt-build@0123456789ab.1.01234567", ".out.phirt-build", ".phirt-x", "notes"]
    for name in kept:
        (place / name).mkdir()
    build_model(source, place / "out")
    # The first is of another machine, of which nothing is known.
    assert others(place) == sorted(kept)


@pytest.mark.parametrize("flags", [(), ("--overwrite",)], ids=["", "overwrite"])
def test_two_builds_into_one_place(source, place, flags):
    out = place / "out"
    processes = [start(source, out, *flags) for _ in range(2)]
    said = [finish(process)[-1] for process in processes]
    lost = [line for line in said if "published" not in line]
    if flags:
        assert lost == []
    else:
        assert len(lost) <= 1
        assert all("is a model already. Name another folder" in line for line in lost)
    assert precision_of(out) == "int8"
    assert others(place) == []


@pytest.mark.slow
def test_the_work_of_a_live_process_is_not_swept(source, place):
    done: list[list[str]] = []

    def build_another(progress: object) -> None:
        if not done:
            done.append(finish(start(source, place / "another")))
            assert len(others(place)) == 2

    build_model(source, place / "out", progress=build_another)
    assert precision_of(place / "out") == precision_of(place / "another") == "int8"
    assert others(place) == ["another"]
