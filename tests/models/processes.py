"""Starts processes that install into a store, and kills them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from phirt.models.kill_points import VARIABLE
from phirt.models.store import Store

NEVER = 10**9
"""To be killed at: the points are counted, and none is the last."""

_REPOSITORY = Path(__file__).parents[2]
_PATIENCE_S = 120


def start(
    store: Store,
    *arguments: object,
    kill_at: int | str = 0,
    environment: Mapping[str, str] | None = None,
) -> subprocess.Popen[str]:
    """Start `tests.models.install_child` with a kind, what it takes, and where to kill it."""
    command = [sys.executable, "-m", "tests.models.install_child", store.root, *arguments]
    return subprocess.Popen(
        [str(argument) for argument in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=_REPOSITORY,
        env=os.environ | {VARIABLE: str(kill_at) if kill_at else ""} | dict(environment or {}),
    )


def finish(process: subprocess.Popen[str]) -> list[str]:
    """The lines that a process printed, which must have gone well."""
    output, errors = process.communicate(timeout=_PATIENCE_S)
    assert process.returncode == 0, errors
    return output.splitlines()


def kill(
    store: Store,
    *arguments: object,
    at: int | str,
    environment: Mapping[str, str] | None = None,
) -> None:
    """Run until the process has killed itself."""
    process = start(store, *arguments, kill_at=at, environment=environment)
    _, errors = process.communicate(timeout=_PATIENCE_S)
    # An exception ends with 1. What kills itself ends with a signal, or 15 on Windows.
    assert process.returncode not in {0, 1}, f"not killed at {at}: {errors}"


def points(
    folder: Path, *arguments: object, environment: Mapping[str, str] | None = None
) -> list[str]:
    """Names of the points that an undisturbed run in a new folder passes, in order."""
    place = folder / "undisturbed"
    place.mkdir()
    run = start(Store(place / "store"), *arguments, kill_at=NEVER, environment=environment)
    return finish(run)[-1].split()
