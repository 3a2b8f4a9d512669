"""Whether a model folder is still what was installed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from phirt.errors import ModelFormatError, UnsafeModelError
from phirt.models.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    record_file,
    save_manifest,
)
from phirt.models.templates import TEMPLATE_FILES, read_chat_template, template_id

__all__ = ["Fault", "accept_chat_template", "check_folder", "faults_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Something in the store that is not as it was installed.

    Attributes:
        key: The artifact's key, or the SHA-256 of a fetched file.
        path: The file, or the folder where it has no manifest.
        problem: What is wrong with it.
    """

    key: str
    path: Path
    problem: str

    def __str__(self) -> str:
        return f"{self.path} {self.problem}"


def check_folder(folder: Path, manifest: Manifest, *, sha256: Callable[[Path], str]) -> None:
    """Compare every file with its record: the size and time, and what differs by its hash.

    Args:
        folder: The model folder.
        manifest: Its manifest.
        sha256: Hashes a file. One that was touched is hashed at every check, so a function
            that remembers is wanted.

    Raises:
        ModelFormatError: A file is missing or has changed.
        UnsafeModelError: The chat template has changed since the installation (row M6).
    """
    for name, record in manifest.files.items():
        problem = _problem(folder / name, record, sha256=sha256, thorough=False)
        if problem is not None:
            if name in TEMPLATE_FILES:
                _check_template(folder, manifest)
            raise ModelFormatError(
                f"{folder / name} {problem} Install the model again with `phirt pull`, or "
                f"remove it with `phirt rm {folder.name}`."
            )
    if any(name not in manifest.files and (folder / name).exists() for name in TEMPLATE_FILES):
        _check_template(folder, manifest)


def faults_of(
    folder: Path, manifest: Manifest, *, sha256: Callable[[Path], str]
) -> Iterator[Fault]:
    """Everything in which a folder differs from what was installed; every file is hashed.

    A file whose content has changed and whose time has not is given a new time, by which
    `check_folder` notices it from then on.

    Args:
        folder: The model folder.
        manifest: Its manifest.
        sha256: Reads a file to its end and hashes it.
    """
    for name, record in manifest.files.items():
        problem = _problem(folder / name, record, sha256=sha256, thorough=True)
        if problem is not None:
            yield Fault(key=folder.name, path=folder / name, problem=problem)
    try:
        _check_template(folder, manifest)
    except ModelFormatError as error:
        yield Fault(key=folder.name, path=folder, problem=f"has no readable template: {error}")
    except UnsafeModelError as error:
        yield Fault(key=folder.name, path=folder, problem=f"is refused: {error}")


def accept_chat_template(folder: Path, manifest: Manifest) -> None:
    """Pin the chat template that the folder has now, and the files that it may be in.

    Args:
        folder: The model folder.
        manifest: Its manifest, which is written anew.

    Raises:
        ModelFormatError: The template cannot be read.
    """
    files = {name: record for name, record in manifest.files.items() if name not in TEMPLATE_FILES}
    for name in TEMPLATE_FILES:
        if (folder / name).exists():
            files[name] = record_file(folder / name)
    pin = template_id(read_chat_template(folder))
    save_manifest(folder, replace(manifest, files=files, chat_template=pin))


def _check_template(folder: Path, manifest: Manifest) -> None:
    if manifest.chat_template is None:  # installed before templates were pinned
        return
    found = template_id(read_chat_template(folder))
    if found != manifest.chat_template:
        place = next((name for name in TEMPLATE_FILES if (folder / name).exists()), "none")
        raise UnsafeModelError(
            f"The chat template of {folder.name} has changed since the model was installed: its "
            f"SHA-256 was {manifest.chat_template[:12]}, and is {found[:12]} (in {folder / place})."
            " A template decides what a model is told beside your words. Read it, and accept it "
            f"with `phirt verify --accept-template {folder.name}`, or install the model again."
        )


def _problem(
    path: Path, record: FileRecord, *, sha256: Callable[[Path], str], thorough: bool
) -> str | None:
    """What is wrong with a file, as the rest of a sentence that begins with its path."""
    try:
        status = path.stat()
        if status.st_size != record.size:
            return (
                f"is damaged: it has {status.st_size:,} bytes; {MANIFEST_NAME} says "
                f"{record.size:,}."
            )
        untouched = record.mtime_ns in {None, status.st_mtime_ns}
        if record.sha256 is None or (untouched and not thorough):
            return None
        found = sha256(path)
    except FileNotFoundError:
        return f"is missing; {MANIFEST_NAME} lists it."
    except OSError as error:
        return f"cannot be read: {error.strerror or error}."
    if found != record.sha256:
        if untouched:
            # A disk's fault leaves no trace in the time: now a load notices, and a pull repairs.
            with suppress(OSError):
                os.utime(path)
        return f"is damaged: its SHA-256 is {found}; {MANIFEST_NAME} says {record.sha256}."
    return None
