"""phirt.json: what phirt's own converters say about the folder that they wrote.

It is written last. A folder without it is either somebody else's or unfinished, so its
presence, with the sizes that it lists, is what makes a conversion complete.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from phirt.errors import ModelFormatError
from phirt.models.paths import plain_name_fault
from phirt.models.safe_json import JsonFields, read_json

__all__ = ["MANIFEST_NAME", "Manifest", "read_manifest", "write_manifest"]

MANIFEST_NAME = "phirt.json"

_FORMAT_VERSION = 1
_MAX_FILE_BYTES = 1 << 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a converter recorded.

    Attributes:
        weights_id: Identifies the weights: artifacts with one id hold the same.
        architecture: The decoder's architecture, such as ``"llama"``.
        precision: How the weights are stored, such as ``"int8"``.
        source: Where they came from: ``{"file": ..., "sha256": ...}`` and the like.
        versions: Versions of what wrote the folder, by package name.
        files: Size in bytes of every other file of the folder, by name.
    """

    weights_id: str
    architecture: str
    precision: str
    source: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, int] = field(default_factory=dict)

    def check_files(self, folder: Path) -> None:
        """Compare the files with the sizes that were recorded.

        Raises:
            ModelFormatError: A file is missing or has another size.
        """
        for name, size in self.files.items():
            try:
                found = (folder / name).stat().st_size
            except FileNotFoundError:
                raise ModelFormatError(
                    f"{folder} lacks the file {name} that its {MANIFEST_NAME} lists. "
                    "Remove the folder and install or convert the model again."
                ) from None
            if found != size:
                raise ModelFormatError(
                    f"{folder / name} has {found:,} bytes; {MANIFEST_NAME} says {size:,}. "
                    "Remove the folder and install or convert the model again."
                )


def write_manifest(
    folder: Path,
    *,
    weights_id: str,
    architecture: str,
    precision: str,
    source: Mapping[str, Any],
    versions: Mapping[str, str],
) -> Manifest:
    """Write phirt.json, listing the files that are in the folder now. Call it last.

    Args:
        folder: The artifact's folder, complete but for the manifest.
        weights_id: Identifies the weights, a digest of all that they depend on.
        architecture: The decoder's architecture.
        precision: How the weights are stored.
        source: Where the weights came from; JSON values only.
        versions: Versions of what wrote the folder, by package name.
    """
    manifest = Manifest(
        weights_id=weights_id,
        architecture=architecture,
        precision=precision,
        source=source,
        versions=versions,
        files={
            path.name: path.stat().st_size
            for path in sorted(folder.iterdir())
            if path.name != MANIFEST_NAME
        },
    )
    document = {"format_version": _FORMAT_VERSION, **asdict(manifest)}
    text = json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    (folder / MANIFEST_NAME).write_text(text, encoding="utf-8", newline="\n")
    return manifest


def read_manifest(folder: Path) -> Manifest | None:
    """Read phirt.json, or return None where the folder has none.

    Raises:
        ModelFormatError: It is damaged, or of a newer format than this phirt reads.
    """
    path = folder / MANIFEST_NAME
    if not path.exists():
        return None
    fields = JsonFields(read_json(path), source=str(path))
    version = fields.integer("format_version", minimum=1, maximum=1 << 31)
    if version > _FORMAT_VERSION:
        raise ModelFormatError(
            f"{path} is of format {version}; this phirt reads up to {_FORMAT_VERSION}. "
            "Upgrade phirt, or remove the folder and install the model again."
        )
    return Manifest(
        weights_id=fields.string("weights_id", max_length=200),
        architecture=fields.string("architecture", max_length=100),
        precision=fields.string("precision", max_length=100),
        source=fields.mapping("source"),
        versions=fields.mapping("versions"),
        files=_file_sizes(fields.mapping("files"), path),
    )


def _file_sizes(entries: Mapping[str, Any], path: Path) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name, size in entries.items():
        fault = plain_name_fault(name)
        if fault:
            raise ModelFormatError(f"{path} lists a file named {name[:80]!r}: {fault}.")
        if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < _MAX_FILE_BYTES:
            raise ModelFormatError(f"{path} gives the file {name} no valid size.")
        sizes[name] = size
    return sizes
