"""phirt.json: what is known of a model folder that phirt wrote, and of each of its files.

It is written last. A folder without it is either somebody else's or unfinished. A converter
lists its files and their sizes; the store, which installs the folder, adds hashes and times
(`seal_manifest`), so that a change can be noticed later.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from phirt.errors import ModelFormatError
from phirt.models.hashing import sha256_of
from phirt.models.kill_points import kill_point
from phirt.models.paths import plain_name_fault
from phirt.models.remembered import Remembered
from phirt.models.safe_json import MAX_JSON_BYTES, parse_versioned, read_bytes
from phirt.models.templates import read_chat_template, template_id

__all__ = [
    "MANIFEST_NAME",
    "FileRecord",
    "Manifest",
    "read_manifest",
    "record_file",
    "save_manifest",
    "seal_manifest",
    "write_manifest",
]

MANIFEST_NAME = "phirt.json"

# Format 1 gave each file's size and nothing else.
_FORMAT_VERSION = 2
_MAX_FILE_BYTES = 1 << 50
_MAX_TIME_NS = 1 << 63
_MAX_DEPTH = 8


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What is known of one file.

    Attributes:
        size: In bytes.
        sha256: Of its content, lower-case hex; None in a folder that is not installed.
        mtime_ns: Its time of modification when it was installed.
    """

    size: int
    sha256: str | None = None
    mtime_ns: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What is recorded of a model folder.

    Attributes:
        weights_id: Identifies the weights: artifacts with one id hold the same.
        architecture: The decoder's architecture, such as ``"llama"``.
        precision: How the weights are stored, such as ``"int8"``.
        source: Where they came from: ``{"name": ..., "id": "sha256:..."}`` of what was
            converted, ``{"repository": ..., "revision": ...}`` of what was fetched.
        versions: Versions of what wrote the folder, by package name.
        build: How it was made: ``{"engine": "phirt", ...}``; empty where nobody said.
        files: Every other file of the folder, by its path in it, with ``/``.
        name: What the user calls the model; None where nobody said.
        chat_template: `template_id` of the chat template at the time of the installation,
            which `check_folder` holds it to; None where it was not pinned.
    """

    weights_id: str
    architecture: str
    precision: str
    source: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    build: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, FileRecord] = field(default_factory=dict)
    name: str | None = None
    chat_template: str | None = None


def write_manifest(
    folder: Path,
    *,
    weights_id: str,
    architecture: str,
    precision: str,
    source: Mapping[str, Any],
    versions: Mapping[str, str],
    build: Mapping[str, Any] | None = None,
    sha256: Mapping[str, str] | None = None,
) -> Manifest:
    """Write phirt.json, listing the files that are in the folder now. Call it last.

    Args:
        folder: The artifact's folder, complete but for the manifest.
        weights_id: Identifies the weights, a digest of all that they depend on.
        architecture: The decoder's architecture.
        precision: How the weights are stored.
        source: Where the weights came from; JSON values only.
        versions: Versions of what wrote the folder, by package name.
        build: How it was made; JSON values only.
        sha256: Hashes of files whose content was checked as it was written, by path, so
            that installing them need not read them again.
    """
    known = sha256 or {}
    manifest = Manifest(
        weights_id=weights_id,
        architecture=architecture,
        precision=precision,
        source=source,
        versions=versions,
        build=build or {},
        files={
            name: FileRecord((folder / name).stat().st_size, known.get(name))
            for name in _names_in(folder)
        },
    )
    save_manifest(folder, manifest)
    return manifest


def seal_manifest(folder: Path, *, name: str | None = None) -> None:
    """Complete phirt.json with hash and time of every file, and the chat template's hash.

    Called when a folder is complete, before it is moved to its place. Does nothing where
    there is no phirt.json.

    Args:
        folder: The artifact's folder.
        name: What the user calls the model.

    Raises:
        ModelFormatError: phirt.json or the file of the chat template is damaged.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        return
    files = {}
    for path in _names_in(folder):
        kill_point("hash")
        known = manifest.files.get(path)
        files[path] = record_file(folder / path, sha256=known.sha256 if known else None)
    sealed = replace(
        manifest,
        files=files,
        name=name or manifest.name,
        chat_template=template_id(read_chat_template(folder)),
    )
    save_manifest(folder, sealed)


