"""What lies in the store, when it was last used, and whether it is sound."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from phirt.errors import ModelError, StoreError
from phirt.models.hashing import sha256_of
from phirt.models.integrity import Fault, faults_of
from phirt.models.layouts import held_formats
from phirt.models.manifest import MANIFEST_NAME, Manifest, read_manifest
from phirt.models.paths import plain_name_fault
from phirt.types import ProgressCallback

__all__ = [
    "COPY_RECORD",
    "SOURCE_RECORD",
    "InstalledModel",
    "faults_of_model",
    "faults_of_models",
    "faults_of_sources",
    "installed_models",
    "is_key",
    "manifests",
    "mark_used",
]

SOURCE_RECORD = "source.json"
"""Beside a fetched file: its name, size and time."""

COPY_RECORD = "phirt-copy.json"
"""In a copy of somebody's model folder: its files and their sizes."""

# Lower case only: on Windows and macOS "A" and "a" are one folder.
_KEY = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class InstalledModel:
    """An artifact in the store.

    Attributes:
        key: Its name in the store, by which it is verified and removed.
        name: What the user calls the model.
        path: Its folder.
        format: Its layout (`phirt.types.Artifact.format`), or None where it holds none.
        precision: How its weights are stored.
        bytes: Size of its files.
        source: The repository it was fetched from, or the file that it was converted from.
        revision: The commit of the repository, where it came from one.
        last_used: When it was last loaded or installed, where that was recorded.
        manifest: All that is recorded of it.
    """

    key: str
    name: str
    path: Path
    format: str | None
    precision: str
    bytes: int
    source: str | None
    revision: str | None
    last_used: datetime | None
    manifest: Manifest


def is_key(name: str) -> bool:
    """Whether the store may call an artifact so. Another folder is not the store's."""
    return bool(_KEY.fullmatch(name)) and plain_name_fault(name) is None


def installed_models(root: Path) -> list[InstalledModel]:
    """The artifacts of a store whose manifest can be read, by key."""
    return [_describe(root, path, manifest) for path, manifest in manifests(root)]


def manifests(root: Path) -> Iterator[tuple[Path, Manifest]]:
    """Folder and manifest of every artifact whose manifest can be read."""
    for path in _artifacts(root):
        with suppress(ModelError, OSError):
            manifest = read_manifest(path)
            if manifest is not None:
                yield path, manifest


def mark_used(root: Path, key: str) -> None:
    """Remember that an artifact is used now. A store that cannot be written forgets."""
    marker = root / "used" / key
    with suppress(OSError):
        try:
            os.utime(marker)
        except FileNotFoundError:
            marker.parent.mkdir(exist_ok=True)
            marker.touch()


def faults_of_models(root: Path, progress: ProgressCallback | None = None) -> list[Fault]:
    """What is wrong with the artifacts of a store; every file is hashed."""
    return [fault for path in _artifacts(root) for fault in faults_of_model(path, progress)]


def faults_of_model(path: Path, progress: ProgressCallback | None = None) -> list[Fault]:
    """What is wrong with one artifact; every file is hashed."""
    try:
        manifest = read_manifest(path)
        if manifest is None:
            return [Fault(key=path.name, path=path, problem=f"has no {MANIFEST_NAME}.")]
        return list(faults_of(path, manifest, sha256=partial(sha256_of, progress=progress)))
    except (ModelError, OSError) as error:
        return [Fault(key=path.name, path=path, problem=f"cannot be read: {error}")]


def faults_of_sources(root: Path, progress: ProgressCallback | None = None) -> list[Fault]:
    """Fetched files whose content is not what their folder is named for.

    They are given a new time, as in `faults_of`.
    """
    faults = []
    for folder in _folders(root / "sources"):
        if not _SHA256.fullmatch(folder.name):
            continue
        for file in folder.iterdir():
            if file.name == SOURCE_RECORD or file.name.startswith("."):
                continue
            try:
                if sha256_of(file, progress=progress) == folder.name:
                    continue
                problem = f"is damaged: its SHA-256 is not {folder.name}."
                with suppress(OSError):  # so that it is hashed, and fetched again, when wanted
                    os.utime(file)
            except FileNotFoundError:  # removed a moment ago
                continue
            except OSError as error:
                problem = f"cannot be read: {error.strerror or error}."
            faults.append(Fault(key=folder.name, path=file, problem=problem))
    return faults


def _describe(root: Path, path: Path, manifest: Manifest) -> InstalledModel:
    source = {key: value for key, value in manifest.source.items() if isinstance(value, str)}
    formats: tuple[str, ...] = ()
    with suppress(ModelError, OSError):
        formats = held_formats(path)
    return InstalledModel(
        key=path.name,
        name=manifest.name or source.get("name") or path.name,
        path=path,
        format=formats[0] if formats else None,
        precision=manifest.precision,
        bytes=sum(record.size for record in manifest.files.values()),
        source=source.get("repository") or source.get("name"),
        revision=source.get("revision"),
        last_used=_last_used(root, path.name),
        manifest=manifest,
    )


def _last_used(root: Path, key: str) -> datetime | None:
    try:
        return datetime.fromtimestamp((root / "used" / key).stat().st_mtime, tz=UTC)
    except OSError:
        return None


def _artifacts(root: Path) -> list[Path]:
    return [path for path in _folders(root / "models") if is_key(path.name)]


def _folders(parent: Path) -> list[Path]:
    try:
        # Finder leaves a file .DS_Store wherever somebody looks.
        return sorted(entry for entry in parent.iterdir() if entry.is_dir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StoreError(
            f"The store cannot be read: {error}. Set PHIRT_HOME to a folder of your own."
        ) from error
