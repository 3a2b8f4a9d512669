"""The answers of the runtimes on disk, one file for one state of the machine."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from phirt.devices.machine import SCHEMA, BackendRecord, Trial
from phirt.devices.record_json import from_json, to_json
from phirt.dispatch.machine_dir import parsed_record, update_record
from phirt.models.remembered import Remembered
from phirt.models.staging import locked

__all__ = ["SurveyCache", "forget_surveys", "with_trial"]

_PREFIX = "survey-"
# Environments that are in use at once have a file each; those of others are in nobody's way
# until there are many.
_MOST_FILES = 16


class SurveyCache:
    """The file of one state of a machine. A damaged one is none, and a lost one costs time.

    Args:
        folder: Where it lies.
        fingerprint: Names the state.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._path = folder / f"{_PREFIX}{fingerprint}.json"

    def read(self) -> dict[str, BackendRecord]:
        """What is known, by the backend's name."""
        known = parsed_record(self._path, _KNOWN, _records_of)
        return dict(known)

    def save(self, record: BackendRecord) -> None:
        """Keep what a backend listed."""
        self._change(lambda known: known | {record.backend: record})
        _drop_oldest(self._path.parent)

    def add_trial(self, backend: str, trial: Trial) -> None:
        """Keep a trial, of a backend whose list is known."""

        def change(known: dict[str, BackendRecord]) -> dict[str, BackendRecord]:
            if backend in known:
                known[backend] = with_trial(known[backend], trial)
            return known

        self._change(change)

    @contextmanager
    def held(self, backend: str) -> Iterator[None]:
        """Keep others from asking the same backend meanwhile, where the file system has locks."""
        name = re.sub(r"[^a-z0-9]", "-", backend.lower())
        with ExitStack() as stack:
            with suppress(OSError):  # where nothing can be written, nothing is kept either
                stack.enter_context(locked(self._path.with_suffix(f".{name}.lock")))
            yield

    def _change(
        self, change: Callable[[dict[str, BackendRecord]], Mapping[str, BackendRecord]]
    ) -> None:
        def rewrite(document: dict[str, Any] | None) -> dict[str, Any]:
            known = change(_records_of(document))
            return {"schema": SCHEMA, "backends": [to_json(record) for record in known.values()]}

        update_record(self._path, rewrite)


def with_trial(record: BackendRecord, trial: Trial) -> BackendRecord:
    """The record with one more trial, in place of one of the same device."""
    others = [each for each in record.trials if each.device != trial.device]
    return replace(record, trials=(*others, trial))


def forget_surveys(folder: Path) -> None:
    """Remove the files of all states."""
    for path in folder.glob(f"{_PREFIX}*"):
        with suppress(OSError):
            path.unlink()


_KNOWN: Remembered[dict[str, BackendRecord]] = Remembered()


def _records_of(document: dict[str, Any] | None) -> dict[str, BackendRecord]:
    try:
        if document is None or document["schema"] != SCHEMA:
            return {}
        records = [from_json(BackendRecord, each, where="survey") for each in document["backends"]]
    except (KeyError, TypeError, ValueError):
        return {}  # as a damaged file is
    return {record.backend: record for record in records}


def _drop_oldest(folder: Path) -> None:
    with suppress(OSError):
        files = sorted(folder.glob(f"{_PREFIX}*.json"), key=lambda path: path.stat().st_mtime)
        for file in files[:-_MOST_FILES]:
            for path in folder.glob(f"{file.stem}.*"):  # its locks, too
                path.unlink()