def record_file(path: Path, *, sha256: str | None = None) -> FileRecord:
    """What is to be recorded of a file.

    Args:
        path: The file.
        sha256: Its hash, where it is known already.
    """
    status = path.stat()
    return FileRecord(status.st_size, sha256 or sha256_of(path), status.st_mtime_ns)


def save_manifest(folder: Path, manifest: Manifest) -> None:
    """Write phirt.json as it is given; whoever reads meanwhile reads the old or the new."""
    document = {"format_version": _FORMAT_VERSION, **asdict(manifest)}
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    partial = folder / f"{MANIFEST_NAME}.partial"
    with partial.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    kill_point("manifest")
    partial.replace(folder / MANIFEST_NAME)


def read_manifest(folder: Path) -> Manifest | None:
    """Read phirt.json, or return None where the folder has none.

    Raises:
        ModelFormatError: It is damaged, or of a newer format than this phirt reads.
    """
    path = folder / MANIFEST_NAME
    if not path.exists():
        return None
    data = read_bytes(path, max_bytes=MAX_JSON_BYTES)
    known = _KNOWN.of(data, lambda: _parse(data, path))
    # What is kept stays as it is, whatever a caller does to what it is given.
    return replace(
        known,
        source=dict(known.source),
        versions=dict(known.versions),
        build=dict(known.build),
        files=dict(known.files),
    )


_KNOWN: Remembered[Manifest] = Remembered()


def _parse(data: bytes, path: Path) -> Manifest:
    fields = parse_versioned(data, path, newest=_FORMAT_VERSION)
    version = fields.integer("format_version", minimum=1, maximum=_FORMAT_VERSION)
    return Manifest(
        weights_id=fields.string("weights_id", max_length=200),
        architecture=fields.string("architecture", max_length=100),
        precision=fields.string("precision", max_length=100),
        source=fields.mapping("source"),
        versions=fields.mapping("versions"),
        build=fields.mapping("build"),
        files={
            name: _file_record(name, entry, path, version=version)
            for name, entry in fields.mapping("files").items()
        },
        name=fields.optional_string("name", max_length=1000),
        chat_template=fields.optional_string("chat_template", max_length=64),
    )


def _names_in(folder: Path) -> list[str]:
    """Every file of the folder but phirt.json, by its path in it."""
    files = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in files if name != MANIFEST_NAME)


def _file_record(name: str, entry: Any, path: Path, *, version: int) -> FileRecord:
    parts = name.split("/")
    fault = next(filter(None, map(plain_name_fault, parts)), None)
    if fault or len(parts) > _MAX_DEPTH:
        raise ModelFormatError(
            f"{path} lists a file named {name[:80]!r}: {fault or 'it is too deep'}."
        )
    values: Mapping[str, Any] = {"size": entry}
    if version > 1 and isinstance(entry, dict):
        values = entry
    size: Any = values.get("size")
    sha256, mtime_ns = values.get("sha256"), values.get("mtime_ns")
    if not _is_count(size, _MAX_FILE_BYTES):
        raise ModelFormatError(f"{path} gives the file {name} no valid size.")
    if sha256 is not None and not (isinstance(sha256, str) and len(sha256) == 64):
        raise ModelFormatError(f"{path} gives the file {name} no valid SHA-256.")
    if mtime_ns is not None and not _is_count(mtime_ns, _MAX_TIME_NS):
        raise ModelFormatError(f"{path} gives the file {name} no valid time of modification.")
    return FileRecord(size, sha256, mtime_ns)


def _is_count(value: Any, limit: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < limit
